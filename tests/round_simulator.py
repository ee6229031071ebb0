"""A simulator of sparseloco's rounds: a fake chain, peers and validators, all by one seed.

Time goes in blocks. Every peer drives the real functions of `rounds` as a live strategy
would, on small integers instead of tensors: a state is a tuple of integers, a blob keeps
the largest coordinates of what was learned. The world hurts them in every way that the
protocol claims to survive, and the checks run after every block. What they compare with
is written a second time, on purpose in another way, from the chain's own blocks.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, field, replace
from fractions import Fraction

from hiveminer.strategies.sparseloco import rounds
from hiveminer.strategies.sparseloco.records import Mark, Record, decode_record, witness
from hiveminer.strategies.sparseloco.rounds import (
    Apply,
    Block,
    Decision,
    Empty,
    Facts,
    Neuron,
    Position,
    Repair,
    Rules,
    Transfer,
    VoidAndApply,
)
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


# --- the chain ----------------------------------------------------------------------


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

    def facts(self, schedule: Schedule, number: int) -> Facts:
        """What anyone reads; like the SDK's `at()`, it does not ask what is final."""
        first = self.blocks[schedule.first_block(number)]
        records = self.blocks[schedule.records_block(number)]
        marks = self.blocks[schedule.marks_block(number)]
        return Facts(
            number,
            Block(first.number, first.hash),
            Block(records.number, records.hash),
            Block(marks.number, marks.hash),
            first.neurons,
            records.commitments,
            marks.commitments,
        )


def facts_to_json(facts: Facts) -> str:
    """One line of the log."""
    plain = {**vars(facts), "neurons": [vars(neuron) for neuron in facts.neurons]}
    for key in ("first_block", "records_block", "marks_block"):
        plain[key] = vars(plain[key])
    for key in ("records", "marks"):
        plain[key] = {hotkey.hex(): raw.hex() for hotkey, raw in plain[key].items()}
    return json.dumps(plain, default=bytes.hex)


def facts_from_json(line: str) -> Facts:
    plain = json.loads(line)

    def block(key: str) -> Block:
        return Block(plain[key]["number"], bytes.fromhex(plain[key]["hash"]))

    def raws(key: str) -> dict[bytes, bytes]:
        return {bytes.fromhex(k): bytes.fromhex(raw) for k, raw in plain[key].items()}

    neurons = tuple(
        Neuron(**{**neuron, "hotkey": bytes.fromhex(neuron["hotkey"])})
        for neuron in plain["neurons"]
    )
    return Facts(
        plain["round"],
        block("first_block"),
        block("records_block"),
        block("marks_block"),
        neurons,
        raws("records"),
        raws("marks"),
    )


# --- what is true, written a second time ----------------------------------------------


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
        records = self._last_calls(chain, number, self.schedule.records_block(number))
        blobs = [self.blobs[decode_record(records[hotkey]).blob_hash] for hotkey in hotkeys]
        state = apply(self.states[parent], [decode(blob) for blob in blobs])
        self.confirmed, self.newest = parent, state_hash(state)
        self.states[self.newest] = state
        self.lineage[self.newest] = self.lineage[parent] | {(number, h) for h in hotkeys}

    def _last_calls(self, chain: Chain, number: int, until: int) -> dict[bytes, bytes]:
        """By hotkey, the last call in the blocks up to `until`."""
        last: dict[bytes, bytes] = {}
        for block in chain.blocks[max(0, self.schedule.first_block(number - 1)) : until + 1]:
            for call in block.calls:
                last[call.hotkey] = call.raw
        return last

    def _decide(self, chain: Chain, number: int) -> tuple[bytes, tuple[bytes, ...]] | None:
        schedule = self.schedule
        neurons = chain.blocks[schedule.first_block(number)].neurons
        header = RUN + number.to_bytes(4, "little")
        marks: list[tuple[int, bytes, int]] = []
        everything = 0
        calls = self._last_calls(chain, number, schedule.marks_block(number))
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
        block = chain.blocks[schedule.records_block(number)]
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


# --- peers ------------------------------------------------------------------------------


