"""What an answer's losses say. Pure: numbers in, numbers out.

A validator replays a sample of the answers. From its own copy of the global state of the
answer's epoch it runs the same rows twice: once training on them, once only evaluating.
That gives three curves of loss by step: what the miner answered, what training gives
(`trained`), and what no training gives (`untrained`). Two numbers are read off them.

- `explained_variance`: how much of the trained curve's ups and downs the answer shares (1
  minus the variance of their difference over the curve's own variance, both without their
  trend, which is nearly the same for all rows). Rows differ in difficulty far more than two
  honest copies of the model differ, so an answer that was invented, or was given for
  other rows, is below zero.
- `learning`: where the answer lies between the untrained curve (0) and the trained one
  (1), by least squares. A miner that only runs forward is at 0.

Where the curves are too flat for a number to mean anything, nobody is judged by it: rows
that all have one loss give nothing to recognize, and a model that has converged learns
nothing in a request. Flatness is read off the validator's own two curves, so that no answer
can cause it.

What this cannot see: a miner that trains and withholds, or one that forges a curve by
replaying the training as the validator does (which costs it the training). So these
scores tell the idle and the lying from the working; they are not yet safe for emissions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FULL_VARIANCE = 0.9
"""From this explained variance on, an answer counts as given for these rows: honest ones are
above 0.94."""

LEAST_VARIANCE = 0.7

FULL_LEARNING = 0.35
"""From here on an answer counts as trained: honest ones are mostly between 0.4 and 1.7, and
now and then lower; a miner that only ran forward is at 0.0."""

LEAST_LEARNING = 0.1

LEAST_SPREAD, AMPLE_SPREAD = 0.01, 0.1
"""Nats per token by which the trained curve varies: below the first nobody is judged, since
rounding alone makes a part of that; above the second its rows are told apart in any case."""

CLEAR_SPREAD, CLEAR_GAIN = 5.0, 1.2
"""How many times the noise the spread of the trained curve has to be in between, and the mean
gain of training anywhere. An honest miner has trained a little between the epoch's begin and
its answer, on rows that the validator's copy has not seen. That moves each loss about as
irregularly as the training in a replay does: by one to two times the spread of its gains."""

TREND = 2
"""Degree of the polynomial that is taken off a curve as its trend."""

FEWEST_STEPS = 6
"""Shorter curves say nothing."""


@dataclass(frozen=True)
class Evidence:
    """One replayed answer.

    answered, trained, untrained: loss by optimizer step, in nats per token, of equal length.
    claimed_samples, given_samples: rows the miner says it trained, and was given.
    """

    hotkey: str
    request_id: str
    epoch: int
    answered: tuple[float, ...]
    trained: tuple[float, ...]
    untrained: tuple[float, ...]
    claimed_samples: int
    given_samples: int
    tokens: int

    @property
    def explained_variance(self) -> float:
        """Share of the trained curve's variance that the answer has in common; at most 1."""
        return explained_variance(self.answered, self.trained)

    @property
    def fit(self) -> float:
        """The explained variance, by its name in the metrics."""
        return self.explained_variance

    @property
    def learning(self) -> float:
        """0 where the answer is the untrained curve, 1 where it is the trained one."""
        return learning(self.answered, trained=self.trained, untrained=self.untrained)

    @property
    def problem(self) -> str | None:
        """Why the curves cannot be compared, which is the miner's fault; None if they can."""
        steps = len(self.trained)
        if steps < FEWEST_STEPS:
            return (
                f"fewer than {FEWEST_STEPS} of its losses belong to the epoch's state, so nothing "
                "can be compared: train whole requests, and keep up with the swarm (see catch_up)"
            )
        if len(self.answered) != steps or len(self.untrained) != steps:
            return (
                f"{len(self.answered)} losses were answered where a replay has {steps}: answer "
                "one for each step"
            )
        if not all(map(math.isfinite, self.answered)):
            return "a loss was answered that is not finite: look at the miner's log for NaN"
        if self.claimed_samples > self.given_samples:
            return f"{self.claimed_samples} rows are claimed and {self.given_samples} were given"
        return None

    @property
    def tells(self) -> bool:
        """Whether an honest answer to these rows can be told from an invented one, and an idle
        miner's from a working one's; if not, the answer is not judged."""
        if self.problem is not None:
            return True
        if self._is_flat:
            return False
        return self.shows_learning or self.explained_variance < FULL_VARIANCE

    @property
    def _is_flat(self) -> bool:
        clear = min(AMPLE_SPREAD, CLEAR_SPREAD * spread(self._gains))
        return spread(self.trained) < max(LEAST_SPREAD, clear)

    @property
    def shows_learning(self) -> bool:
        """Whether training gains enough for its lack to be seen."""
        return sum(self._gains) / len(self._gains) >= CLEAR_GAIN * spread(self._gains)

    @property
    def _gains(self) -> list[float]:
        return [u - t for u, t in zip(self.untrained, self.trained, strict=True)]


