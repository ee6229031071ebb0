"""Tests of checkpoints: complete or absent, and skipped when they are not what was written."""

from __future__ import annotations

import logging
import shutil
import threading
from collections import UserDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import (
    is_number,
    length_and_hash,
    look_in,
    rewrite,
    tensors,
    the_one_before,
    written,
)
from safetensors.torch import save_file
from tiny import no_file_longer_than

from hiveminer.training.checkpoint import MANIFEST, STATE, Checkpoints
from hiveminer.validation.scores import SavedScores, ScoreTable
from programs import started

# --- what is kept ---------------------------------------------------------------------------


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    values = {
        "float32": torch.randn(3, 5, generator=torch.Generator().manual_seed(1)),
        "bfloat16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "scalar": torch.tensor(7.0),
        "integers": torch.arange(5),
        "empty": torch.zeros(0, 3),
    }
    facts = {"": -0.0, "pi": 3.141592653589793, "text": 'ä "\n\ud800', "list": [1, None, True]}
    kept = Checkpoints(tmp_path / "some" / "folder")
    assert kept.save(values, facts) == kept.newest == "checkpoint-000001"
    found = Checkpoints(kept.folder).load()
    assert found is not None
    assert found.name == "checkpoint-000001"
    assert found.metadata == facts
    assert found.tensors.keys() == values.keys()
    for name, value in values.items():
        assert found.tensors[name].dtype == value.dtype
        assert torch.equal(found.tensors[name], value)
    assert kept.save(None, facts) == "checkpoint-000002"
    found = kept.load()
    assert found is not None
    assert (found.metadata, found.tensors) == (facts, {})
    assert [path.name for path in (kept.folder / found.name).iterdir()] == [MANIFEST]


def test_the_last_three_are_kept(tmp_path: Path) -> None:
    kept = written(tmp_path, count=12)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-000010", "checkpoint-000011", "checkpoint-000012"]
    assert is_number(kept.load(), 12)
    again = Checkpoints(tmp_path)
    assert again.save(tensors(13), {"n": 13}) == "checkpoint-000013"


def test_numbers_go_by_their_value(tmp_path: Path) -> None:
    kept = written(tmp_path)
    for name, number in (("checkpoint-999999", 999_999), ("checkpoint-09999999", 9_999_999)):
        shutil.copytree(tmp_path / "checkpoint-000002", tmp_path / name)
        rewrite(tmp_path / name / MANIFEST, number=number)
    found, refused = look_in(tmp_path)
    assert found is not None
    assert (found.name, refused) == ("checkpoint-999999", [])
    assert kept.save(tensors(7), {"n": 7}) == "checkpoint-1000000"
    assert is_number(kept.load(), 7)


def test_leftovers_of_a_crash_are_swept_and_other_files_left_alone(tmp_path: Path) -> None:
    written(tmp_path)
    shutil.copytree(tmp_path / "checkpoint-000002", tmp_path / ".draft-x7")
    (tmp_path / ".draft-checkpoint-000000").mkdir()
    (tmp_path / "checkpoint-new").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-000001" / "notes.txt").write_text("mine too")
    kept = Checkpoints(tmp_path)
    assert is_number(kept.load(), 2)
    kept.save(tensors(3), {"n": 3})
    numbered = [f"checkpoint-00000{number}" for number in (1, 2, 3)]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [*numbered, "checkpoint-new", "notes.txt"]