class Crash(Exception):
    """The process died here."""


@dataclass(frozen=True)
class Checkpoint:
    position: Position
    learned: Vector
    own: dict[int, tuple[Vector, Vector]]
    states: dict[bytes, Vector]
    trained: Vector
    forgotten: Vector
    forgot: frozenset[int]
    marked: int


class SimulatedPeer:
    """One peer: what the live strategy does, on integers.

    fault: what this peer does wrong, "" for an honest one. mines: whether it trains.
    """

    def __init__(self, world: World, hotkey: bytes, *, mines: bool, fault: str = ""):
        self.world = world
        self.rng = world.rng
        self.hotkey = hotkey
        self.mines = mines
        self.fault = fault
        self.alive = True
        self.sees_chain = True
        self.group = 0
        self.blobs: dict[bytes, bytes] = {}
        self.bad: set[bytes] = set()
        self.position = Position(hotkey)
        self.states: dict[bytes, Vector] = {}
        self.local: Vector = ZERO
        self.learned_alone: Vector = ZERO  # u while there is no state to stand on
        self.own: dict[int, tuple[Vector, Vector]] = {}
        self.trained = ZERO
        self.forgotten = ZERO
        self.forgot: frozenset[int] = frozenset()
        self.marked = -1
        self.forked = False
        self.checkpoint = self._snapshot()

    # What is learned and not yet in the state: u = state - local.

    @property
    def learned(self) -> Vector:
        held = self.position.held
        return self.learned_alone if held is None else subtract(self.states[held], self.local)

    def _stand_on(self, state: bytes, learned: Vector) -> None:
        self.local = subtract(self.states[state], learned)

    # Life and death.

    def _snapshot(self) -> Checkpoint:
        return Checkpoint(
            self.position,
            self.learned,
            dict(self.own),
            {h: s for h, s in self.states.items() if h in self.position.states_to_keep},
            self.trained,
            self.forgotten,
            self.forgot,
            self.marked,
        )

    def save(self) -> None:
        self.checkpoint = self._snapshot()

    def _may_crash(self) -> None:
        if self.rng.random() < self.world.crash_rate:
            raise Crash

    def restart(self) -> None:
        saved = self.checkpoint
        self.alive = True
        self.own, self.states = dict(saved.own), dict(saved.states)
        self.trained, self.marked = saved.trained, saved.marked
        self.forgotten, self.forgot = saved.forgotten, saved.forgot
        if self.mines and self.rng.random() < 0.3:
            self.states.pop(self.rng.choice(sorted(self.states) or [b""]), None)
        self.position = rounds.restart(saved.position, self.states)
        self.learned_alone = saved.learned
        if self.position.held is not None:
            if self.position.held not in self.states:  # an older state than those it keeps
                self.position = replace(self.position, held=None)
            else:
                self._stand_on(self.position.held, saved.learned)

    # One block.

    def step(self) -> None:
        if not self.alive:
            return
        try:
            self._train()
            if self.sees_chain:
                self._follow()
            self._catch_up()
            if self.sees_chain:
                self._commit()
                self._mark()
            if self.rng.random() < 0.1:
                self.save()
            self._may_crash()
        except Crash:
            self.alive = False

    def _train(self) -> None:
        if self.mines and self.position.held is not None and self.rng.random() < 0.6:
            step = self.rng.getrandbits(30) - 2**29, self.rng.getrandbits(30) - 2**29
            self.local = add(self.local, step)
            self.trained = add(self.trained, step)

    def _follow(self) -> None:
        newest = self.world.schedule.newest_final_round(self.world.chain.final)
        if self.position.round is None:
            self._join(newest)
            return
        for number in range(self.position.round + 1, newest + 1):
            self._settle(self.world.decide(number))
            self._may_crash()

    def _join(self, newest: int) -> None:
        for number in range(newest, -1, -1):
            decision = self.world.decide(number)
            if decision.parent is not None:
                self._settle(decision)
                for later in range(number + 1, newest + 1):
                    self._settle(self.world.decide(later))
                return
        self.states[state_hash(START)] = START
        self.position = rounds.start(self.hotkey, state_hash(START), settled=newest)
        self.local = START

    def _settle(self, decision: Decision) -> None:
        before = self.position
        self.position, action = rounds.settle(before, decision)
        self.world.note(action)
        match action:
            case Repair():
                assert not action.differs or self.forked, "an honest peer made another state"
                if action.returned:
                    assert before.held is None
                    q, _ = self.own[action.returned.round]
                    self.learned_alone = add(self.learned_alone, q)
            case VoidAndApply():
                assert before.held is not None
                assert before.confirmed is not None
                moved = subtract(self.states[before.held], self.states[before.confirmed])
                self.local = subtract(self.local, moved)
                if action.returned:
                    self.local = subtract(self.local, self.own[action.returned.round][0])
            case Apply() | Empty():
                pass
        self._tidy()

    def _tidy(self) -> None:
        needed = {blob.round for blob in self.position.own_blobs}
        self.own = {number: own for number, own in self.own.items() if number in needed}
        kept = {*self.position.states_to_keep, self.position.held}
        self.states = {state: value for state, value in self.states.items() if state in kept}

    def _catch_up(self) -> None:
        wanted = self.position.missing_state
        if wanted is not None:
            state = self.states.get(wanted) or self.world.fetch_state(self, wanted)
            if state is None:
                return
            assert state_hash(state) == wanted
            self._take(wanted, state)
            self._may_crash()
        blobs = []
        for contribution in self.position.missing_blobs:
            blob = self._fetch(contribution.blob_hash)
            if blob is None:
                return
            blobs.append(decode(blob))
        if blobs:
            self._make_newest(blobs)
            self._may_crash()

    def _take(self, wanted: bytes, state: Vector) -> None:
        learned = self.learned
        self.position, transfer = rounds.take_state(self.position)
        self.states[wanted] = state
        self._stand_on(wanted, self._moved(learned, transfer))
        self._tidy()

    def _make_newest(self, updates: list[Vector]) -> None:
        confirmed = self.position.confirmed
        assert confirmed is not None
        state = apply(self.states[confirmed], updates)
        if self.fault == "rounds" and self.rng.random() < 0.5:
            state = self.world.fork(state)
            self.forked = True
        learned = self.learned
        self.position, transfer = rounds.make_newest(self.position, state_hash(state))
        self.states[state_hash(state)] = state
        self._stand_on(state_hash(state), self._moved(learned, transfer))
        self._tidy()

    def _moved(self, learned: Vector, transfer: Transfer) -> Vector:
        for blob in transfer.off:
            q, e = self.own[blob.round]
            learned = subtract(learned, q)
            if not blob.forgotten:
                assert blob.round not in self.forgot, "rho forgot twice"
                self.forgot = self.forgot | {blob.round}
                learned = subtract(learned, forgotten(e))
                self.forgotten = add(self.forgotten, forgotten(e))
        for blob in transfer.back:
            learned = add(learned, self.own[blob.round][0])
        return learned

    # Records and marks.

    def _commit(self) -> None:
        if not self.mines:
            return
        schedule, block = self.world.schedule, self.world.chain.head.number
        number = schedule.round_at(block)
        due = schedule.cut_block(number) <= block < schedule.records_block(number)
        ready = self.position.round == number - 1 and self.position.base is not None
        if not (due and ready) or self.rng.random() < 0.15:
            return
        if self.position.cut is None:
            q = largest(self.learned)
            if q == ZERO:
                return
            blob = self._cut(number, q)
            self._may_crash()
            self._send_record(number, blob)
        elif self.rng.random() < 0.3:  # the same blob again, as after a restart
            blob = self.blobs[self.position.cut.blob_hash]
            self._send_record(number, blob)

    def _cut(self, number: int, q: Vector) -> bytes:
        base = self.position.base
        assert base is not None
        blob = encode(self.hotkey, number, base, q)
        if self.fault == "malformed":
            blob = b"not a blob" + blob
        elif self.fault == "too long":
            blob = blob.ljust(MAX_BLOB_BYTES + 1)
        blob_hash = hashlib.sha256(blob).digest()
        self.position = rounds.cut_blob(self.position, number, blob_hash)
        self.own[number] = q, subtract(self.learned, q)
        self.blobs[blob_hash] = blob
        self.world.cut(self, number, blob, q)
        self.save()
        return blob

    def _send_record(self, number: int, blob: bytes) -> None:
        base, size = self.position.base, len(blob)
        assert base is not None
        if self.fault == "junk record":
            base, size = self.rng.choice(
                [(self.rng.randbytes(32), size), (base, 0), (base, MAX_BLOB_BYTES + 1)]
            )
        record = Record(RUN, number, base, size, hashlib.sha256(blob).digest())
        self.world.send(self, record.encode())
        if self.fault == "overwrites":
            other = encode(self.hotkey, number, base, (1, self.rng.randint(3, 99)))
            self.blobs[hashlib.sha256(other).digest()] = other
            self.world.truth.blobs[hashlib.sha256(other).digest()] = other
            record = replace(record, blob_hash=hashlib.sha256(other).digest())
            record = replace(record, blob_bytes=len(other))
            self.world.send(self, record.encode())

    def _mark(self) -> None:
        world, schedule = self.world, self.world.schedule
        block = world.chain.head.number
        number = schedule.round_at(block)
        if number <= self.marked or world.chain.final < schedule.records_block(number):
            return
        if self.position.round != number - 1 or self.position.base is None:
            return
        if not world.permitted(self.hotkey, number) or self.rng.random() < 0.1:
            return
        if self.fault in ("lies", "lazy"):
            self._mark_badly(number)
            return
        chosen, complete = self._screen(number)
        if complete or block >= schedule.marks_block(number) - 2:
            self._send_mark(number, chosen)

    def _screen(self, number: int) -> tuple[dict[int, bytes], bool]:
        """The good blobs by uid, and whether nothing that could count is missing."""
        world, base = self.world, self.position.base
        assert base is not None
        facts = world.records(number)
        names = rounds.candidates(world.rules, facts, base)
        good: dict[int, bytes] = {}
        missing: set[int] = set()
        while True:
            left = [n for n in names if n.uid not in missing]
            places = 256 if world.marks_all else world.rules.max_contributors
            wanted = rounds.first_places(left, places=places, records_hash=facts.records_block.hash)
            todo = [neuron for neuron in wanted if neuron.uid not in good]
            if not todo:
                return {n.uid: good[n.uid] for n in wanted}, not missing
            for neuron in todo:
                record = decode_record(facts.records[neuron.hotkey])
                assert record is not None
                blob = self._fetch(record.blob_hash)
                if blob is None or not _well_formed(blob, neuron.hotkey, record):
                    missing.add(neuron.uid)
                else:
                    good[neuron.uid] = blob

    def _send_mark(self, number: int, good: dict[int, bytes]) -> None:
        base = self.position.base
        assert base is not None
        self._may_crash()
        self.marked = number
        self.save()
        mark = Mark(RUN, number, base, frozenset(good), witness(self.hotkey, good))
        self.world.send(self, mark.encode())

    def _mark_badly(self, number: int) -> None:
        position, rng = self.position, self.rng
        assert position.base is not None
        assert position.confirmed is not None
        self.marked = number
        everyone = frozenset(neuron.uid for neuron in self.world.neurons)
        if self.fault == "lazy":  # vouches for all it has not seen, or says nothing
            if rng.random() < 0.7:
                mark = Mark(RUN, number, position.base, everyone, bytes(16))
                self.world.send(self, mark.encode())
            return
        state, uids = rng.choice(
            [
                (self.world.junk_state, everyone),
                (position.base, everyone),
                (position.confirmed, everyone),
                (position.base, frozenset()),
            ]
        )
        raw = Mark(RUN, number, state, uids, rng.randbytes(16)).encode()
        raw = rng.choice([raw] * 6 + [raw[:-1], raw + b"x", b"\x22" + raw[1:], rng.randbytes(93)])
        self.world.send(self, raw)

    # The network.

    def serves(self, blob_hash: bytes) -> bool:
        cut = self.position.cut
        if self.fault == "withholds" and self.rng.random() < 0.8:
            return False
        if cut is not None and cut.blob_hash == blob_hash:
            return self.world.chain.final >= self.world.schedule.records_block(cut.round)
        return blob_hash in self.blobs

    @property
    def own_hashes(self) -> set[bytes]:
        """The blobs that are its own: nobody else can bring them back before D is final."""
        return {blob.blob_hash for blob in self.position.own_blobs}

    def _fetch(self, blob_hash: bytes) -> bytes | None:
        if blob_hash not in self.blobs:
            blob = self.world.fetch_blob(self, blob_hash)
            if blob is not None:
                self.blobs[blob_hash] = blob
        return self.blobs.get(blob_hash)


