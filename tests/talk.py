"""A registered caller on an embedded network, and a miner's process that it calls."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from hiveminer.chain import Chain, embedded_wallet, open_chain
from hiveminer.errors import MinerError
from hiveminer.protocol import IsAlive, Train
from hiveminer.rpc.dendrite import Dendrite, Endpoint
from programs import Program


class Talk:
    """A caller's dendrite, the miner that it calls, and what that answered first."""

    def __init__(self, dendrite: Dendrite, endpoint: Endpoint, alive: IsAlive):
        self.dendrite = dendrite
        self.endpoint = endpoint
        self.alive = alive
        self.asked = 0

    def request(self, **changes: Any) -> Train:
        self.asked += 1
        fields: dict[str, Any] = {
            "request_id": f"r{self.asked}",
            "run_id": self.alive.run_id,
            "data_hash": self.alive.data_hash,
            "version": self.alive.version,
            "dataset_indices": [5, 3, 9, 1],
            "batch_size": 2,
            "timeout_seconds": 120.0,
        }
        return Train.model_construct(**(Train(**fields).model_dump() | changes))

    async def ask(self, **changes: Any) -> Train:
        return await self.dendrite.call(self.endpoint, self.request(**changes), timeout_seconds=150)

    async def is_alive(self) -> IsAlive:
        return await self.dendrite.call(self.endpoint, IsAlive(), timeout_seconds=60)

    async def refusal(self, **changes: Any) -> tuple[int | None, str]:
        with pytest.raises(MinerError) as raised:
            await self.ask(**changes)
        return raised.value.status, raised.value.reason


@contextlib.contextmanager
def caller(folder: Path, *, prefix: str = "caller") -> Iterator[Chain]:
    """A chain for a hotkey of its own on the embedded network in this folder."""
    with (
        embedded_wallet(folder, prefix=prefix) as claim,
        open_chain(
            network="embedded", netuid=1, wallet=claim.wallet, path=folder / "chain.sqlite"
        ) as chain,
    ):
        yield chain


def hotkey_of(program: Program) -> str:
    return program.words.split(", hotkey ", 1)[1].split()[0]


@contextlib.asynccontextmanager
async def talking(chain: Chain, program: Program) -> AsyncIterator[Talk]:
    """Talk to a miner that serves, once it has read the metagraph with us in it."""
    said = re.search(r"serving on 127\.0\.0\.1 port (\d+)", program.words)
    assert said is not None
    endpoint = Endpoint(hotkey_of(program), "127.0.0.1", int(said[1]))
    async with Dendrite(chain.wallet) as dendrite:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(MinerError):
                alive = await dendrite.call(endpoint, IsAlive(), timeout_seconds=5)
                break
            assert time.monotonic() < deadline
            await asyncio.sleep(0.2)
        yield Talk(dendrite, endpoint, alive)
