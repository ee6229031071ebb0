"""Scores an answer by its curve of losses.

A validator replays a sample of the answers: from the global state of the answer's epoch it runs
the same rows twice, once training them and once only evaluating. That gives three curves of loss
per step: the miner's answer, `trained` and `untrained`. Two numbers compare them.

- `explained_variance`: 1 minus the variance of the difference between answer and trained curve
  over the curve's own variance, both without their trend. Rows differ in difficulty far more than
  two honest copies of the model do, so an answer that was invented, or belongs to other rows, is
  below zero.
- `learning`: where the answer lies between the untrained curve (0) and the trained one (1), by
  least squares. A miner that only runs forward is at 0. An honest answer may be there too, by
  chance, if training gains little, so the miner's last few replays together count if better.

If the curves are too flat for a number to mean anything, it is not used: rows that all have the
same loss cannot be recognized, and a converged model learns nothing in a request. Flatness is
measured on the validator's own two curves, so no answer can cause it.

Not detected: a miner that trains and withholds, or one that forges a curve by training as the
validator does. So these scores tell idle and lying miners from working ones; they are not yet
safe for emissions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FULL_VARIANCE = 0.9
"""From here on an answer counts as given for these rows: honest ones are above 0.94."""

LEAST_VARIANCE = 0.7

FULL_LEARNING = 0.35
"""From here on an answer counts as trained: honest ones are mostly between 0.4 and 1.7; a miner
that only ran forward is at 0.0."""

LEAST_LEARNING = 0.1

LEAST_SPREAD, AMPLE_SPREAD = 0.01, 0.1
"""Spread of the trained curve in nats per token: below the first nobody is judged, since rounding
alone causes part of it; above the second, rows can always be told apart."""

CLEAR_SPREAD, CLEAR_GAIN = 5.0, 1.2
"""In between, the trained curve's spread has to be this many times the noise, and the mean gain of
training anywhere. Noise: an honest miner has trained other rows since the epoch began, which moves
each loss by one to two times the spread of a replay's gains."""

CLEAREST = 4.0
"""From this clarity on (the mean gain over its spread), replays count alike in `usual_learning`."""

TREND = 2
"""Degree of the polynomial that is subtracted from a curve as its trend."""

MOST_LOSS = 1e9
"""Larger losses, which only an invented curve has, count as this: their squares would overflow."""

FEWEST_STEPS = 6
"""Shorter curves are not compared."""


@dataclass(frozen=True)
class Evidence:
    """One replayed answer.

    answered, trained, untrained: loss by optimizer step, in nats per token, of equal length.
    claimed_samples, given_samples: rows the miner says it trained, and was given.
    given_steps: optimizer steps in the request.
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
    usual_learning: float = -math.inf
    """The mean learning of this miner's last replays, this one included; clear ones count most."""
    given_steps: int = FEWEST_STEPS

    @property
    def explained_variance(self) -> float:
        """Share of the trained curve's variance that the answer explains; at most 1."""
        return explained_variance(self.answered, self.trained)

    fit = explained_variance  # its name in the metrics

    @property
    def learning(self) -> float:
        """0 if the answer is the untrained curve, 1 if it is the trained one."""
        return learning(self.answered, trained=self.trained, untrained=self.untrained)

    @property
    def problem(self) -> str | None:
        """Why the curves cannot be compared, because of the miner; None if they can."""
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
        """Whether these rows can tell an honest answer from an invented one, and an idle miner
        from a working one; if not, the answer is not judged."""
        if self.given_steps < FEWEST_STEPS:
            return False
        if self.problem is not None:
            return True
        clear = min(AMPLE_SPREAD, CLEAR_SPREAD * spread(self._gains))
        if spread(self.trained) < max(LEAST_SPREAD, clear):
            return False
        return self.shows_learning or self.explained_variance < FULL_VARIANCE

    @property
    def shows_learning(self) -> bool:
        """Whether training gains enough to notice its absence."""
        return self._clarity >= CLEAR_GAIN

    @property
    def learning_weight(self) -> float:
        """Its weight in a mean of several replays; 0 where its learning tells nothing."""
        if self.problem is not None or not (self.tells and self.shows_learning):
            return 0.0
        return min(CLEAREST, self._clarity) ** 2

    @property
    def best_learning(self) -> float:
        return max(self.learning, self.usual_learning)

    @property
    def _gains(self) -> Array:
        return _difference(self.untrained, self.trained)

    @property
    def _clarity(self) -> float:
        """The mean gain of training over the gains' spread."""
        noise, mean = spread(self._gains), float(self._gains.mean())
        return mean / noise if noise else math.copysign(math.inf, mean)


def score(evidence: Evidence) -> float:
    """The score of a replayed answer, between 0 and 1; 1 if it tells nothing."""
    if evidence.problem is not None:
        return 0.0
    if not evidence.tells:
        return 1.0
    value = ramp(evidence.explained_variance, LEAST_VARIANCE, FULL_VARIANCE)
    if evidence.shows_learning:
        value *= ramp(evidence.best_learning, LEAST_LEARNING, FULL_LEARNING)
    return value


def shortfalls(evidence: Evidence) -> list[str]:
    """Why a score is below 1, each reason with the miner's remedy."""
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
    if evidence.shows_learning and evidence.best_learning < FULL_LEARNING:
        reasons.append(
            f"learning {evidence.best_learning:.2f} of {FULL_LEARNING}: the losses hardly fall as "
            "training makes them: steps were skipped or discarded, or begun from other weights"
        )
    return reasons


def explained_variance(answered: Sequence[float], trained: Sequence[float]) -> float:
    """1 - Var(answered - trained) / Var(trained) without trends, at least -10. The trend of the
    difference comes from the other rows that the miner has trained since the epoch began."""
    total = spread(trained) ** 2
    rest = spread(_difference(answered, trained)) ** 2
    if total < 1e-12:
        return 1.0 if rest < 1e-12 else -10.0
    return max(-10.0, 1.0 - rest / total)


def learning(
    answered: Sequence[float], *, trained: Sequence[float], untrained: Sequence[float]
) -> float:
    """The x that brings untrained + x * (trained - untrained) closest to the answer.

    The mean of two least-squares fits, clipped to [-2, 2]: without a common offset, which
    includes what was learned since the epoch began, and with one, which does not depend on how
    old the validator's copy is.
    """
    gains, shown = _difference(untrained, trained), _difference(untrained, answered)
    fits = [_slope(shown, gains), _slope(shown - shown.mean(), gains - gains.mean())]
    return float(np.clip(fits, -2.0, 2.0).mean())


def ramp(value: float, low: float, high: float) -> float:
    """0 up to `low`, 1 from `high` on, linear in between."""
    return min(1.0, max(0.0, (value - low) / (high - low)))


def spread(curve: Sequence[float] | Array) -> float:
    """The standard deviation of a curve without its trend."""
    values = np.clip(curve, -MOST_LOSS, MOST_LOSS)
    places = np.linspace(-1.0, 1.0, len(values))
    degree = min(TREND, max(0, len(values) - 2))
    fitted = np.polynomial.polynomial.polyfit(places, values, degree)
    return float(np.std(values - np.polynomial.polynomial.polyval(places, fitted)))


def _difference(one: Sequence[float], other: Sequence[float]) -> Array:
    first, second = np.clip([one, other], -MOST_LOSS, MOST_LOSS)
    return np.asarray(first - second)


def _slope(values: Array, along: Array) -> float:
    power = float(along @ along)
    return float(values @ along) / power if power else 0.0
