"""`hiveminer status`: the subnet as a table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from bittensor.keyfiles import Keypair
from small_neurons import Running, miner_settings, running
from talk import caller

from hiveminer import cli
from hiveminer.chain import Chain, join_embedded
from hiveminer.commands import status
from hiveminer.training.checkpoint import MANIFEST, SCORES_FOLDER, Checkpoints
from programs import wait_for


@pytest.fixture
def miner(tmp_path: Path) -> Iterator[Running]:
    with running(miner_settings(tmp_path)) as program:
        program.endpoint()
        yield program


@pytest.fixture
def validator(miner: Running, tmp_path: Path) -> Iterator[Chain]:
    with caller(tmp_path / "network", prefix="validator") as chain:
        join_embedded(chain, stake_tao=5000)
        chain.commit(b"run r-1-2-3")
        wait_for(lambda: miner.alive(chain.wallet), seconds=60)
        yield chain


def test_the_table_joins_chain_probes_and_what_neurons_wrote(
    miner: Running, validator: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = miner.miner.neuron.hotkey, validator.hotkey
    folder = tmp_path / "state" / "embedded" / "1"
    lines = [
        {"time": 1000.0, "kind": "train", "caller": theirs},
        {"time": 1002.0, "kind": "train", "caller": theirs},
        {"time": 1001.0, "kind": "axon", "refused": 3, "counts": {}},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\n{"cut sho'
    (folder / ours / "metrics.jsonl").write_text(text)
    score = {"score": 0.5, "replays": 3, "tokens": 9.0}
    kept = Checkpoints(folder / theirs / SCORES_FOLDER)
    assert kept.save(None, {"run_id": "r", "scores": {ours: score}})
    wait_for(lambda: validator.metagraph().by_hotkey(ours).axon, seconds=60)  # type: ignore[union-attr]
    rows = {row.hotkey: row for row in status.gather(miner_settings(tmp_path), clock=lambda: 1010)}
    mine, other = rows[ours], rows[theirs]
    assert (mine.alive, mine.epoch, mine.score, mine.refusals) == (True, 7, 0.5, 3)
    assert mine.last_calls == {theirs: 8.0}
    assert mine.immunity_left > 0
    assert (other.alive, other.axon, other.run, other.permit) == (None, None, "r-1-2-3", True)
    assert other.stake == 5000
    words = ["--subtensor.path", str(tmp_path / "network"), "--neuron.path", str(folder.parents[1])]
    assert cli.main(["status", "--json", *words]) == 0
    assert {row["hotkey"] for row in json.loads(capsys.readouterr().out)} == {ours, theirs}
    assert cli.main(["status", *words]) == 0
    table = capsys.readouterr().out
    assert "subnet 1 of embedded: 2 neurons" in table
    assert ours[:8] in table


def test_a_neuron_that_does_not_answer_is_not_alive(
    miner: Running, validator: Chain, tmp_path: Path
) -> None:
    validator.serve_axon("127.0.0.1", 1)
    rows = {row.hotkey: row for row in status.gather(miner_settings(tmp_path))}
    assert rows[validator.hotkey].alive is False
    assert rows[validator.hotkey].why_not


def test_damaged_files_leave_their_columns_empty(tmp_path: Path) -> None:
    key = Keypair.create_from_uri("//Alice")
    place = tmp_path / key.ss58_address
    kept = Checkpoints(place / SCORES_FOLDER, keep=9)
    kept.save(None, {"scores": {"5Hot": {"score": 0.5, "replays": 1, "tokens": 2}}})
    assert status.read_local(tmp_path).scores == {"5Hot": 0.5}
    (place / SCORES_FOLDER / "checkpoint-000001" / MANIFEST).write_text("{}")
    for said in ({}, {"scores": [1]}, {"scores": 1}, {"scores": {"a": {}}}):
        kept.save(None, said)
        (place / "metrics.jsonl").write_text('1\n{"kind": "train"}\n{"kind":"axon","time":"x"}\n')
        local = status.read_local(tmp_path)
        assert (local.scores, local.last_calls, local.refusals) == ({}, {}, {})


def test_without_a_network_it_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", "--subtensor.path", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("hiveminer: there is no embedded network at")
    assert "start a miner" in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
