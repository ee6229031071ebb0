"""A miner's optimizer over the swarm: `hivemind.Optimizer` with local updates.

Each step updates this machine's weights with AdamW; once the swarm together has trained
`epoch_samples` rows, an epoch ends and the peers average their weights. What is changed
against the stock optimizer, each by overriding one of its hooks, and why:

- `SwarmAverager`: the group is complete when all live peers are in it, so nobody waits out
  the matchmaking time; peers count by the rows they trained; a state that is not finite,
  or of another shape, is never loaded, and loading has a deadline.
- `SampleTracker`: an epoch ends by rows, never by the clock's guess, so a slow moment does
  not turn into an epoch of one step.

A peer without work calls `idle()` now and then: as long as the others count on it, it
takes part in the averaging. When work comes after a longer rest, `catch_up` loads what the
swarm has learnt meanwhile.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import hivemind
import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.control import StepControl
from hivemind.compression import CompressionBase, Float16Compression, NoCompression
from hivemind.optim.progress_tracker import ProgressTracker
from hivemind.optim.state_averager import TrainingStateAverager
from torch import Tensor, nn

from hiveminer.run import OptimizerSection, Run, SwarmSection
from hiveminer.swarm.peer import START_SECONDS, Peer
from hiveminer.swarm.processes import settle

logger = logging.getLogger(__name__)

CHUNK_SECONDS = 30.0
"""How long a peer waits for the next part of a tensor: hivemind's default is shorter than
some rounds take to begin."""

IDLE_WEIGHT = 1e-3
"""An idle peer's weight in rows. Not zero: a group of idle peers would divide by it."""

REPORT_SECONDS = 20.0
"""A peer that has not reported for so long is no longer counted."""


@dataclass(frozen=True)
class Round:
    """How an epoch ended: the epoch begun by it, the size of the group that averaged (1
    when it was alone, or the averaging failed), and how long the step took that did it."""

    epoch: int
    group_size: int
    seconds: float


def build_optimizer(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], section: OptimizerSection
) -> torch.optim.AdamW:
    """AdamW as the run wants it; decay only on matrices (vectors are norms and biases)."""
    groups: list[Any] = list(parameters)
    if groups and isinstance(groups[0], Tensor):
        groups = parameter_groups(groups, weight_decay=section.weight_decay)
    return torch.optim.AdamW(
        groups, lr=section.learning_rate, betas=section.betas, eps=section.eps, fused=True
    )


def parameter_groups(
    parameters: Iterable[nn.Parameter], *, weight_decay: float
) -> list[dict[str, Any]]:
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.dim() > 1 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_scheduler(
    optimizer: torch.optim.Optimizer, section: OptimizerSection
) -> torch.optim.lr_scheduler.LRScheduler:
    """The run's learning rate by epoch: hivemind steps it when the swarm's epoch does."""
    # A peer that loads the swarm's state catches up with its rate before its first step.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: rate_factor(epoch, section))


def rate_factor(epoch: int, section: OptimizerSection) -> float:
    """The share of the full learning rate at an epoch, between a tenth and one."""
    low = 0.1
    if epoch < section.warmup_epochs:
        return low + (1 - low) * epoch / section.warmup_epochs
    if section.schedule == "constant":
        return 1.0
    span = max(1, section.total_epochs - section.warmup_epochs)
    done = min(1.0, (epoch - section.warmup_epochs) / span)
    left = 1 - done if section.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return low + (1 - low) * left


class _Guard(DecentralizedAverager):  # type: ignore[misc]
    """Stands between TrainingStateAverager and its base in the order of inheritance."""

    rows_weight: float = IDLE_WEIGHT
    last_control: StepControl | None = None
    loaded_epoch: int | None = None

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Begin a round; this peer weighs as much as the rows it trained in the epoch."""
        kwargs["weight"] = self.rows_weight
        control = super().step(*args, **kwargs)
        if isinstance(control, StepControl):
            self.last_control = control
        return control

    def load_state_from_peers(
        self, wait: bool = True, timeout: float | None = None
    ) -> tuple[Any, Any] | None:
        """The base's download, within a deadline, and refused unless it is sound."""
        self.loaded_epoch = None
        try:
            state = super().load_state_from_peers(wait=wait, timeout=timeout)
        except Exception as error:  # noqa: BLE001 - whatever a peer's bytes may cause
            logger.warning("no state could be had from peers: %r", error)
            return None
        if state is None:
            return None
        problem = self._problem_with(state)
        if problem:
            logger.error("a peer's state is refused: %s", problem)
            return None
        self.loaded_epoch = state[0]["epoch"]
        return state  # type: ignore[no-any-return]

    def _problem_with(self, state: tuple[Any, Any]) -> str | None:
        metadata, tensors = state
        if not isinstance(metadata, dict) or not isinstance(metadata.get("epoch"), int):
            return "it does not say its epoch"
        if not isinstance(metadata.get("optimizer_metadata"), list):
            return "it does not describe its optimizer"
        expected = self.get_current_state()[1]
        shapes = [tuple(tensor.shape) for tensor in expected]
        if [tuple(tensor.shape) for tensor in tensors] != shapes:
            return "its tensors have other shapes than ours"
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            return "it holds numbers that are not finite"
        return None


class SwarmAverager(TrainingStateAverager, _Guard):  # type: ignore[misc]
    """The stock state averager, but: its group size can follow the number of live peers;
    it hands out the weights that the epoch began with, which are the same for all peers,
    and not its own of this moment; its process ends with its parent."""

    def run(self) -> None:
        settle(self._parent_pid)
        super().run()

    def run_in_background(self, await_ready: bool = True, timeout: float | None = None) -> None:
        """As the stock one, but SIGINT is ignored in the new process only, so that a Ctrl-C
        while a program starts is not lost."""
        self.start()
        if await_ready:
            self.wait_until_ready(timeout if timeout is not None else START_SECONDS)

    def get_current_state(self) -> tuple[Any, Any, Any]:
        """What a peer that asks is given: the averaging buffers still hold the epoch's start."""
        metadata, tensors, infos = super().get_current_state()
        with self.get_tensors() as averaged:
            start = [tensor.clone() for tensor in averaged[: len(self.main_parameters)]]
        return metadata, start + tensors[len(start) :], infos

    def begin_epoch(self) -> None:
        """Take the weights of this moment for the epoch's start: there was no averaging."""
        self._load_local_tensors_into_averager_()

    @property
    def loaded(self) -> bool:
        """Whether the last download was sound, and not behind what this peer already had."""
        return self.loaded_epoch is not None and self.loaded_epoch >= self.local_epoch

    def set_target_group_size(self, size: int) -> None:
        """A group of this many peers is complete and need not wait for more."""
        self._outer_pipe.send(("_set_target_group_size", [size], {}))

    async def _set_target_group_size(self, size: int) -> None:
        """Runs in the averager's process. The key manager's own target stays unset: it
        takes it for a bound, and fails on a group that has outgrown it."""
        self._matchmaking.target_group_size = size
        self._matchmaking.potential_leaders.target_group_size = size


class SampleTracker(ProgressTracker):  # type: ignore[misc]
    """The stock progress tracker, without the epoch that ends by the clock."""

    @property
    def ready_to_update_epoch(self) -> bool:
        progress = self.global_progress
        return bool(
            self.global_epoch > self.local_progress.epoch
            or progress.samples_accumulated >= self.target_batch_size
        )


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


def averager_prefix(run_id: str) -> str:
    return f"{run_id}_state_averager"


def compression(section: SwarmSection) -> CompressionBase:
    return Float16Compression() if section.compression == "float16" else NoCompression()
