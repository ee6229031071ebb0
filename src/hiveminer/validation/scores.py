"""From scores to weights: what is known of each hotkey, and how it survives a restart."""

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
"""Replays that tell nothing, before a hotkey that was never judged gets the benefit of the
doubt: a cheat that is not caught at once is caught at its second answer or third."""

AVERAGE_OVER = 4.0
"""The weight of a new score in the average is one over this, once there are as many."""


@dataclass
class Standing:
    """What is known of one hotkey: its averaged score, and the work it answered for.

    replays: answers that were judged. tokens: those answered for, old ones decayed.
    """

    score: float = 0.0
    replays: int = 0
    tokens: float = 0.0
    unjudged: int = field(default=0, compare=False)

    @property
    def is_known(self) -> bool:
        """Whether an answer was replayed, if only to find that nothing can be told from it."""
        return self.replays > 0 or self.score > 0

    def add_score(self, value: float) -> None:
        """Take one judged answer into the average."""
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
    decay: float = 0.9

    def of(self, hotkey: str) -> Standing:
        return self.standings.setdefault(hotkey, Standing())

    def add_work(self, hotkey: str, tokens: int) -> None:
        """Count the tokens of an answer."""
        self.of(hotkey).tokens += tokens

    def add_score(self, hotkey: str, value: float) -> None:
        self.of(hotkey).add_score(value)

    def add_unjudged(self, hotkey: str) -> None:
        """An answer was replayed and nothing could be told from it. A hotkey to which that
        happens again and again is paid until it is judged, and that replaces this."""
        standing = self.of(hotkey)
        standing.unjudged += 1
        if not standing.replays and standing.unjudged >= DOUBTS:
            standing.score = 1.0

    def decay_work(self) -> None:
        """Let old work count less; called each time weights are set."""
        for standing in self.standings.values():
            standing.tokens *= self.decay

    def retain(self, hotkeys: Iterable[str]) -> None:
        """Delete all hotkeys but these."""
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
        """The newest sound scores of this run; an empty table without any."""
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
        """Write the scores down, unless the newest checkpoint has the same."""
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
