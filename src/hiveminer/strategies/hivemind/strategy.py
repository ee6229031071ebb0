"""The strategy `hivemind`: local steps, and all peers' weights averaged at the end of an epoch.

Each step updates this machine's weights with AdamW; once all peers together have trained
`epoch_samples` rows, the epoch ends and they average their weights. The changes to the stock
optimizer are in `averager.py` and `tracker.py`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from hivemind.averaging.control import AveragingStage
from hivemind.compression import Float16Compression, NoCompression
from torch import Tensor, nn

from hiveminer.config.run import Run
from hiveminer.runtime.events import tell
from hiveminer.strategies.base import Context, RoundResult, Strategy, between_steps
from hiveminer.strategies.hivemind import state
from hiveminer.strategies.hivemind.bounds import Bounds
from hiveminer.strategies.hivemind.failure_detector import PING_SECONDS, FailureDetector
from hiveminer.strategies.hivemind.optimizer import SwarmOptimizer
from hiveminer.swarm.admission import SHUN_SECONDS
from hiveminer.swarm.membership import Membership, announced_ip, start_peer
from hiveminer.swarm.processes import require_shared_memory
from hiveminer.training.optimizer import build_optimizer, build_scheduler, parameter_groups

logger = logging.getLogger(__name__)

LOAD_SECONDS = 60.0
LOAD_BYTES = 1_250_000.0
"""Loading a state is abandoned after LOAD_SECONDS, and a second more for each LOAD_BYTES."""

RECENT_SECONDS = 30.0
"""A peer that trained this recently compares who answers with who reports: all have work then."""


class HivemindStrategy(Strategy):
    """A model that trains with a swarm. Construct it in the main thread, after the DHT and before
    any server: it forks a process."""

    def __init__(
        self,
        model: nn.Module,
        *,
        membership: Membership,
        run: Run,
        run_id: str,
        on_round: Callable[[RoundResult], None] = lambda _: None,
    ):
        require_shared_memory(sum(each.numel() for each in model.parameters()))
        self.model = model
        self.membership = membership
        self.on_round = on_round
        peer = membership.peer
        section = run.swarm
        self.optimizer = SwarmOptimizer(
            dht=peer.dht,
            run_id=run_id,
            params=parameter_groups(model.parameters(), weight_decay=run.optimizer.weight_decay),
            optimizer=lambda groups: build_optimizer(groups, run.optimizer),
            scheduler=lambda optimizer: build_scheduler(optimizer, run.optimizer),
            target_batch_size=section.epoch_samples,
            use_local_updates=True,
            # With local updates the next step waits for the round anyway.
            delay_state_averaging=False,
            matchmaking_time=section.matchmaking_seconds,
            averaging_timeout=section.averaging_timeout_seconds,
            state_averaging_compression=(
                Float16Compression() if section.compression == "float16" else NoCompression()
            ),
            averager_opts={
                "request_timeout": min(1.5, section.matchmaking_seconds / 2),
                "bounds": Bounds.of(run),
            },
            tracker_opts={"private_key": peer.identity.private_key},
        )
        size = self.optimizer.state_averager.state_bytes
        self.optimizer.load_state_timeout = LOAD_SECONDS + size / LOAD_BYTES
        self._target = 2
        self.optimizer.state_averager.set_target_group_size(self._target)
        self._trained_in: int | None = None
        self._deserted = False
        self._lock = threading.Lock()
        self._detector = FailureDetector(
            peer=peer,
            tracker=self.optimizer.tracker,
            is_running=self._is_rounding,
            group=self.optimizer.state_averager.group,
            on_lost=self._leave_out,
            on_deserted=self._stop_searching,
        )
        self._zeroed_at = 0.0
        self._stepped_at = -RECENT_SECONDS
        self._closed = False
        membership.children.watch("the averager's process", int(self.optimizer.state_averager.pid))
        membership.children.watch_thread("the failure detector", self._detector.thread)
        membership.children.watch_thread("the progress tracker", self.optimizer.tracker)
        for thread in self.optimizer.state_averager.threads:
            membership.children.watch_thread("the state that peers download", thread)

    @property
    def epoch(self) -> int:
        return int(self.optimizer.local_epoch)

    @property
    def peers(self) -> int:
        return max(1, int(self.optimizer.tracker.global_progress.num_peers))

    def step(self, *, batch_size: int) -> bool:
        """False when this peer had fallen behind, and has loaded the swarm's state instead."""
        with self._lock:
            self._trained_in = self.epoch
            seconds = time.monotonic() - self._zeroed_at
            self.optimizer.state_averager.set_step_seconds(seconds)
            try:
                return self._step(batch_size)
            finally:
                self._stepped_at = time.monotonic()

    def zero_grad(self) -> None:
        self._zeroed_at = time.monotonic()
        self.optimizer.zero_grad(set_to_none=True)

    def idle(self) -> None:
        """Join a round that is due, while the others still wait for this peer: in the epoch that
        it last trained in, and the next, for which it reports rows."""
        if self._trained_in is None or self.epoch > self._trained_in + 1:
            return
        with self._lock:
            self.zero_grad()
            self._step(0)

    def catch_up(self) -> bool:
        with self._lock:
            if self.optimizer.tracker.global_epoch <= self.epoch:
                return True
            self.optimizer.load_state_from_peers()
            return bool(self.optimizer.state_averager.loaded)

    def recover(self) -> bool:
        with self._lock:
            averager = self.optimizer.state_averager
            if averager.is_sound():
                return True
            averager.rollback()
            self.zero_grad()
            if self.peers > 1:
                self.optimizer.load_state_from_peers()
            return False

    def state_dict(
        self, *, timeout_seconds: float = 60.0
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        with between_steps(self._lock, timeout_seconds=timeout_seconds):
            return state.state_dict(self.optimizer)

    def load_state_dict(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        with self._lock:
            state.load_state_dict(self.optimizer, tensors, metadata)
            if metadata["rows"]:  # they are reported again, so the others count on this peer
                self._trained_in = self.epoch

    def move_to(self, device: torch.device) -> None:
        self.model.to(device)
        for values in self.optimizer.opt.state.values():
            for key, value in values.items():
                if isinstance(value, Tensor):  # the step count too: the optimizer is fused
                    values[key] = value.to(device)

    def join(self) -> None:
        self.membership.join()
        self.catch_up()

    def sync(self) -> None:
        result = self.membership.sync()
        # Only a peer with work has to report; when this one has some, so do the others.
        if result is not None and time.monotonic() - self._stepped_at < RECENT_SECONDS:
            self.membership.discovery.compare(
                working=len(result.answered), reporting=self.peers - 1
            )

    def interrupt(self) -> None:
        for control in (self.optimizer.scheduled_state, self.optimizer.state_averager.last_control):
            if control is not None and not control.done():
                control.cancel()

    def close(self) -> None:
        """Tell the peers, and stop the processes."""
        if self._closed:
            return
        self._closed = True
        self._detector.close()
        try:
            self.optimizer.shutdown()
        except Exception as error:  # noqa: BLE001 - a dead process must not keep the rest up
            logger.warning("the swarm's optimizer did not shut down cleanly: %r", error)
        self.membership.close()

    def _step(self, batch_size: int) -> bool:
        self._follow_live_peers()
        rows = self.optimizer.local_progress.samples_accumulated + batch_size
        self.optimizer.state_averager.set_weight(float(rows), self.optimizer.scheduled_state)
        epoch, reloads = self.epoch, self.optimizer.reloads
        began = time.monotonic()
        self._deserted = False
        with self._detector.during():
            self.optimizer.step(batch_size=batch_size)
        if self._deserted:
            self.optimizer.load_state_from_peers()
        kept = self.optimizer.reloads == reloads
        if not kept:
            loaded = self.optimizer.state_averager.loaded
            outcome = "was loaded" if loaded else "could not be had"
            cause = f"this peer fell behind the swarm: {batch_size} rows were discarded"
            tell(logger, "catch_up", f"{cause}, and the swarm's state {outcome}")
        elif self.epoch != epoch:
            self._take_what_was_lost()
            self._tell_round(time.monotonic() - began)
        return kept

    def _take_what_was_lost(self) -> None:
        """Load a lost part of the average from the others, as the epoch's start, unless a member
        has died: then nobody has it."""
        averager = self.optimizer.state_averager
        if averager.is_whole:
            return
        peer = self.membership.peer
        others = averager.members - {peer.peer_id}
        if peer.answering(others, timeout_seconds=PING_SECONDS) != others:
            return
        tell(logger, "diverged", f"epoch {self.epoch}: a part of the average was lost on the way")
        self.optimizer.load_state_from_peers()

    def _follow_live_peers(self) -> None:
        """Update the size of a complete group: all live peers of our epoch that are not shunned.
        Called before each step, and by the failure detector's thread during one."""
        for peer in self.optimizer.state_averager.shunned():
            self.optimizer.tracker.leave_out(peer, seconds=SHUN_SECONDS)
        target = max(2, 1 + len(self.optimizer.tracker.companions))
        if target != self._target:
            self.optimizer.state_averager.set_target_group_size(target)
            self._target = target

    def _leave_out(self, lost: set[str]) -> None:
        """Called by the failure detector. The averager readmits whoever joins a group, so it gets
        the complete set each time."""
        self.optimizer.state_averager.leave_out(lost)
        self._follow_live_peers()

    def _is_rounding(self) -> bool:
        control = self.optimizer.state_averager.last_control
        return control is not None and control.triggered and not control.done()

    def _stop_searching(self) -> None:
        """Called by the failure detector's thread when nobody will join our round."""
        control = self.optimizer.state_averager.last_control
        if control is None or control.done():
            return
        if control.stage == AveragingStage.LOOKING_FOR_GROUP:
            self._deserted = self.optimizer.tracker.is_left_behind
            control.cancel()

    def _tell_round(self, seconds: float) -> None:
        size, expected = len(self.optimizer.state_averager.members), self._target
        if size < expected and self.peers > 1:
            came = (
                f"{size} of {expected} peers came to the round" if size > 1 else "the round failed"
            )
            tell(logger, "no_group", f"epoch {self.epoch}: {came}, {seconds:.1f} s")
        self.on_round(RoundResult(epoch=self.epoch, group_size=size, seconds=seconds))


def open_hivemind(context: Context) -> Strategy:
    """Start a peer and the strategy on it, for a miner. Raises OperatorError."""
    host, task = context.host, context.task
    settings, run_id = host.settings, str(task.run_id)
    announced = announced_ip(settings, context.public_ip)
    host.check_address("--dht.external_ip", announced or settings.dht_ip)
    peer = start_peer(
        settings, identity=host.identity(run_id), admitted=host.registered, announce_ip=announced
    )
    membership = Membership(
        peer,
        registered=lambda: host.registered,
        addresses=host.peer_addresses,
        commit=host.keep_committed,
    )
    try:
        host.go_on()
        return HivemindStrategy(
            task.model,
            membership=membership,
            run=task.run,
            run_id=run_id,
            on_round=context.on_round,
        )
    except BaseException:
        membership.close()
        raise
