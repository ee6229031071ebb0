"""For the simulator of rounds: one peer, which drives the functions of `rounds`.

It does what the live strategy does, on pairs of integers, and is honest unless its fault
says otherwise. A crash may come between any two of its steps.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from simulated_chain import (
    MAX_BLOB_BYTES,
    RUN,
    START,
    ZERO,
    Vector,
    add,
    apply,
    decode,
    encode,
    forgotten,
    largest,
    state_hash,
    subtract,
)

from hiveminer.strategies.sparseloco import rounds
from hiveminer.strategies.sparseloco.records import Mark, Record, decode_record, witness
from hiveminer.strategies.sparseloco.rounds import (
    Decision,
    Position,
    Transfer,
)

if TYPE_CHECKING:
    from round_simulator import World


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
        assert not action.differs or self.forked, "an honest peer made another state"
        if before.held and self.position.held != before.held:
            moved = subtract(self.states[before.held], self.states[self.position.held])
            self.local = subtract(self.local, moved)
        if action.returned:
            q, _ = self.own[action.returned.round]
            if before.held is None:
                self.learned_alone = add(self.learned_alone, q)
            else:
                self.local = subtract(self.local, q)
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
        facts = world.chain.records(world.schedule, number)
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
    def kept_hashes(self) -> set[bytes]:
        """The blobs that no peer loses: its own, and those between its two states. If all
        lost the latter, validators that are split between the states would stay so."""
        own = {blob.blob_hash for blob in self.position.own_blobs}
        return own | {blob.blob_hash for blob in self.position.contributions}

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
