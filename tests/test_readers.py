"""Tests of reading local files: which are read, what is in them, and what is refused."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError
from row_files import all_texts, load, refused, write_lines, write_parquet, write_rows

from hiveminer.config.run import DataSection
from hiveminer.errors import OperatorError
from hiveminer.training.data import load_rows, read_records
from hiveminer.training.readers import find_files

TEXTS = [f"row {number}: " + "word " * (number % 7) for number in range(25)]


def test_mixed_kinds_are_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.txt").write_text("text\n")
    refused(tmp_path, r"files of more than one kind \(a\.jsonl, b\.txt\)")


def test_what_is_not_data_is_refused(tmp_path: Path) -> None:
    assert "absent.jsonl" in refused(tmp_path / "absent.jsonl", "no such file or folder")
    refused(tmp_path, r"no file in it ends in \.txt")
    (tmp_path / ".hidden.txt").write_text("hidden\n")
    refused(tmp_path, r"no file in it ends in \.txt")
    (tmp_path / "a.csv").write_text("text\na\n")
    refused(tmp_path, r"it holds a\.csv")
    refused(tmp_path / "a.csv", "its name ends in none of")
    refused(tmp_path / "a.csv" / "b.txt", "no such file|cannot be read")
    os.mkfifo(tmp_path / "pipe.txt")
    refused(tmp_path / "pipe.txt", "not a regular file")
    refused(tmp_path, r"pipe\.txt: not a regular file")
    for name in ("", "a\0b.txt"):
        with pytest.raises(ValidationError):
            DataSection(name=name)
    for name in ("x" * 5000, "x" * 5000 + ".txt"):
        with pytest.raises(OperatorError):
            load_rows(DataSection(name=name))


LATIN = "café\n".encode("latin-1")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"one\ntwo\n" + LATIN, "line 3: not UTF-8 .byte 0xe9"),
        ("a.txt", "one\n".encode("utf-16"), "line 1: UTF-16"),
        ("a.txt", "one\n".encode("utf-32"), "line 1: UTF-32"),
        ("a.txt", "one\ntwo\n".encode("utf-16-le"), "line 1: a NUL byte"),
        ("a.txt", b"one\ntw\0o\n", "line 2: a NUL byte"),
        ("a.txt", b"\xed\xa0\xbd\n", "line 1: not UTF-8"),
        ("a.txt", POINTER, "a Git LFS pointer"),
        ("a.parquet", POINTER, "a Git LFS pointer"),
        ("a.parquet", b"PAR1 no parquet", "cannot be read"),
        ("a.parquet", b"", "cannot be read"),
        ("a.jsonl", POINTER, "a Git LFS pointer"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "' + LATIN + b'"}\n', "line 2: not UTF-8"),
        ("a.json", b'[{"text": "one"},\n{"text": "caf\xe9"}]', "line 2: not UTF-8"),
        ("a.jsonl", '{"text": "one"}\n'.encode("utf-16"), "line 1: UTF-16"),
        ("a.jsonl", b"{broken", "line 1: not JSON"),
        ("a.jsonl", b'{"text": "one"}\n\n{"text": "tw', "line 3: not JSON: Unterminated"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "two"} 3\n', "line 2: not JSON: Extra data"),
        ("a.json", b'[{"text": "one"},\n{"text": }]', "line 2: not JSON"),
        ("a.json", b'[{"text": "one"}]\n[]', "line 2: not JSON: more follows after the array"),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', "line 1: not JSON: key 'text' twice"),
        ("a.json", b'[{"text": "a", "text": "b"}]', "key 'text' twice"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}\n', r"line 2: .*half a character, .ud83d"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "line 2: a list, expected an object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 1}\n', "line 2: column 'text' is int, expected"),
        ("a.json", b'[{"text": "a"}, {"text": ["b"]}]', "row 1: column 'text' is a list"),
        ("a.jsonl", b'{"text": {"en": "a"}}\n', "line 1: column 'text' is an object"),
        ("a.jsonl", b'{"text": true}\n', "line 1: column 'text' is bool"),
        ("a.jsonl", b'{"body": "a"}\n{"body": "b"}\n', "no column 'text'; it has body"),
        ("a.json", b'{"data": [{"text": "a"}]}', "no column 'text'; it has data .data.column"),
        ("a.jsonl", b'{"text": null}\n{"text": ""}\n', "column 'text' holds no text"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON: nested too deeply"),
        ("a.jsonl", b"\n \n", "it holds no row"),
        ("a.txt", b"", "it holds no row"),
        ("a.txt", b" \n\n", "it holds no row"),
    ],
)
def test_what_cannot_be_read_is_refused_with_file_and_line(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert name in refused(tmp_path / name, words)
    refused(tmp_path, words)


def test_one_file_of_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", TEXTS)
    write_lines(tmp_path / "b.jsonl", TEXTS, column="body")
    refused(tmp_path, r"b\.jsonl: no column 'text'; it has body, number")


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", TEXTS)
    rows = read_records([path], "json", "text", hashlib.sha256(), [])
    next(rows)
    path.write_text(path.read_text() + '{"text": "one more"}\n')
    with pytest.raises(OperatorError, match=r"a\.jsonl: it changed while it was read"):
        list(rows)


def test_files_without_rows_and_missing_shards_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("json", "text", "shards"):
        (tmp_path / name).mkdir()
    write_lines(tmp_path / "json" / "a.jsonl", TEXTS)
    (tmp_path / "json" / "b.jsonl").write_text("\n")
    (tmp_path / "text" / "a.txt").write_text("text\n")
    (tmp_path / "text" / "b.txt").touch()
    for number in (0, 2):
        write_parquet(tmp_path / "shards" / f"train-0000{number}-of-00003.parquet", TEXTS)
    for name, words in (
        ("json", "no row in: b.jsonl"),
        ("text", "no row in: b.txt"),
        ("shards", "only 2 of the 3 files train-*-of-00003.parquet are here"),
    ):
        caplog.clear()
        load(tmp_path / name)
        assert caplog.messages == [f"data {tmp_path / name}: {words}"]
    write_parquet(tmp_path / "shards" / "train-00001-of-00003.parquet", TEXTS)
    caplog.clear()
    assert len(load(tmp_path / "shards")) == 3 * len(TEXTS)
    assert caplog.messages == []


TEXT_TYPES = [
    pyarrow.string(),
    pyarrow.large_string(),
    pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
]
NOT_TEXT = {
    "is int64, expected text": [1, 2],
    "is bool, expected text": [True, False],
    "is binary, expected text": [b"one", b"two"],
    "is list.*, expected text": [["a"], ["b"]],
    "is struct.*, expected text": [{"text": "a"}, {"text": "b"}],
    "is null, expected text": [None, None],
    "UTF8": pyarrow.array([b"one", b"caf\xe9"]).view(pyarrow.string()),
}


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_a_parquet_column_of_text_is_read_whatever_its_encoding(
    tmp_path: Path, kind: pyarrow.DataType
) -> None:
    values = pyarrow.array(["one", None, "two", "one"], pyarrow.string()).cast(kind)
    table = pyarrow.table({"other": [1, 2, 3, 4], "text": values, "a.b": values})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert all_texts(load(tmp_path)) == ["one", "", "two", "one"]
    assert all_texts(load(tmp_path, column="a.b")) == ["one", "", "two", "one"]


@pytest.mark.parametrize("words", NOT_TEXT)
def test_a_parquet_column_that_is_not_text_is_refused(tmp_path: Path, words: str) -> None:
    table = pyarrow.table({"text": NOT_TEXT[words]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    refused(tmp_path, f"a.parquet: .*{words}")


@pytest.mark.parametrize(
    "content",
    [
        b'{"text": "one"}\n{"text": "two\\u2028"}\n',
        b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two\xe2\x80\xa8"}',
        b'{"text": "one"}\r{"text": "two\\u2028"}\r',
        b'[{"text": "one"}, {"text": "two\\u2028"}]',
        b'\xef\xbb\xbf[\n  {"text": "one"},\n  {"text": "two\\u2028", "text2": 1}\n]\n',
        b'{\n  "text": "one"\n}\n{\n  "text": "two\\u2028"\n}\n',
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.NDJSON"])
def test_json_is_read_by_line_as_an_array_and_pretty_printed(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    assert all_texts(load(tmp_path / name)) == ["one", "two\u2028"]


@pytest.mark.parametrize("text", ["2024-01-01", "17", "true", "null", "1e5", "NaN", "a\0b", " "])
def test_text_that_looks_like_another_type_stays_text(tmp_path: Path, text: str) -> None:
    assert all_texts(load(write_lines(tmp_path / "a.jsonl", [text, text]))) == [text, text]


def test_line_ends_stay_as_they_are_and_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    text = "one\r\ntwo\rthree\u2028four\x0bfive\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8-sig", newline="")
    assert all_texts(load(tmp_path / "a.txt")) == [text]


# --- names ------------------------------------------------------------------------------------


NAMES = ["a[1]", "a*", "a?", "[!a]", "{a,b}", "a%20b", "a::b", "**", "a b\n", "ü", "hf:", "a#b?c=d"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_a_path_means_itself(tmp_path: Path, name: str, kind: str) -> None:
    folder = tmp_path / name
    for place in (folder / f"{name}.{kind}", folder / f"a1.{kind}", tmp_path / f"ab.{kind}"):
        write_rows(place, ["MINE\n" if place.stem == name else "OTHER\n"])
    assert all_texts(load(folder / f"{name}.{kind}")) == ["MINE\n"]
    assert sorted(all_texts(load(folder))) == ["MINE\n", "OTHER\n"]


def test_a_file_name_that_is_not_utf_8_is_a_name_like_any(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text("text\n")
    assert all_texts(load(tmp_path)) == ["text\n"]
    (tmp_path / name).write_bytes(LATIN)
    refused(tmp_path, r"caf.udce9\.txt: line 1: not UTF-8").encode()


def test_hidden_files_are_ignored_and_others_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.txt", "._a.txt", ".ipynb_checkpoints/a-checkpoint.txt", ".git/b.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n")
    with caplog.at_level(logging.WARNING):
        assert all_texts(load(tmp_path)) == ["a.txt\n"]
    assert caplog.messages == []
    for name in ("README.md", "dataset_infos.json", "more.jsonl.gz", "other.csv"):
        (tmp_path / name).write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert all_texts(load(tmp_path)) == ["a.txt\n"]
    words = "not read: README.md, dataset_infos.json, more.jsonl.gz and 1 more"
    assert [message.partition(": ")[2] for message in caplog.messages] == [words]


def test_links_are_followed_and_never_in_circles(tmp_path: Path) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    (elsewhere / "b.txt").write_text("linked\n")
    (here / "a.txt").symlink_to(elsewhere / "b.txt")
    (here / "folder").symlink_to(elsewhere)
    assert all_texts(load(here)) == ["linked\n", "linked\n"]
    (here / "c.txt").symlink_to("nowhere")
    refused(here, r"c\.txt: not a regular file, or a broken link")
    (here / "c.txt").unlink()
    (here / "circle").symlink_to(here)
    refused(here, "circle: a link to a folder that it is in")


SPLIT_NAMES = [
    ("{}.txt", "train", "validation", "test"),
    ("{}.txt", "train", "valid", "test"),
    ("{}.txt", "training", "dev", "eval"),
    ("data/{}-00000-of-00002.txt", "train", "val", "testing"),
    ("{}/part-0.txt", "train", "validation", "test"),
    ("wiki.{}.raw.TXT", "train", "valid", "test"),
    ("{}00.txt", "Train", "Dev", "Test"),
]


@pytest.mark.parametrize("names", SPLIT_NAMES, ids=lambda names: names[0].format(names[2]))
def test_the_files_of_a_split_are_chosen_by_their_names(
    tmp_path: Path, names: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    form, *words = names
    for split, word in zip(("train", "validation", "test"), words, strict=True):
        path = tmp_path / form.format(word)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{split}\n")
    assert all_texts(load(tmp_path)) == ["train\n"]
    assert form.format(words[1]) in caplog.text, "what is left out is named"
    for split in ("validation", "test"):
        assert all_texts(load(tmp_path, split=split)) == [f"{split}\n"]
    assert sorted(all_texts(load(tmp_path, split="all"))) == ["test\n", "train\n", "validation\n"]


def test_a_split_that_cannot_be_told_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("test\n")
    refused(tmp_path, r"no file of the split 'train'; it holds test\.txt")
    (tmp_path / "more.txt").write_text("more\n")
    refused(tmp_path, r"test\.txt names a split and more\.txt none")
    assert len(load(tmp_path, split="all")) == 2
    assert len(load(tmp_path / "test.txt")) == 1, "a file that is named is read"
    (tmp_path / "test.txt").unlink()
    refused(tmp_path, "no file of the split 'test'", split="test")
    for path in (tmp_path, tmp_path / "more.txt"):
        refused(path, r"data\.split 'train\[:10%\]'", split="train[:10%]")


def test_markdown_is_read_where_there_is_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "garden.md").write_text("# Garden\n\nThe beans need water.\n")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    kind, files, others = find_files(tmp_path, split="train")
    assert (kind, [file.name for file in files]) == ("text", ["garden.md"])
    assert [file.name for file in others] == ["photo.png"]
    assert find_files(tmp_path / "garden.md", split="train")[1] == [tmp_path / "garden.md"]
    (tmp_path / "data.txt").write_text("beside data, Markdown is about the data\n")
    _, files, others = find_files(tmp_path, split="train")
    assert [file.name for file in files] == ["data.txt"]
    assert {file.name for file in others} == {"garden.md", "photo.png"}
