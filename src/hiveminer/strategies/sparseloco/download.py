"""Downloads what a peer needs from others: a round's blobs, and a state, which may outlast it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable

from hiveminer.strategies.sparseloco.apply import State
from hiveminer.strategies.sparseloco.parts import Parts
from hiveminer.strategies.sparseloco.replay import rebuild
from hiveminer.strategies.sparseloco.rounds import Contribution, Decision, decide
from hiveminer.strategies.sparseloco.shelf import DOWNLOAD_ROUNDS

logger = logging.getLogger(__name__)

FETCH_SECONDS = 60.0
FETCH_BYTES = 1_250_000.0
"""The download of blobs that count is given up after FETCH_SECONDS, and a second more for each
FETCH_BYTES, or when the next cut is due. That of a state is given up when nothing has come for
FETCH_SECONDS or a round."""

DECIDED_BLOCKS = 3
"""From a round's last block to its decision."""


class Downloads:
    """What a peer needs from others: the blobs that count, and states."""

    def __init__(self, parts: Parts):
        self._plan, self._log, self._shelf = parts.plan, parts.log, parts.shelf
        self._chain, self._exchange = parts.chain, parts.exchange
        self._thread: threading.Thread | None = None
        self._begun: tuple[bytes, Decision | None] = b"", None
        """The state that the thread downloads, and the decision that named it."""
        self._downloaded: State | None = None

    def blobs(self, number: int, wanted: Iterable[Contribution], *, seconds: float) -> None:
        """Fetch blobs into the log, and serve them from now on."""

        def keep(which: Contribution, blob: bytes) -> None:
            try:
                self._log.add_blob(blob)
            except OSError as error:
                logger.warning("a blob cannot be saved: %s", error)
                return
            self._shelf.serve(number, which.uid, which.blob_hash)

        missing = []
        for each in wanted:
            if self._log.blob(each.blob_hash) is None:
                missing.append(each)
            else:
                self._shelf.serve(number, each.uid, each.blob_hash)
        if missing:
            self._exchange.fetch_blobs(number, missing, keep=keep, timeout_seconds=seconds)

    def missing_state(self, wanted: bytes, decision: Decision | None) -> State | None:
        """The state that is missing, from other peers. It is waited for until the next round is
        decided. What arrives later leads to the state that is missing then, by the blobs since."""
        if self._thread is None:
            self._begun = wanted, decision
            self._thread = threading.Thread(target=self._download, name="state", daemon=True)
            self._thread.start()
        self._thread.join(self._seconds_to_decision())
        if self._thread.is_alive():
            return None
        (digest, named_by), state = self._begun, self._downloaded
        self._thread = self._downloaded = None
        if state is None or digest == wanted:
            return state
        if named_by is None:
            return None
        self._log.add_state(named_by.round, state)
        for number in (each for each in self._log.rounds() if each >= named_by.round):
            entry = self._log.entry(number)
            if entry is not None:
                wanted_blobs = decide(self._plan.rules, entry.facts).contributions
                self.blobs(number, wanted_blobs, seconds=self._seconds_to_decision())
        return rebuild(self._log, self._plan, wanted)

    def _download(self) -> None:
        seconds = self._plan.rules.schedule.round_blocks * self._chain.block_seconds
        self._downloaded = self._exchange.fetch_state(
            self._begun[0],
            self._plan.shapes,
            timeout_seconds=DOWNLOAD_ROUNDS * seconds,
            idle_seconds=max(FETCH_SECONDS, seconds),
        )

    def state(self, digest: bytes) -> State | None:
        """This state, if it comes before the current round is decided."""
        seconds = self._seconds_to_decision()
        return self._exchange.fetch_state(digest, self._plan.shapes, timeout_seconds=seconds)

    def _seconds_to_decision(self) -> float:
        """Until the current round is decided, and at least a block."""
        schedule, head = self._plan.rules.schedule, self._chain.head()
        decided = schedule.marks_block(schedule.round_at(head)) + DECIDED_BLOCKS
        return max(1, decided - head) * self._chain.block_seconds
