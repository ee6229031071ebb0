"""Failure detector for averaging rounds: leaves out members that are gone, during the round.

Hivemind waits for a dead partner until the whole round times out. A live peer answers pings, and
reports to the DHT from a background thread, however busy it is; one that fails to in two checks is
left out until its next report. And if no other peer is in our epoch, nobody will join our round.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from hiveminer.runtime.events import tell
from hiveminer.strategies.hivemind.tracker import SampleTracker
from hiveminer.swarm.peer import Peer

logger = logging.getLogger(__name__)

FIRST_CHECK_SECONDS = 0.7
"""Rounds that end sooner are not checked."""

CHECK_SECONDS = 0.5
"""Between two checks."""

PING_SECONDS = 2.0
"""A peer that has not answered within this has missed a check."""

MISSES = 2
"""Checks in a row that a peer misses before it is left out."""


class Group(NamedTuple):
    """The running round: its id, empty when none runs, and its other members."""

    id: bytes = b""
    members: frozenset[str] = frozenset()


@dataclass(kw_only=True)
class FailureDetector:
    """Checks the peers during rounds, in a background thread.

    is_running: whether a round is running. group: its members, as far as they are known.
    on_lost: called with peers that are gone, after the tracker has left them out.
    on_deserted: called when nobody will join the round.
    """

    peer: Peer
    tracker: SampleTracker
    is_running: Callable[[], bool]
    group: Callable[[], Group]
    on_lost: Callable[[set[str]], None]
    on_deserted: Callable[[], None]

    def __post_init__(self) -> None:
        self._busy = threading.Event()
        self._free = threading.Event()
        self._closed = threading.Event()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="swarm-reports")
        self.thread = threading.Thread(target=self._run, name="failure-detector", daemon=True)
        self.thread.start()

    @contextmanager
    def during(self) -> Iterator[None]:
        """Context of a step, which may end in a round."""
        self._free.clear()
        self._busy.set()
        try:
            yield
        finally:
            self._busy.clear()
            self._free.set()

    def close(self) -> None:
        self._closed.set()
        self._busy.set()
        self._free.set()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        while True:
            self._busy.wait()
            if self._closed.is_set():
                return
            if not self._free.wait(FIRST_CHECK_SECONDS):
                try:
                    self._watch()
                except RuntimeError as error:
                    if not self._closed.is_set():
                        raise
                    logger.debug("closed in the middle of a check: %r", error)

    def _watch(self) -> None:
        """Check until the round ends, and once more if somebody has missed a check by then."""
        misses: dict[str, int] = {}  # of the peers that are watched
        left_out: set[str] = set()
        group = Group()
        while not self._free.wait(CHECK_SECONDS) or any(misses.values()):
            if self._closed.is_set():
                return
            ended = self._free.wait(0)
            if not ended and not self.is_running():
                continue
            reporting = set(self.tracker.reports.seconds) - {self.peer.peer_id}
            before, group = group, self.group()
            # A peer that was left out is watched again once it reports anew, or is a member of
            # another round: the averager takes back whoever joins a group.
            left_out = left_out - reporting if group.id == before.id else set()
            watched = misses.keys() | reporting | (group.members - left_out)
            alive = self._alive(watched)
            misses = {peer: 0 if peer in alive else misses.get(peer, 0) + 1 for peer in watched}
            lost = {peer for peer in watched if misses[peer] >= MISSES}
            if lost:
                misses = {peer: misses[peer] for peer in watched - lost}
                left_out |= lost
                self._leave_out(lost, left=len(misses))
            if ended:
                return
            epochs, ours = self.tracker.reports.epochs, self.tracker.local_progress.epoch
            if all(epochs.get(peer, ours) != ours for peer in misses):
                self.on_deserted()

    def _alive(self, expected: set[str]) -> set[str]:
        """Those of these peers that answer a ping and report to the DHT."""
        reading = self._executor.submit(self.tracker.refresh, timeout_seconds=PING_SECONDS)
        answering = self.peer.answering(expected, timeout_seconds=PING_SECONDS)
        reporting = reading.result()
        return answering if reporting is None else answering & reporting

    def _leave_out(self, lost: set[str], *, left: int) -> None:
        for peer in sorted(lost):
            self.tracker.leave_out(peer)
            rest = f"{left + 1} peers are left" if left else "no other peer is left"
            cause = f"peer {peer} no longer answers or reports"
            tell(logger, "no_group", f"{cause}: it is left out, {rest}")
        self.on_lost(lost)
