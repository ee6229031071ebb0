"""How far a miner has come, over restarts: what it has trained, and when that is written down.

A checkpoint is taken between two steps: copied in the training thread, which takes a moment,
and written in a thread of its own. One is due when an epoch begins, since the weights are
then the swarm's, and within an epoch that lasts long; the last one is taken at the end, in
the middle of an epoch or not.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from hiveminer.__version__ import __version__
from hiveminer.errors import SwarmError
from hiveminer.runtime import events
from hiveminer.strategies.base import Strategy
from hiveminer.training.checkpoint import Checkpoints, of_run
from hiveminer.training.trainer import TrainResult

logger = logging.getLogger(__name__)

LONG_EPOCH = 10
"""An epoch that lasts so many times as long as two checkpoints are apart has one within."""

STEP_SECONDS = 60.0
LAST_STEP_SECONDS = 2.0
"""So long a checkpoint, and the last one, waits for a running step."""

LAST_SECONDS = 10.0
"""So long the end waits for the last snapshot: what it wants of hivemind may be dead."""

WRITE_SECONDS = 15.0
WRITE_BYTES = 25e6
"""Writing is given up after so long, and a second more for each WRITE_BYTES."""


@dataclass
class Trained:
    """What was trained in all: requests answered, rows and real tokens.

    running: rows of the request that is being trained, which are not in `rows` yet.
    """

    requests: int = 0
    rows: int = 0
    tokens: int = 0
    running: int = 0

    @property
    def all_rows(self) -> int:
        return self.rows + self.running


class Progress:
    """A miner's counts, and its checkpoints.

    strategy: before it has joined the others. run_id: another run's checkpoints are
    refused. every_seconds: two checkpoints are this far apart at least.

    All but `keep_last` and `close` is called in the thread that trains.
    """

    def __init__(
        self,
        strategy: Strategy,
        checkpoints: Checkpoints,
        *,
        run_id: str,
        every_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.strategy = strategy
        self.checkpoints = checkpoints
        self.run_id = run_id
        self.every_seconds = every_seconds
        self.trained = Trained()
        self._clock = clock
        self._kept_at = clock()
        self._epoch_began = False
        self._kept = self._began = self._place
        self._last: str | None = None
        self._bytes = 0

    @property
    def write_seconds(self) -> float:
        """How long writing what was last taken may take."""
        return WRITE_SECONDS + self._bytes / WRITE_BYTES

    @property
    def _place(self) -> tuple[int, int]:
        """Changes whenever there is something new to keep."""
        return self.strategy.epoch, self.trained.all_rows

    def resume(self) -> bool:
        """Go on from the newest sound checkpoint of this run; whether there was one."""
        found = self.checkpoints.load(of_run(self.run_id))
        if found is None:
            return False
        try:
            trained = read_trained(found.metadata)
            self.strategy.load_state_dict(found.tensors, found.metadata["swarm"])
        except (ValueError, KeyError, TypeError) as error:
            events.tell(logger, "checkpoint", f"{found.name} is not used: {error!s:.200}")
            return False
        self.trained = trained
        self._kept = self._began = self._place
        logger.info("resumed %s, from %s", self._words(found.metadata), found.name)
        return True

    def request(self) -> None:
        """A request begins."""
        self.trained.rows += self.trained.running
        self.trained.running = 0

    def step(self, rows: int) -> None:
        """A step of the request was taken."""
        self.trained.running += rows
        self.keep_if_due()

    def answered(self, result: TrainResult) -> None:
        """The request came to its end."""
        self.trained.requests += 1
        self.trained.rows += result.samples
        self.trained.tokens += result.tokens
        self.trained.running = 0
        self.keep_if_due()

    def epoch_began(self) -> None:
        """The swarm's epoch has ended, and the next begun; called within the step that did it."""
        self._epoch_began = True

    def keep_if_due(self) -> None:
        """Begin to write a checkpoint, if there is something new and it is time."""
        pause = self.every_seconds * (1 if self._epoch_began else LONG_EPOCH)
        if self._clock() - self._kept_at < pause or self._place == self._kept:
            return
        if not self.checkpoints.writing:
            self._keep(timeout_seconds=STEP_SECONDS)

    def keep_last(self) -> None:
        """Begin to write the state of this moment, also beside another that is being written."""
        if self._place == self._began:
            return

        def keep() -> None:
            self._last = self._keep(timeout_seconds=LAST_STEP_SECONDS, must=True)

        taking = threading.Thread(target=keep, name="last-snapshot", daemon=True)
        taking.start()
        taking.join(LAST_SECONDS)
        if taking.is_alive():
            cause = f"no checkpoint was taken at the end: that hung for {LAST_SECONDS:.0f} s"
            events.tell(logger, "checkpoint", cause)

    def close(self) -> None:
        """Wait for what is being written, `write_seconds` at most."""
        seconds = self.write_seconds
        if not self.checkpoints.close(seconds):
            cause = f"the last checkpoint was not written within {seconds:.0f} s"
            events.tell(logger, "checkpoint", cause)
        elif self._last is not None and self.checkpoints.newest is not None:
            logger.info("kept %s, in %s", self._last, self.checkpoints.newest)

    def _keep(self, *, timeout_seconds: float, must: bool = False) -> str | None:
        """What is being written, in words; None when nothing is."""
        try:
            tensors, said = self.strategy.state_dict(timeout_seconds=timeout_seconds)
        except (SwarmError, RuntimeError, MemoryError) as error:
            # PyTorch says so when memory runs out.
            events.tell(logger, "checkpoint", f"no checkpoint was taken: {error!s:.200}")
            self._kept_at = self._clock()
            return None
        facts = self._facts(said)
        self._bytes = sum(tensor.nbytes for tensor in tensors.values())
        if not self.checkpoints.save_later(tensors, facts, must=must):
            return None
        self._kept, self._kept_at, self._epoch_began = self._place, self._clock(), False
        return self._words(facts)

    def _facts(self, said: dict[str, Any]) -> dict[str, Any]:
        trained = asdict(self.trained)
        trained["rows"] += trained.pop("running")
        return {
            "run_id": self.run_id,
            "version": __version__,
            "written_at": round(time.time(), 3),
            "trained": trained,
            "swarm": said,
        }

    def _words(self, facts: dict[str, Any]) -> str:
        swarm, rows = facts["swarm"], facts["trained"]["rows"]
        return f"epoch {swarm['epoch']} with {swarm['rows']} rows of it, {rows} rows in all"


def read_trained(facts: dict[str, Any]) -> Trained:
    """The counts of a checkpoint. Raises ValueError for what are none."""
    said = facts.get("trained")
    names = {"requests", "rows", "tokens"}
    if not isinstance(said, dict) or set(said) != names:
        raise ValueError("it does not say what was trained")
    if not all(type(count) is int and count >= 0 for count in said.values()):
        raise ValueError("its counts are out of bounds")
    return Trained(**said)
