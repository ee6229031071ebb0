"""Strategies and an observer through rounds, with the chain and the swarm in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from memory_network import MemoryExchange, Network, NetworkView, Swarm
from tiny import VOCABULARY, tiny_model

from hiveminer.config.run import OptimizerSection, SparselocoSection
from hiveminer.strategies.base import RoundResult
from hiveminer.strategies.sparseloco.log import Log
from hiveminer.strategies.sparseloco.observer import SparselocoObserver
from hiveminer.strategies.sparseloco.parts import Parts
from hiveminer.strategies.sparseloco.plan import Plan
from hiveminer.strategies.sparseloco.records import decode_record
from hiveminer.strategies.sparseloco.replay import verify
from hiveminer.strategies.sparseloco.rounds import Neuron
from hiveminer.strategies.sparseloco.shelf import Shelf
from hiveminer.strategies.sparseloco.strategy import SparselocoStrategy

SECTION = SparselocoSection(
    round_blocks=15, mark_blocks=7, cut_blocks=2, density=0.25, bits=2, contributor_power=0.5
)
OPTIMIZER = OptimizerSection(learning_rate=0.01)
RUN_ID = "memory-a-b-c"


def key(uid: int) -> bytes:
    return bytes([uid + 1]) * 32


class Peers:
    """Three miners and a validator. A block is one look of everybody, and a step of each miner."""

    def __init__(self, folder: Path, *, miners: int = 3, optimizer: OptimizerSection = OPTIMIZER):
        self.folder = folder
        self.optimizer = optimizer
        self.validator_uid, self.is_validating = 9, True
        neurons = [Neuron(uid, key(uid), False, 0, 0) for uid in range(6)]
        neurons.append(Neuron(self.validator_uid, key(self.validator_uid), True, 100, 0))
        self.network, self.swarm = Network(tuple(neurons)), Swarm()
        self.rounds: list[tuple[int, RoundResult]] = []
        self.views: dict[int, NetworkView] = {}
        self.miners: dict[int, SparselocoStrategy] = {}
        self.rows = torch.Generator().manual_seed(0)
        for uid in range(miners):
            self.start(uid)
        self.validator = SparselocoObserver(tiny_model("llama"), self.parts(self.validator_uid))

    def parts(self, uid: int) -> Parts:
        model = tiny_model("llama")
        plan = Plan.of(SECTION, run_id=RUN_ID, model=model)
        log = Log(self.folder / str(uid))
        log.begin(plan, run_id=RUN_ID)
        shelf = self.swarm.sources[key(uid)] = Shelf(log)
        view = self.views[uid] = NetworkView(self.network, key(uid))
        return Parts(
            section=self.optimizer, plan=plan, hotkey=key(uid), chain=view,
            exchange=MemoryExchange(self.swarm), log=log, shelf=shelf,
        )  # fmt: skip

    def start(self, uid: int) -> SparselocoStrategy:
        def on_round(ended: RoundResult) -> None:
            self.rounds.append((uid, ended))

        strategy = SparselocoStrategy(tiny_model("llama"), self.parts(uid), on_round=on_round)
        self.miners[uid] = strategy
        return strategy

    def stop(self, uid: int) -> SparselocoStrategy:
        """As kill -9: nothing is saved, and nothing is served any more."""
        del self.swarm.sources[key(uid)]
        return self.miners.pop(uid)

    def look(self) -> None:
        validators = [self.validator] if self.is_validating else []
        for peer in (*self.miners.values(), *validators):
            if not self.network.down:
                peer.follower.follow()

    def block(self, count: int = 1, *, training: bool = True) -> None:
        for _ in range(count):
            self.network.advance()
            self.look()
            for miner in self.miners.values():
                if training:
                    self.train(miner)
                else:
                    miner.idle()

    def train(self, miner: SparselocoStrategy) -> bool:
        miner.zero_grad()
        first = torch.randint(2, VOCABULARY - 4, (4, 1), generator=self.rows)
        tokens = first + torch.arange(4)  # each token follows from the one before
        torch.autograd.backward(miner.model(input_ids=tokens, labels=tokens).loss)
        return miner.step(batch_size=4)

    def round(self, count: int = 1) -> None:
        self.block(count * SECTION.round_blocks)

    def states(self) -> set[bytes | None]:
        peers = (*self.miners.values(), self.validator)
        return {peer.replica.position.newest for peer in peers}

    def loss(self) -> float:
        """Of the global state."""
        model = tiny_model("llama")
        weights = self.validator.replica.state.weights
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.copy_(weights[name])
            tokens = torch.arange(2, VOCABULARY - 4).unsqueeze(1) + torch.arange(4)
            return float(model(input_ids=tokens, labels=tokens).loss)


slow = pytest.mark.slow


def counted(peers: Peers) -> list[tuple[int, ...]]:
    """By round, the uids that count, as the validator's log has it."""
    report = verify(peers.validator.follower.log, peers.validator.replica.plan)
    return [tuple(c.uid for c in each.decision.contributions) for each in report.rounds]


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=slow)])
def test_all_hold_the_same_states_and_learn(tmp_path: Path, name: str) -> None:
    section = OptimizerSection.model_validate({"name": name, "learning_rate": 0.01})
    peers = Peers(tmp_path, optimizer=section)
    before = peers.loss()
    seen = set()
    for _ in range(6):
        peers.round()
        peers.block(4)
        states = peers.states()
        assert len(states) == 1
        seen |= states
        peers.block(SECTION.round_blocks - 4)
    assert len(seen) == 6
    assert counted(peers)[:6] == [(0, 1, 2)] * 6
    assert peers.loss() < 0.7 * before
    for peer in (*peers.miners.values(), peers.validator):
        report = verify(peer.follower.log, peer.replica.plan)
        assert report.verified, report.problems
        assert sum(each.verified for each in report.rounds) >= 6
    assert {uid for uid, _ in peers.rounds} == {0, 1, 2}
    assert peers.rounds[-1][1].group_size == 3


