"""Neurons without a swarm, in this process: a miner's life and a validator's keys, in
milliseconds. What they stand on (settings, chain, axon) is the real thing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hiveminer.chain import Chain
from hiveminer.config.settings import MinerSettings
from hiveminer.errors import HiveminerError, MinerError
from hiveminer.neuron import BaseMinerNeuron
from hiveminer.protocol import IsAlive, Train
from hiveminer.rpc.dendrite import Dendrite, Endpoint
from programs import wait_for


def miner_settings(folder: Path, **groups: Any) -> MinerSettings:
    """Settings whose every folder lies in `folder`, with any free ports."""
    given: dict[str, Any] = {
        "subtensor": {"path": folder / "network", "block_seconds": 0.05},
        "neuron": {"path": folder / "state"},
        "axon": {"port": 0},
        "dht": {"port": 0},
        "wallet": {"path": folder / "wallets"},
    }
    for name, values in groups.items():
        given[name] = given.get(name, {}) | values if isinstance(values, dict) else values
    return MinerSettings(**given)


class SmallMiner(BaseMinerNeuron):
    """Answers, and trains nothing."""

    def is_alive(self, synapse: IsAlive) -> IsAlive:
        synapse.completion = not self.neuron.stopping.is_set()
        synapse.epoch = 7
        return synapse

    def forward(self, synapse: Train) -> Train:
        return synapse


class Running:
    """A small miner in a thread of its own, and what it ended with."""

    def __init__(self, miner: SmallMiner):
        self.miner = miner
        self.error: HiveminerError | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.miner.run()
        except HiveminerError as error:
            self.error = error

    def endpoint(self) -> Endpoint:
        axon = wait_for(lambda: self.miner.axon, seconds=10, about="the axon")
        assert axon is not None
        return Endpoint(self.miner.neuron.hotkey, "127.0.0.1", axon.port)

    def alive(self, wallet: Any) -> bool:
        """Ask it, as a validator does; False as well when it refuses."""

        async def ask() -> bool:
            async with Dendrite(wallet) as dendrite:
                with contextlib.suppress(MinerError):
                    call = dendrite.call(self.endpoint(), IsAlive(), timeout_seconds=5)
                    return (await call).completion
            return False

        return asyncio.run(ask())


@contextlib.contextmanager
def running(settings: MinerSettings, chain: Chain | None = None) -> Iterator[Running]:
    """A small miner that serves until the block ends."""
    with quiet(), SmallMiner(settings, chain=chain) as miner:
        program = Running(miner)
        try:
            yield program
        finally:
            miner.neuron.stopping.set()
            program.thread.join(15)
            assert not program.thread.is_alive()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Neurons configure the process's logging; leave it as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    levels = {
        name: logging.getLogger(name).level for name in ("hiveminer", "bittensor", "hivemind")
    }
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        for name, old in levels.items():
            logging.getLogger(name).setLevel(old)
