"""What work is worth. Pure: numbers in, numbers out.

A validator replays a sample of the answers. From its own copy of the swarm's state of the
answer's epoch it runs the same rows twice: once training on them, once only measuring.
Three curves of loss by step then lie side by side: what the miner answered, what training
gives (`trained`), what no training gives (`untrained`). Two numbers are read off them.

- `fit`: how much of the trained curve's ups and downs the answer shares (1 minus the
  variance of their difference over the curve's own variance, both without their trend,
  which is nearly the same for all rows). Rows differ in difficulty far more than two
  honest copies of the swarm differ, so an answer that was invented, or was given for
  other rows, has a fit below zero.
- `learning`: where the answer lies between the untrained curve (0) and the trained one
  (1), by least squares. A miner that only runs forward lies at 0.

What this cannot see: a miner that trains and withholds, or one that forges a curve by
replaying the training as the validator does (which costs it the training). So these
scores tell the idle and the lying from the working; they are not yet safe for emissions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

FULL_FIT = 0.9
"""From this fit on an answer counts as given for these rows: honest ones lie above 0.94."""

LEAST_FIT = 0.7

FULL_LEARNING = 0.35
"""From here on an answer counts as trained: honest ones mostly lie between 0.4 and 1.7, and
now and then one lies lower; a miner that only ran forward lies at 0.0."""

LEAST_LEARNING = 0.1

TREND = 2
"""Degree of the polynomial that is taken off a curve as its trend."""

FEWEST_STEPS = 6
"""Shorter curves say nothing."""

LEAST_AVERAGE = 0.25
"""An averaged score up to this earns nothing, however much work is claimed."""

FULL_AVERAGE = 0.75

AVERAGE_OVER = 4.0
"""The weight of a new score in the average is one over this, once there are as many."""


@dataclass(frozen=True)
class Evidence:
    """One replayed answer.

    answered, trained, untrained: loss by optimizer step, nats a token, of equal length.
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
    def fit(self) -> float:
        """Share of the trained curve's variance that the answer has in common; at most 1."""
        return fit(self.answered, self.trained)

    @property
    def learning(self) -> float:
        """0 where the answer is the untrained curve, 1 where it is the trained one."""
        return learning(self.answered, trained=self.trained, untrained=self.untrained)


def score(evidence: Evidence) -> float:
    """What one replayed answer is worth, between 0 and 1."""
    steps = len(evidence.trained)
    if len(evidence.answered) != steps or len(evidence.untrained) != steps:
        return 0.0
    if steps < FEWEST_STEPS or not all(map(math.isfinite, evidence.answered)):
        return 0.0
    if evidence.claimed_samples > evidence.given_samples:
        return 0.0
    fits = ramp(evidence.fit, LEAST_FIT, FULL_FIT)
    learns = ramp(evidence.learning, LEAST_LEARNING, FULL_LEARNING)
    return fits * learns


def shortfalls(evidence: Evidence) -> list[str]:
    """Why a score is below 1, each reason in plain words with what a miner can do; empty when
    nothing is short."""
    steps = len(evidence.trained)
    if steps < FEWEST_STEPS:
        return [
            f"fewer than {FEWEST_STEPS} of its losses belong to the epoch's state, so nothing can "
            "be compared: train whole requests, and keep up with the swarm (see catch_up)"
        ]
    if len(evidence.answered) != steps or len(evidence.untrained) != steps:
        return [
            f"{len(evidence.answered)} losses were answered where a replay has {steps}: answer one "
            "for each step"
        ]
    if not all(map(math.isfinite, evidence.answered)):
        return ["a loss was answered that is no finite number: look at the miner's log for NaN"]
    reasons = []
    if evidence.claimed_samples > evidence.given_samples:
        reasons.append(
            f"{evidence.claimed_samples} rows are claimed and {evidence.given_samples} were given"
        )
    if evidence.fit < FULL_FIT:
        reasons.append(
            f"fit {evidence.fit:.2f} of {FULL_FIT}: the losses do not rise and fall with these "
            "rows, so they are other rows', or the weights are far from the swarm's: see the "
            "miner's log for diverged and catch_up"
        )
    if evidence.learning < FULL_LEARNING:
        reasons.append(
            f"learning {evidence.learning:.2f} of {FULL_LEARNING}: the losses hardly fall as "
            "training makes them: steps were skipped or thrown away, or begun from other weights"
        )
    return reasons


def fit(answered: Sequence[float], trained: Sequence[float]) -> float:
    """1 - Var(answered - trained) / Var(trained), trends taken off, at least -10.

    The trend of the difference is the miner's: it has trained other rows since the epoch
    began, and the validator's copy has not.
    """
    spread = _variance(_without_trend(trained))
    rest = _variance(_without_trend([a - t for a, t in zip(answered, trained, strict=True)]))
    if spread < 1e-12:
        return 1.0 if rest < 1e-12 else -10.0
    return max(-10.0, 1.0 - rest / spread)