# --- a disk that fails ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 100, 1500])
def test_a_full_disk_is_one_line_and_changes_nothing(
    tmp_path: Path, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    kept = written(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    large = {"a": torch.zeros(1000)}
    with no_file_longer_than(size):
        assert kept.save(large, {"n": 3}) is None
        assert kept.save(large, {"n": 3}) is None  # the same trouble is not told again
    assert sorted(tmp_path.rglob("*")) == before
    assert len(caplog.records) == 1
    assert "no checkpoint could be written to" in caplog.records[0].getMessage()
    assert "File too large" in caplog.records[0].getMessage()
    assert kept.save(tensors(3), {"n": 3}) == "checkpoint-000003"
    with no_file_longer_than(size):
        assert kept.save(large, {"n": 4}) is None
    assert len(caplog.records) == 2  # it had been well in between
    assert is_number(kept.load(), 3)


def test_a_folder_that_cannot_be_made_is_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    kept = Checkpoints(tmp_path / "file" / "kept")
    assert kept.load() is None
    assert kept.save_later(tensors(1), {})
    assert kept.close(30)
    assert [record.__dict__["event"] for record in caplog.records] == ["checkpoint"]
    assert "Not a directory" in caplog.records[0].getMessage()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_neither_kept_nor_used(tmp_path: Path, bad: float) -> None:
    kept = written(tmp_path)
    values = {"a": torch.zeros(100_000)}
    values["a"][99_999] = bad
    assert kept.save(values, {}) is None
    assert kept.save(None, {"loss": bad}) is None
    assert is_number(kept.load(), 2)
    path = tmp_path / "checkpoint-000002" / STATE
    save_file(values, path)
    rewrite(path.with_name(MANIFEST), state=length_and_hash(path))
    the_one_before(tmp_path, "not finite")


# --- beside the training ------------------------------------------------------------------------


class SlowMetadata(UserDict[str, int]):
    """Metadata that can be read once that is allowed: until then, it is being written."""

    def __init__(self, n: int) -> None:
        super().__init__(n=n)
        self.asked = threading.Event()
        self.allowed = threading.Event()

    def __iter__(self) -> Iterator[str]:
        self.asked.set()
        assert self.allowed.wait(30)
        return super().__iter__()


def test_writing_takes_a_thread_of_its_own_one_at_a_time(tmp_path: Path) -> None:
    slow = SlowMetadata(1)
    kept = Checkpoints(tmp_path)
    assert not kept.writing
    assert kept.save_later(tensors(1), slow)
    assert slow.asked.wait(30)
    assert kept.writing
    assert not kept.save_later(tensors(2), {"n": 2})  # this one is skipped
    assert kept.save_later(tensors(3), {"n": 3}, must=True)  # this one waits for its turn
    assert kept.load() is None
    assert not kept.close(0.05)
    slow.allowed.set()
    assert kept.close(30)
    assert is_number(kept.load(), 3)
    assert kept.newest == "checkpoint-000002"
    assert not kept.save_later(tensors(4), {"n": 4}, must=True)  # it is closed


KILLED = '''
import os, random, signal, sys, time
from pathlib import Path
import torch
from hiveminer.training.checkpoint import Checkpoints, newest

torch.set_num_threads(1)
folder, chance = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
NAMES = [str(n) for n in range(8)]

def write(told):
    """Checkpoint after checkpoint; each number is told once its checkpoint is there."""
    kept = Checkpoints(folder)
    found = kept.load()
    number = found.metadata["number"] if found else 0
    while True:
        number += 1
        values = {name: torch.full((20_000,), float(number)) for name in NAMES}
        assert kept.save(values, {"number": number})
        os.write(told, b"%9d" % number)

drafts = least = 0
for _ in range(25):
    read, told = os.pipe()
    child = os.fork()
    if not child:
        try:
            write(told)
        finally:
            os._exit(1)
    os.close(told)
    first = os.read(read, 9)  # it is in the middle of its work
    time.sleep(chance.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    said = first
    while part := os.read(read, 9000):
        said += part
    os.close(read)
    least = int(said[-9:])
    drafts += any(path.name.startswith(".draft-") for path in folder.iterdir())
    refused = []
    found = newest(folder, refuse=refused.append)
    assert not refused, refused  # whole or not at all
    number = found.metadata["number"]
    assert number in (least, least + 1), (number, least)
    assert sorted(found.tensors) == NAMES
    assert all(bool((value == number).all()) for value in found.tensors.values())
print("drafts left behind:", drafts)
assert drafts
print("sound each time")
'''


@pytest.mark.timeout(180)
def test_kill_9_in_the_middle_of_writing_always_leaves_a_sound_one(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    with started(KILLED, str(tmp_path / "kept"), "11", folder=tmp_path / "killed") as killed:
        told = killed.says("sound each time", seconds=150)
        assert killed.process.wait(60) == 0, told


# --- a validator's scores -------------------------------------------------------------------------


def saved_scores(folder: Path, *, run_id: str = "r-1-2-3") -> SavedScores:
    return SavedScores(Checkpoints(folder), run_id=run_id)


def test_scores_survive_a_torn_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    table, saved = ScoreTable(), saved_scores(tmp_path)
    for _ in range(5):
        table.add_work("a", 100)
        table.add_score("a", 1.0)
        saved.save(table)
        saved.save(table)  # nothing new, nothing written
    assert len(list(tmp_path.iterdir())) == 3
    path = tmp_path / "checkpoint-000005" / MANIFEST
    path.write_bytes(path.read_bytes()[:-40])
    again = saved_scores(tmp_path).load()
    assert (again.of("a").replays, again.of("a").tokens) == (4, 400.0)
    refused, resumed = caplog.messages
    assert refused.startswith("checkpoint-000005 is refused: ")
    assert resumed == "resumed 1 scores, from checkpoint-000004"


def test_another_runs_scores_and_broken_ones_are_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = ScoreTable()
    table.add_score("a", 1.0)
    saved_scores(tmp_path / "theirs", run_id="r-9-9-9").save(table)
    Checkpoints(tmp_path / "broken").save(None, {"run_id": "r-1-2-3", "scores": {"a": {}}})
    for folder, words in (("theirs", "it is of run r-9-9-9"), ("broken", "cannot be read")):
        caplog.clear()
        assert saved_scores(tmp_path / folder).load().standings == {}
        assert len(caplog.messages) == 1
        assert words in caplog.messages[0]