def test_who_trained_nothing_commits_nothing(tmp_path: Path) -> None:
    peers = Peers(tmp_path)
    peers.block(40, training=False)
    assert all(not peers.views[uid].commits for uid in peers.miners)
    peers.round(2)
    assert all(peers.views[uid].commits for uid in peers.miners)


def test_nothing_is_lost_of_what_did_not_count(tmp_path: Path) -> None:
    """Without a validator rounds are empty, and the learning of all goes into a later one."""
    peers = Peers(tmp_path)
    peers.is_validating = False
    peers.round(3)
    assert peers.states() == {peers.miners[0].replica.position.newest, None}
    learned = [u.clone() for u in peers.miners[0].replica.snapshot(parameters(peers, 0))[2]]
    assert max(float(u.abs().max()) for u in learned) > 0.05
    peers.is_validating = True
    peers.round(2)
    peers.block(4)
    assert len(peers.states()) == 1
    assert counted(peers)[-1] == (0, 1, 2)


def parameters(peers: Peers, uid: int) -> list[torch.Tensor]:
    named = dict(peers.miners[uid].model.named_parameters())
    return [named[name].detach() for name in peers.miners[uid].replica.names]


def test_a_joiner_takes_the_state_and_counts(tmp_path: Path) -> None:
    peers = Peers(tmp_path)
    peers.round(4)
    joiner = peers.start(3)
    assert not peers.train(joiner)  # what is trained before the state is there is discarded
    peers.round(2)
    peers.block(4)
    assert len(peers.states()) == 1
    assert counted(peers)[-1] == (0, 1, 2, 3)


@pytest.mark.parametrize("block", [5, *(pytest.param(at, marks=slow) for at in (1, 9, 13))])
def test_a_restart_loses_no_round_and_publishes_once(tmp_path: Path, block: int) -> None:
    peers = Peers(tmp_path)
    peers.round(3)
    peers.block(block)
    miner = peers.miners[1]
    tensors, metadata = miner.state_dict()
    tensors = {name: value.clone() for name, value in tensors.items()}
    u = miner.replica.snapshot(parameters(peers, 1))[2]
    peers.stop(1)
    commits = peers.views[1].commits
    peers.block(2)
    again = peers.start(1)
    again.load_state_dict(tensors, metadata)
    assert_close(again.replica.snapshot(parameters(peers, 1))[2], u)
    peers.round(3)
    peers.block(4)
    assert len(peers.states()) == 1
    assert_published_once(commits + peers.views[1].commits)
    assert sum(1 in uids for uids in counted(peers)) >= len(counted(peers)) - 2
    report = verify(again.follower.log, again.replica.plan)
    assert report.verified, report.problems