def _well_formed(blob: bytes, hotkey: bytes, record: Record) -> bool:
    try:
        owner, number, parent, _ = json.loads(blob)
    except ValueError:
        return False
    named = (bytes.fromhex(owner), number, bytes.fromhex(parent), len(blob))
    return named == (hotkey, record.round, record.parent, record.blob_bytes)


# --- the world --------------------------------------------------------------------------

FAULTS = ("withholds", "overwrites", "malformed", "too long", "junk record", "rounds")
CHAOS_ROUNDS = 5
CALM_ROUNDS = 3


class World:
    """One schedule: everything that happens follows from the seed."""

    def __init__(self, seed: int):
        rng = self.rng = random.Random(seed)
        self.schedule = Schedule(rng.randint(9, 12), mark_blocks=4, cut_blocks=2)
        quorum = rng.choice([Fraction(1, 2), Fraction(1, 2), Fraction(2, 3), Fraction(9, 10)])
        places = rng.choice([1, 2, 5, 20])
        self.rules = Rules(RUN, self.schedule, MAX_BLOB_BYTES, quorum, places)
        self.truth = Truth(quorum, places, self.schedule)
        self.junk_state = rng.randbytes(32)
        self.crash_rate = rng.choice([0, 0.002, 0.01])
        self.loss = rng.choice([0, 0.1, 0.4])
        self.longest_delay = rng.choice([0, 1, 4])
        self.outage_from = self.outage_until = 0
        self.marks_all = rng.random() < 0.5
        self.withholding = rng.choice([0, 0, 0.5])
        self.unrest = rng.choice([0.02, 0.1, 0.2])
        self.peers: dict[bytes, SimulatedPeer] = {}
        self.gone: set[bytes] = set()
        self.cuts: dict[tuple[int, bytes], Vector] = {}
        self.decisions: dict[int, Decision] = {}
        self.log: list[str] = []
        self._sums: dict[tuple[bytes, bytes], Vector] = {}
        self.events: dict[str, int] = {}
        self.neurons = self._register()
        self.chain = Chain(rng, self.neurons, lag=rng.choice([1, 2]))
        for peer in self.peers.values():
            peer.position = rounds.start(peer.hotkey, state_hash(START))
            peer.states, peer.local = {state_hash(START): START}, START
            peer.save()

    def _register(self) -> tuple[Neuron, ...]:
        rng = self.rng
        uids = rng.sample([0, 255, *rng.sample(range(1, 255), 10)], 12)
        neurons = [
            self._neuron(uids.pop(), permit=True, mines=rng.random() < 0.2)
            for _ in range(rng.randint(1, 5))
        ]
        neurons += [
            self._neuron(uids.pop(), permit=False, mines=True) for _ in range(rng.randint(2, 4))
        ]
        for neuron in sorted(neurons, key=lambda neuron: neuron.stake):
            peer = self.peers[neuron.hotkey]
            if neuron.permit:
                peer.fault = rng.choice(["", "lies", "lies", "lazy"])
            elif rng.random() < 0.3:
                peer.fault = rng.choice(FAULTS)
            if not self._is_safe(neurons):
                peer.fault = ""
        return tuple(neurons)

    def _neuron(self, uid: int, *, permit: bool, mines: bool) -> Neuron:
        hotkey = self.rng.randbytes(32)
        self.peers[hotkey] = SimulatedPeer(self, hotkey, mines=mines)
        stake = self.rng.choice([0, 1, 5, 20, 40, 40]) * self.rng.choice([1, 10**15])
        return Neuron(uid, hotkey, permit, stake, self.rng.choice([0, 0, 7, 99, 65535]))

    def _is_safe(self, neurons: list[Neuron]) -> bool:
        """Whether those who do wrong hold less than it takes to be more than half of a
        quorum: what the protocol promises holds only then."""
        stakes = {n.hotkey: max(1, n.stake) for n in neurons if n.permit}
        bad = sum(stake for hotkey, stake in stakes.items() if self.peers[hotkey].fault)
        return 2 * bad <= self.rules.quorum * sum(stakes.values()) and 2 * bad < sum(
            stakes.values()
        )

    # What happens.

    def run(self) -> None:
        blocks = CHAOS_ROUNDS * self.schedule.round_blocks
        while self.chain.head.number < blocks:
            self._disturb()
            self._tick()
        self._heal()
        last = self.schedule.round_at(self.chain.head.number) + CALM_ROUNDS
        while self.chain.head.number < self.schedule.marks_block(last) + self.chain.lag + 2:
            self._tick()
        self._check_healed(last)
        self._check_log()

    def _tick(self) -> None:
        self.chain.advance(self.neurons)
        self._follow()
        if self.chain.head.number == self.outage_from:
            for peer in self.peers.values():
                if self.rng.random() < 0.8:
                    peer.blobs = {h: b for h, b in peer.blobs.items() if h in peer.own_hashes}
        peers = [peer for peer in self.peers.values() if peer.hotkey not in self.gone]
        self.rng.shuffle(peers)
        for peer in peers:
            peer.step()
            self._check_peer(peer)

    def _follow(self) -> None:
        newest = self.schedule.newest_final_round(self.chain.final)
        for number in range(len(self.truth.decided), newest + 1):
            before = (self.truth.confirmed, self.truth.newest)
            self.truth.follow(self.chain, number)
            self._check_rule(number, before)
            self.log.append(facts_to_json(self.chain.facts(self.schedule, number)))

    def _disturb(self) -> None:
        rng = self.rng
        starts = self.chain.head.number % self.schedule.round_blocks == 0
        if starts and rng.random() < self.withholding:
            EVENTS["withhold"](self, next(iter(self.peers.values())))
        if rng.random() > self.unrest:
            return
        peer = rng.choice(list(self.peers.values()))
        self.happened(event := rng.choice(sorted(EVENTS)))
        EVENTS[event](self, peer)

    def _heal(self) -> None:
        self.loss = self.longest_delay = self.crash_rate = 0
        self.chain.stalled_until = self.outage_until = 0
        for peer in self.peers.values():
            peer.group, peer.sees_chain = 0, True
            if peer.fault == "rounds":
                peer.fault = ""
            if not peer.alive and peer.hotkey not in self.gone:
                peer.restart()

    def happened(self, event: str) -> None:
        self.events[event] = self.events.get(event, 0) + 1

    def note(self, action: object) -> None:
        self.happened(type(action).__name__)
        if isinstance(action, VoidAndApply) and action.returned:
            self.happened("returned")
        if isinstance(action, Repair) and action.differs:
            self.happened("differs")

    # What peers reach.

    def send(self, peer: SimulatedPeer, raw: bytes) -> None:
        if self.rng.random() < self.loss / 2:
            return
        arrives = self.chain.head.number + 1 + self.rng.randint(0, self.longest_delay)
        self.chain.submit(Call(peer.hotkey, raw, arrives, arrives + 7))

    def decide(self, number: int) -> Decision:
        """What a peer decides from what it reads itself; often enough, the first one's."""
        if number in self.decisions and self.rng.random() < 0.7:
            return self.decisions[number]
        decision = rounds.decide(self.rules, self.chain.facts(self.schedule, number))
        truth = self.truth.decided[number]
        if truth is None:
            assert decision.parent is None
        else:
            hotkeys = tuple(blob.hotkey for blob in decision.contributions)
            assert (decision.parent, hotkeys) == truth, f"round {number}"
        assert self.decisions.setdefault(number, decision) == decision
        return decision

    def records(self, number: int) -> Facts:
        """What a validator knows once the records are final."""
        first = self.chain.blocks[self.schedule.first_block(number)]
        block = self.chain.blocks[self.schedule.records_block(number)]
        marks = Block(self.schedule.marks_block(number), b"")
        return Facts(
            number,
            Block(first.number, first.hash),
            Block(block.number, block.hash),
            marks,
            first.neurons,
            block.commitments,
            {},
        )

    def permitted(self, hotkey: bytes, number: int) -> bool:
        neurons = self.chain.blocks[self.schedule.first_block(number)].neurons
        return hotkey in {neuron.hotkey for neuron in neurons if neuron.permit}

    def _others(self, peer: SimulatedPeer, *, blobs: bool) -> list[SimulatedPeer]:
        outage = blobs and self.outage_from <= self.chain.head.number < self.outage_until
        if outage or self.rng.random() < self.loss:
            return []
        others = [
            other
            for other in self.peers.values()
            if other.alive and other is not peer and other.group == peer.group
        ]
        self.rng.shuffle(others)
        return others

    def fetch_blob(self, peer: SimulatedPeer, blob_hash: bytes) -> bytes | None:
        """From a random holder first, and from another if that fails."""
        for other in self._others(peer, blobs=True):
            if other.serves(blob_hash) and self.rng.random() >= self.loss:
                blob = b"something else" if other.fault == "lies" else other.blobs[blob_hash]
                if hashlib.sha256(blob).digest() == blob_hash:
                    return blob
        return None

    def fetch_state(self, peer: SimulatedPeer, wanted: bytes) -> Vector | None:
        for other in self._others(peer, blobs=False):
            if wanted in other.states and self.rng.random() >= self.loss:
                state = (0, 1) if other.fault == "lies" else other.states[wanted]
                if state_hash(state) == wanted:
                    return state
        return None

    def cut(self, peer: SimulatedPeer, number: int, blob: bytes, q: Vector) -> None:
        assert (number, peer.hotkey) not in self.cuts, "a second cut in one round"
        self.cuts[number, peer.hotkey] = q
        self.truth.blobs[hashlib.sha256(blob).digest()] = blob

    def fork(self, state: Vector) -> Vector:
        """The same state with a rounding error."""
        other = (state[0] + 1, state[1])
        self.truth.states[state_hash(other)] = other
        self.truth.lineage[state_hash(other)] = self.truth.lineage[state_hash(state)]
        return other

    # What must hold.

    def _check_rule(self, number: int, before: tuple[bytes, bytes]) -> None:
        decided = self.truth.decided[number]
        if decided is None:
            return
        assert decided[0] in before, "a state that nobody made was decided"
        for share in self.truth.shares[number]:
            assert share > self.rules.quorum / 2, "a minority decided"
        for hotkey in decided[1]:
            assert (number, hotkey) in self.cuts, "what was never cut counts"

    def _check_peer(self, peer: SimulatedPeer) -> None:
        """After every step: the state is one that the chain made, and no learning is lost."""
        position = peer.position
        if not peer.alive or position.held is None:
            return
        state = peer.states[position.held]
        assert self.truth.states[position.held] == state
        assert position.base is None or position.states_to_keep <= set(peer.states)
        if peer.fault == "overwrites":  # it publishes what it does not keep account of
            return
        total = add(peer.learned, add(peer.forgotten, peer.trained))
        total = add(total, self._counted(position.held, peer.hotkey))
        assert total == ZERO, "learning was lost or counted twice"

    def _counted(self, state: bytes, hotkey: bytes) -> Vector:
        """The sum of a peer's blobs that are in a state."""
        if (state, hotkey) not in self._sums:
            total = ZERO
            for number, author in self.truth.lineage[state]:
                if author == hotkey:
                    total = add(total, self.cuts[number, hotkey])
            self._sums[state, hotkey] = total
        return self._sums[state, hotkey]

    def _check_healed(self, last: int) -> None:
        for peer in self.peers.values():
            if peer.hotkey in self.gone:
                continue
            position = peer.position
            assert position.round == last
            assert position.confirmed == self.truth.confirmed
            assert position.newest == position.held == self.truth.newest
        if self._must_progress():
            calm = range(last - CALM_ROUNDS, last + 1)
            decided = [self.truth.decided[number] for number in calm]
            assert any(decided), "nothing was decided though all was calm"
            assert any(found and found[1] for found in decided), "nothing counted"

    def _must_progress(self) -> bool:
        stakes = {n.hotkey: max(1, n.stake) for n in self.neurons if n.permit}
        honest = sum(stake for hotkey, stake in stakes.items() if not self.peers[hotkey].fault)
        miners = [self.peers[neuron.hotkey] for neuron in self.neurons]
        works = any(peer.mines and not peer.fault for peer in miners)
        return works and honest >= self.rules.quorum * sum(stakes.values())

    def _check_log(self) -> None:
        """Every decision follows from the log alone."""
        for number, line in enumerate(self.log):
            decision = rounds.decide(self.rules, facts_from_json(line))
            assert self.decisions[number] == decision


