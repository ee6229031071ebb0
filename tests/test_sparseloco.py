"""Four replicas train through codec, update, apply and rounds, in one process."""

from __future__ import annotations

import asyncio
import hashlib
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hiveminer.config.run import OptimizerSection
from hiveminer.strategies.sparseloco import rounds, update
from hiveminer.strategies.sparseloco.apply import CountedBlob, OuterStep, State, apply_blobs
from hiveminer.strategies.sparseloco.codec import Compression, Header, decode, encode
from hiveminer.strategies.sparseloco.records import Mark, Record, witness
from hiveminer.strategies.sparseloco.schedule import Schedule
from hiveminer.training.model import builtin_model
from hiveminer.training.optimizer import inner_optimizer

STEPS, PEERS = 200, 4
ROWS, TOKENS = 4, 32
RUN = bytes(8)
# A block per step. The blob of a cut counts half a round of steps later.
SCHEDULE = Schedule(round_blocks=20, mark_blocks=6, cut_blocks=4)
RULES = rounds.Rules(RUN, SCHEDULE, max_blob_bytes=10**6)
COMPRESSION = Compression(density=1 / 4, bits=2)
STEP = OuterStep(contributor_power=0.5)
KEEP = 0.9
VALIDATORS = (bytes([100]) * 32, bytes([101]) * 32)


def text() -> tuple[Tensor, Tensor]:
    """Bytes of the standard library, as tokens: to train on, and held out."""
    files = sorted(Path(asyncio.__file__).parent.glob("*.py"))
    data = b"".join(path.read_bytes() for path in files)
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    return tokens[:-50_000], tokens[-50_000:]


def rows(tokens: Tensor, count: int, *, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(tokens) - TOKENS, (count,), generator=generator)
    return torch.stack([tokens[start : start + TOKENS] for start in starts.tolist()])