@pytest.mark.parametrize("block", [9, *(pytest.param(at, marks=slow) for at in (5, 13))])
def test_a_crash_after_a_cut_without_a_checkpoint_publishes_once(
    tmp_path: Path, block: int
) -> None:
    peers = Peers(tmp_path)
    peers.round(3)
    peers.block(block)
    commits = peers.views[1].commits
    peers.stop(1)
    again = peers.start(1)
    again._resume_cut()  # the first thing that `join` does
    peers.round(2)
    peers.block(4)
    assert len(peers.states()) == 1
    assert_published_once(commits + peers.views[1].commits)


def assert_published_once(commits: list[bytes]) -> None:
    blobs: dict[int, bytes] = {}
    for raw in commits:
        record = decode_record(raw)
        assert record is not None
        assert blobs.setdefault(record.round, record.blob_hash) == record.blob_hash


def assert_close(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_a_withheld_blob_voids_one_round(tmp_path: Path) -> None:
    """All lose a blob right after it was marked: the next marks name the older state."""
    peers = Peers(tmp_path)
    peers.round(3)
    while not any(mark_of(peers)):
        peers.block()
    cut = peers.miners[2].replica.position.cut
    assert cut is not None
    peers.swarm.withheld.add(cut.blob_hash)
    remove_blob(peers, cut.blob_hash)
    peers.round(3)
    peers.block(4)
    assert len(peers.states()) == 1
    uids = counted(peers)
    assert (0, 1, 2) in uids[-2:]
    assert sum(not each for each in uids[3:]) <= 2


def mark_of(peers: Peers) -> list[bytes]:
    """The validator's mark that was committed in this block."""
    raw = peers.network.pending.get(key(peers.validator_uid))
    return [raw] if raw else []


def remove_blob(peers: Peers, digest: bytes) -> None:
    for uid in (*peers.miners, peers.validator_uid):
        if uid != 2:
            (peers.folder / str(uid) / "blobs" / digest.hex()).unlink(missing_ok=True)


def test_a_stall_of_finality_costs_rounds_and_nothing_else(tmp_path: Path) -> None:
    peers = Peers(tmp_path)
    peers.round(3)
    peers.network.stalled = True
    peers.round(2)
    peers.network.stalled = False
    peers.round(2)
    peers.block(4)
    assert len(peers.states()) == 1
    assert counted(peers)[-1] == (0, 1, 2)
    report = verify(peers.miners[0].follower.log, peers.miners[0].replica.plan)
    assert report.verified, report.problems


def test_a_chain_that_does_not_answer_is_waited_for(tmp_path: Path) -> None:
    peers = Peers(tmp_path)
    peers.round(2)
    peers.network.down = True
    peers.round(1)
    peers.network.down = False
    peers.round(3)
    peers.block(4)
    assert len(peers.states()) == 1
    assert counted(peers)[-1] == (0, 1, 2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: next(iter(sorted((folder / "states").iterdir()))),
        lambda folder: next(iter(sorted((folder / "blobs").iterdir()))),
    ],
    ids=["state", "blob"],
)
def test_verify_sees_damage(tmp_path: Path, damage: Callable[[Path], Path]) -> None:
    peers = Peers(tmp_path)
    peers.round(4)
    folder = tmp_path / "0"
    path = damage(folder)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    run_id, plan = Log(folder).plan()
    assert run_id == RUN_ID
    assert plan == peers.miners[0].plan
    report = verify(Log(folder), plan)
    assert not all(each.verified for each in report.rounds)


def test_verify_sees_a_changed_record(tmp_path: Path) -> None:
    peers = Peers(tmp_path)
    peers.round(4)
    path = sorted((tmp_path / "0" / "rounds").iterdir())[1]
    text = path.read_text()
    at = text.index('":"21', text.index('"marks":')) + 40  # in the hash of a mark's state
    path.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])
    report = verify(Log(tmp_path / "0"), peers.miners[0].plan)
    assert report.problems