# --- what disturbs the world ------------------------------------------------------------


def _crash(world: World, peer: SimulatedPeer) -> None:
    peer.alive = False


def _restart(world: World, peer: SimulatedPeer) -> None:
    for other in world.peers.values():
        if not other.alive and other.hotkey not in world.gone:
            other.restart()


def _partition(world: World, peer: SimulatedPeer) -> None:
    for other in world.peers.values():
        other.group = world.rng.randint(0, 1)
        other.sees_chain = world.rng.random() < 0.8


def _reunite(world: World, peer: SimulatedPeer) -> None:
    for other in world.peers.values():
        other.group, other.sees_chain = 0, True


def _stall(world: World, peer: SimulatedPeer) -> None:
    world.chain.stalled_until = world.chain.head.number + world.rng.randint(3, 18)


def _withhold(world: World, peer: SimulatedPeer) -> None:
    """After the next marks nobody serves blobs for a while, and some lose what they had."""
    number = world.schedule.round_at(world.chain.head.number)
    world.outage_from = world.schedule.marks_block(number) - 1
    world.outage_until = world.outage_from + world.rng.randint(5, 14)


def _reorganize(world: World, peer: SimulatedPeer) -> None:
    for _ in range(world.chain.reorganize()):
        world.chain.advance(world.neurons)
    world._follow()


