"""What strategy and observer are built from, and what they need of the chain and the swarm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from hiveminer.config.run import OptimizerSection
from hiveminer.strategies.sparseloco.apply import State
from hiveminer.strategies.sparseloco.link import Link
from hiveminer.strategies.sparseloco.log import Log
from hiveminer.strategies.sparseloco.plan import Plan
from hiveminer.strategies.sparseloco.rounds import Block, Contribution, Neuron
from hiveminer.strategies.sparseloco.shelf import Shelf


class RoundChain(Protocol):
    """A subnet, as the rounds need it. Each method raises ChainError.

    `snapshot` and `commitments` read the state after a block, which must be final. Hotkeys are 32
    bytes.
    """

    block_seconds: float

    def head(self) -> int:
        """The newest block."""

    def final_head(self) -> int:
        """The newest final block."""

    def snapshot(self, number: int) -> tuple[Block, tuple[Neuron, ...]]:
        """The subnet's neurons at a block."""

    def commitments(self, number: int) -> tuple[Block, Mapping[bytes, bytes]]:
        """The raw commitments at a block, by hotkey."""

    def commit(self, data: bytes) -> None:
        """Replace this hotkey's commitment within the next few blocks, or never."""


class Fetcher(Protocol):
    """Downloads from other peers; see `exchange.Exchange`."""

    def fetch_blobs(
        self,
        number: int,
        wanted: Iterable[Contribution],
        *,
        keep: Callable[[Contribution, bytes], None],
        timeout_seconds: float,
    ) -> frozenset[int]: ...

    def fetch_state(
        self,
        digest: bytes,
        shapes: Mapping[str, torch.Size],
        *,
        timeout_seconds: float,
        idle_seconds: float = math.inf,
    ) -> State | None: ...


@dataclass(frozen=True, kw_only=True)
class Parts:
    """section: the inner optimizer's. hotkey: 32 bytes. link: to the peer. poll_seconds: how often
    the chain is read; by default twice per block."""

    section: OptimizerSection
    plan: Plan
    hotkey: bytes
    chain: RoundChain
    exchange: Fetcher
    log: Log
    shelf: Shelf
    link: Link = field(default_factory=Link)
    poll_seconds: float | None = None
