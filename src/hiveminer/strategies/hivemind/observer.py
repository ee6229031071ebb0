"""What a validator sees of the swarm: its epoch, its peers, and copies of its state.

An observer is a client of the DHT. It stores nothing there, declares nothing, joins no
group, and serves nobody.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hiveminer.config.run import Run
from hiveminer.strategies.hivemind.averager import CHUNK_SECONDS, SwarmAverager, averager_prefix
from hiveminer.strategies.hivemind.bounds import Bounds
from hiveminer.strategies.hivemind.tracker import SampleTracker
from hiveminer.swarm.peer import Peer
from hiveminer.training.optimizer import build_optimizer, build_scheduler, parameter_groups

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SwarmState:
    """A copy of the swarm's state: `epoch`, the weights by name, the optimizer's own."""

    epoch: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]


class Observer:
    """Downloads the swarm's state into copies, and leaves no trace in the swarm.

    The model given is used as the place to load into. Build it in the main thread: it
    starts a process of hivemind's.
    """

    def __init__(self, model: nn.Module, *, peer: Peer, run: Run, run_id: str):
        self.model = model
        self.run = run
        self._tracker = SampleTracker(
            dht=peer.dht,
            prefix=run_id,
            target_batch_size=run.swarm.epoch_samples,
            client_mode=True,
            min_refresh_period=0.2,
            max_refresh_period=1.0,
            default_refresh_period=1.0,
            private_key=peer.private_key,
            start=True,
        )
        self._averager = SwarmAverager(
            dht=peer.dht,
            prefix=averager_prefix(run_id),
            params=parameter_groups(model.parameters(), weight_decay=run.optimizer.weight_decay),
            optimizer=lambda groups: build_optimizer(groups, run.optimizer),
            scheduler=lambda optimizer: build_scheduler(optimizer, run.optimizer),
            bounds=Bounds.of(run),
            next_chunk_timeout=CHUNK_SECONDS,
            client_mode=True,
            start=True,
        )

    @property
    def process(self) -> int:
        """The number of hivemind's process."""
        return int(self._averager.pid)

    @property
    def epoch(self) -> int:
        """The swarm's epoch, at most a second old."""
        return int(self._tracker.global_epoch)

    @property
    def peers(self) -> int:
        """Live peers of the run."""
        return int(self._tracker.global_progress.num_peers)

    def initial_state(self) -> SwarmState:
        """The state before anything was downloaded: the run's published start."""
        return self._copy()

    def fetch(self, *, timeout_seconds: float = 30.0) -> SwarmState | None:
        """Download the newest state that a peer offers; None when nobody gave a sound one."""
        self._averager.load_state_from_peers(timeout=timeout_seconds)
        return self._copy() if self._averager.loaded else None

    def close(self) -> None:
        # The stock shutdown writes a goodbye into the DHT; an observer was never there.
        self._tracker.shutdown_triggered.set()
        self._tracker.should_report_progress.set()
        self._tracker.global_state_updated.set()
        self._tracker.shutdown_complete.wait(5)
        self._averager.shutdown()

    def _copy(self) -> SwarmState:
        named = self.model.named_parameters()
        weights = {name: value.detach().clone() for name, value in named}
        return SwarmState(
            epoch=int(self._averager.local_epoch),
            weights=weights,
            optimizer=_clone(self._averager.optimizer.state_dict()),
        )


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _clone(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_clone(item) for item in value]
    return value
