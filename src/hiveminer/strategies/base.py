"""The interface between neurons and the strategies by which peers learn from each other.

A miner holds a `Strategy`, a validator an `Observer`. `strategies/registry.py` picks both by
`run.strategy`; tests pass their own.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from bittensor import Metagraph
from torch import Tensor, nn

from hiveminer.chain import Chain
from hiveminer.config.run import OptimizerSection
from hiveminer.config.settings import Settings
from hiveminer.errors import SwarmError
from hiveminer.runtime.addresses import ask_outside
from hiveminer.swarm.identity import Identity
from hiveminer.swarm.membership import Membership
from hiveminer.training.optimizer import build_optimizer
from hiveminer.training.task import Task
from hiveminer.training.trainer import LocalStep, Step


@dataclass(frozen=True)
class RoundResult:
    """How an epoch ended.

    epoch: the one that begins. group_size: peers in the average; 1 when this peer was alone, or
    the round failed. seconds: duration of the step that ended the epoch.
    """

    epoch: int
    group_size: int
    seconds: float


@dataclass(frozen=True)
class GlobalState:
    """A copy of the global state: weights by name, and the inner optimizer's `state_dict`.

    donor: the hotkey that handed it out, where the optimizer is its own.
    """

    epoch: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    donor: str | None = None


class Host(Protocol):
    """The neuron, as its strategy sees it."""

    settings: Settings
    chain: Chain
    metagraph: Metagraph
    hotkey: str
    folder: Path

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

    public_ip: this machine's public address; may ask a service, so call it only if needed.
    on_round: called after each epoch, in the training thread.
    """

    host: Host
    task: Task
    public_ip: Callable[[], str] = ask_outside
    on_round: Callable[[RoundResult], None] = lambda _: None


class Participant(ABC):
    """What a miner's strategy and a validator's observer have in common."""

    membership: Membership

    @property
    @abstractmethod
    def epoch(self) -> int:
        """This peer's epoch; an observer's is the run's."""

    @property
    @abstractmethod
    def peers(self) -> int:
        """Peers of the run that are working, a miner itself included."""

    def check(self) -> None:
        """Raise SwarmError when something that the neuron needs has ended."""
        self.membership.children.check()

    @abstractmethod
    def close(self) -> None:
        """Leave the swarm, and end what was started. Idempotent."""


class Strategy(Participant):
    """How a miner learns together with others; a `training.trainer.Step`.

    Built in the main thread, with the model on the CPU and before any other thread, since it may
    fork. Then `move_to`, perhaps `load_state_dict`, and `join` are called in this order; after
    that, `step`, `idle`, `catch_up` and `recover` in one thread, and `sync` in another.
    """

    @property
    def address(self) -> str:
        """Where this peer is in the swarm, for `IsAlive`; empty where the chain says it."""
        return ""

    @abstractmethod
    def step(self, *, batch_size: int) -> bool:
        """Apply the gradients of `batch_size` rows, and exchange with other peers when that is
        due. False when the step was discarded."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Drop the gradients."""

    @abstractmethod
    def state_dict(
        self, *, timeout_seconds: float = 60.0
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies on the CPU of all that training resumes from, and metadata for JSON with `epoch`
        and `rows` (trained in it). Raises SwarmError when a running step does not end in time."""

    @abstractmethod
    def load_state_dict(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        """Resume from a `state_dict`. Raises ValueError, and changes nothing, if it does not fit
        the model."""

    @abstractmethod
    def move_to(self, device: torch.device) -> None:
        """Move the model and the optimizer's state to a device."""

    @abstractmethod
    def join(self) -> None:
        """Publish this peer's address, connect with other peers, and catch up with them."""

    @abstractmethod
    def sync(self) -> None:
        """Called after each reading of the metagraph."""

    @abstractmethod
    def idle(self) -> None:
        """Take part in an exchange that is due while there is no work."""

    @abstractmethod
    def catch_up(self) -> bool:
        """Load the global state if it is ahead; returns whether this peer is now up to date."""

    @abstractmethod
    def recover(self) -> bool:
        """Roll back to the last good state if the weights are not finite or out of bounds; returns
        whether they were valid."""

    def interrupt(self) -> None:
        """Make a waiting `step` return soon; called from any thread."""


class Observer(Participant):
    """What a validator sees of a run: its epoch, its peers, and copies of its global state.

    Built in the main thread. `fetch` is called in one other thread, `sync` in another.
    """

    @abstractmethod
    def initial_state(self) -> GlobalState:
        """The run's initial state."""

    @abstractmethod
    def fetch(self, *, timeout_seconds: float = 30.0) -> GlobalState | None:
        """The newest state; None when no valid one arrived in time."""

    @abstractmethod
    def local_step(self, model: nn.Module, state: GlobalState) -> Step:
        """A miner's optimizer between two rounds, for a model that has the state's weights."""

    def declare(self) -> None:
        """Say on the chain which run this validator is in; called once, at its start."""

    def shares(self) -> dict[str, float] | None:
        """What each hotkey has earned, where the rounds say it; None where answers are judged."""
        return None

    @abstractmethod
    def sync(self, *, working: int) -> None:
        """Called after each reading of the metagraph. working: how many miners have recently
        answered with work."""


@contextlib.contextmanager
def between_steps(lock: threading.Lock, *, timeout_seconds: float) -> Iterator[None]:
    """Hold the lock that each step holds. Raises SwarmError if a running step does not end in
    time."""
    if not lock.acquire(timeout=timeout_seconds):
        raise SwarmError(f"the running step did not end in {timeout_seconds:.0f} s")
    try:
        yield
    finally:
        lock.release()


StrategyFactory = Callable[[Context], Strategy]
ObserverFactory = Callable[[Context], Observer]


def local_step(model: nn.Module, state: GlobalState, *, section: OptimizerSection) -> Step:
    """The run's optimizer on a model, with the optimizer state of a global state."""
    optimizer = build_optimizer(model.parameters(), section)
    optimizer.load_state_dict(copy.deepcopy(state.optimizer))
    return LocalStep(optimizer)
