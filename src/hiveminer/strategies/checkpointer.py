"""Counts what a miner has trained, across restarts, and schedules its checkpoints.

A checkpoint is copied in the training thread between two steps, and written in a background
thread: when an epoch begins, since the weights are then the swarm's, within a long epoch, and at
the end.
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
"""Within an epoch, checkpoints are this many times as far apart."""

STEP_SECONDS = 60.0
LAST_STEP_SECONDS = 2.0
"""How long a checkpoint, and the last one, waits for a running step."""

LAST_SECONDS = 10.0
"""How long the shutdown waits for the last snapshot: Hivemind's processes may be dead."""

WRITE_SECONDS = 15.0
WRITE_BYTES = 25e6
"""Writing is abandoned after WRITE_SECONDS, and a second more for each WRITE_BYTES."""


@dataclass
class Trained:
    """Totals: requests answered, rows and real tokens."""

    requests: int = 0
    rows: int = 0
    tokens: int = 0


class Progress:
    """A miner's counts and checkpoints.

    strategy: before it has joined. run_id: checkpoints of other runs are refused. every_seconds:
    minimum between two checkpoints.

    All but `keep_last` and `close` is called in the training thread.
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
        self.last_seconds = LAST_SECONDS
        self.trained = Trained()
        self._rows_before = 0
        self._clock = clock
        self._kept_at = clock()
        self._epoch_began = False
        self._kept = self._began = self._place
        self._last: str | None = None
        self._bytes = 0

    @property
    def write_seconds(self) -> float:
        """The limit for writing the last snapshot."""
        return WRITE_SECONDS + self._bytes / WRITE_BYTES

    @property
    def _place(self) -> tuple[int, int]:
        """Changes whenever there is something new to save."""
        return self.strategy.epoch, self.trained.rows

    def resume(self) -> bool:
        """Resume from the newest valid checkpoint of this run; returns whether there was one."""
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
        """Called when a request begins."""
        self._rows_before = self.trained.rows

    def step(self, rows: int) -> None:
        """Called after each step of a request."""
        self.trained.rows += rows
        self.keep_if_due()

    def answered(self, result: TrainResult) -> None:
        """Called after a request. Rows of steps that were discarded do not count."""
        self.trained.requests += 1
        self.trained.rows = self._rows_before + result.samples
        self.trained.tokens += result.tokens
        self.keep_if_due()

    def epoch_began(self) -> None:
        """Called within the step that ends the swarm's epoch."""
        self._epoch_began = True

    def keep_if_due(self) -> None:
        """Start to write a checkpoint, if there is something new and one is due."""
        pause = self.every_seconds * (1 if self._epoch_began else LONG_EPOCH)
        if self._clock() - self._kept_at < pause or self._place == self._kept:
            return
        if not self.checkpoints.writing:
            self._keep(timeout_seconds=STEP_SECONDS)

    def keep_last(self) -> None:
        """Start to write the current state, even while another is being written."""
        if self._place == self._began:
            return

        def keep() -> None:
            self._last = self._keep(timeout_seconds=LAST_STEP_SECONDS, must=True)

        taking = threading.Thread(target=keep, name="last-snapshot", daemon=True)
        taking.start()
        taking.join(self.last_seconds)
        if taking.is_alive():
            cause = f"no checkpoint was taken at the end: that hung for {self.last_seconds:.0f} s"
            events.tell(logger, "checkpoint", cause)

    def close(self) -> None:
        """Wait for running writes, at most `write_seconds`."""
        seconds = self.write_seconds
        if not self.checkpoints.close(seconds):
            cause = f"the last checkpoint was not written within {seconds:.0f} s"
            events.tell(logger, "checkpoint", cause)
        elif self._last is not None and self.checkpoints.newest is not None:
            logger.info("kept %s, in %s", self._last, self.checkpoints.newest)

    def _keep(self, *, timeout_seconds: float, must: bool = False) -> str | None:
        """Take and start to write a checkpoint; what it is, in words, or None."""
        try:
            tensors, said = self.strategy.state_dict(timeout_seconds=timeout_seconds)
        except (SwarmError, RuntimeError, MemoryError) as error:
            # RuntimeError: PyTorch has run out of memory.
            events.tell(logger, "checkpoint", f"no checkpoint was taken: {error!s:.200}")
            self._kept_at = self._clock()
            return None
        facts = {
            "run_id": self.run_id,
            "version": __version__,
            "written_at": round(time.time(), 3),
            "trained": asdict(self.trained),
            "swarm": said,
        }
        self._bytes = sum(tensor.nbytes for tensor in tensors.values())
        if not self.checkpoints.save_later(tensors, facts, must=must):
            return None
        self._kept, self._kept_at, self._epoch_began = self._place, self._clock(), False
        return self._words(facts)

    def _words(self, facts: dict[str, Any]) -> str:
        swarm, rows = facts["swarm"], facts["trained"]["rows"]
        return f"epoch {swarm['epoch']} with {swarm['rows']} rows of it, {rows} rows in all"


def read_trained(facts: dict[str, Any]) -> Trained:
    """The counts in a checkpoint's metadata. Raises ValueError."""
    said = facts.get("trained")
    if not isinstance(said, dict) or set(said) != {"requests", "rows", "tokens"}:
        raise ValueError("it does not say what was trained")
    if not all(type(count) is int and count >= 0 for count in said.values()):
        raise ValueError("its counts are out of bounds")
    return Trained(**said)
