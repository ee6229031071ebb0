"""`hiveminer log`: what it lists, and that whatever is damaged or forged is named."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from memory_peers import RUN_ID, SECTION, Peers, key
from small_neurons import miner_settings

from hiveminer import cli
from hiveminer.commands import log as command
from hiveminer.commands.checks import rounds, training
from hiveminer.commands.checks.base import Examination
from hiveminer.config.settings import LogSettings, SubtensorSettings
from hiveminer.strategies.sparseloco.log import LOG_FOLDER, Log
from hiveminer.strategies.sparseloco.onchain import SubnetRounds
from hiveminer.strategies.sparseloco.records import decode_mark
from hiveminer.strategies.sparseloco.replay import compare, rebuild, verify

ROUNDS = 9


@pytest.fixture(scope="module")
def peers(tmp_path_factory: pytest.TempPathFactory) -> Peers:
    """Three miners and a validator that went through nine rounds."""
    peers = Peers(tmp_path_factory.mktemp("peers"))
    peers.short_round(ROUNDS)
    peers.block(4, training=False)
    return peers


@pytest.fixture
def folder(peers: Peers, tmp_path: Path) -> Path:
    """A copy of a miner's log."""
    return Path(shutil.copytree(peers.folder / "0", tmp_path / "log"))


def problems(folder: Path) -> tuple[str, ...]:
    log = Log(folder)
    return verify(log, log.plan()[1]).problems


