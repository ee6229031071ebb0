"""What weights must be like to be sent, averaged or applied.

One step that is not finite makes every peer NaN for good, and one peer with weights a
thousand times too large drowns the rest. Hivemind's all-reduce sums what comes, so what
comes is looked at before it is summed, and again before it is applied. What cannot be seen
this way: weights of the right size that point somewhere else.
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
"""So many times the norm of our own weights is the most that another's may have."""

RUNAWAY = 10.0
"""So many times the norm that it began the epoch with, and a peer has diverged."""

STEPS = 100
ROWS_A_STEP = 8
"""Steps of AdamW in an epoch that may all have gone the same way from a weight that was
nothing: each moves it by about the learning rate."""

FURTHEST = 1.0
"""No weight moves further than this in an epoch, on average over a tensor."""


@dataclass(frozen=True)
class Bounds:
    """How much of what a peer may send in a round.

    most_rows: rows that a peer can have trained in an epoch; its weight in the average.
    learning_rate: the run's, at its full height.
    """

    most_rows: float
    learning_rate: float

    @classmethod
    def of(cls, run: Run) -> Self:
        """What a peer of this run may send."""
        return cls(
            most_rows=float(run.swarm.epoch_samples), learning_rate=run.optimizer.learning_rate
        )

    def problem_with(self, theirs: Tensor, ours: Tensor) -> str | None:
        """Why a tensor must not be averaged with ours of the same place, or None."""
        if theirs.shape != ours.shape:
            return f"it has shape {tuple(theirs.shape)}, not {tuple(ours.shape)}"
        norm = _norm(theirs)
        if not math.isfinite(norm):
            return "it holds numbers that are not finite"
        most = max(LOUDEST * _norm(ours), self._moved(ours))
        if norm > most:
            return f"its norm is {norm:.3g}, and {most:.3g} at most is to be expected"
        return None

    def problem_with_weight(self, weight: float) -> str | None:
        """Why a peer cannot count for so many rows, or None."""
        if 0 <= weight <= self.most_rows:
            return None
        return f"it wants to count for {weight:.6g} rows, and an epoch has {self.most_rows:.0f}"

    def problem_with_all(self, theirs: Sequence[Tensor], ours: Sequence[Tensor]) -> str | None:
        """The first problem of a whole model's tensors, or None."""
        for their, our in zip(theirs, ours, strict=True):
            problem = self.problem_with(their, our)
            if problem is not None:
                return problem
        return None

    def ran_away(self, now: Sequence[Tensor], start: Sequence[Tensor]) -> bool:
        """Whether weights are no longer finite, or far from all that an epoch can do."""
        for tensor, before in zip(now, start, strict=True):
            norm = _norm(tensor)
            if not norm <= RUNAWAY * max(_norm(before), self._moved(before)):
                return True
        return False

    def _moved(self, tensor: Tensor) -> float:
        """The norm that a tensor of zeros can come to in an epoch."""
        steps = max(STEPS, self.most_rows / ROWS_A_STEP)
        return min(FURTHEST, self.learning_rate * steps) * math.sqrt(tensor.numel())


def _norm(tensor: Tensor) -> float:
    # In float64 a norm overflows only where the tensor itself is not finite.
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))
