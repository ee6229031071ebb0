"""Which peers to deal with: those that have proved a registered hotkey, unless they cheated.

The DHT's process knows who has proved what; an `Admission` asks it from any event loop, in
this process or in one forked from it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from hivemind.p2p import PeerID

from hiveminer.runtime.events import tell
from hiveminer.swarm.identity import identify, known_hotkey

logger = logging.getLogger(__name__)

IDENTIFY_SECONDS = 4.0
"""Timeout for a peer to prove its hotkey."""

CACHE_SECONDS = 5.0
"""How long a proof is cached; a refusal is cached for a fifth of it."""

SHUN_SECONDS = 300.0
"""How long a peer that sent poison is treated as a stranger."""

MAX_CONCURRENT = 16
"""Unknown peers that are asked for their proof at the same time; more are turned away. Whoever
has proved a hotkey before is not among them, so strangers do not keep it out."""

MAX_CACHED = 4096
"""Proofs and refusals in the cache; strangers may be many."""


class Admission:
    """Decides, per peer, whether to deal with it.

    dht: the `hivemind.DHT` whose process knows who has proved a hotkey.
    on_shun: called with the id of a peer when it is shunned.
    """

    def __init__(self, dht: Any, *, on_shun: Callable[[str], None] = lambda _: None):
        self._dht = dht
        self._on_shun = on_shun
        self._cache: dict[str, tuple[float, bool]] = {}
        self._identifying = 0
        self._shunned_until: dict[str, float] = {}

    async def admits(self, peer: PeerID) -> bool:
        """Whether this peer has proved a registered hotkey and is not shunned."""
        return await self._is_registered(str(peer)) and not self._is_shunned(str(peer))

    def shun(self, peer: PeerID, problem: str, *, event: str = "poison") -> None:
        """Treat this peer as a stranger for SHUN_SECONDS, and report it as this event."""
        if not self._is_shunned(str(peer)):  # reported once, not for each part
            tell(logger, event, f"peer {peer} is left out for a while: {problem}")
            self._on_shun(str(peer))
        self._shunned_until[str(peer)] = time.monotonic() + SHUN_SECONDS

    def _is_shunned(self, peer: str) -> bool:
        return time.monotonic() < self._shunned_until.get(peer, 0.0)

    async def _is_registered(self, name: str) -> bool:
        now = time.monotonic()
        until, admitted = self._cache.get(name, (0.0, False))
        if now < until:
            return admitted
        admitted = await self._ask(partial(known_hotkey, peer_id=name))
        if not admitted and self._identifying < MAX_CONCURRENT:
            self._identifying += 1
            try:
                task = partial(identify, peer_id=name, timeout_seconds=IDENTIFY_SECONDS)
                admitted = await self._ask(task)
            finally:
                self._identifying -= 1
        if len(self._cache) >= MAX_CACHED:
            self._cache.clear()
        self._cache[name] = (now + (CACHE_SECONDS if admitted else CACHE_SECONDS / 5), admitted)
        return admitted

    async def _ask(self, task: Callable[..., Any]) -> bool:
        """Whether this coroutine, run in the DHT's process, finds a hotkey."""
        try:
            future = self._dht.run_coroutine(task, return_future=True)
            return await asyncio.wait_for(future, IDENTIFY_SECONDS + 1) is not None
        except Exception as error:  # noqa: BLE001 - who cannot be identified is a stranger
            logger.debug("a peer could not be identified: %r", error)
            return False