def score(evidence: Evidence) -> float:
    """What one replayed answer is worth, between 0 and 1; 1 where it tells nothing."""
    if evidence.problem is not None:
        return 0.0
    if not evidence.tells:
        return 1.0
    value = ramp(evidence.explained_variance, LEAST_VARIANCE, FULL_VARIANCE)
    if evidence.shows_learning:
        value *= ramp(evidence.learning, LEAST_LEARNING, FULL_LEARNING)
    return value


def shortfalls(evidence: Evidence) -> list[str]:
    """Why a score is below 1, each reason with what a miner can do; empty when nothing is
    short."""
    if evidence.problem is not None:
        return [evidence.problem]
    if not evidence.tells:
        return []
    reasons = []
    if evidence.explained_variance < FULL_VARIANCE:
        reasons.append(
            f"fit {evidence.explained_variance:.2f} of {FULL_VARIANCE}: the losses do not rise and "
            "fall with these rows, so they are other rows', or the weights are far from the "
            "swarm's: see the miner's log for diverged and catch_up"
        )
    if evidence.shows_learning and evidence.learning < FULL_LEARNING:
        reasons.append(
            f"learning {evidence.learning:.2f} of {FULL_LEARNING}: the losses hardly fall as "
            "training makes them: steps were skipped or discarded, or begun from other weights"
        )
    return reasons


def explained_variance(answered: Sequence[float], trained: Sequence[float]) -> float:
    """1 - Var(answered - trained) / Var(trained), trends taken off, at least -10.

    The trend of the difference is the miner's: it has trained other rows since the epoch
    began, and the validator's copy has not.
    """
    total = spread(trained) ** 2
    rest = spread([a - t for a, t in zip(answered, trained, strict=True)]) ** 2
    if total < 1e-12:
        return 1.0 if rest < 1e-12 else -10.0
    return max(-10.0, 1.0 - rest / total)


def learning(
    answered: Sequence[float], *, trained: Sequence[float], untrained: Sequence[float]
) -> float:
    """The x that brings untrained + x * (trained - untrained) closest to the answer.

    Least squares twice, with and without a common offset, and the mean of both. Without,
    it also sees what was learned since the epoch began; with, it is not moved by how old
    the validator's copy is. Clipped to [-2, 2].
    """
    gains = [u - t for u, t in zip(untrained, trained, strict=True)]
    shown = [u - a for u, a in zip(untrained, answered, strict=True)]
    return (_clip(_slope(shown, gains)) + _clip(_slope(_centered(shown), _centered(gains)))) / 2


def ramp(value: float, low: float, high: float) -> float:
    """0 up to `low`, 1 from `high` on, linear in between."""
    return min(1.0, max(0.0, (value - low) / (high - low)))


def spread(values: Sequence[float]) -> float:
    """The standard deviation of a curve without its trend."""
    places = np.linspace(-1.0, 1.0, len(values))
    degree = min(TREND, max(0, len(values) - 2))
    fitted = np.polynomial.polynomial.polyfit(places, values, degree)
    trend = np.polynomial.polynomial.polyval(places, fitted)
    return _rms(_centered([v - float(at) for v, at in zip(values, trend, strict=True)]))


def _slope(values: Sequence[float], along: Sequence[float]) -> float:
    power = sum(x * x for x in along)
    return sum(v * x for v, x in zip(values, along, strict=True)) / power if power else 0.0


def _clip(value: float) -> float:
    return min(2.0, max(-2.0, value))


def _centered(values: Sequence[float]) -> list[float]:
    mean = sum(values) / len(values)
    return [value - mean for value in values]


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
