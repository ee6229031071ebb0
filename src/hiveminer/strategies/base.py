"""The seam between the neurons and the way in which peers learn from each other.

A miner holds a `Strategy`, a validator an `Observer`, and neither knows which one it is.
`strategies/registry.py` picks both by `run.strategy`; tests pass their own.
"""

from __future__ import annotations

import copy
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from bittensor import Metagraph
from torch import Tensor, nn

from hiveminer.chain import Chain
from hiveminer.config.run import OptimizerSection
from hiveminer.config.settings import Settings
from hiveminer.swarm import Identity
from hiveminer.training.optimizer import build_optimizer, parameter_groups
from hiveminer.training.task import Task
from hiveminer.training.trainer import LocalStep, Step


@dataclass(frozen=True)
class RoundResult:
    """How an epoch ended.

    epoch: the one that began by it. group_size: peers whose work is in it; 1 when this peer
    was alone, or the round failed. seconds: how long the step took that ended it.
    """

    epoch: int
    group_size: int
    seconds: float


@dataclass(frozen=True)
class GlobalState:
    """A copy of what all peers train from: weights by name, and the inner optimizer's state
    as its `state_dict` has it."""

    epoch: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]


class Host(Protocol):
    """The neuron, as its strategy sees it."""

    settings: Settings
    chain: Chain
    metagraph: Metagraph
    hotkey: str
    folder: Path
    stopping: threading.Event

    @property
    def registered(self) -> frozenset[str]:
        """The hotkeys registered on the subnet."""

    def identity(self, run_id: str) -> Identity:
        """This neuron's proof to the peers of the run."""

    def peer_addresses(self) -> frozenset[str]:
        """Where other peers can be reached."""

    def keep_committed(self, data: bytes) -> None:
        """Commit this on chain beside the hotkey, now and whenever it is missing there."""

    def check_address(self, flag: str, ip: str) -> None:
        """Raise OperatorError for an address at which nobody can call this machine."""

    def go_on(self) -> None:
        """Raise KeyboardInterrupt if the program has been told to stop."""


@dataclass(frozen=True)
class Context:
    """What a strategy or an observer is built from.

    public_ip: the address at which the internet sees this machine; it may have to ask, so it
        is called only where it is needed.
    on_round: called after each epoch, in the thread that trains.
    """

    host: Host
    task: Task
    public_ip: Callable[[], str]
    on_round: Callable[[RoundResult], None]


class Strategy(ABC):
    """How a miner learns together with others; a `training.trainer.Step`.

    Built in the main thread, with the model on the CPU and before any other thread, since it
    may fork. Then, in this order: `move_to`, perhaps `load_state_dict`, and `join`. From there
    on `step`, `idle`, `catch_up` and `recover` are called in one thread, one at a time; `sync`
    in another.
    """

    @property
    @abstractmethod
    def epoch(self) -> int:
        """The epoch this machine is in."""

    @property
    @abstractmethod
    def peers(self) -> int:
        """Peers of the run that are working, this one included."""

    @property
    def address(self) -> str:
        """Where this peer is in the swarm, for `IsAlive`; empty where the chain says it."""
        return ""

    @abstractmethod
    def step(self, *, batch_size: int) -> bool:
        """Learn from the gradients of `batch_size` rows, and exchange with the other peers
        when that is due. False when the step was discarded."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Drop the gradients."""

    @abstractmethod
    def state_dict(
        self, *, timeout_seconds: float = 60.0
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies on the CPU of all that training resumes from, and its metadata for JSON, with
        `epoch` and `rows` (trained in it).

        Waits for the end of a step; raises SwarmError when that does not come in time.
        """

    @abstractmethod
    def load_state_dict(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Resume from a `state_dict`. Raises ValueError, and changes nothing, if it does not
        fit."""

    @abstractmethod
    def move_to(self, device: torch.device) -> None:
        """Move the model and the optimizer's state to a device."""

    @abstractmethod
    def join(self) -> None:
        """Publish this peer's address, meet the other peers, and catch up with them."""

    @abstractmethod
    def sync(self) -> None:
        """Follow the metagraph: called after each time that it was read."""

    @abstractmethod
    def idle(self) -> None:
        """Take part in an exchange that is due while there is no work."""

    @abstractmethod
    def catch_up(self) -> bool:
        """Load the global state if it is ahead; whether this peer is now up to date."""

    @abstractmethod
    def recover(self) -> bool:
        """Roll back to the last good state if the weights are not finite or out of bounds;
        whether they were sound."""

    @abstractmethod
    def check(self) -> None:
        """Raise SwarmError when something has ended that training cannot go on without."""

    @abstractmethod
    def interrupt(self) -> None:
        """Make a waiting `step` return soon; called from any thread."""

    @abstractmethod
    def close(self) -> None:
        """Leave the swarm, and end what was started. May be called again."""


class Observer(ABC):
    """What a validator sees of a run: its epoch, its peers, and copies of its global state.

    Built in the main thread. `fetch` is called in one other thread, `sync` in another.
    """

    @property
    @abstractmethod
    def epoch(self) -> int:
        """The run's epoch."""

    @property
    @abstractmethod
    def peers(self) -> int:
        """Peers of the run that are working."""

    @abstractmethod
    def initial_state(self) -> GlobalState:
        """The state that the run began with."""

    @abstractmethod
    def fetch(self, *, timeout_seconds: float = 30.0) -> GlobalState | None:
        """The newest state; None when no sound one was to be had in time."""

    @abstractmethod
    def local_step(self, model: nn.Module, state: GlobalState) -> Step:
        """A miner's steps between two rounds, without the others: trains a model that has the
        state's weights."""

    def declare(self) -> None:  # noqa: B027 - nothing, unless a strategy wants it
        """Say on the chain which run this validator is in; called once, at its start."""

    def shares(self) -> dict[str, float] | None:
        """What each hotkey has earned, where the rounds say it; None where answers are judged."""
        return None

    @abstractmethod
    def sync(self, *, working: int) -> None:
        """Follow the metagraph: called after each time that it was read. working: how many
        miners have answered with work lately."""

    @abstractmethod
    def check(self) -> None:
        """Raise SwarmError when something has ended that observing needs."""

    @abstractmethod
    def close(self) -> None:
        """End what was started. May be called again."""


StrategyFactory = Callable[[Context], Strategy]
ObserverFactory = Callable[[Context], Observer]


def local_step(model: nn.Module, state: GlobalState, *, section: OptimizerSection) -> Step:
    """The run's own optimizer on a model, begun from the optimizer state of a global state."""
    groups = parameter_groups(model.parameters(), weight_decay=section.weight_decay)
    optimizer = build_optimizer(groups, section)
    optimizer.load_state_dict(copy.deepcopy(state.optimizer))
    return LocalStep(optimizer)
