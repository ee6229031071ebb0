"""The validator's side of the rounds: follows the states, and checks and marks blobs."""

from __future__ import annotations

import time
from collections import Counter

import bittensor as bt
from torch import nn

from hiveminer.strategies.base import GlobalState, Observer
from hiveminer.strategies.sparseloco.apply import State
from hiveminer.strategies.sparseloco.marking import MarkingFollower
from hiveminer.strategies.sparseloco.parts import Parts
from hiveminer.training.optimizer import inner_optimizer
from hiveminer.training.trainer import LocalStep, Step

LOOK_SECONDS = 0.1


class SparselocoObserver(Observer):
    """Follows the rounds with the global states only, without local weights."""

    def __init__(self, model: nn.Module, parts: Parts):
        self.section, self.membership = parts.section, parts.membership
        named = model.named_parameters()
        self._frozen = {n: each.detach().clone() for n, each in named if not each.requires_grad}
        self.follower = MarkingFollower(parts, start=State.of(model))
        self.replica = self.follower.replica
        self.follower.remember_logged()

    @property
    def epoch(self) -> int:
        """The current round."""
        return self.follower.decided + 1

    @property
    def peers(self) -> int:
        """Peers whose updates counted in the last round that was not empty."""
        return self.follower.contributors

    def initial_state(self) -> GlobalState:
        return self._global(self.replica.start, epoch=0)

    def fetch(self, *, timeout_seconds: float = 30.0) -> GlobalState | None:
        """The newest state, which this validator has computed itself."""
        deadline = time.monotonic() + timeout_seconds
        while not self.replica.is_ready or self.replica.position.missing_blobs:
            if time.monotonic() > deadline or self.follower.stopping.wait(LOOK_SECONDS):
                return None
        return self._global(self.replica.state, epoch=self.epoch)

    def shares(self) -> dict[str, float]:
        """By hotkey, the share of the last rounds that were not empty in which its blob counted."""
        rounds = list(self.follower.counted)
        counts = Counter(hotkey for each in rounds for hotkey in each)
        return {bt.sp_core.ss58_encode(who): n / len(rounds) for who, n in counts.items()}

    def local_step(self, model: nn.Module, state: GlobalState) -> Step:
        """A new inner optimizer, since a miner does not share its optimizer's state."""
        return LocalStep(inner_optimizer(model, self.section))

    def sync(self, *, working: int) -> None:
        self.membership.sync()

    def close(self) -> None:
        self.follower.close()

    def _global(self, state: State, *, epoch: int) -> GlobalState:
        weights = {name: value.clone() for name, value in state.weights.items()}
        return GlobalState(epoch=epoch, weights=self._frozen | weights, optimizer={})
