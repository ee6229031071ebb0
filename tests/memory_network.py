"""A chain and a swarm in memory, for tests of the rounds: blocks come when the test says so."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from hiveminer.errors import ChainError
from hiveminer.strategies.sparseloco.apply import State
from hiveminer.strategies.sparseloco.pieces import StateBuilder, read_manifest
from hiveminer.strategies.sparseloco.rounds import Block, Contribution, Neuron
from hiveminer.strategies.sparseloco.shelf import Shelf

FINALITY = 2


@dataclass
class Network:
    """The state after each block. stalled: no block becomes final."""

    neurons: tuple[Neuron, ...]
    commitments: list[dict[bytes, bytes]] = field(default_factory=lambda: [{}])
    pending: dict[bytes, bytes] = field(default_factory=dict)
    final: int = 0
    stalled: bool = False
    down: bool = False

    @property
    def head(self) -> int:
        return len(self.commitments) - 1

    def advance(self) -> None:
        """One more block, with all that is pending."""
        self.commitments.append(self.commitments[-1] | self.pending)
        self.pending = {}
        if not self.stalled:
            self.final = max(self.final, self.head - FINALITY)


class NetworkView:
    """As `onchain.SubnetRounds`, of one hotkey."""

    block_seconds = 1.0

    def __init__(self, network: Network, hotkey: bytes):
        self.network = network
        self.hotkey = hotkey
        self.commits: list[bytes] = []

    def head(self) -> int:
        self._check()
        return self.network.head

    def final_head(self) -> int:
        self._check()
        return self.network.final

    def snapshot(self, number: int) -> tuple[Block, tuple[Neuron, ...]]:
        return self._block(number), self.network.neurons

    def commitments(self, number: int) -> tuple[Block, Mapping[bytes, bytes]]:
        return self._block(number), self.network.commitments[number]

    def commit(self, data: bytes) -> None:
        self._check()
        self.commits.append(data)
        self.network.pending[self.hotkey] = data

    def _block(self, number: int) -> Block:
        self._check()
        assert number <= self.network.final, "a block was read that is not final"
        return Block(number, hashlib.sha256(number.to_bytes(8, "little")).digest())

    def _check(self) -> None:
        if self.network.down:
            raise ChainError("the chain does not answer")


class Swarm:
    """What every peer serves."""

    def __init__(self) -> None:
        self.sources: dict[bytes, Shelf] = {}
        self.withheld: set[bytes] = set()
        self.bytes = 0

    def get(self, digest: bytes) -> bytes | None:
        for source in self.sources.values():
            data = source.get(digest)
            if data is not None and digest not in self.withheld:
                self.bytes += len(data)
                if hashlib.sha256(data).digest() != digest:
                    continue
                return bytes(data)
        return None


class MemoryMembership:
    """As `membership.Membership`, of a peer that dials nobody."""

    peer = SimpleNamespace(commitment="")

    def join(self, *_: object) -> None: ...

    sync = close = join
    children = SimpleNamespace(check=lambda: None, watch_thread=lambda *_: None)


class MemoryExchange:
    """As `exchange.Exchange`, but whatever is not there at once does not come.

    before_piece: called before each piece of a state, to make a download slow.
    """

    def __init__(self, swarm: Swarm, *, before_piece: Callable[[], object] = lambda: None):
        self.swarm = swarm
        self.before_piece = before_piece

    def close(self) -> None: ...

    def fetch_blobs(
        self,
        number: int,
        wanted: Iterable[Contribution],
        *,
        keep: Callable[[Contribution, bytes], None],
        timeout_seconds: float,
    ) -> None:
        for each in wanted:
            holds = any(each.uid in s.have(number) for s in self.swarm.sources.values())
            data = self.swarm.get(each.blob_hash) if holds else None
            if data is not None:
                keep(each, data)

    def fetch_state(
        self,
        digest: bytes,
        shapes: Mapping[str, torch.Size],
        *,
        timeout_seconds: float,
        idle_seconds: float = 0.0,
    ) -> State | None:
        raw = self.swarm.get(digest)
        if raw is None:
            return None
        builder = StateBuilder(read_manifest(raw, shapes), shapes)
        for piece in builder.manifest.pieces:
            self.before_piece()
            data = self.swarm.get(piece.hash)
            if data is None:
                return None
            builder.add(piece, data)
        return builder.build()
