"""Looks, while a round is under way, at who is still there.

Hivemind waits for a partner that died until the whole averaging times out. Who is in the
round can be asked: a live peer answers a ping, and reports to the DHT from a thread of its
own however busy it is. A peer that twice does not answer, or whose last report has
expired, is left out, and comes back with its next report. And when none of the others is in
our epoch, nobody will come to a round of ours.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from hiveminer.runtime.events import tell
from hiveminer.strategies.hivemind.tracker import SampleTracker
from hiveminer.swarm.peer import Peer

logger = logging.getLogger(__name__)

FIRST_LOOK_SECONDS = 0.7
"""Rounds that end sooner are not looked at."""

LOOK_SECONDS = 0.5
"""Between two looks."""

PING_SECONDS = 2.0
"""A peer that has not answered within this has missed one look."""

MISSES = 2
"""Looks that a peer may miss, less one."""


class Watch:
    """Watches over rounds in a thread of its own.

    rounding: whether a round is under way now.
    gone: told when peers were left out, after the tracker was.
    deserted: told when nobody is left who would come to the round.
    """

    def __init__(
        self,
        *,
        peer: Peer,
        tracker: SampleTracker,
        rounding: Callable[[], bool],
        gone: Callable[[], None],
        deserted: Callable[[], None],
    ):
        self._peer = peer
        self._tracker = tracker
        self._rounding = rounding
        self._gone = gone
        self._deserted = deserted
        self._busy = threading.Event()
        self._free = threading.Event()
        self._closed = False
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="swarm-look")
        self._thread = threading.Thread(target=self._run, name="swarm-watch", daemon=True)
        self._thread.start()

    @contextmanager
    def over(self) -> Iterator[None]:
        """Around whatever may end in a round."""
        self._free.clear()
        self._busy.set()
        try:
            yield
        finally:
            self._busy.clear()
            self._free.set()

    def close(self) -> None:
        self._closed = True
        self._busy.set()
        self._free.set()
        self._beside.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        while True:
            self._busy.wait()
            if self._closed:
                return
            if not self._free.wait(FIRST_LOOK_SECONDS):
                try:
                    self._watch()
                except RuntimeError as error:  # closed in the middle of a look
                    logger.debug("the look at the peers ended: %r", error)

    def _watch(self) -> None:
        """Look until the round ends, and once more if somebody has missed a look by then."""
        misses: Counter[str] = Counter()
        expected = self._others()
        while not self._free.wait(LOOK_SECONDS) or any(misses.values()):
            if self._closed:
                return
            over = self._free.wait(0)
            if not over and not self._rounding():
                continue
            expected |= self._others()
            here = self._here(expected)
            for peer in expected:
                misses[peer] = 0 if peer in here else misses[peer] + 1
            lost = {peer for peer in expected if misses[peer] >= MISSES}
            if lost:
                self._leave_out(lost, expected - lost)
                expected -= lost
            for peer in lost:
                del misses[peer]
            if over:
                return
            if self._is_deserted(expected):
                self._deserted()

    def _here(self, expected: set[str]) -> set[str]:
        """Those of these peers that answer a ping and report to the DHT."""
        reading = self._beside.submit(self._tracker.look, timeout_seconds=PING_SECONDS)
        answering = self._peer.answering(expected, timeout_seconds=PING_SECONDS)
        reporting = reading.result()
        return answering if reporting is None else answering & reporting

    def _leave_out(self, lost: set[str], left: set[str]) -> None:
        for peer in sorted(lost):
            self._tracker.leave_out(peer)
            rest = f"{len(left) + 1} peers are left" if left else "no other peer is left"
            cause = f"peer {peer} does not answer or report any more"
            tell(logger, "no_group", f"{cause}: it is left out, {rest}")
        self._gone()

    def _is_deserted(self, others: set[str]) -> bool:
        epochs, ours = self._tracker.reports.epochs, self._tracker.local_progress.epoch
        return all(epochs.get(peer, ours) != ours for peer in others)

    def _others(self) -> set[str]:
        return set(self._tracker.reports.seconds) - {self._peer.peer_id}
