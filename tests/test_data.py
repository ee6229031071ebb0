"""Tests of the data: how rows are cut, their hash, and what is refused."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from row_files import all_texts, load, refused, write_lines, write_rows
from tiny import cut_the_network, no_file_longer_than, one_line

from hiveminer.config.run import DataSection
from hiveminer.errors import OperatorError, TrainingError
from hiveminer.training import data
from hiveminer.training.data import (
    CACHED_SHARDS,
    ROW_BYTES,
    RecordRows,
    StoredRows,
    StreamedRows,
    builtin_rows,
    cut_rows,
    load_rows,
    split_held_out,
)

TEXTS = [f"row {number}: " + "word " * (number % 7) for number in range(25)]


@pytest.fixture(autouse=True, scope="module")
def no_helper_process() -> Iterator[None]:
    """A stream shares a number with torch's workers; the strategy that hivemind sets when it
    is imported would start a process for that."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_descriptor")
    yield
    torch.multiprocessing.set_sharing_strategy(before)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees what another has cached, and none asks the hub."""
    monkeypatch.setattr(
        "datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets"))
    )
    cut_the_network(monkeypatch)


def line(letter: str, size: int) -> str:
    return letter * (size - 1) + "\n"


HALF, FULL = ROW_BYTES // 2, ROW_BYTES


@pytest.mark.parametrize(
    "rows",
    [
        [line("a", HALF) + line("b", HALF), line("c", 1 + HALF), line("d", 3 * FULL), "e"],
        [line("a", FULL), line("a", FULL)],
        [line("a", FULL - 1) + "b"],
        [line("a", FULL - 1), "bc"],
        [line("é", HALF), "ab"],  # bytes are counted, not letters
    ],
)
def test_rows_are_cut_by_the_rule(rows: list[str]) -> None:
    assert list(cut_rows("".join(rows))) == rows


def test_blocks_of_white_space_are_left_out() -> None:
    rows = ["a\n", line("b", FULL), "c\n"]
    assert list(cut_rows("a\n" + line("b", FULL) + "\n" * FULL + "c\n")) == rows
    assert list(cut_rows("")) == list(cut_rows(" \n\t\n")) == []


@settings(max_examples=100)
@given(
    st.lists(
        st.tuples(st.text(max_size=30), st.integers(1, 40), st.sampled_from(["\n", "\r\n", ""])),
        max_size=30,
    )
)
def test_every_line_is_in_one_row_once_and_rows_are_bounded(
    pieces: list[tuple[str, int, str]],
) -> None:
    text = "".join(piece * times + end for piece, times, end in pieces)
    rows = list(cut_rows(text))
    assert all(row.strip() for row in rows)
    for row in rows:
        assert len(row.encode()) <= ROW_BYTES or len(row.splitlines()) == 1
    place = 0
    for row in rows:
        found = text.index(row, place)
        assert not text[place:found].strip(), "only white space is left out"
        place = found + len(row)
    assert not text[place:].strip()


def make_library(folder: Path) -> Path:
    for name, text in {
        "b.py": "b = 1\n",
        "a/z.py": "z = 1\n",
        "a.py": "a = 1\n",
        "a/empty.py": "",
        "test/test_a.py": "left out\n",
        "a/tests/test_z.py": "left out\n",
        "site-packages/other.py": "left out\n",
        "a/notes.txt": "left out\n",
        "é.py": "last = 1\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "latin.py").write_bytes(b"# \xe9\n")
    return folder


def test_builtin_rows_are_the_librarys_files_and_the_hash_follows_them(tmp_path: Path) -> None:
    here, there = make_library(tmp_path / "here"), make_library(tmp_path / "there")
    rows = builtin_rows(here)
    assert all_texts(rows) == ["a = 1\n", "z = 1\n", "b = 1\n", "last = 1\n"]
    before = rows.hash
    assert builtin_rows(there).hash == before, "where it lies does not matter"
    (there / "test/test_a.py").write_text("changed\n")
    assert builtin_rows(there).hash == before, "what is left out does not matter"
    (there / "b.py").write_text("b = 2\n")
    changed = builtin_rows(there).hash
    (there / "b.py").write_text("b = 1\n")
    (there / "b.py").rename(there / "c.py")
    assert len({before, changed, builtin_rows(there).hash}) == 3


def test_builtin_rows_of_this_python_are_many_and_the_same_twice() -> None:
    one = builtin_rows()
    two = load_rows(DataSection(hash=one.hash))
    assert len(one) == len(two) > 10_000
    assert one.hash == two.hash
    sample = range(0, len(one), 997)
    assert one.texts(sample) == two.texts(sample)


def test_a_folder_of_text_is_read_whole_in_order(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "deep").mkdir(parents=True)
        (tmp_path / folder / "b.txt").write_text("second\n")
        (tmp_path / folder / "a.TXT").write_text(line("a", FULL) + "first\n")
        (tmp_path / folder / "deep" / "c.txt").write_text("third\n")
        (tmp_path / folder / "readme.md").write_text("no kind that is read\n")
    rows = load(tmp_path / "one")
    assert all_texts(rows) == [line("a", FULL), "first\n", "second\n", "third\n"]
    assert load(tmp_path / "two").hash == rows.hash
    (tmp_path / "two" / "b.txt").write_text("changed\n")
    assert load(tmp_path / "two").hash != rows.hash


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_records_keep_their_numbers(tmp_path: Path, kind: str) -> None:
    write_rows(tmp_path / f"b.{kind}", TEXTS[10:])
    write_rows(tmp_path / f"a.{kind}", TEXTS[:10])  # they are read in the order of names
    rows = load(tmp_path)
    assert len(rows) == 25
    assert all_texts(rows) == TEXTS
    assert rows.texts([24, 0, 7, 0]) == [TEXTS[24], TEXTS[0], TEXTS[7], TEXTS[0]]
    assert rows.texts([]) == []


def test_the_hash_of_records_follows_content_and_column(tmp_path: Path) -> None:
    here = write_lines(tmp_path / "here" / "a.jsonl", TEXTS)
    there = write_lines(tmp_path / "there" / "b.jsonl", TEXTS)
    other = write_lines(tmp_path / "other" / "a.jsonl", [*TEXTS[:-1], "changed"])
    here_hash = load(here).hash
    assert load(there).hash == here_hash
    assert load(other).hash != here_hash
    two = tmp_path / "two.jsonl"
    two.write_text('{"text": "a", "body": "b"}\n')
    assert load(two).hash != load(two, column="body").hash
    assert all_texts(load(two, column="body")) == ["b"]


def test_rows_without_text_keep_their_numbers_and_are_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": null}\n{"other": 1}\n{"text": ""}\n{"text": "x"}\n')
    with caplog.at_level(logging.WARNING):
        rows = load(path)
    assert all_texts(rows) == ["one", "", "", "", "x"]
    assert len(caplog.messages) == 1
    assert "3 of 5 rows have no text" in caplog.messages[0]


# --- storage and hashes -----------------------------------------------------------------------


def test_hashes_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """A data set keeps its hash, so that a run keeps its id and its checkpoints."""
    (tmp_path / "t" / "sub").mkdir(parents=True)
    (tmp_path / "t" / "a.txt").write_bytes("one\r\ntwo\u2028three\n".encode())
    (tmp_path / "t" / "sub" / "b.txt").write_text("é\n", encoding="utf-8")
    (tmp_path / "r.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "b.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "two" / "a.jsonl").write_text('{"text": "b"}\n')
    for name, content_hash in {
        "t": "847a74ec566ce70d0171f07965f69d215494efb7ff843771c2ac3d81d30d8d50",
        "t/a.txt": "bfc8522505f878ae05a6e6ed41e1c6dc77e62b4054c00e24ed0f2133bfc75256",
        "r.jsonl": "e8cb42d277295f152d203073939bbe22410e9141b9d6ae79c3d0dee988bdb1c7",
        "two": "eaf831b19c7ab0294ad7db27eab2028f634e70465ad23f959e4a15e218edc2a9",
    }.items():
        assert load(tmp_path / name).hash == content_hash


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_no_cache_stands_in_for_other_content(tmp_path: Path, kind: str) -> None:
    """Of the same name, length and time; and what is loaded stays what it was."""
    path = tmp_path / f"a.{kind}"
    write_rows(path, ["one\n"])
    time_ns, size = path.stat().st_mtime_ns, path.stat().st_size
    first = load(path)
    write_rows(path, ["two\n"])
    os.utime(path, ns=(time_ns, time_ns))
    assert path.stat().st_size == size
    second = load(path)
    assert (all_texts(first), all_texts(second)) == (["one\n"], ["two\n"])
    assert first.hash != second.hash


def test_many_rows_go_to_a_temporary_file(tmp_path: Path) -> None:
    texts = [f"é{number}" * (number % 50) for number in range(1000)]
    rows = StoredRows(texts, hashlib.sha256(), memory_bytes=1000)
    assert rows.texts([999, 0, 500]) == [texts[999], texts[0], texts[500]]
    assert rows.empty == 20
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_the_rows_is_one_line() -> None:
    with no_file_longer_than(10_000), pytest.raises(OperatorError, match="no room") as caught:
        StoredRows(["word " * 1000] * 100, hashlib.sha256(), memory_bytes=1000)
    assert "TMPDIR" in one_line(caught)


def test_a_huge_row_is_cut_to_what_can_be_trained() -> None:
    rows = StoredRows(["short", "é" * 5000], hashlib.sha256(), row_characters=1000)
    assert all_texts(rows) == ["short", "é" * 1000]


def test_another_hash_than_the_runs_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    right = load(path).hash
    assert load(path, hash=right).hash == right
    path.write_text(path.read_text().replace("row 3", "row three"))
    refused(path, f"the run wants {right}", hash=right)


@pytest.mark.parametrize("name", ["nobody/nothing-of-this-name", "not a name!"])
def test_a_hub_name_that_is_none_is_told_in_one_line(name: str) -> None:
    assert name in refused(name, "cannot be loaded")


@pytest.mark.parametrize("kind", ["stored", "hub", "stream"])
@pytest.mark.parametrize("wrong", [[25], [-1], [0, 1, 99, 2], [2**47]])
def test_a_number_that_is_no_rows_is_a_training_error(
    tmp_path: Path, kind: str, wrong: list[int]
) -> None:
    rows = {
        "stored": lambda: load(write_lines(tmp_path / "a.jsonl", TEXTS)),
        "hub": lambda: RecordRows(datasets.Dataset.from_dict({"text": TEXTS}), "text", "hash"),
        "stream": lambda: streamed(shard_rows=10),
    }[kind]()
    assert len(rows) == 25
    with pytest.raises(TrainingError, match="out of range: the data has 25 rows"):
        rows.texts(wrong)


class Counted:
    """A stream that counts how often it is read from."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.reads = 0

    def skip(self, count: int) -> Any:
        self.reads += 1
        return self.stream.skip(count)


