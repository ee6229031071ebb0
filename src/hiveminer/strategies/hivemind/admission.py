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
from functools import partial
from typing import Any

from hivemind.averaging.allreduce import AveragingMode
from hivemind.p2p import PeerID
from hivemind.utils.serializer import MSGPackSerializer

from hiveminer.runtime.events import tell
from hiveminer.swarm.identity import identify

logger = logging.getLogger(__name__)

IDENTIFY_SECONDS = 4.0
"""Timeout for a peer to prove its hotkey."""

CACHE_SECONDS = 5.0
"""How long a proof is cached; a refusal is cached for a fifth of it."""

SHUN_SECONDS = 300.0
"""How long a peer that sent poison is treated as a stranger."""

STRIKE_SECONDS = 600.0
"""A peer that is silent twice within this time is shunned."""

MAX_CONCURRENT = 16
"""Strangers that are asked for their proof at the same time; more are turned away."""

MAX_CACHED = 4096
"""Proofs and refusals in the cache; strangers may be many."""

MAX_GATHER_BYTES = 1024


class Admission:
    """Decides, per peer, whether to deal with it.

    dht: the `hivemind.DHT` whose process knows who has proved a hotkey.
    on_shun: called with the id of a peer when it is shunned.
    """

    def __init__(self, dht: Any, *, on_shun: Callable[[str], None]):
        self._dht = dht
        self._on_shun = on_shun
        self._cache: dict[str, tuple[float, bool]] = {}
        self._identifying = 0
        self._shunned_until: dict[str, float] = {}
        self._silent_at: dict[str, float] = {}
        self._gone: dict[str, asyncio.Event] = {}

    async def admits(self, peer: PeerID) -> bool:
        """Whether this peer has proved a registered hotkey and is not shunned."""
        return await self._is_registered(str(peer)) and not self._is_shunned(str(peer))

    def shun(self, peer: PeerID, problem: str, *, event: str = "poison") -> None:
        """Treat this peer as a stranger for SHUN_SECONDS."""
        if not self._is_shunned(str(peer)):  # reported once, not for each part
            tell(logger, event, f"peer {peer} is left out for a while: {problem}")
            self._on_shun(str(peer))
        self._shunned_until[str(peer)] = time.monotonic() + SHUN_SECONDS

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
        for peer in self._gone.keys() & set(peers):
            self._gone[peer].clear()

    def gone_of(self, peers: Iterable[str]) -> set[str]:
        """Those of these peers that are gone."""
        return {peer for peer in self._gone.keys() & set(peers) if self._gone[peer].is_set()}

    def _is_shunned(self, peer: str) -> bool:
        return time.monotonic() < self._shunned_until.get(peer, 0.0)

    async def _is_registered(self, name: str) -> bool:
        now = time.monotonic()
        until, admitted = self._cache.get(name, (0.0, False))
        if now < until:
            return admitted
        if self._identifying >= MAX_CONCURRENT:
            return False
        self._identifying += 1
        try:
            task = partial(identify, peer_id=name, timeout_seconds=IDENTIFY_SECONDS)
            future = self._dht.run_coroutine(task, return_future=True)
            admitted = await asyncio.wait_for(future, IDENTIFY_SECONDS + 1) is not None
        except Exception as error:  # noqa: BLE001 - who cannot be identified is a stranger
            logger.debug("peer %s could not be identified: %r", name, error)
            admitted = False
        finally:
            self._identifying -= 1
        if len(self._cache) >= MAX_CACHED:
            self._cache.clear()
        self._cache[name] = (now + (CACHE_SECONDS if admitted else CACHE_SECONDS / 5), admitted)
        return admitted


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
    if bandwidth is not None:
        sound = isinstance(bandwidth, int | float) and math.isfinite(bandwidth) and bandwidth >= 0
        if not sound:
            return None
    return epoch if isinstance(epoch, int) else None
