"""Bounds on the weights that are sent, averaged or applied.

One value that is not finite would make every peer NaN for good, and weights a thousand times too
large would dominate the average. So weights are checked before they are averaged, and again before
they are applied. This does not detect wrong weights of the right size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from hiveminer.config.run import Run

LOUDEST = 4.0
"""Limit of another peer's norm, in multiples of our own weights' norm."""

RUNAWAY = 10.0
"""A peer has diverged at this multiple of the norm that it began the epoch with."""

STEPS = 100
ROWS_A_STEP = 8
"""AdamW steps in an epoch that may all have moved a zero weight in one direction, each by about
the learning rate."""

FURTHEST = 1.0
"""Limit of a weight's move in an epoch, on average over a tensor."""


@dataclass(frozen=True)
class Bounds:
    """What a peer may send in a round.

    most_rows: that a peer can have trained in an epoch, its weight in the average.
    learning_rate: the run's full one.
    """

    most_rows: float
    learning_rate: float

    @classmethod
    def of(cls, run: Run) -> Self:
        return cls(
            most_rows=float(run.swarm.epoch_samples), learning_rate=run.optimizer.learning_rate
        )

    def problem_with(self, theirs: Tensor, ours: Tensor) -> str | None:
        """Why a tensor must not be averaged with our corresponding one, or None."""
        if theirs.shape != ours.shape:
            return f"it has shape {tuple(theirs.shape)}, not {tuple(ours.shape)}"
        norm = _norm(theirs)
        if not math.isfinite(norm):
            return "it holds numbers that are not finite"
        most = max(LOUDEST * _norm(ours), self._moved(ours))
        if norm > most:
            return f"its norm is {norm:.3g}, expected at most {most:.3g}"
        return None

    def problem_with_weight(self, weight: float) -> str | None:
        """Why a peer's weight is invalid, or None."""
        if 0 <= weight <= self.most_rows:
            return None
        return f"it claims {weight:.6g} rows, and an epoch has {self.most_rows:.0f}"

    def ran_away(self, now: Sequence[Tensor], start: Sequence[Tensor]) -> bool:
        """Whether weights are not finite, or further away than an epoch can move them."""
        return not all(
            _norm(tensor) <= RUNAWAY * max(_norm(before), self._moved(before))
            for tensor, before in zip(now, start, strict=True)
        )

    def _moved(self, tensor: Tensor) -> float:
        """The norm that a tensor of zeros can reach in an epoch."""
        steps = max(STEPS, self.most_rows / ROWS_A_STEP)
        return min(FURTHEST, self.learning_rate * steps) * math.sqrt(tensor.numel())


def _norm(tensor: Tensor) -> float:
    # In float64 a norm overflows only where the tensor itself is not finite.
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))
