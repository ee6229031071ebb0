"""A subnet on a chain that fails on purpose."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bittensor as bt
from chain_worker import Keys, new_keys
from flaky_substrate import FlakySubstrate

from hiveminer.chain import Chain, EmbeddedSubstrate, join_embedded
from hiveminer.chain.weights import WeightSetter

BLOCK_SECONDS = 0.05


class Clock:
    """The real clock, put forward by a test. One for all substrates of it."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead

    def blocks(self, count: int) -> None:
        self.ahead += count * BLOCK_SECONDS


class Subnet:
    """A validator with its setter of weights, and miners, over one flaky network."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.clock = Clock()
        self.path = folder / "chain.sqlite"
        self.substrate = self.new_substrate()
        self.opened: list[Chain] = []
        self.validator = self.chain(self.substrate)
        join_embedded(self.validator, stake_tao=5000)
        self.stopping = threading.Event()
        self.setter = self.new_setter()

    def new_substrate(self) -> FlakySubstrate:
        return FlakySubstrate(self.path, block_seconds=BLOCK_SECONDS, clock=self.clock)

    def chain(self, substrate: EmbeddedSubstrate, keys: Any = None, **options: Any) -> Chain:
        opened = Chain(
            network="embedded",
            netuid=1,
            wallet=keys or new_keys(),
            client=bt.Client("local", substrate=substrate),
            **({"timeout_seconds": 2.0} | options),
        )
        self.opened.append(opened)
        return opened

    def new_setter(self, **options: Any) -> WeightSetter:
        return WeightSetter(
            self.validator,
            path=self.folder / "weights.json",
            stopping=self.stopping,
            first_pause_seconds=0.05,
            **({"every_seconds": 500 * BLOCK_SECONDS} | options),
        )

    def join(self) -> Keys:
        keys = new_keys()
        with self.chain(self.new_substrate(), keys) as chain:
            join_embedded(chain)
        return keys

    def shares(self) -> dict[str, float]:
        """The validator's weights as they stand on the chain, by hotkey."""
        graph = self.validator.metagraph()
        ours = graph.by_hotkey(self.validator.hotkey)
        assert ours is not None
        found = self.validator.weights_of(ours.uid)
        total = sum(found.values()) or 1
        return {graph.neuron(uid).hotkey: value / total for uid, value in found.items()}

    def close(self) -> None:
        self.stopping.set()
        for chain in self.opened:
            chain.close()


def address(keys: Any) -> str:
    return str(keys.hotkey.ss58_address)


def earned(shares: Mapping[str, float]) -> Callable[[bt.Metagraph], Mapping[str, float]]:
    return lambda graph: shares
