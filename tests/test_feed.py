"""How a validator feeds its miners."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from hiveminer.rpc.dendrite import Endpoint
from hiveminer.validation.feed import Feed, LiveMiner


def test_what_the_feeding_of_a_miner_fails_with_is_raised() -> None:
    def assign(hotkey: str) -> list[int]:
        raise ValueError(f"no rows for {hotkey}")

    async def feed_and_find() -> None:
        nothing: Any = None
        task: Any = SimpleNamespace(run_id="run", dataset=SimpleNamespace(hash="hash"))
        feed = Feed(task=task, work=nothing, assign=assign, take=nothing, metrics=nothing)
        miner = LiveMiner(Endpoint("hotkey", "127.0.0.1", 1))
        miner.feeding = asyncio.ensure_future(feed._feed(nothing, miner))
        feed._miners["hotkey"] = miner
        await asyncio.wait([miner.feeding])
        await feed.find(nothing, [])

    with pytest.raises(ValueError, match="no rows for hotkey"):
        asyncio.run(feed_and_find())