class Replica:
    """A model that trains alone."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.model = builtin_model()
        self.optimizer = inner_optimizer(self.model, OptimizerSection())
        self.parameters = dict(self.model.named_parameters())

    def train(self, tokens: Tensor) -> None:
        """One step."""
        batch = rows(tokens, ROWS, generator=self.generator)
        self.optimizer.zero_grad()
        self.model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()

    @torch.no_grad()
    def loss(self, tokens: Tensor) -> float:
        batch = rows(tokens, 64, generator=torch.Generator().manual_seed(0))
        return float(self.model(input_ids=batch, labels=batch).loss)


class Peer(Replica):
    """A replica that takes part in rounds, with the bookkeeping of the invariant."""

    def __init__(self, uid: int):
        super().__init__(uid)
        self.uid, self.hotkey = uid, bytes([uid + 1]) * 32
        self.state = State.of(self.model)
        self.names = list(self.state.weights)
        self.local = [self.parameters[name].detach() for name in self.names]
        self.position = rounds.start(self.hotkey, self.state.hash())
        self.cut: update.Cut | None = None
        self.blob = b""
        self.sums = [torch.zeros(value.shape, dtype=torch.float64) for value in self.local]
        self.counted = 0

    @property
    def weights(self) -> list[Tensor]:
        return [self.state.weights[name] for name in self.names]

    def train(self, tokens: Tensor) -> None:
        before = [value.clone() for value in self.local]
        super().train(tokens)
        for total, old, new in zip(self.sums, before, self.local, strict=True):
            total += new.double() - old.double()

    def make_record(self, number: int) -> Record:
        assert self.position.base == self.state.hash()
        header = Header(self.hotkey, RUN, number, self.state.hash())

        def compress(learned: list[Tensor]) -> list[Tensor]:
            named = dict(zip(self.names, learned, strict=True))
            self.blob = encode(named, header=header, compression=COMPRESSION)
            shapes = {name: value.shape for name, value in named.items()}
            sent = decode(self.blob, shapes=shapes)
            return [sent.dense(name) for name in self.names]

        self.cut = update.cut(self.weights, self.local, compress=compress)
        blob_hash = hashlib.sha256(self.blob).digest()
        self.position = rounds.cut_blob(self.position, number, blob_hash)
        return Record(RUN, number, header.parent, len(self.blob), blob_hash)

    def settle(self, decision: rounds.Decision, blobs: dict[bytes, bytes]) -> None:
        self.position, action = rounds.settle(self.position, decision)
        assert isinstance(action, rounds.Apply)
        assert action.parent == self.state.hash()
        counted = [
            CountedBlob(
                each.uid,
                Header(each.hotkey, RUN, decision.round, action.parent),
                blobs[each.blob_hash],
            )
            for each in self.position.missing_blobs
        ]
        random.Random(self.uid).shuffle(counted)  # the order of arrival is one's own
        before = self.weights
        applied = apply_blobs(self.state, counted, step=STEP, compression=COMPRESSION)
        assert not applied.left_out
        self.state = applied.state
        self.position, transfer = rounds.make_newest(self.position, self.state.hash())
        mine = self.cut if transfer.off else None
        update.settle(self.local, before, self.weights, counted=mine, keep=KEEP)
        if mine is not None:
            self.counted += 1
            for index, total in enumerate(self.sums):
                total += mine.taken(index, keep=KEEP).double()

    def off_by(self) -> float:
        """u + own q that counts + what was forgotten + own steps: 0 but for rounding."""
        learned = update.learned(self.weights, self.local)
        return max(
            float((u.double() + total).abs().max())
            for u, total in zip(learned, self.sums, strict=True)
        )


def block(number: int) -> rounds.Block:
    return rounds.Block(number, hashlib.sha256(number.to_bytes(8, "little")).digest())


def decide(
    number: int, peers: list[Peer], records: dict[bytes, Record], marked: frozenset[int]
) -> rounds.Decision:
    """What the chain decides when both validators mark these uids."""
    state = peers[0].state.hash()
    neurons = [rounds.Neuron(peer.uid, peer.hotkey, False, 0, 0) for peer in peers]
    neurons += [
        rounds.Neuron(PEERS + index, hotkey, True, 10, 0) for index, hotkey in enumerate(VALIDATORS)
    ]
    blobs = {peer.uid: peer.blob for peer in peers if peer.uid in marked}
    marks = {
        hotkey: Mark(RUN, number, state, marked, witness(hotkey, blobs)).encode()
        for hotkey in VALIDATORS
    }
    facts = rounds.Facts(
        number,
        block(SCHEDULE.first_block(number)),
        block(SCHEDULE.records_block(number)),
        block(SCHEDULE.marks_block(number)),
        tuple(neurons),
        {hotkey: record.encode() for hotkey, record in records.items()},
        marks,
    )
    return rounds.decide(RULES, facts)


@pytest.mark.slow
@pytest.mark.timeout(600)  # a minute of one core, which may be shared
def test_four_replicas_learn_more_than_one_and_hold_the_same_state() -> None:
    train, held_out = text()
    peers = [Peer(uid) for uid in range(PEERS)]
    alone = Replica(0)
    blobs_of_run = PEERS * STEPS // SCHEDULE.round_blocks
    missed = set(random.Random(5).sample(range(blobs_of_run), blobs_of_run // 10))
    records: dict[bytes, Record] = {}
    seen = {peers[0].state.hash()}
    for now in range(1, STEPS + 1):
        for replica in (*peers, alone):
            replica.train(train)
        number = SCHEDULE.round_at(now)
        if now == SCHEDULE.cut_block(number):
            records = {peer.hotkey: peer.make_record(number) for peer in peers}
        if now == SCHEDULE.marks_block(number - 1):
            marked = frozenset(
                uid for uid in range(PEERS) if PEERS * (number - 1) + uid not in missed
            )
            decision = decide(number - 1, peers, records, marked)
            blobs = {hashlib.sha256(peer.blob).digest(): peer.blob for peer in peers}
            for peer in peers:
                peer.settle(decision, blobs)
            hashes = {peer.state.hash() for peer in peers}
            assert len(hashes) == 1
            assert not hashes & seen  # the round moved the state
            seen |= hashes
            assert max(peer.off_by() for peer in peers) < 1e-4
    assert sum(peer.counted for peer in peers) == blobs_of_run - len(missed)
    assert len(seen) == STEPS // SCHEDULE.round_blocks + 1
    single, locals_ = alone.loss(held_out), [peer.loss(held_out) for peer in peers]
    with torch.no_grad():
        for name, value in peers[0].parameters.items():
            value.copy_(peers[0].state.weights[name])
    shared = peers[0].loss(held_out)
    print(f"alone {single:.3f}, shared {shared:.3f}, local {locals_}")
    assert shared < single
    assert max(locals_) < single
