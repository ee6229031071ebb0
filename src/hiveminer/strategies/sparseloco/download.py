"""Downloads what a peer needs from others: a round's blobs, and a state, which may outlast it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping

import torch

from hiveminer.strategies.sparseloco.apply import State
from hiveminer.strategies.sparseloco.exchange import Exchange
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


class StateDownload:
    """Downloads the parent state of a round.

    number: of the round, if it is known. The other arguments are those of `Exchange.fetch_state`.
    """

    def __init__(
        self,
        exchange: Exchange,
        digest: bytes,
        shapes: Mapping[str, torch.Size],
        *,
        number: int | None,
        timeout_seconds: float,
        idle_seconds: float,
    ):
        self.digest = digest
        self.number = number
        self.state: State | None = None
        """What was downloaded; None if that did not succeed."""

        def fetch() -> None:
            self.state = exchange.fetch_state(
                digest, shapes, timeout_seconds=timeout_seconds, idle_seconds=idle_seconds
            )

        self._thread = threading.Thread(target=fetch, name="state", daemon=True)
        self._thread.start()

    def has_ended(self, *, within_seconds: float) -> bool:
        """Wait this long for the end, and say whether it has come."""
        self._thread.join(within_seconds)
        return not self._thread.is_alive()


class Downloads:
    """What a peer needs from others: the blobs that count, and states."""

    def __init__(self, parts: Parts):
        self._plan, self._log, self._shelf = parts.plan, parts.log, parts.shelf
        self._chain, self._exchange = parts.chain, parts.exchange
        self._download: StateDownload | None = None

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
        if self._download is None:
            seconds = self._plan.rules.schedule.round_blocks * self._chain.block_seconds
            self._download = StateDownload(
                self._exchange,
                wanted,
                self._plan.shapes,
                number=None if decision is None else decision.round,
                timeout_seconds=DOWNLOAD_ROUNDS * seconds,
                idle_seconds=max(FETCH_SECONDS, seconds),
            )
        if not self._download.has_ended(within_seconds=self._seconds_to_decision()):
            return None
        done, self._download = self._download, None
        if done.state is None or done.digest == wanted:
            return done.state
        if done.number is None:
            return None
        self._log.add_state(done.number, done.state)
        for number in (each for each in self._log.rounds() if each >= done.number):
            entry = self._log.entry(number)
            if entry is not None:
                wanted_blobs = decide(self._plan.rules, entry.facts).contributions
                self.blobs(number, wanted_blobs, seconds=self._seconds_to_decision())
        return rebuild(self._log, self._plan, wanted)

    def state(self, digest: bytes) -> State | None:
        """This state, if it comes before the current round is decided."""
        seconds = self._seconds_to_decision()
        return self._exchange.fetch_state(digest, self._plan.shapes, timeout_seconds=seconds)

    def _seconds_to_decision(self) -> float:
        """Until the current round is decided, and at least a block."""
        schedule, head = self._plan.rules.schedule, self._chain.head()
        decided = schedule.marks_block(schedule.round_at(head)) + DECIDED_BLOCKS
        return max(1, decided - head) * self._chain.block_seconds


def download_seconds(size: int, *, blocks: int, block_seconds: float) -> float:
    """Timeout of a download of `size` bytes with this many blocks left."""
    return min(FETCH_SECONDS + size / FETCH_BYTES, max(1, blocks) * block_seconds)
