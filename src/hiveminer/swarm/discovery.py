"""Keeps a peer together with the registered ones: the chain knows who should be there.

Starting and healing a split are the same act, dialling all known addresses at once; here
is when to do it again, and what is to be said of how it went. A peer that nobody answers
trains alone, and so does each part of a DHT that fell apart: neither is an error that
anybody would raise.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection

from hiveminer.runtime.events import tell
from hiveminer.swarm.peer import FOREIGN, Look, Peer

logger = logging.getLogger(__name__)

MEET_AGAIN_SECONDS = 30.0

SOONER_SECONDS = 2.0
"""Who does not answer is dialled again sooner, at first: a neuron that has just registered
speaks only with those who have read so on the chain, and both have to."""

MISSING_SECONDS = 60.0
"""A report has to be missing so long before it is called a split: a peer that has just begun
to work has not reported yet."""


class Neighbours:
    """Whom a peer has to do with.

    peer: ours. again_seconds: known addresses are dialled again after this.
    """

    def __init__(
        self,
        peer: Peer,
        *,
        again_seconds: float = MEET_AGAIN_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.peer = peer
        self._clock = clock
        self._again_seconds = again_seconds
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

    def meet(self, addresses: Collection[str]) -> Look | None:
        """Dial these addresses, when there are new ones or it is time to look again; None
        when neither is so."""
        known = frozenset(addresses)
        if known == self._known and self._clock() < self._next_at:
            return None
        if known != self._known:
            self._pause_seconds = SOONER_SECONDS
        self._known = known
        look = self.peer.look(sorted(known))
        self._next_at = self._clock() + self._pause(look)
        self._tell_count(look)
        self._tell_alone(look)
        self._tell_split(look)
        self._met |= look.answered
        return look

    def compare(self, *, working: int, reporting: int) -> None:
        """Compare how many other peers work in our run with how many report to the DHT that
        they do; to be called after each look."""
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

    def _pause(self, look: Look) -> float:
        """How long to wait before the next look, without new addresses."""
        if not look.silent:
            self._pause_seconds = SOONER_SECONDS
            return self._again_seconds
        pause = min(self._again_seconds, self._pause_seconds)
        self._pause_seconds = 2 * pause
        return pause

    def _tell_count(self, look: Look) -> None:
        counts = len(look.answered), len(look.tried)
        if counts != self._counts:
            logger.info("%d of %d known peers answered", *counts)
        self._counts = counts

    def _tell_alone(self, look: Look) -> None:
        """Once, until somebody answers. Who is there may speak with us at the next look."""
        if look.answered or not look.tried:
            self._alone, self._told_alone = 0, False
            return
        self._alone += 1
        sure = self._alone > 1 or FOREIGN not in look.silent.values()
        if sure and not self._told_alone:
            self._told_alone = True
            reasons = Counter(look.silent.values()).most_common()
            why = ", ".join(f"{count} times: {reason}" for reason, count in reasons)
            tell(
                logger, "peer_start",
                f"none of the {len(look.tried)} known peers answered ({why}), so this peer is "
                "alone",
            )  # fmt: skip

    def _tell_split(self, look: Look) -> None:
        """Of peers that were met before, and were in no part of the DHT that we knew."""
        if self.peer.client_only:  # in no part of it itself: it dials each peer it wants
            return
        before, self._split = self._split, look.joined & self._met
        if self._split:
            again = len(self._split & before)
            names = ", ".join(sorted(self._split)[:3]) + (" ..." if len(self._split) > 3 else "")
            healed = (
                f"not healed for good: {again} of them had left it again" if again else "healed"
            )
            tell(
                logger, "dht_split",
                f"the DHT was split: {len(self._split)} of {len(look.answered)} peers that "
                f"answered were not in our part of it ({names}), and were joined with it; {healed}",
            )  # fmt: skip
