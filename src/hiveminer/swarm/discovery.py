"""Keeps a peer connected with the registered ones, by dialing the addresses on chain.

A peer that nobody answers trains alone, and so does each part of a DHT that is split: neither
raises an error, so both are reported here.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection

from hiveminer.runtime.events import tell
from hiveminer.swarm.peer import FOREIGN, DialResult, Peer

logger = logging.getLogger(__name__)

MEET_AGAIN_SECONDS = 30.0

SOONER_SECONDS = 2.0
"""First interval for a peer that does not answer: it may not have read on chain yet that we are
registered."""

MISSING_SECONDS = 60.0
"""How long a report may be missing before it counts as a split: a peer that has just begun to
work has not reported yet."""


class Discovery:
    """Dials the known addresses of other peers every MEET_AGAIN_SECONDS, and reports problems."""

    def __init__(self, peer: Peer, *, clock: Callable[[], float] = time.monotonic):
        self.peer = peer
        self._clock = clock
        self._known: frozenset[str] | None = None
        self._next_at = 0.0
        self._pause_seconds = SOONER_SECONDS
        self._met: frozenset[str] = frozenset()
        self._split: frozenset[str] = frozenset()
        self._alone = 0
        self._told_alone = False
        self._missing_since: float | None = None
        self._told_missing = False
        self._counts = (0, 0)

    def meet(self, addresses: Collection[str]) -> DialResult | None:
        """Dial these addresses if there are new ones or it is due; None otherwise."""
        known = frozenset(addresses)
        if known == self._known and self._clock() < self._next_at:
            return None
        if known != self._known:
            self._pause_seconds = SOONER_SECONDS
        self._known = known
        result = self.peer.dial(sorted(known))
        if result.silent:
            pause = min(MEET_AGAIN_SECONDS, self._pause_seconds)
            self._pause_seconds = 2 * pause
        else:
            pause, self._pause_seconds = MEET_AGAIN_SECONDS, SOONER_SECONDS
        self._next_at = self._clock() + pause
        counts = len(result.answered), len(result.tried)
        if counts != self._counts:
            logger.info("%d of %d known peers answered", *counts)
        self._counts = counts
        self._report_alone(result)
        self._report_split(result)
        self._met |= result.answered
        return result

    def compare(self, *, working: int, reporting: int) -> None:
        """Compare how many other peers work in our run with how many report it in the DHT."""
        missing = working - reporting
        if missing <= 0:
            if self._told_missing:
                logger.info("all %d peers that work report in our part of the DHT again", working)
            self._missing_since, self._told_missing = None, False
            return
        if self._missing_since is None:
            self._missing_since = self._clock()
        long = self._clock() - self._missing_since >= MISSING_SECONDS
        if long and not self._told_missing:
            self._told_missing = True
            tell(
                logger, "dht_split",
                f"{missing} of {working} peers of this run that answer do not report in our part "
                "of the DHT: it is split and not healed yet, or they have no work",
            )  # fmt: skip

    def _report_alone(self, result: DialResult) -> None:
        """Report once, until somebody answers, that nobody does."""
        if result.answered or not result.tried:
            self._alone, self._told_alone = 0, False
            return
        self._alone += 1
        sure = self._alone > 1 or FOREIGN not in result.silent.values()
        if sure and not self._told_alone:
            self._told_alone = True
            reasons = Counter(result.silent.values()).most_common()
            why = ", ".join(f"{count} times: {reason}" for reason, count in reasons)
            tell(
                logger, "peer_start",
                f"none of the {len(result.tried)} known peers answered ({why}), so this peer is "
                "alone",
            )  # fmt: skip

    def _report_split(self, result: DialResult) -> None:
        """Report peers that were met before, and had left our part of the DHT."""
        if self.peer.client_only:  # in no part of it itself: it dials each peer it wants
            return
        before, self._split = self._split, result.joined & self._met
        if self._split:
            again = len(self._split & before)
            names = ", ".join(sorted(self._split)[:3]) + (" ..." if len(self._split) > 3 else "")
            healed = (
                f"not healed for good: {again} of them had left it again" if again else "healed"
            )
            tell(
                logger, "dht_split",
                f"the DHT was split: {len(self._split)} of {len(result.answered)} peers that "
                f"answered were not in our part of it ({names}), and were joined with it; {healed}",
            )  # fmt: skip
