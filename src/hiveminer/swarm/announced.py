"""The peers' own addresses in the DHT: how peers without an axon are found.

A peer that has met any other reads them there. Each is one short-lived record (`records`), signed,
under its writer's peer id, so nobody writes for another. What is not an address of its writer is
ignored.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Any

from hivemind.p2p import PeerID
from hivemind.utils.timed_storage import get_dht_time

from hiveminer.errors import first_line
from hiveminer.swarm.peer import Peer, addresses_in, peer_id_of

logger = logging.getLogger(__name__)

LIFETIME_SECONDS = 100.0
EVERY_SECONDS = 30.0
"""How often a peer writes its record, and reads the others'."""

AGAIN_SECONDS = 2.0
"""How soon it reads again while there are none: it may have met nobody yet."""

READ_SECONDS = 20.0
"""A read is given up after this."""

MAX_CHARACTERS = 256
MAX_PEERS = 512
"""Records to use; of more, a random choice, so that a flood cannot hide the same ones each time."""


class AnnouncedAddresses:
    """Called for the addresses of all other peers in the DHT; writes and reads them when due.

    It never waits: what a read finds is returned by a later call. Use it from one thread at a
    time. run: separates the runs.
    """

    def __init__(self, peer: Peer, *, run: str, clock: Callable[[], float] = time.monotonic):
        self._peer = peer
        self._key = f"addresses.{run}"
        self._clock = clock
        self._found: frozenset[str] = frozenset()
        self._reading: tuple[Any, float] | None = None
        self._write_at = self._read_at = clock()

    def __call__(self) -> frozenset[str]:
        now = self._clock()
        if now >= self._write_at:
            self._write_at = now + EVERY_SECONDS
            self._write()
        if self._reading is None and now >= self._read_at:
            future = self._peer.dht.get(self._key, latest=True, return_future=True)
            self._reading = future, now + READ_SECONDS
        elif self._reading is not None:
            future, until = self._reading
            if future.done() or now > until:
                self._reading = None
                self._found = self._read(future) if future.done() else self._found
                self._read_at = now + (EVERY_SECONDS if self._found else AGAIN_SECONDS)
        return self._found

    def _write(self) -> None:
        self._peer.dht.store(
            self._key,
            subkey=PeerID.from_base58(self._peer.peer_id).to_bytes(),
            value=self._peer.commitment,
            expiration_time=get_dht_time() + LIFETIME_SECONDS,
            return_future=True,
        )

    def _read(self, future: Any) -> frozenset[str]:
        try:
            found = future.result(timeout=0)
        except Exception as error:  # noqa: BLE001 - it is read again
            logger.debug("addresses could not be read in the DHT: %s", first_line(error))
            return self._found
        records = found.value if found is not None and isinstance(found.value, dict) else {}
        names = [name for name in records if isinstance(name, bytes)]
        chosen = random.sample(names, min(len(names), MAX_PEERS))
        return frozenset(each for name in chosen for each in self._own(name, records[name].value))

    def _own(self, name: bytes, text: object) -> list[str]:
        """The addresses in a record, if they are of the peer that wrote it."""
        if not isinstance(text, str) or len(text) > MAX_CHARACTERS:
            return []
        peer = str(PeerID(name))
        addresses = addresses_in(text)
        is_own = peer != self._peer.peer_id and all(peer_id_of(each) == peer for each in addresses)
        return addresses if is_own else []
