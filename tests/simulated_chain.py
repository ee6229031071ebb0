"""For the simulator of rounds: integers for tensors, a fake chain, and the true history.

A state is a pair of integers, a blob keeps the larger one of what was learned. `Truth`
decides each round a second time, on purpose in another way, from the chain's own blocks
and from nothing that peers say.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, field, replace
from fractions import Fraction

from hiveminer.strategies.sparseloco.rounds import Block, Facts, Neuron
from hiveminer.strategies.sparseloco.schedule import Schedule

RUN = b"the run."
MAX_BLOB_BYTES = 1000
Vector = tuple[int, int]
ZERO: Vector = (0, 0)
START: Vector = (7, 8)


def add(a: Vector, b: Vector) -> Vector:
    return a[0] + b[0], a[1] + b[1]


def subtract(a: Vector, b: Vector) -> Vector:
    return a[0] - b[0], a[1] - b[1]


def state_hash(state: Vector) -> bytes:
    return hashlib.sha256(b"state" + repr(state).encode()).digest()


def apply(state: Vector, updates: list[Vector]) -> Vector:
    """The outer step: subtract the floored mean."""
    if not updates:
        return state
    first, second = (sum(column) for column in zip(*updates, strict=True))
    return subtract(state, (first // len(updates), second // len(updates)))


def encode(hotkey: bytes, number: int, parent: bytes, q: Vector) -> bytes:
    return json.dumps([hotkey.hex(), number, parent.hex(), q]).encode()


def decode(blob: bytes) -> Vector:
    first, second = json.loads(blob)[3]
    return first, second


def largest(u: Vector) -> Vector:
    """q: the larger coordinate, to within a unit of 16."""
    if abs(u[0]) > abs(u[1]):
        return u[0] - u[0] % 16, 0
    return 0, u[1] - u[1] % 16


def forgotten(e: Vector) -> Vector:
    """(1 - rho) e, in whole numbers."""
    return e[0] // 4, e[1] // 4


@dataclass
class Call:
    hotkey: bytes
    raw: bytes
    from_block: int
    until_block: int


@dataclass
class ChainBlock:
    number: int
    hash: bytes
    calls: list[Call]
    neurons: tuple[Neuron, ...]
    commitments: dict[bytes, bytes]


class Chain:
    """Blocks with calls in them, a head that may be reorganized, finality that may stall."""

    def __init__(self, rng: random.Random, neurons: tuple[Neuron, ...], lag: int):
        self.rng = rng
        self.blocks = [ChainBlock(0, rng.randbytes(32), [], neurons, {})]
        self.pool: list[Call] = []
        self.final = 0
        self.lag = lag
        self.stalled_until = 0

    @property
    def head(self) -> ChainBlock:
        return self.blocks[-1]

    def submit(self, call: Call) -> None:
        self.pool.append(call)

    def advance(self, neurons: tuple[Neuron, ...]) -> None:
        """One more block: the calls that have arrived, in any order."""
        number = self.head.number + 1
        registered = {neuron.hotkey for neuron in self.head.neurons}
        self.pool = [call for call in self.pool if call.until_block >= number]
        ready = [call for call in self.pool if call.from_block <= number]
        self.rng.shuffle(ready)
        self.pool = [call for call in self.pool if call.from_block > number]
        ready = [call for call in ready if call.hotkey in registered]
        commitments = dict(self.head.commitments)
        for call in ready:
            commitments[call.hotkey] = call.raw
        self.blocks.append(ChainBlock(number, self.rng.randbytes(32), ready, neurons, commitments))
        if number >= self.stalled_until:
            self.final = max(self.final, number - self.lag)

    def reorganize(self) -> int:
        """Drop blocks that are not final; their calls wait again, or are lost."""
        depth = self.rng.randint(0, self.head.number - self.final)
        for _ in range(depth):
            for call in self.blocks.pop().calls:
                if self.rng.random() < 0.8:
                    self.pool.append(call)
        return depth

    def records(self, schedule: Schedule, number: int) -> Facts:
        """What anyone reads once the records are due; it is not asked whether they are final."""
        first = self.blocks[schedule.first_block(number)]
        records = self.blocks[schedule.records_block(number)]
        return Facts(
            number,
            Block(first.number, first.hash),
            Block(records.number, records.hash),
            Block(schedule.marks_block(number), b""),
            first.neurons,
            records.commitments,
            {},
        )

    def facts(self, schedule: Schedule, number: int) -> Facts:
        """The same with the marks."""
        marks = self.blocks[schedule.marks_block(number)]
        block = Block(marks.number, marks.hash)
        return replace(self.records(schedule, number), marks_block=block, marks=marks.commitments)


@dataclass
class Truth:
    """The history as it has to be, from the chain's blocks and from nothing the peers say."""

    quorum: Fraction
    places: int
    schedule: Schedule
    decided: dict[int, tuple[bytes, tuple[bytes, ...]] | None] = field(default_factory=dict)
    """By round: the parent and the hotkeys that count, or None when it was empty."""
    shares: dict[int, list[Fraction]] = field(default_factory=dict)
    """By round: the share of all permitted stake behind the parent and behind each uid."""
    states: dict[bytes, Vector] = field(default_factory=dict)
    lineage: dict[bytes, frozenset[tuple[int, bytes]]] = field(default_factory=dict)
    """By state: the (round, hotkey) whose blobs are in it."""
    blobs: dict[bytes, bytes] = field(default_factory=dict)
    """All blobs that were ever cut, by hash."""
    confirmed: bytes = state_hash(START)
    newest: bytes = state_hash(START)
    voids: int = 0

    def __post_init__(self) -> None:
        self.states[self.confirmed] = START
        self.lineage[self.confirmed] = frozenset()

    def follow(self, chain: Chain, number: int) -> None:
        """Decide round `number`, whose marks are final, and make its state."""
        decided = self.decided[number] = self._decide(chain, number)
        if decided is None:
            return
        parent, hotkeys = decided
        if parent not in (self.confirmed, self.newest):
            return  # `check_rule` says that this must not happen
        self.voids += parent != self.newest
        records = self._last_calls(chain, number, self._due(number)[0])
        blobs = [self.blobs[records[hotkey][-32:]] for hotkey in hotkeys]
        state = apply(self.states[parent], [decode(blob) for blob in blobs])
        self.confirmed, self.newest = parent, state_hash(state)
        self.states[self.newest] = state
        self.lineage[self.newest] = self.lineage[parent] | {(number, h) for h in hotkeys}

    def _due(self, number: int) -> tuple[int, int]:
        """The blocks at which records and marks are due."""
        marks = (number + 1) * self.schedule.round_blocks
        return marks - self.schedule.mark_blocks, marks

    def _last_calls(self, chain: Chain, number: int, until: int) -> dict[bytes, bytes]:
        """By hotkey, the last call in the blocks up to `until`."""
        last: dict[bytes, bytes] = {}
        for block in chain.blocks[max(0, (number - 1) * self.schedule.round_blocks) : until + 1]:
            for call in block.calls:
                last[call.hotkey] = call.raw
        return last

    def _decide(self, chain: Chain, number: int) -> tuple[bytes, tuple[bytes, ...]] | None:
        records_due, marks_due = self._due(number)
        neurons = chain.blocks[number * self.schedule.round_blocks].neurons
        header = RUN + number.to_bytes(4, "little")
        marks: list[tuple[int, bytes, int]] = []
        everything = 0
        calls = self._last_calls(chain, number, marks_due)
        for neuron in neurons:
            if not neuron.permit:
                continue
            stake = neuron.stake or 1
            everything += stake
            raw = calls.get(neuron.hotkey, b"")
            if len(raw) == 93 and raw[:13] == b"\x21" + header:
                marks.append((stake, raw[13:45], int.from_bytes(raw[45:77], "little")))
        total = sum(stake for stake, _, _ in marks)
        if total == 0 or Fraction(total, everything) < self.quorum:
            return None
        half = Fraction(total, 2)
        for parent in {state for _, state, _ in marks}:
            behind = [(stake, mask) for stake, state, mask in marks if state == parent]
            if sum(stake for stake, _ in behind) > half:
                break
        else:
            return None
        self.shares[number] = [Fraction(sum(stake for stake, _ in behind), everything)]
        block = chain.blocks[records_due]
        calls = self._last_calls(chain, number, block.number)
        eligible = []
        for neuron in neurons:
            raw = calls.get(neuron.hotkey, b"")
            stake = sum(stake for stake, mask in behind if mask & (1 << neuron.uid))
            stands = len(raw) == 81 and raw[:45] == b"\x11" + header + parent
            if stands and stake > half and 1 <= int.from_bytes(raw[45:49], "little") <= 1000:
                lot = hashlib.sha256(block.hash + neuron.hotkey).digest()
                eligible.append((neuron, lot))
                self.shares[number].append(Fraction(stake, everything))
        eligible.sort(key=lambda pair: pair[1])
        eligible.sort(key=lambda pair: pair[0].incentive, reverse=True)
        first = self.places * 4 // 5
        late = sorted(eligible[first:], key=lambda pair: pair[1])[: self.places - first]
        chosen = sorted((neuron.uid, neuron.hotkey) for neuron, _ in eligible[:first] + late)
        return parent, tuple(hotkey for _, hotkey in chosen)
