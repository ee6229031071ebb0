"""The validator's view of the swarm: its epoch, its peers, and copies of its state.

An observer is only a client of the DHT: it stores nothing, joins no group, and serves nobody.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from hiveminer.config.run import Run
from hiveminer.strategies.base import Context, GlobalState, Observer, local_step
from hiveminer.strategies.hivemind.averager import SwarmAverager
from hiveminer.strategies.hivemind.bounds import Bounds
from hiveminer.strategies.hivemind.records import Shapes
from hiveminer.strategies.hivemind.tracker import SampleTracker
from hiveminer.swarm.membership import Membership
from hiveminer.swarm.peer import Peer
from hiveminer.swarm.processes import require_shared_memory
from hiveminer.training.optimizer import build_optimizer, build_scheduler, parameter_groups
from hiveminer.training.trainer import Step


class HivemindObserver(Observer):
    """Downloads the swarm's state into a model. Construct it in the main thread: it forks a
    process."""

    def __init__(
        self,
        model: nn.Module,
        *,
        membership: Membership,
        run: Run,
        run_id: str,
        commit: Callable[[bytes], None],
    ):
        require_shared_memory(sum(each.numel() for each in model.parameters()))
        self.model = model
        self.run = run
        self.membership = membership
        self._commit, self._run_id = commit, run_id
        self._closed = False
        peer = membership.peer
        peer.dht.add_validators([Shapes(run_id)])
        self._tracker = SampleTracker(
            dht=peer.dht,
            prefix=run_id,
            target_batch_size=run.swarm.epoch_samples,
            private_key=peer.identity.private_key,
            start=True,
        )
        self._averager = SwarmAverager(
            dht=peer.dht,
            run_id=run_id,
            params=parameter_groups(model.parameters(), weight_decay=run.optimizer.weight_decay),
            optimizer=lambda groups: build_optimizer(groups, run.optimizer),
            scheduler=lambda optimizer: build_scheduler(optimizer, run.optimizer),
            bounds=Bounds.of(run),
            start=True,
        )
        membership.children.watch("the averager's process", int(self._averager.pid))
        membership.children.watch_thread("the progress tracker", self._tracker)

    @property
    def epoch(self) -> int:
        """The swarm's epoch, at most a second old."""
        return int(self._tracker.global_epoch)

    @property
    def peers(self) -> int:
        return int(self._tracker.global_progress.num_peers)

    def initial_state(self) -> GlobalState:
        """The state before anything was downloaded."""
        return self._copy()

    def fetch(self, *, timeout_seconds: float = 30.0) -> GlobalState | None:
        self._averager.load_state_from_peers(timeout=timeout_seconds)
        if not self._averager.loaded:
            return None
        return self._copy(self.membership.peer.hotkey_of(self._averager.donor()))

    def local_step(self, model: nn.Module, state: GlobalState) -> Step:
        return local_step(model, state, section=self.run.optimizer)

    def declare(self) -> None:
        self._commit(f"run {self._run_id}".encode())

    def sync(self, *, working: int) -> None:
        if self.membership.sync() is not None:
            self.membership.discovery.compare(working=working, reporting=self.peers)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._tracker.stop()
        self._averager.shutdown()
        self.membership.close()

    def _copy(self, donor: str | None = None) -> GlobalState:
        named = self.model.named_parameters()
        weights = {name: value.detach().clone() for name, value in named}
        return GlobalState(
            epoch=int(self._averager.local_epoch),
            weights=weights,
            optimizer=copy.deepcopy(self._averager.optimizer.state_dict()),
            donor=donor,
        )


def open_hivemind_observer(context: Context) -> Observer:
    """Start a peer that nobody can call, and the observer on it. Raises OperatorError."""
    host, task = context.host, context.task
    run_id = str(task.run_id)
    peer = Peer(
        ip=host.settings.dht_ip,
        client_only=True,
        identity=host.identity(run_id),
        admitted=host.registered,
    )
    membership = Membership(peer, registered=lambda: host.registered, addresses=host.peer_addresses)
    try:
        host.go_on()
        return HivemindObserver(
            task.model,
            membership=membership,
            run=task.run,
            run_id=run_id,
            commit=host.keep_committed,
        )
    except BaseException:
        membership.close()
        raise
