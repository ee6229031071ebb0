"""Picks answers to replay, and replays them: the result is the evidence."""

from __future__ import annotations

import logging
import random
from collections import defaultdict, deque
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from hiveminer.config.settings import WorkSettings
from hiveminer.errors import HiveminerError, TrainingError
from hiveminer.strategies.base import GlobalState
from hiveminer.training.task import Task
from hiveminer.validation.curves import FEWEST_STEPS, Evidence
from hiveminer.validation.feed import Answered
from hiveminer.validation.replay import Curves, Replayer

logger = logging.getLogger(__name__)

KEPT_STATES = 3
"""Epochs whose state is kept."""

MAX_SAMPLES = 16
"""Answers that wait to be replayed; the oldest is dropped."""

STALE_EPOCHS = 3
"""An answer from an older epoch is not counted as work."""

USUAL_REPLAYS = 6
"""How many of a miner's last replays are its usual ones."""

EVASIONS = 3
"""This many answers in a row that are too short to replay are judged as one worth nothing."""


class States:
    """The global states of the last epochs; at first the run's initial one.

    A donor hands out its state some time after the epoch began, so its optimizer's moments hold the
    gradients of the rows that it has trained. With those, a replay of the same rows would seem to
    gain far more than a miner can. So a donor's own answers are replayed with the moments of the
    state before.
    """

    def __init__(self, first: GlobalState):
        self._states = {first.epoch: first}
        self._moments: dict[str, Any] | None = None
        self._earlier: dict[int, dict[str, Any] | None] = {}
        self.newest = first.epoch

    @property
    def epochs(self) -> Collection[int]:
        """Epochs whose state is known."""
        return self._states.keys()

    def __getitem__(self, epoch: int) -> GlobalState:
        return self._states[epoch]

    def replayed(self, epoch: int, *, hotkey: str) -> GlobalState | None:
        """The state to replay this miner's answers from; None if there is none for a donor."""
        state = self._states[epoch]
        if state.donor != hotkey:
            return state
        moments = self._earlier[epoch]
        if moments is None:
            return None
        return replace(state, optimizer=state.optimizer | {"state": moments})

    def add(self, state: GlobalState, *, wanted: Collection[int]) -> bool:
        """Add a state, and drop old ones, those of wanted epochs a little later. False for an
        epoch that is known already."""
        if state.epoch <= self.newest:
            return False
        self.newest = state.epoch
        self._earlier[state.epoch] = self._moments
        self._moments = state.optimizer.get("state", {})
        self._states[state.epoch] = state
        for old in sorted(self._states)[:-KEPT_STATES]:
            if old not in wanted or old < state.epoch - 2 * KEPT_STATES:
                del self._states[old]
                self._earlier.pop(old, None)
        return True

    def is_timely(self, epoch: int | None, *, now: int) -> bool:
        """Whether an answer's epoch is plausible. now: the run's epoch."""
        now = max(now, self.newest)
        return epoch is not None and now - STALE_EPOCHS <= epoch <= now + 1


class Samples:
    """Answers that wait for a replay: a miner's first ones of an epoch, since later ones began
    further away from the state that the replay begins from."""

    def __init__(self, *, rate: float, chance: random.Random):
        self._rate = rate
        self._chance = chance
        self._waiting: list[Answered] = []
        self._last_epoch: dict[str, int] = {}

    @property
    def epochs(self) -> Collection[int]:
        return {sample.epoch for sample in self._waiting}

    def offer(self, sample: Answered, *, unproved: bool) -> None:
        """Queue an answer by chance, or because nothing is known of its miner yet."""
        if self._last_epoch.get(sample.hotkey) == sample.epoch:
            return
        self._last_epoch[sample.hotkey] = sample.epoch
        waiting = any(other.hotkey == sample.hotkey for other in self._waiting)
        by_chance = self._chance.random() < self._rate
        if (unproved and not waiting) or by_chance:
            self._waiting.append(sample)
            del self._waiting[:-MAX_SAMPLES]

    def next(self, states: States, *, replays: Callable[[str], int]) -> Answered | None:
        """The answer to replay now: of an epoch whose state is known, and the miner with the
        fewest replays. Drops answers whose state will not arrive any more."""
        known = states.epochs
        self._waiting = [s for s in self._waiting if s.epoch >= states.newest or s.epoch in known]
        ready = [sample for sample in self._waiting if sample.epoch in known]
        if not ready:
            return None
        sample = min(ready, key=lambda ready: replays(ready.hotkey))
        self._waiting.remove(sample)
        return sample


