"""How a validator feeds its miners."""

from __future__ import annotations

import asyncio
import gc
from types import SimpleNamespace
from typing import Any

import pytest

from hiveminer.config.settings import WorkSettings
from hiveminer.protocol import IsAlive, Synapse
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


class OneMiner:
    """A dendrite whose miner is alive, and answers no other request."""

    async def call(
        self, endpoint: Endpoint, synapse: Synapse, *, timeout_seconds: float
    ) -> Synapse:
        if not isinstance(synapse, IsAlive):
            await asyncio.sleep(3600)
        return synapse.model_copy(update={"completion": True})


def test_a_miner_that_leaves_is_dropped_quietly(caplog: pytest.LogCaptureFixture) -> None:
    async def come_and_go() -> None:
        task: Any = SimpleNamespace(
            run_id="run", dataset=SimpleNamespace(hash="0" * 64), difference=lambda **_: None
        )
        work = WorkSettings()
        dendrite: Any = OneMiner()
        nothing: Any = SimpleNamespace(log=lambda kind, values: None)
        feed = Feed(task=task, work=work, assign=lambda _: [1], take=nothing, metrics=nothing)
        neuron: Any = SimpleNamespace(hotkey="hotkey", axon="127.0.0.1:1")
        await feed.find(dendrite, [neuron])
        assert list(feed.hotkeys) == ["hotkey"]
        await asyncio.sleep(0)
        await feed.find(dendrite, [])
        await asyncio.sleep(0)
        assert not feed.hotkeys

    asyncio.run(come_and_go())
    gc.collect()  # asyncio reports then what nobody asked for
    assert [record.name for record in caplog.records if record.name == "asyncio"] == []