def streamed(*, count: int = 25, shard_rows: int, texts: Sequence[str | None] = TEXTS) -> Any:
    """Typed as anything, since a test looks at its insides."""
    records = datasets.Dataset.from_dict({"text": list(texts)}).to_iterable_dataset()
    return StreamedRows(
        records, column="text", count=count, shard_rows=shard_rows, content_hash="hash"
    )


def test_row_n_of_a_stream_is_record_n() -> None:
    rows = streamed(shard_rows=4)
    assert len(rows) == 25
    for order in ([24, 0, 13, 3, 4, 0], [11, 10], list(reversed(range(25)))):
        assert rows.texts(order) == [TEXTS[index] for index in order]
    assert streamed(shard_rows=1).texts(range(25)) == TEXTS, "more shards than are cached"
    assert streamed(shard_rows=2, texts=["a", None]).texts([0, 1]) == ["a", ""]


def test_a_row_beyond_the_end_of_a_stream_is_a_training_error() -> None:
    rows = streamed(count=40, shard_rows=10)
    assert rows.texts([24]) == [TEXTS[24]]
    for index in (25, 29, 30, 39):
        with pytest.raises(TrainingError, match=f"row {index} is beyond the end of the stream"):
            rows.texts([0, index])


def test_local_files_count_as_many_rows_as_a_stream_is_said_to_have(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    assert all_texts(load(path, streaming=True, rows=10)) == TEXTS[:10]
    assert load(path, streaming=True, rows=10).hash == load(path).hash
    refused(path, "data.rows is 40, and it has 25 rows", streaming=True, rows=40)


def test_records_of_the_hub_have_one_type_and_no_nulls() -> None:
    rows = RecordRows(datasets.Dataset.from_dict({"text": ["a", None, "", "b"]}), "text", "hash")
    assert all_texts(rows) == ["a", "", "", "b"]
    assert rows.empty == 2
    section = DataSection(name="somebody/something")
    for values, words in (([1, 2], "int64"), ([["a"]], "list"), ([b"a"], "binary")):
        dataset = datasets.Dataset.from_dict({"text": values})
        for each in (dataset, dataset.to_iterable_dataset()):
            with pytest.raises(OperatorError, match=f"column 'text' is {words}"):
                data._check_column(section, each, list(each.take(1)))


def test_a_streams_shards_are_read_once_while_they_are_cached() -> None:
    rows = streamed(shard_rows=2)
    rows._stream = counted = Counted(rows._stream)
    rows.texts([0, 1, 3, 2, 0])
    assert counted.reads == 2
    rows.texts([1, 2])
    assert counted.reads == 2, "cached shards were read again"
    rows.texts([2 * shard for shard in range(2, 2 + CACHED_SHARDS)])
    assert counted.reads == 2 + CACHED_SHARDS
    rows.texts([0])
    assert counted.reads == 3 + CACHED_SHARDS, "the oldest shard was cached for ever"


@pytest.mark.parametrize(
    ("count", "share", "held_out"),
    [(100, 0.01, 1), (100, 0.25, 25), (1000, 0.0, 0), (10, 0.01, 0), (1, 0.5, 0), (3, 0.99, 2)],
)
def test_the_last_rows_are_held_out(count: int, share: float, held_out: int) -> None:
    training, measured = split_held_out(count, share)
    assert len(measured) == held_out
    assert [*training, *measured] == list(range(count))
    assert len(training) >= 1
