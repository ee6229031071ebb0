"""Whole swarms of real processes. There are few, and each checks much."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny

from programs import ROOT, Network, Program, descendants_gone, started, wait_for

PEER = '''
import sys, time
from pathlib import Path
import torch
from hiveminer.training.data import builtin_rows
from hiveminer.training.model import builtin_model, builtin_tokenizer, encode
from hiveminer.config.run import Run
from hiveminer.strategies.hivemind.strategy import HivemindStrategy
from hiveminer.swarm.peer import Peer
from hiveminer.swarm.membership import Membership
from hiveminer.training.trainer import Trainer
from identities import EVERYBODY, NAMES, who

torch.set_num_threads(1)
me, folder = int(sys.argv[1]), Path(sys.argv[2])
run = Run.model_validate({"swarm": {"epoch_samples": 64, "matchmaking_seconds": 5}})
peer = Peer(identity=who(NAMES[me]), admitted=EVERYBODY)
(folder / f"{me}.draft").write_text(peer.address)
(folder / f"{me}.draft").rename(folder / f"{me}.address")
model = builtin_model()
ended = []

def on_round(ended_round):
    """The weights right after an averaging, before anybody trains on."""
    print("round", ended_round, flush=True)
    if ended_round.group_size == 2:
        tensors = {name: value.detach().clone() for name, value in model.named_parameters()}
        torch.save(tensors, folder / f"{me}.{ended_round.epoch}.weights")
        ended.append(ended_round.epoch)

swarm = HivemindStrategy(
    model, membership=Membership(peer), run=run, run_id="test-a-b-c", on_round=on_round
)
tokenizer, rows = builtin_tokenizer(), builtin_rows()
trainer = Trainer(
    model, encode=lambda texts: encode(tokenizer, texts, max_length=64), optimizer=swarm
)
deadline, at = time.monotonic() + 90, 1000 * me
while len(ended) < 2 and time.monotonic() < deadline:
    peer.dial([path.read_text() for path in folder.glob("*.address")])
    trainer.train(rows.texts(range(at, at + 8)), batch_size=4)
    at += 8
print("reloads", swarm.optimizer.reloads, flush=True)
swarm.close()
sys.exit(0 if len(ended) >= 2 else 1)
'''


@pytest.mark.timeout(200)
def test_two_peers_hold_the_same_weights_after_an_epoch(tmp_path: Path) -> None:
    peers = [started(PEER, str(n), str(tmp_path), folder=tmp_path / str(n)) for n in (0, 1)]
    try:
        codes = [peer.process.wait(150) for peer in peers]
        told = "\n---\n".join(peer.words for peer in peers)
        assert codes == [0, 0], told
    finally:
        for peer in peers:
            peer.end()
    epochs = {path.name.split(".")[1] for path in tmp_path.glob("0.*.weights")}
    both = epochs & {path.name.split(".")[1] for path in tmp_path.glob("1.*.weights")}
    assert both, told
    start = None
    for epoch in sorted(both, key=int):
        first, second = (torch.load(tmp_path / f"{n}.{epoch}.weights") for n in (0, 1))
        for name, value in first.items():
            torch.testing.assert_close(value, second[name], rtol=0, atol=1e-3)
        if start is not None:  # and they learn: the weights are not just the start's
            assert any(not torch.equal(start[name], value) for name, value in first.items())
        start = first


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_terminals_without_a_flag(tmp_path: Path) -> None:
    """`python miner.py` twice and `python validator.py`: keys and ports by themselves,
    IsAlive while training, weights on the chain, Ctrl-C and kill -9 leave nothing."""
    home = {"HOME": str(tmp_path / "home")}
    copied = tmp_path / "elsewhere" / "miner.py"
    copied.parent.mkdir()
    copied.write_text((ROOT / "miner.py").read_text())
    state = tmp_path / "home" / ".hiveminer"
    with (
        Program([str(copied)], folder=tmp_path / "first", env=home) as first,
        Program([str(ROOT / "validator.py")], folder=tmp_path / "validator", env=home) as validator,
    ):
        first.says("This is the embedded network", seconds=60)
        first.says("(key miner-0)", seconds=60)
        first.says("serving on 127.0.0.1 port", seconds=60)
        with Program([str(ROOT / "miner.py")], folder=tmp_path / "second", env=home) as second:
            second.says("(key miner-1)", seconds=60)
            second.says("is in use: the axon takes", seconds=60)
            second.says("is in use: the swarm's peer takes", seconds=60)
            second.says("met peer", seconds=60)
            second.says("averaged in a group of 2,", seconds=150)
            validator.says("weights set", seconds=120)
            alive = [
                line["milliseconds"]
                for path in state.glob("*/*/*/metrics.jsonl")
                for raw in path.read_text().splitlines()
                if (line := json.loads(raw))["kind"] == "alive"
            ]
            assert len(alive) > 3

            orphans = second.family()
            second.process.kill()
            descendants_gone(orphans, seconds=60)
            first.says("trained", seconds=60)
            wait_for(
                lambda: "is gone" in validator.words, seconds=60, about="the validator notices"
            )

            with Program([str(ROOT / "miner.py")], folder=tmp_path / "third", env=home) as third:
                third.says("(key miner-1)", seconds=60)  # the key is free again, and taken
                third.says("serving on", seconds=90)
                family = third.family()
                assert third.interrupt(seconds=60) == 0
                descendants_gone(family, seconds=60)
        families = first.family() + validator.family()
        assert first.interrupt(seconds=60) == 0
        assert validator.interrupt(seconds=60) == 0
        descendants_gone(families, seconds=60)
        for program in (first, validator, third):
            assert "Traceback" not in program.words, program.words

        # The validator starts again where it was.
        with Program([str(ROOT / "validator.py")], folder=tmp_path / "again", env=home) as again:
            again.says("resumed", seconds=60)
            family = again.family()
            assert again.interrupt(seconds=60) in (0, 130)  # 130: in the middle of its start
            descendants_gone(family, seconds=60)


@pytest.mark.timeout(120)
def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    with Network(tmp_path) as network:
        miner = network.start("miner-0")
        miner.says("serving on", seconds=90)
        family = miner.family()
        assert len(family) > 3  # the DHT, its daemon, the averager
        miner.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)  # what counts as a second one, not the same twice
        if miner.process.poll() is None:
            miner.process.send_signal(signal.SIGTERM)
        miner.process.wait(60)
        descendants_gone(family, seconds=60)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("kind", "suffix"), [("llama", "jsonl"), ("qwen2", "parquet")])
def test_a_local_model_and_local_data_train_as_well(kind: str, suffix: str, tmp_path: Path) -> None:
    from datasets import Dataset

    save_tiny(kind, tmp_path / "model")
    texts = [f"row {n}: " + "the quick brown fox " * (n % 5 + 1) for n in range(300)]
    data = Dataset.from_dict({"text": texts})
    path = tmp_path / f"rows.{suffix}"
    data.to_json(path) if suffix == "jsonl" else data.to_parquet(path)
    run = f"""
name = "local_{kind}"
[model]
name = "{tmp_path / "model"}"
sequence_length = 64
[data]
name = "{path}"
[swarm]
epoch_samples = 64
"""
    with Network(tmp_path / "net", run=run) as network:
        network.start("miner-0")
        network.start("validator", "--validator.rows", "32", "--validator.weights_seconds", "2")

        def enough(lines: list[dict[str, Any]]) -> bool:
            return len(lines) >= 3

        answers = network.wait_for_numbers("answer", enough, seconds=120)
        assert all(line["samples"] == 32 for line in answers)
        assert answers[-1]["loss"] < answers[0]["loss"]
        network.wait_for_numbers("weights", bool, seconds=90)


@pytest.mark.timeout(120)
def test_ctrl_c_in_the_middle_of_a_demo(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["-m", "hiveminer", "demo", "--miners", "1", "--seconds", "60", "--out", str(out)]
    with Program(words, folder=tmp_path / "demo") as demo:
        wait_for(lambda: len(demo.family()) > 6, seconds=60, about="the programs to start")
        family = demo.family()
        os.kill(demo.process.pid, signal.SIGINT)
        assert demo.process.wait(60) == 130, demo.words
        descendants_gone(family, seconds=60)
        assert "Traceback" not in demo.words
