"""A miner's optimizer over the swarm: `hivemind.Optimizer` with local updates.

Each step updates this machine's weights with AdamW; once the swarm together has trained
`epoch_samples` rows, an epoch ends and the peers average their weights. What is changed
against the stock optimizer is in `averager.py` and `tracker.py`.

A peer without work calls `idle()` now and then: as long as the others count on it, it
takes part in the averaging. When work comes after a longer rest, `catch_up` loads what the
swarm has learnt meanwhile.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hivemind
import torch
from torch import Tensor, nn

from hiveminer.run import Run
from hiveminer.swarm.adamw import build_optimizer, build_scheduler, parameter_groups
from hiveminer.swarm.averager import (
    CHUNK_SECONDS,
    IDLE_WEIGHT,
    SwarmAverager,
    averager_prefix,
    compression,
)
from hiveminer.swarm.peer import Peer
from hiveminer.swarm.tracker import SampleTracker

logger = logging.getLogger(__name__)

REPORT_SECONDS = 20.0
"""A peer that has not reported for so long is no longer counted."""


@dataclass(frozen=True)
class Round:
    """How an epoch ended: the epoch begun by it, the size of the group that averaged (1
    when it was alone, or the averaging failed), and how long the step took that did it."""

    epoch: int
    group_size: int
    seconds: float


class SwarmOptimizer(hivemind.Optimizer):  # type: ignore[misc]
    """`hivemind.Optimizer`, local updates, with the averager and the tracker of this module."""

    reloads: int = 0
    """How often a step was thrown away because this peer had fallen behind."""

    def _make_state_averager(self, **kwargs: Any) -> SwarmAverager:
        return SwarmAverager(
            dht=self.dht,
            prefix=averager_prefix(self.run_id),
            min_matchmaking_time=self.matchmaking_time,
            allreduce_timeout=self.allreduce_timeout,
            shutdown_timeout=self.shutdown_timeout,
            next_chunk_timeout=self.next_chunk_timeout,
            client_mode=self.client_mode,
            status_loglevel=self.status_loglevel,
            start=True,
            **kwargs,
        )

    def _make_progress_tracker(self, target_batch_size: int, **kwargs: Any) -> SampleTracker:
        return SampleTracker(
            dht=self.dht,
            prefix=self.run_id,
            target_batch_size=target_batch_size,
            client_mode=self.client_mode,
            status_loglevel=self.status_loglevel,
            start=True,
            **kwargs,
        )

    def load_state_from_peers(self, **kwargs: Any) -> None:
        self.reloads += 1
        super().load_state_from_peers(**kwargs)


class Swarm:
    """A model that trains with a swarm; a `trainer.Step`.

    Build it in the main thread, after the DHT and before any server: it starts a process
    of hivemind's. `step` and `idle` may then be called from one other thread.

    on_round: told of each epoch that ended.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        peer: Peer,
        run: Run,
        run_id: str,
        load_state_seconds: float = 60.0,
        on_round: Callable[[Round], None] | None = None,
    ):
        self.model = model
        self.peer = peer
        self.run_id = run_id
        self.on_round = on_round
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
            next_chunk_timeout=CHUNK_SECONDS,
            load_state_timeout=load_state_seconds,
            state_averaging_compression=compression(section),
            averager_opts={"request_timeout": min(1.5, section.matchmaking_seconds / 2)},
            tracker_opts={
                "min_refresh_period": 0.2,
                "max_refresh_period": 1.0,
                "default_refresh_period": 1.0,
                "metadata_expiration": REPORT_SECONDS,
            },
        )
        self._target = 2
        self.optimizer.state_averager.set_target_group_size(self._target)
        self._trained_in: int | None = None
        self._lock = threading.Lock()

    @property
    def epoch(self) -> int:
        """The epoch this machine is in."""
        return int(self.optimizer.local_epoch)

    @property
    def peers(self) -> int:
        """Live peers of the run, this one included."""
        return max(1, int(self.optimizer.tracker.global_progress.num_peers))

    def step(self, *, batch_size: int) -> bool:
        """Learn from the gradients of `batch_size` rows; average when the epoch is full.

        False when the step was thrown away: this peer had fallen behind and has loaded
        the swarm's state instead.
        """
        with self._lock:
            self._trained_in = self.epoch
            return self._step(batch_size)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def idle(self) -> None:
        """Join a round that is due, while the others still count on this peer.

        They do for as long as it reports rows: in the epoch it last trained in, and the
        next.
        """
        if self._trained_in is None or self.epoch > self._trained_in + 1:
            return
        with self._lock:
            self.zero_grad()
            self._step(0)

    def catch_up(self) -> bool:
        """Load the swarm's state if it is ahead; whether this peer is now up to date."""
        with self._lock:
            tracker = self.optimizer.tracker
            if tracker.global_epoch <= self.epoch:
                return True
            self.optimizer.load_state_from_peers()
            return bool(self.optimizer.state_averager.loaded)

    def move_to(self, device: torch.device) -> None:
        """Move the model and the optimizer's state to a device, after the processes started."""
        self.model.to(device)
        for state in self.optimizer.opt.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):  # the step count too: the optimizer is fused
                    state[key] = value.to(device)

    def interrupt(self) -> None:
        """Give up a round that is under way, so that a waiting `step` comes back."""
        for control in (self.optimizer.scheduled_state, self.optimizer.state_averager.last_control):
            if control is not None and not control.done():
                control.cancel()

    def close(self) -> None:
        """Say goodbye to the peers and stop hivemind's process."""
        try:
            self.optimizer.shutdown()
        except Exception as error:  # noqa: BLE001 - a dead process must not keep the rest up
            logger.warning("the swarm's optimizer did not shut down cleanly: %r", error)

    def _step(self, batch_size: int) -> bool:
        self._follow_live_peers()
        self._weigh(batch_size)
        epoch, reloads = self.epoch, self.optimizer.reloads
        began = time.monotonic()
        self.optimizer.step(batch_size=batch_size)
        kept = self.optimizer.reloads == reloads
        if not kept:
            logger.warning(
                "this peer fell behind the swarm: %d rows were thrown away, and its state %s",
                batch_size,
                "was loaded" if self.optimizer.state_averager.loaded else "could not be had",
            )
        elif self.epoch != epoch:
            self._tell_round(time.monotonic() - began)
        return kept

    def _follow_live_peers(self) -> None:
        target = max(2, self.peers)
        if target != self._target:
            self.optimizer.state_averager.set_target_group_size(target)
            self._target = target

    def _weigh(self, batch_size: int) -> None:
        """Tell the averager, and a round that is already arranged, what this peer weighs."""
        rows = self.optimizer.local_progress.samples_accumulated + batch_size
        averager = self.optimizer.state_averager
        averager.rows_weight = float(rows) if rows else IDLE_WEIGHT
        scheduled = self.optimizer.scheduled_state
        if scheduled is not None and not scheduled.triggered and not scheduled.done():
            scheduled.weight = averager.rows_weight

    def _tell_round(self, seconds: float) -> None:
        averager = self.optimizer.state_averager
        control, averager.last_control = averager.last_control, None
        size = 1
        if control is not None and control.done() and not control.cancelled():
            if control.exception() is None and control.result():
                size = len(control.result())
            else:
                logger.warning("epoch %d: averaging failed; going on with our own", self.epoch)
        if size == 1:
            averager.begin_epoch()
        if self.on_round is not None:
            self.on_round(Round(epoch=self.epoch, group_size=size, seconds=seconds))