def learning(
    answered: Sequence[float], *, trained: Sequence[float], untrained: Sequence[float]
) -> float:
    """The x that brings untrained + x * (trained - untrained) closest to the answer.

    Least squares twice, with and without a common offset, and the mean of both. Without,
    it also sees what was learnt since the epoch began; with, it is not moved by how old
    the validator's copy is. Clipped to [-2, 2].
    """
    gains = [u - t for u, t in zip(untrained, trained, strict=True)]
    shown = [u - a for u, a in zip(untrained, answered, strict=True)]
    return (_clip(_slope(shown, gains)) + _clip(_slope(_centred(shown), _centred(gains)))) / 2


def ramp(value: float, low: float, high: float) -> float:
    """0 up to `low`, 1 from `high` on, straight in between."""
    return min(1.0, max(0.0, (value - low) / (high - low)))


@dataclass
class Standing:
    """What is known of one hotkey: the averaged score, and the work it answered for."""

    score: float = 0.0
    replays: int = 0
    tokens: float = 0.0
    """Claimed tokens, old ones fading."""

    def add_score(self, value: float) -> None:
        """Take one replayed answer into the average."""
        self.replays += 1
        self.score += (value - self.score) / min(float(self.replays), AVERAGE_OVER)


@dataclass
class ScoreTable:
    """Scores by hotkey: uids are recycled, and a newcomer must not inherit.

    A hotkey's weight is its averaged score (a ramp of it: nothing up to LEAST_AVERAGE)
    times the tokens it answered for, so that work counts and unproved work does not:
    without a replay the score is zero.
    """

    standings: dict[str, Standing] = field(default_factory=dict)
    fade: float = 0.9

    def of(self, hotkey: str) -> Standing:
        return self.standings.setdefault(hotkey, Standing())

    def add_work(self, hotkey: str, tokens: int) -> None:
        """Count the tokens of an answer."""
        self.of(hotkey).tokens += tokens

    def add_score(self, hotkey: str, value: float) -> None:
        self.of(hotkey).add_score(value)

    def fade_work(self) -> None:
        """Let old work count less; call it each time weights are set."""
        for standing in self.standings.values():
            standing.tokens *= self.fade

    def keep(self, hotkeys: set[str]) -> None:
        """Forget who is no longer registered."""
        for gone in set(self.standings) - hotkeys:
            del self.standings[gone]

    def weights(self) -> dict[str, float]:
        """Weight by hotkey, summing to 1; empty when nobody has earned any."""
        earned = {
            who: ramp(s.score, LEAST_AVERAGE, FULL_AVERAGE) * s.tokens
            for who, s in self.standings.items()
        }
        total = sum(earned.values())
        return {who: value / total for who, value in earned.items() if value > 0} if total else {}

    def dump(self) -> dict[str, dict[str, float]]:
        return {
            who: {"score": s.score, "replays": s.replays, "tokens": s.tokens}
            for who, s in list(self.standings.items())  # answers may come in meanwhile
        }

    @classmethod
    def restore(cls, said: Mapping[str, Mapping[str, float]]) -> ScoreTable:
        """The table that `dump` wrote. Raises ValueError for anything else."""
        if not isinstance(said, Mapping):
            raise ValueError("the scores are no table")
        return cls({who: _standing(who, row) for who, row in said.items()})


def _standing(who: str, row: Mapping[str, float]) -> Standing:
    try:
        score, replays, tokens = float(row["score"]), int(row["replays"]), float(row["tokens"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(f"the scores of {who} cannot be read") from None
    if not 0 <= score <= 1 or replays < 0 or not 0 <= tokens < math.inf:
        raise ValueError(f"the scores of {who} are out of bounds")
    return Standing(score, replays, tokens)


def _slope(values: Sequence[float], along: Sequence[float]) -> float:
    power = sum(x * x for x in along)
    return sum(v * x for v, x in zip(values, along, strict=True)) / power if power else 0.0


def _clip(value: float) -> float:
    return min(2.0, max(-2.0, value))


def _centred(values: Sequence[float]) -> list[float]:
    mean = sum(values) / len(values)
    return [value - mean for value in values]


def _without_trend(values: Sequence[float]) -> list[float]:
    places = np.linspace(-1.0, 1.0, len(values))
    degree = min(TREND, max(0, len(values) - 2))
    trend = np.polynomial.polynomial.polyval(
        places, np.polynomial.polynomial.polyfit(places, values, degree)
    )
    return [float(value - at) for value, at in zip(values, trend, strict=True)]


def _variance(values: Sequence[float]) -> float:
    return sum(value * value for value in _centred(values)) / len(values)
