"""Rows: the rule they are cut by, their hash, and every kind of source."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.multiprocessing
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import cut_the_network

from hiveminer.config.run import DataSection
from hiveminer.errors import OperatorError, TrainingError
from hiveminer.training.data import (
    KEPT_SHARDS,
    ROW_BYTES,
    Rows,
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


def load(path: Path, **section: Any) -> Rows:
    return load_rows(DataSection(name=str(path), **section))


def all_texts(rows: Rows) -> list[str]:
    return rows.texts(range(len(rows)))


def write_lines(path: Path, texts: Sequence[str], *, column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    records = (json.dumps({column: text, "number": i}) for i, text in enumerate(texts))
    path.write_text("\n".join(records) + "\n", encoding="utf-8")
    return path


def write_parquet(path: Path, texts: Sequence[str | None]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": list(texts)}), path)
    return path


def one_line(error: pytest.ExceptionInfo[OperatorError]) -> str:
    said = str(error.value)
    assert "\n" not in said
    assert len(said) < 500
    return said


def line(letter: str, size: int) -> str:
    return letter * (size - 1) + "\n"


def test_rows_are_cut_by_the_rule() -> None:
    half = ROW_BYTES // 2
    a, b, c = line("a", half), line("b", half), line("c", 1 + half)
    long, last = line("d", 3 * ROW_BYTES), "e"
    assert list(cut_rows(a + b + c + long + last)) == [a + b, c, long, last]


def test_a_row_may_be_full_to_the_byte() -> None:
    full = line("a", ROW_BYTES)
    assert list(cut_rows(full + full)) == [full, full]
    assert list(cut_rows(line("a", ROW_BYTES - 1) + "b")) == [line("a", ROW_BYTES - 1) + "b"]
    assert list(cut_rows(line("a", ROW_BYTES - 1) + "bc")) == [line("a", ROW_BYTES - 1), "bc"]


def test_bytes_are_counted_and_not_letters() -> None:
    letters = line("é", ROW_BYTES // 2)
    assert list(cut_rows(letters + "ab")) == [letters, "ab"]


def test_blocks_of_white_space_are_left_out() -> None:
    blank = "\n" * ROW_BYTES
    assert list(cut_rows("a\n" + line("b", ROW_BYTES) + blank + "c\n")) == [
        "a\n",
        line("b", ROW_BYTES),
        "c\n",
    ]
    assert list(cut_rows("")) == []
    assert list(cut_rows(" \n\t\n")) == []


@settings(database=None, deadline=None, derandomize=True, max_examples=100)
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


def test_builtin_rows_are_the_librarys_files_in_order(tmp_path: Path) -> None:
    rows = builtin_rows(make_library(tmp_path))
    assert all_texts(rows) == ["a = 1\n", "z = 1\n", "b = 1\n", "last = 1\n"]


def test_builtin_hash_follows_the_content_and_the_names(tmp_path: Path) -> None:
    here, there = make_library(tmp_path / "here"), make_library(tmp_path / "there")
    before = builtin_rows(here).hash
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


def test_a_text_file_is_cut_into_rows(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(200))
    (tmp_path / "a.txt").write_text(text)
    rows = load(tmp_path / "a.txt")
    assert all_texts(rows) == list(cut_rows(text))
    assert len(rows) > 1


def test_a_folder_of_text_is_read_whole_in_order(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "deep").mkdir(parents=True)
        (tmp_path / folder / "b.txt").write_text("second\n")
        (tmp_path / folder / "a.TXT").write_text("first\n")
        (tmp_path / folder / "deep" / "c.txt").write_text("third\n")
        (tmp_path / folder / "readme.md").write_text("no kind that is read\n")
    rows = load(tmp_path / "one")
    assert all_texts(rows) == ["first\n", "second\n", "third\n"]
    assert load(tmp_path / "two").hash == rows.hash
    (tmp_path / "two" / "b.txt").write_text("changed\n")
    assert load(tmp_path / "two").hash != rows.hash


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_records_keep_their_numbers(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    rows = load(write_lines(path, TEXTS) if kind == "jsonl" else write_parquet(path, TEXTS))
    assert len(rows) == 25
    assert all_texts(rows) == TEXTS
    assert rows.texts([24, 0, 7, 0]) == [TEXTS[24], TEXTS[0], TEXTS[7], TEXTS[0]]
    assert rows.texts([]) == []


def test_a_folder_of_records_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    write_lines(tmp_path / "b.jsonl", TEXTS[10:])
    write_lines(tmp_path / "a.jsonl", TEXTS[:10])
    assert all_texts(load(tmp_path)) == TEXTS


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


def test_another_column_can_be_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", TEXTS, column="body")
    assert all_texts(load(path, column="body")) == TEXTS


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_column_is_told_in_one_line(tmp_path: Path, streaming: bool) -> None:
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(OperatorError, match=r"no column 'body'; it has text, number") as caught:
        load(path, column="body", streaming=streaming, rows=25)
    assert "data.column" in one_line(caught)


def test_a_record_that_is_no_text_is_a_training_error(tmp_path: Path) -> None:
    rows = load(write_lines(tmp_path / "a.jsonl", TEXTS), column="number")
    with pytest.raises(TrainingError, match="'number' is no text but int"):
        rows.texts([3])
    holes = load(write_parquet(tmp_path / "a.parquet", ["a", None]))
    assert holes.texts([0]) == ["a"]
    with pytest.raises(TrainingError, match="no text but NoneType"):
        holes.texts([0, 1])


def test_mixed_kinds_are_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.txt").write_text("text\n")
    with pytest.raises(OperatorError, match=r"files of one kind.* found json, text") as caught:
        load(tmp_path)
    one_line(caught)


def test_what_is_no_data_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="no such file or folder") as caught:
        load(tmp_path / "absent.jsonl")
    assert "absent.jsonl" in one_line(caught)
    with pytest.raises(OperatorError, match="found none of them"):
        load(tmp_path)
    (tmp_path / "a.csv").write_text("text\na\n")
    with pytest.raises(OperatorError, match="found none of them"):
        load(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", b"{broken"), ("a.parquet", b"PAR1 no parquet"), ("a.parquet", b"")],
)
def test_a_broken_file_is_told_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OperatorError, match="cannot be read") as caught:
        load(tmp_path / name)
    one_line(caught)


def test_data_without_a_row_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n\n")
    with pytest.raises(OperatorError, match="it holds no row"):
        load(tmp_path / "a.txt")
    write_parquet(tmp_path / "a.parquet", [])
    with pytest.raises(OperatorError) as caught:
        load(tmp_path / "a.parquet")
    one_line(caught)


def test_another_hash_than_the_runs_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    right = load(path).hash
    assert load(path, hash=right).hash == right
    path.write_text(path.read_text().replace("row 3", "row three"))
    with pytest.raises(OperatorError, match=f"the run wants {right}") as caught:
        load(path, hash=right)
    one_line(caught)


@pytest.mark.parametrize("name", ["nobody/nothing-of-this-name", "not a name!"])
def test_a_hub_name_that_is_none_is_told_in_one_line(name: str) -> None:
    with pytest.raises(OperatorError, match="cannot be loaded") as caught:
        load_rows(DataSection(name=name))
    assert name in one_line(caught)


@pytest.mark.parametrize("kind", ["memory", "records", "stream"])
@pytest.mark.parametrize("wrong", [[25], [-1], [0, 1, 99, 2], [2**47]])
def test_a_number_that_is_no_rows_is_a_training_error(
    tmp_path: Path, kind: str, wrong: list[int]
) -> None:
    if kind == "memory":
        path = tmp_path / "a.txt"
        path.write_text("".join(line(chr(65 + i), ROW_BYTES) for i in range(25)))
    else:
        path = write_lines(tmp_path / "a.jsonl", TEXTS)
    rows = load(path, streaming=kind == "stream", rows=25)
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


def streamed(path: Path, **section: Any) -> Any:
    """Typed as anything, since a test looks at its insides."""
    return load(path, streaming=True, **section)


def test_row_n_of_a_stream_is_record_n(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", TEXTS[:11])
    write_lines(tmp_path / "b.jsonl", TEXTS[11:])
    rows = streamed(tmp_path, rows=25, shard_rows=4)
    assert len(rows) == 25
    for order in ([24, 0, 13, 3, 4, 0], [11, 10], list(reversed(range(25)))):
        assert rows.texts(order) == [TEXTS[index] for index in order]
    whole = load(tmp_path)
    assert all_texts(rows) == all_texts(whole)
    assert rows.hash == whole.hash


def test_a_row_beyond_the_end_of_a_stream_is_a_training_error(tmp_path: Path) -> None:
    rows = streamed(write_lines(tmp_path / "a.jsonl", TEXTS), rows=40, shard_rows=10)
    assert rows.texts([24]) == [TEXTS[24]]
    for index in (25, 29, 30, 39):
        with pytest.raises(TrainingError, match=f"row {index} is beyond the end of the stream"):
            rows.texts([0, index])
    with pytest.raises(TrainingError, match="out of range"):
        rows.texts([40])


def test_a_streams_shards_are_read_once_while_they_are_kept(tmp_path: Path) -> None:
    rows = streamed(write_lines(tmp_path / "a.jsonl", TEXTS), rows=25, shard_rows=2)
    rows._stream = counted = Counted(rows._stream)
    rows.texts([0, 1, 3, 2, 0])
    assert counted.reads == 2
    rows.texts([1, 2])
    assert counted.reads == 2, "shards that are kept were read again"
    rows.texts([2 * shard for shard in range(2, 2 + KEPT_SHARDS)])
    assert counted.reads == 2 + KEPT_SHARDS
    rows.texts([0])
    assert counted.reads == 3 + KEPT_SHARDS, "the oldest shard was kept for ever"


def test_more_shards_than_are_kept_may_be_asked_for_at_once(tmp_path: Path) -> None:
    rows = streamed(write_lines(tmp_path / "a.jsonl", TEXTS), rows=25, shard_rows=1)
    assert rows.texts(range(25)) == TEXTS


@pytest.mark.parametrize(
    ("count", "share", "held_out"),
    [(100, 0.01, 1), (100, 0.25, 25), (1000, 0.0, 0), (10, 0.01, 0), (1, 0.5, 0), (3, 0.99, 2)],
)
def test_the_last_rows_are_held_out(count: int, share: float, held_out: int) -> None:
    training, measured = split_held_out(count, share)
    assert len(measured) == held_out
    assert [*training, *measured] == list(range(count))
    assert len(training) >= 1
