"""Which peers an averager deals with: registered, not shunned, and still there.

An `Admission` lives in hivemind's averager process. It asks the DHT's process who has proved
a registered hotkey, and remembers who sent poison and who is gone.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from hivemind.averaging.allreduce import AveragingMode
from hivemind.p2p import PeerID
from hivemind.utils.serializer import MSGPackSerializer

from hiveminer.runtime.events import tell
from hiveminer.swarm.admission import MAX_CACHED
from hiveminer.swarm.admission import Admission as PeerAdmission

logger = logging.getLogger(__name__)

STRIKE_SECONDS = 600.0
"""A peer that is silent twice within this time is shunned."""

MAX_GATHER_BYTES = 1024


class Admission(PeerAdmission):
    """Also knows who is gone from a round.

    dht, on_shun: as in the base class.
    """

    def __init__(self, dht: Any, *, on_shun: Callable[[str], None]):
        super().__init__(dht, on_shun=on_shun)
        self._silent_at: dict[str, float] = {}
        self._gone: dict[str, asyncio.Event] = {}

    def note_silence(self, peer: PeerID, problem: str) -> None:
        """This peer did not do its part in a round: it is gone from it, and shunned the second
        time, for it may be there and mean it."""
        name, now = str(peer), time.monotonic()
        again = now - self._silent_at.get(name, -math.inf) < STRIKE_SECONDS
        if len(self._silent_at) >= MAX_CACHED:
            self._silent_at.clear()
        self._silent_at[name] = now
        if again:
            self.shun(peer, f"{problem}, for the second time", event="silence")
        else:
            tell(logger, "silence", f"peer {peer} is left out of the round: {problem}")
        self.leave_out([name])

    def gone(self, peer: str) -> asyncio.Event:
        """Set while this peer is left out. A running call waits for this very event."""
        return self._gone.setdefault(peer, asyncio.Event())

    def leave_out(self, peers: Iterable[str]) -> None:
        """These peers are gone."""
        for peer in peers:
            self.gone(peer).set()

    def take_back(self, peers: Iterable[str]) -> None:
        """These peers are here: they have joined a group."""
        for peer in peers:
            self.gone(peer).clear()


def epoch_in(gather: bytes) -> int | None:
    """The epoch that a peer is about to begin, from what it sends with its request to join.

    None if that is not a bandwidth, a mode and an epoch. The whole group reads it, and a round
    fails for everybody if it cannot be read.
    """
    if len(gather) > MAX_GATHER_BYTES:
        return None
    try:
        bandwidth, mode, user_data = MSGPackSerializer.loads(gather)
        AveragingMode(mode)
        epoch = MSGPackSerializer.loads(user_data)
    except Exception:  # noqa: BLE001 - the parser raises whatever it meets
        return None
    if not isinstance(bandwidth, int | float | None) or not isinstance(epoch, int):
        return None
    return epoch if bandwidth is None or 0 <= bandwidth < math.inf else None
