"""Strategies and an observer through rounds, with the chain and the swarm in memory."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from memory_network import MemoryExchange
from memory_peers import SECTION, Peers, key
from tiny import save_tiny
from transformers import PreTrainedModel

from hiveminer.config.run import OptimizerSection
from hiveminer.strategies.sparseloco.records import decode_record
from hiveminer.strategies.sparseloco.replay import verify
from hiveminer.strategies.sparseloco.strategy import SparselocoStrategy
from hiveminer.strategies.sparseloco.update import Cut
from hiveminer.training.model import load_model
from programs import wait_for

slow = pytest.mark.slow


def counted(peers: Peers) -> list[tuple[int, ...]]:
    """By round, the uids that count, as the validator's log has it; the last one is settled, and
    all peers hold the same state."""
    peers.block(4)
    assert len(peers.states()) == 1
    report = verify(peers.validator.follower.log, peers.validator.replica.plan)
    return [tuple(c.uid for c in each.decision.contributions) for each in report.rounds]


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=slow)])
def test_all_hold_the_same_states_and_learn(tmp_path: Path, name: str) -> None:
    section = OptimizerSection.model_validate({"name": name, "learning_rate": 0.01})
    peers = Peers(tmp_path, optimizer=section)
    before = peers.loss()
    seen = set()
    steps = {uid: own_steps(peers, uid) for uid in peers.miners}
    cuts: dict[bytes, Cut] = {}
    for _ in range(4):
        peers.round()
        cuts |= open_cuts(peers)
        peers.block(4)
        states = peers.states()
        assert len(states) == 1
        seen |= states
        peers.block(SECTION.round_blocks - 4)
        cuts |= open_cuts(peers)
    assert len(seen) == 4
    assert_nothing_is_lost(peers, steps, cuts)
    assert counted(peers)[:4] == [(0, 1, 2)] * 4
    assert peers.loss() < 0.8 * before
    for peer in (peers.miners[0], peers.validator):
        report = verify(peer.follower.log, peer.replica.plan)
        assert report.verified, report.problems
        assert sum(each.verified for each in report.rounds) >= 4
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
    learned = peers.miners[0].replica.snapshot(parameters(peers, 0))[2]
    assert max(float(u.abs().max()) for u in learned.values()) > 0.05
    peers.is_validating = True
    peers.round(2)
    assert counted(peers)[-1] == (0, 1, 2)


def assert_nothing_is_lost(
    peers: Peers, steps: dict[int, dict[str, torch.Tensor]], cuts: dict[bytes, Cut]
) -> None:
    """u + (own q in the state) + (what rho forgot) = -(all own steps), for each miner."""
    report = verify(peers.validator.follower.log, peers.validator.replica.plan)
    blobs = [blob for each in report.rounds for blob in each.decision.contributions]
    for uid, miner in peers.miners.items():
        own = [cuts[blob.blob_hash] for blob in blobs if blob.uid == uid]
        for name, u in miner.replica.snapshot(parameters(peers, uid))[2].items():
            taken = sum(cut.sent[name] + (1 - miner.plan.keep) * cut.left[name] for cut in own)
            torch.testing.assert_close(u + taken, -steps[uid][name], atol=1e-4, rtol=0)


def open_cuts(peers: Peers) -> dict[bytes, Cut]:
    own = [each for miner in peers.miners.values() for each in miner.replica.cuts.values()]
    return {each.record.blob_hash: each.cut for each in own if each.cut.left}


def own_steps(peers: Peers, uid: int) -> dict[str, torch.Tensor]:
    """The sums, from now on, of what the inner optimizer's steps do to the weights."""
    totals = {name: torch.zeros_like(each) for name, each in parameters(peers, uid).items()}

    def subtract(*_: object) -> None:
        for name, own in parameters(peers, uid).items():
            totals[name].sub_(own)

    def add(*_: object) -> None:
        for name, own in parameters(peers, uid).items():
            totals[name].add_(own)

    peers.miners[uid].optimizer.register_step_pre_hook(subtract)
    peers.miners[uid].optimizer.register_step_post_hook(add)
    return totals


def parameters(peers: Peers, uid: int) -> dict[str, torch.Tensor]:
    miner = peers.miners[uid]
    named = dict(miner.model.named_parameters())
    return {name: named[name].detach() for name in miner.plan.shapes}


def test_a_joiner_takes_the_state_and_counts(tmp_path: Path) -> None:
    peers = Peers(tmp_path)
    peers.round(4)
    joiner = peers.start(3)
    assert not peers.train(joiner)  # what is trained before the state is there is discarded
    peers.round(2)
    assert counted(peers)[-1] == (0, 1, 2, 3)