def _deregister(world: World, peer: SimulatedPeer) -> None:
    """Another hotkey takes the uid; it joins late.

    Not the only holder of a state: what is lost for good nobody can bring back.
    """
    others = [p for p in world.peers.values() if p is not peer and p.hotkey not in world.gone]
    held = {state for other in others for state in other.checkpoint.states}
    if not {world.truth.confirmed, world.truth.newest} <= held:
        return
    for neuron in world.neurons:
        if neuron.hotkey == peer.hotkey:
            new = world._neuron(neuron.uid, permit=False, mines=True)
            neurons = [new if n is neuron else n for n in world.neurons]
            if world._is_safe(neurons) and any(n.permit for n in neurons):
                world.neurons = tuple(neurons)
                world.gone.add(peer.hotkey)
                peer.alive = False
            else:
                del world.peers[new.hotkey]
            return


def _change(world: World, peer: SimulatedPeer) -> None:
    """Stake, incentive and permit of one neuron change."""
    rng = world.rng
    neurons = [
        replace(
            neuron,
            permit=rng.random() < 0.6,
            stake=rng.choice([0, 5, 20, 40]),
            incentive=rng.randint(0, 65535),
        )
        if neuron.hotkey == peer.hotkey
        else neuron
        for neuron in world.neurons
    ]
    if world._is_safe(neurons) and any(neuron.permit for neuron in neurons):
        world.neurons = tuple(neurons)


EVENTS = {
    "crash": _crash,
    "restart": _restart,
    "partition": _partition,
    "reunite": _reunite,
    "stall": _stall,
    "withhold": _withhold,
    "reorganize": _reorganize,
    "deregister": _deregister,
    "change": _change,
}