class Judge:
    """Replays answers, one at a time."""

    def __init__(self, replayer: Replayer, *, task: Task, stopped: Callable[[], bool]):
        self.replayer = replayer
        self.task = task
        self.stopped = stopped
        self._evasions: dict[str, int] = {}
        self._learnings: dict[str, deque[tuple[float, float]]] = defaultdict(
            lambda: deque(maxlen=USUAL_REPLAYS)
        )

    def judge(self, sample: Answered, state: GlobalState) -> Evidence | None:
        """The evidence on one answer; None without any, or when stopped. Raises TrainingError."""
        if len(sample.losses) < FEWEST_STEPS:
            known = sample.given_steps < FEWEST_STEPS or self._evades(sample.hotkey)
            return evidence(sample, Curves((), ())) if known else None
        self._evasions.pop(sample.hotkey, None)
        curves = self.replayer.curves(
            state,
            texts(self.task, sample.rows),
            batch_size=sample.request.batch_size,
            gradient_accumulation_steps=sample.request.gradient_accumulation_steps,
            stopped=self.stopped,
        )
        return self._beside_the_last(evidence(sample, curves)) if curves is not None else None

    def _beside_the_last(self, found: Evidence) -> Evidence:
        """The same, with the mean of what the miner's last replays say of its learning."""
        weight = found.learning_weight
        if not weight:
            return found
        last = self._learnings[found.hotkey]
        last.append((found.learning, weight))
        total = sum(weight for _, weight in last)
        return replace(found, usual_learning=sum(x * weight for x, weight in last) / total)

    def _evades(self, hotkey: str) -> bool:
        """The swarm's averaging may cut a curve short; but not every time."""
        count = self._evasions.get(hotkey, 0) + 1
        self._evasions[hotkey] = count % EVASIONS
        return count == EVASIONS


def warn_of_short_requests(work: WorkSettings, *, rows: int) -> None:
    """Warn if no answer can be judged. rows: to train on, in the data."""
    rows = min(rows, work.rows)
    steps = -(-rows // (work.batch_size * work.gradient_accumulation_steps))
    if steps < FEWEST_STEPS:
        logger.warning(
            "a request of %d rows is %d optimizer steps, and answers are judged from %d steps on: "
            "every miner that answers is paid; raise --validator.rows, or lower "
            "--validator.batch_size or --validator.gradient_accumulation_steps",
            rows, steps, FEWEST_STEPS,
        )  # fmt: skip


def evidence(sample: Answered, curves: Curves) -> Evidence:
    """An answer beside its replay."""
    return Evidence(
        hotkey=sample.hotkey,
        request_id=sample.request.request_id,
        epoch=sample.epoch,
        answered=sample.losses,
        trained=curves.trained,
        untrained=curves.untrained,
        claimed_samples=sample.answer.samples,
        given_samples=len(sample.request.dataset_indices),
        tokens=sample.answer.tokens,
        given_steps=sample.given_steps,
    )


def credited(answered: Answered, task: Task) -> tuple[int, int]:
    """Rows and tokens that an answer may claim: at most those that it was given.

    Raises TrainingError where they cannot be read.
    """
    given = answered.request.dataset_indices
    rows = given[: min(answered.answer.samples, len(given))]
    if not rows:
        return 0, 0
    tokens = int(task.encode(texts(task, rows))["attention_mask"].sum())
    return len(rows), min(answered.answer.tokens, tokens)


def texts(task: Task, rows: list[int]) -> list[str]:
    """Rows of the data. Raises TrainingError for any reason why they cannot be read."""
    try:
        return task.dataset.texts(rows)
    except HiveminerError:
        raise
    except Exception as error:  # readers raise whatever they meet, and no row ends a validator
        raise TrainingError(f"rows {min(rows)} to {max(rows)} cannot be read: {error}") from error