def test_a_download_that_outlasts_rounds_is_finished_with_the_blobs_since(tmp_path: Path) -> None:
    peers = Peers(tmp_path, miners=1)
    peers.short_round(2)
    pieces = threading.Semaphore(0)
    parts = peers.parts(3)
    peers.views[3].block_seconds = 0.001
    slow = MemoryExchange(peers.swarm, before_piece=lambda: pieces.acquire(timeout=60))
    joiner = SparselocoStrategy(peers.model(), replace(parts, exchange=slow))
    peers.miners[3] = joiner
    count = len(joiner.plan.shapes)
    for each in (3, 3, count - 6):
        peers.short_round()
        pieces.release(each)
        wait_for(lambda: pieces._value == 0, seconds=60)
    assert not joiner.replica.is_ready
    names = (thread.name for thread in threading.enumerate())
    wait_for(lambda: "state" not in names, seconds=60)
    peers.short_round()
    assert joiner.replica.is_ready
    peers.short_round(2)
    assert counted(peers)[-1] == (0, 3)


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
    resumed = again.replica.snapshot(parameters(peers, 1))[2]
    torch.testing.assert_close(resumed, u, atol=1e-5, rtol=0)
    peers.round(3)
    uids = counted(peers)
    assert_published_once(commits + peers.views[1].commits)
    assert sum(1 in each for each in uids) >= len(uids) - 2
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
    assert counted(peers)
    assert_published_once(commits + peers.views[1].commits)


def test_a_checkpoint_of_an_earlier_cut_does_not_hide_the_last_one(tmp_path: Path) -> None:
    peers = Peers(tmp_path)
    peers.round(3)
    peers.block(7)
    tensors, metadata = peers.miners[1].state_dict()
    assert peers.miners[1].replica.position.cut
    peers.round()
    commits = peers.views[1].commits
    peers.stop(1)
    again = peers.start(1)
    again.load_state_dict(tensors, metadata)
    again._resume_cut()
    again.follower.follow()  # the round's records are still due
    peers.train(again)
    again.follower.follow()
    peers.round()
    assert counted(peers)
    assert_published_once(commits + peers.views[1].commits)


def test_a_miner_that_has_lost_its_log_returns_with_the_next_round(tmp_path: Path) -> None:
    peers = Peers(tmp_path)
    peers.round(3)
    peers.block(5)
    saved = peers.miners[1].state_dict()
    peers.stop(1)
    shutil.rmtree(tmp_path / "1")
    peers.start(1).load_state_dict(*saved)
    peers.round(2)
    peers.block(4)
    assert len(peers.states()) == 1
    assert counted(peers)[-1] == (0, 1, 2)


def test_weights_that_are_not_finite_are_not_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peers = Peers(tmp_path)
    peers.round(2)
    peers.miners[1].replica.apply_move(parameters(peers, 1))
    next(iter(parameters(peers, 1).values())).fill_(torch.nan)
    peers.round()
    assert not peers.miners[1].recover()
    peers.round()
    uids = counted(peers)
    assert uids[-2:] == [(0, 2), (0, 1, 2)]
    missed = [text for text in caplog.messages if " was missed: " in text]
    assert len(missed) == 1
    assert "not finite" in missed[0]


def assert_published_once(commits: list[bytes]) -> None:
    blobs: dict[int, bytes] = {}
    for raw in commits:
        record = decode_record(raw)
        assert record is not None
        assert blobs.setdefault(record.round, record.blob_hash) == record.blob_hash


def test_a_withheld_blob_voids_one_round(tmp_path: Path) -> None:
    """All lose a blob right after it was marked: the next marks name the older state."""
    peers = Peers(tmp_path)
    peers.round(3)
    while key(peers.validator_uid) not in peers.network.pending:
        peers.block()
    cut = peers.miners[2].replica.position.cut
    assert cut is not None
    peers.swarm.withheld.add(cut.blob_hash)
    for uid in (0, 1, peers.validator_uid):
        (peers.folder / str(uid) / "blobs" / cut.blob_hash.hex()).unlink(missing_ok=True)
    peers.round(3)
    uids = counted(peers)
    assert (0, 1, 2) in uids[-2:]
    assert sum(not each for each in uids[3:]) <= 2


@pytest.mark.parametrize("fault", ["stalled", "down"])
def test_a_chain_that_stalls_or_does_not_answer_costs_rounds_and_nothing_else(
    tmp_path: Path, fault: str
) -> None:
    peers = Peers(tmp_path)
    peers.round(2)
    setattr(peers.network, fault, True)
    peers.round(2)
    setattr(peers.network, fault, False)
    peers.round(2)
    assert counted(peers)[-1] == (0, 1, 2)
    report = verify(peers.miners[0].follower.log, peers.miners[0].replica.plan)
    assert report.verified, report.problems


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_local_folder_trains_and_what_is_frozen_stays_at_home(
    tmp_path: Path, architecture: str
) -> None:
    save_tiny(architecture, tmp_path / "model")

    def model() -> PreTrainedModel:
        loaded = load_model(str(tmp_path / "model"))
        loaded.model.embed_tokens.requires_grad_(requires_grad=False)
        return loaded

    peers = Peers(tmp_path, miners=2, model=model)
    frozen = "model.embed_tokens.weight"
    before = peers.loss()
    start = {name: value.clone() for name, value in peers.miners[0].model.named_parameters()}
    peers.round(4)
    assert counted(peers)[-1] == (0, 1)
    assert peers.loss() < before
    state = peers.validator.replica.state
    assert state.weights.keys() == start.keys() - {frozen}
    for uid in peers.miners:
        now = dict(peers.miners[uid].model.named_parameters())
        assert torch.equal(now[frozen], start[frozen])
        assert not any(torch.equal(now[name], start[name]) for name in state.weights)