def run(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = cli.main(["log", *words])
    read = capsys.readouterr()
    return code, read.out + read.err


def test_the_log_is_listed_and_verified(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(str(folder), "--json", capsys=capsys)
    listed = json.loads(text)
    assert code == 0
    assert (listed["run_id"], listed["verified"], listed["problems"]) == (RUN_ID, None, [])
    assert [each["round"] for each in listed["rounds"]] == list(range(ROUNDS))
    newest = listed["rounds"][-1]
    assert [each["uid"] for each in newest["contributors"]] == [0, 1, 2]
    assert newest["bytes"] == sum(each["bytes"] for each in newest["contributors"]) > 0
    assert newest["parent"] == listed["rounds"][-2]["state"]
    code, text = run(str(folder), "--verify", "--json", capsys=capsys)
    verified = json.loads(text)
    assert code == 0
    assert verified["verified"] is True
    assert sum(each["verified"] for each in verified["rounds"]) >= ROUNDS - 1
    code, text = run(str(folder), "--verify", "--round", "5", capsys=capsys)
    assert code == 0
    assert "0, 1, 2" in text
    assert text.count("yes") == 1
    assert text.endswith("every hash fits\n")


def test_who_does_not_count_is_listed_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = Peers(tmp_path)
    peers.short_round(2)
    while (cut := peers.miners[2].replica.position.cut) is None or cut.round < 2:
        peers.block()
    peers.swarm.withheld.add(cut.blob_hash)
    peers.block(15, training=False)
    _, text = run(str(tmp_path / "0"), "--json", capsys=capsys)
    last = json.loads(text)["rounds"][-1]
    assert [each["uid"] for each in last["contributors"]] == [0, 1]
    assert last["left_out"] == [{"uid": 2, "why": "not marked by more than half"}]


def test_every_round_can_be_made_again(folder: Path) -> None:
    log = Log(folder)
    _, plan = log.plan()
    for number in log.rounds()[-2:]:
        digest = log.read(number).made
        assert digest is not None
        state = rebuild(log, plan, digest)
        assert state is not None
        assert state.hash() == digest


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"0")


def name_of(path: Path) -> str:
    """By what a problem names this file."""
    if path.parent.name == "rounds":
        return f"round {int(path.stem)}: "
    return f"{path.parent.name.removesuffix('s')} {path.name.rpartition('-')[2][:16]}"


@pytest.mark.parametrize("damage", [flipped, cut_short, longer])
@pytest.mark.parametrize("kind", ["rounds", "blobs", "states"])
def test_every_damaged_file_is_named(
    folder: Path, kind: str, damage: Callable[[Path], None]
) -> None:
    files = sorted((folder / kind).iterdir())
    assert len(files) >= (2 if kind == "states" else ROUNDS)
    for path in files:
        damage(path)
    found = problems(folder)
    for path in files:
        assert any(problem.startswith(name_of(path)) for problem in found), path


def crafted(path: Path) -> None:
    """Somebody's plan with its own hash, whose blobs nobody could decode."""
    content = json.loads(path.read_bytes())
    content["compression"]["bits"] = 99
    del content["sha256"]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("damage", [flipped, cut_short, longer, crafted, Path.unlink])
def test_a_log_without_its_plan_is_one_line(
    folder: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder / "plan.json")
    code, text = run(str(folder), capsys=capsys)
    assert code == 2
    assert text.count("\n") == 1
    assert "plan.json" in text


def test_a_missing_blob_is_named(folder: Path) -> None:
    min((folder / "blobs").iterdir()).unlink()
    assert any("are missing" in problem for problem in problems(folder))


def rewrite(folder: Path, number: int, **changes: object) -> None:
    """Forge a round, with a hash that fits."""
    log = Log(folder)
    entry = log.read(number)
    log.add_round(replace(entry.facts, **changes), made=entry.made)  # type: ignore[arg-type]


def marks_with(folder: Path, number: int, **changes: object) -> dict[bytes, bytes]:
    """The mark of a round, forged."""
    mark = decode_mark(Log(folder).read(number).facts.marks[key(9)])
    assert mark is not None
    return {key(9): replace(mark, **changes).encode()}  # type: ignore[arg-type]


def test_forged_rounds_do_not_fit(folder: Path, peers: Peers) -> None:
    """A forger who writes the files' own hashes still has all the others against him."""
    log = Log(folder)
    marks, plan = log.read(5).facts.marks, log.plan()[1]
    for forged in ({"state": bytes(32)}, {"uids": frozenset({0, 1})}):
        rewrite(folder, 5, marks=marks_with(folder, 5, **forged))
        assert problems(folder)
        compared = compare(log, plan.rules.schedule, peers.views[0])
        assert compared.problems == ("round 5: the chain has different marks",)
        assert compared.equal == ROUNDS - 1
        rewrite(folder, 5, marks=marks)
        assert problems(folder) == ()


def test_without_a_folder_the_newest_log_of_this_machine_is_listed(
    peers: Peers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / "state"
    place = state / "embedded" / "1" / "hotkey" / LOG_FOLDER / RUN_ID
    shutil.copytree(peers.folder / "0", place)
    code, text = run("--neuron.path", str(state), "--json", capsys=capsys)
    assert code == 0, text
    assert json.loads(text)["folder"] == str(place)


def test_doctor_fails_while_the_chain_names_another_state(peers: Peers, tmp_path: Path) -> None:
    settings = miner_settings(tmp_path)
    place = tmp_path / "state" / "embedded" / "1" / "hotkey" / LOG_FOLDER / RUN_ID
    shutil.copytree(peers.folder / "0", place)
    file = tmp_path / "run.toml"
    section = SECTION.model_dump(exclude_defaults=True)
    file.write_text(
        'strategy = "sparseloco"\n[sparseloco]\n'
        + "\n".join(f"{name} = {value}" for name, value in section.items())
    )
    neuron = settings.neuron.model_copy(update={"run": file})
    exam = Examination(settings.model_copy(update={"neuron": neuron}))
    assert training.run_file(exam).verdict == "passed"
    assert rounds.rounds(exam).verdict == "warned"  # of the tempo
    marks = marks_with(place, ROUNDS - 1, state=bytes(32))
    log = Log(place)
    log.add_round(replace(log.read(ROUNDS - 1).facts, marks=marks), made=None)
    check = rounds.rounds(exam)
    assert check.verdict == "failed"
    assert f"round {ROUNDS - 1}: the chain names state 0000000000000000" in check.found


def test_the_log_is_compared_with_the_chain(
    folder: Path, peers: Peers, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = LogSettings(
        folder=folder, verify=True, subtensor=SubtensorSettings(network="embedded")
    )

    @contextlib.contextmanager
    def archive(_: LogSettings) -> Iterator[SubnetRounds]:
        yield peers.views[0]

    shown = command.look(settings, open_rounds=archive)
    assert shown.compared is not None
    assert (shown.compared.equal, shown.compared.unread) == (ROUNDS, 0)
    assert shown.is_verified
    neurons = Log(folder).read(4).facts.neurons
    rewrite(folder, 4, neurons=(*neurons[:-1], replace(neurons[-1], stake=7)))
    shown = command.look(settings, open_rounds=archive)
    assert not shown.is_verified
    assert shown.report.problems == ("round 4: the chain has different neurons",)
    peers.network.down = True
    try:
        shown = command.look(settings, open_rounds=archive)
    finally:
        peers.network.down = False
    assert shown.compared is not None
    assert (shown.compared.equal, shown.compared.unread) == (0, ROUNDS)
    assert not shown.is_verified
    assert "rounds cannot be compared: the chain does not answer" in command.as_text(shown)


def test_without_a_log_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ([str(tmp_path)], ["--neuron.path", str(tmp_path)]):
        code, text = run(*words, capsys=capsys)
        assert code == 2
        assert text.count("\n") == 1
        assert "log" in text


def test_a_log_that_a_running_miner_prunes_has_no_problem(peers: Peers, folder: Path) -> None:
    """What is dropped between the look at the folder and the look at the file is not missing."""

    class Pruned(Log):
        def states(self) -> list[tuple[int, bytes]]:
            found = super().states()
            if len(found) > 1:
                self._state_path(*found[0]).unlink()
                self.prune()
            return found

    log = Pruned(folder)
    report = verify(log, log.plan()[1])
    assert report.problems == ()
