"""Scores by hotkey, the weights that follow from them, and their checkpoints."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hiveminer.runtime import events
from hiveminer.training.checkpoint import Checkpoints, of_run
from hiveminer.validation.curves import ramp

logger = logging.getLogger(__name__)

LEAST_AVERAGE = 0.25
"""An averaged score up to this earns nothing, however much work is claimed."""

FULL_AVERAGE = 0.75
"""An averaged score from here on is paid in full."""

DOUBTS = 3
"""Replays without a verdict before a hotkey that was never judged gets the benefit of the doubt: a
cheat is caught by its third answer at the latest."""

AVERAGE_OVER = 4.0
"""The weight of a new score in the average is one over this, or over the number of scores."""


@dataclass
class Standing:
    """One hotkey's averaged score and work.

    replays: answers that were judged. tokens: of its answers, old ones decayed.
    """

    score: float = 0.0
    replays: int = 0
    tokens: float = 0.0
    unjudged: int = field(default=0, compare=False)

    @property
    def is_known(self) -> bool:
        """Whether an answer was replayed, even if without a verdict."""
        return self.replays > 0 or self.score > 0

    def add_score(self, value: float) -> None:
        self.replays += 1
        self.score += (value - self.score) / min(float(self.replays), AVERAGE_OVER)


@dataclass
class ScoreTable:
    """Scores by hotkey, since uids are recycled.

    A hotkey's weight is a ramp of its averaged score times the tokens of its answers; without a
    replay the score is zero.
    """

    standings: dict[str, Standing] = field(default_factory=dict)
    decay: float = 0.9

    def of(self, hotkey: str) -> Standing:
        return self.standings.setdefault(hotkey, Standing())

    def add_work(self, hotkey: str, tokens: int) -> None:
        self.of(hotkey).tokens += tokens

    def add_score(self, hotkey: str, value: float) -> None:
        self.of(hotkey).add_score(value)

    def add_unjudged(self, hotkey: str) -> None:
        """Count a replay without a verdict. After DOUBTS of them a hotkey is paid until it is
        judged."""
        standing = self.of(hotkey)
        standing.unjudged += 1
        if not standing.replays and standing.unjudged >= DOUBTS:
            standing.score = 1.0

    def decay_work(self) -> None:
        """Reduce the weight of old work; called each time weights are set."""
        for standing in self.standings.values():
            standing.tokens *= self.decay

    def retain(self, hotkeys: Iterable[str]) -> None:
        """Delete all other hotkeys."""
        for gone in set(self.standings) - set(hotkeys):
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
    def restore(cls, saved: Mapping[str, Mapping[str, float]]) -> ScoreTable:
        """The table that `dump` wrote. Raises ValueError for anything else."""
        if not isinstance(saved, Mapping):
            raise ValueError("the scores are not a table")
        return cls({who: _standing(who, row) for who, row in saved.items()})


class SavedScores:
    """The checkpoints of a run's scores."""

    def __init__(self, checkpoints: Checkpoints, *, run_id: str):
        self.checkpoints = checkpoints
        self.run_id = run_id
        self._newest: dict[str, Any] | None = None

    def load(self) -> ScoreTable:
        """The newest valid scores of this run, or an empty table."""
        found = self.checkpoints.load(of_run(self.run_id))
        if found is None:
            return ScoreTable()
        try:
            table = ScoreTable.restore(found.metadata["scores"])
        except (KeyError, ValueError) as error:
            events.tell(logger, "checkpoint", f"{found.name} is not used: {error!s:.200}")
            return ScoreTable()
        logger.info("resumed %d scores, from %s", len(table.standings), found.name)
        return table

    def save(self, table: ScoreTable) -> None:
        """Write a checkpoint, unless the newest one is the same."""
        metadata = {"run_id": self.run_id, "scores": table.dump()}
        saved = metadata == self._newest or self.checkpoints.save(None, metadata) is not None
        if saved:
            self._newest = metadata


def _standing(who: str, row: Mapping[str, float]) -> Standing:
    try:
        score, replays, tokens = float(row["score"]), int(row["replays"]), float(row["tokens"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise ValueError(f"the scores of {who} cannot be read") from None
    if not 0 <= score <= 1 or replays < 0 or not 0 <= tokens < math.inf:
        raise ValueError(f"the scores of {who} are out of bounds")
    return Standing(score, replays, tokens)
