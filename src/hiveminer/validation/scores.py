"""Scores by hotkey, the weights that follow from them, and their checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, TypeAdapter, ValidationError

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

DECAY = 0.9
"""Of old work, each time weights are set."""

AVERAGE_OVER = 4.0
"""The weight of a new score in the average is one over this, or over the number of scores."""


class Standing(BaseModel):
    """One hotkey's averaged score and work, as it is saved.

    replays: answers that were judged. tokens: of its answers, old ones decayed.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    score: float = Field(ge=0, le=1)
    replays: int = Field(ge=0)
    tokens: float = Field(ge=0)
    _unjudged: int = PrivateAttr(default=0)


_STANDINGS = TypeAdapter(dict[str, Standing])


@dataclass
class ScoreTable:
    """Scores by hotkey, since uids are recycled.

    A hotkey's weight is a ramp of its averaged score times the tokens of its answers; without a
    replay the score is zero.
    """

    standings: dict[str, Standing] = field(default_factory=dict)

    def of(self, hotkey: str) -> Standing:
        return self.standings.setdefault(hotkey, Standing(score=0.0, replays=0, tokens=0.0))

    def add_work(self, hotkey: str, tokens: int) -> None:
        self.of(hotkey).tokens += tokens

    def add_score(self, hotkey: str, value: float) -> None:
        standing = self.of(hotkey)
        standing.replays += 1
        standing.score += (value - standing.score) / min(float(standing.replays), AVERAGE_OVER)

    def add_unjudged(self, hotkey: str) -> None:
        """Count a replay without a verdict. After DOUBTS of them a hotkey is paid until it is
        judged."""
        standing = self.of(hotkey)
        standing._unjudged += 1
        if not standing.replays and standing._unjudged >= DOUBTS:
            standing.score = 1.0

    def decay_work(self) -> None:
        """Reduce the weight of old work; called each time weights are set."""
        for standing in self.standings.values():
            standing.tokens *= DECAY

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
        # A copy, since answers may come in meanwhile.
        return {who: s.model_dump() for who, s in list(self.standings.items())}

    @classmethod
    def restore(cls, saved: object) -> ScoreTable:
        """The table that `dump` wrote. Raises ValueError for anything else."""
        try:
            return cls(_STANDINGS.validate_python(saved))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"the scores cannot be read: {where}: {first['msg']}") from None


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
            table = ScoreTable.restore(found.metadata.get("scores"))
        except ValueError as error:
            events.tell(logger, "checkpoint", f"{found.name} is not used: {error!s:.200}")
            return ScoreTable()
        logger.info("resumed %d scores, from %s", len(table.standings), found.name)
        return table

    def save(self, table: ScoreTable) -> None:
        """Write a checkpoint, unless the newest one is the same."""
        metadata = {"run_id": self.run_id, "scores": table.dump()}
        if metadata != self._newest and self.checkpoints.save(None, metadata) is not None:
            self._newest = metadata
