"""The peers' addresses in the swarm, as their axons state them in a signed `IsAlive`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from hiveminer.protocol import IsAlive
from hiveminer.rpc.dendrite import Endpoint, endpoints_of, probe
from hiveminer.swarm.peer import addresses_in

AGAIN_SECONDS = 60.0
"""An axon that has answered is asked again after this."""

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
"""An axon that has not is asked again after a pause that doubles."""


@dataclass
class _Known:
    """next_at is a monotonic time."""

    endpoint: Endpoint
    addresses: tuple[str, ...] = ()
    next_at: float = 0.0
    pause_seconds: float = FIRST_PAUSE_SECONDS


class AxonAddresses:
    """Called for the addresses of all other peers; asks the axons that are due, all at once.

    wallet: signs the questions. neurons: those of the metagraph. hotkey: our own, left out.
    Use it from one thread at a time.
    """

    def __init__(
        self,
        wallet: Any,
        *,
        hotkey: str,
        neurons: Callable[[], Iterable[Any]],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._wallet = wallet
        self._hotkey = hotkey
        self._neurons = neurons
        self._clock = clock
        self._known: dict[str, _Known] = {}

    def __call__(self) -> frozenset[str]:
        served = {e.hotkey: e for e in endpoints_of(self._neurons()) if e.hotkey != self._hotkey}
        for gone in self._known.keys() - served.keys():
            del self._known[gone]
        for hotkey, endpoint in served.items():
            if hotkey not in self._known or self._known[hotkey].endpoint != endpoint:
                self._known[hotkey] = _Known(endpoint)
        now = self._clock()
        due = [known.endpoint for known in self._known.values() if known.next_at <= now]
        for hotkey, answer in self._ask(due).items():
            self._take(self._known[hotkey], answer)
        return frozenset(each for known in self._known.values() for each in known.addresses)

    def _ask(self, due: Sequence[Endpoint]) -> dict[str, IsAlive | str]:
        if not due:
            return {}
        # In a thread of its own: this one may have a running event loop already.
        with ThreadPoolExecutor(1, thread_name_prefix="axons") as pool:
            return pool.submit(lambda: asyncio.run(probe(self._wallet, due))).result()

    def _take(self, known: _Known, answer: IsAlive | str) -> None:
        addresses = () if isinstance(answer, str) else tuple(addresses_in(answer.peer))
        if addresses:
            known.addresses, known.pause_seconds = addresses, FIRST_PAUSE_SECONDS
            known.next_at = self._clock() + AGAIN_SECONDS
            return
        # What it said before may hold on: it may only be busy.
        known.next_at = self._clock() + known.pause_seconds
        known.pause_seconds = min(LONGEST_PAUSE_SECONDS, 2 * known.pause_seconds)
