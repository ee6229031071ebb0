"""An embedded network with a clock of its own, and the SDK's calls in short."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import bittensor as bt
from chain_worker import Keys, new_keys

from hiveminer.chain import Chain, EmbeddedSubstrate, join_embedded

RAO = 10**9
VALIDATOR_STAKE = 2000.0


class Clock:
    """A clock that stands until a test moves it; blocks are one second."""

    def __init__(self) -> None:
        self.seconds = 1_700_000_000.0

    def __call__(self) -> float:
        return self.seconds

    def blocks(self, count: int) -> None:
        self.seconds += count


class Network:
    """One embedded network with a clock of its own, and the SDK's calls in short."""

    def __init__(self, path: Path):
        self.clock = Clock()
        self.path = path
        self.substrate = EmbeddedSubstrate(path, clock=self.clock)
        self.client = bt.Client("local", substrate=self.substrate)

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run(coroutine)

    def submit(self, call: Any, keys: Any, signer: str = "coldkey") -> bt.ExtrinsicResult:
        result: bt.ExtrinsicResult = self.run(self.client.submit_call(call, keys, signer=signer))
        return result

    def execute(self, intent: bt.Intent, keys: Any) -> bt.ExtrinsicResult:
        result: bt.ExtrinsicResult = self.run(self.client.execute(intent, keys))
        return result

    def register(self, keys: Any, netuid: int = 1) -> bt.ExtrinsicResult:
        hotkey = keys.hotkey.ss58_address
        call = bt.calls.SubtensorModule.burned_register(netuid=netuid, hotkey=hotkey)
        return self.submit(call, keys)

    def stake(self, keys: Keys, tao: float, netuid: int = 0) -> bt.ExtrinsicResult:
        call = bt.calls.SubtensorModule.add_stake(
            hotkey=keys.hotkey.ss58_address, netuid=netuid, amount_staked=int(tao * RAO)
        )
        return self.submit(call, keys)

    def join(self, *, tao: float = 0.0) -> Keys:
        keys = new_keys()
        self.register(keys).raise_for_failure()
        if tao:
            self.stake(keys, tao).raise_for_failure()
        return keys

    def serve(self, keys: Any, ip: str = "127.0.0.1", port: int = 8091) -> bt.ExtrinsicResult:
        return self.execute(bt.ServeAxon(netuid=1, ip=ip, port=port), keys)

    def commit(self, keys: Any, *fields: Any) -> bt.ExtrinsicResult:
        call = bt.calls.Commitments.set_commitment(netuid=1, info={"fields": list(fields)})
        return self.submit(call, keys, signer="hotkey")

    def weigh(self, keys: Any, weights: dict[int, int], version_key: int = 0) -> Any:
        """Plain `set_weights`, without the SDK's preflight, so that the network decides."""
        call = bt.calls.SubtensorModule.set_weights(
            netuid=1, dests=list(weights), weights=list(weights.values()), version_key=version_key
        )
        return self.submit(call, keys, signer="hotkey")

    def metagraph(self) -> Any:
        return self.run(self.client.subnets.metagraph(1))

    def uid(self, keys: Keys) -> int | None:
        uid: int | None = self.run(
            self.client.neurons.uid(hotkey_ss58=keys.hotkey.ss58_address, netuid=1)
        )
        return uid

    def balance(self, keys: Keys) -> int:
        return int(self.run(self.client.balances.get(keys.coldkey.ss58_address)).rao)


def code_of(result: bt.ExtrinsicResult) -> bt.ErrorCode | None:
    return None if result.error is None else result.error.code


def refused(result: bt.ExtrinsicResult, name: str) -> None:
    """It was refused with this error of the chain, which the SDK knows."""
    assert not result.success
    assert result.error is not None
    assert result.error.name == name
    assert result.error.code is not bt.ErrorCode.UNKNOWN


@contextlib.contextmanager
def network_at(path: Path) -> Iterator[Network]:
    network = Network(path)
    network.clock.seconds = time.time()
    yield network
    network.run(network.client.close())


def on_testnet(folder: Path) -> Callable[[], Chain]:
    """Opens an embedded chain that says it is a real one, with a wallet registered on it."""
    keys, path = new_keys(), folder / "chain.sqlite"

    def open_as(network: str) -> Chain:
        client = bt.Client("local", substrate=EmbeddedSubstrate(path, block_seconds=0.05))
        return Chain(network=network, netuid=1, wallet=keys, client=client)

    with open_as("embedded") as chain:
        join_embedded(chain)
    return lambda: open_as("test")
