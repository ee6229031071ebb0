"""Reads local files: plain text, JSON and Parquet.

No globbing, no cache, no guessing of types. Every row is read and checked before the first
request, and an error names the file, the line or row, and the remedy. docs/miner.md has the
rules.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import pyarrow
import pyarrow.parquet

from hiveminer.errors import OperatorError, first_line, printable

KINDS = {
    ".txt": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".md": "text",
}
"""Kinds of files, by suffix. A folder's Markdown is read if it holds nothing else: beside other
files, it is about the data."""

ABOUT_DATA = frozenset({"dataset_info.json", "dataset_infos.json", "state.json"})
"""Files without rows that `datasets` writes beside data."""

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words in the name of a file or folder that name a split."""

NUMBERED = re.compile(r"(.+)-\d{5}-of-(\d{5})")
"""The name of one of several files that hold one data set."""

EVERY_SPLIT = "all"
"""`data.split` for all files."""

UTF = {
    32: (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),  # first: one of its marks begins like UTF-16's
    16: (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""The beginning of a file that Git LFS has not fetched yet."""

NAMES_SHOWN, NAME_LETTERS = 3, 80


def refuse(path: Path, reason: str) -> NoReturn:
    raise OperatorError(f"data {printable(path)}: {reason}")


# Files -------------------------------------------------------------------------------------


def find_files(path: Path, *, split: str) -> tuple[str, list[Path], list[Path]]:
    """The kind of the files to read, the files in order, and the files that are left out.

    A folder is searched recursively, links included, in the order of the names. Hidden files and
    folders are ignored. If names contain splits, those of `split` are read. Raises OperatorError
    when there is nothing to read, or more than one way to read it.
    """
    try:
        if not path.exists():
            refuse(path, "no such file or folder")
        if not path.is_dir():
            if "[" in split:
                refuse(path, f"data.split {split!r}: only hub data sets can be sliced")
            kind = KINDS.get(path.suffix.lower())
            if kind is None:
                ends = ", ".join(KINDS)
                refuse(path, f"its name ends in none of {ends}: convert, unpack or rename it")
            if not path.is_file():
                refuse(path, "not a regular file")
            return kind, [path], []
        entries = sorted(_walk(path, ()))
    except OSError as error:
        refuse(Path(error.filename or path), f"cannot be read: {error.strerror or error}")
    files = [entry for entry in entries if _kind(entry) is not None]
    files = [file for file in files if not _is_markdown(file)] or files
    if not files:
        names = f"; it holds {_names(path, entries)}" if entries else ""
        refuse(path, f"no file in it ends in {', '.join(KINDS)}{names}")
    files = _of_split(path, files, split)
    kinds_found = {_kind(file): file for file in reversed(files)}
    if len(kinds_found) > 1:
        names = _names(path, sorted(kinds_found.values()))
        refuse(path, f"files of more than one kind ({names}): keep one kind in the folder")
    chosen = set(files)
    return _kind(files[0]) or "text", files, [entry for entry in entries if entry not in chosen]


def _kind(path: Path) -> str | None:
    return None if path.name in ABOUT_DATA else KINDS.get(path.suffix.lower())


def _is_markdown(path: Path) -> bool:
    return path.suffix.lower() == ".md"


def _walk(folder: Path, above: Sequence[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in above:
        refuse(folder, "a link to a folder that it is in: remove it")
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry, (*above, real))
        elif entry.is_file() or _kind(entry) is None or _is_markdown(entry):
            yield entry
        else:
            refuse(entry, "not a regular file, or a broken link")


def _of_split(folder: Path, files: list[Path], split: str) -> list[Path]:
    if split == EVERY_SPLIT:
        return files
    wanted = SPLITS.get(split.lower())
    if wanted is None:
        refuse(folder, f"data.split {split!r}: files have train, validation, test or all")
    splits = {file: _split(file.relative_to(folder)) for file in files}
    named = [file for file in files if splits[file] is not None]
    if not named and wanted == "train":
        return files
    unnamed = [file for file in files if splits[file] is None]
    if named and unnamed:
        refuse(
            folder,
            f"{_names(folder, named[:1])} names a split and {_names(folder, unnamed[:1])} none: "
            f"rename or move one of them, or set data.split to {EVERY_SPLIT!r} to read all",
        )
    chosen = [file for file in named if splits[file] == wanted]
    if not chosen:
        names = _names(folder, files)
        refuse(folder, f"no file of the split {split!r}; it holds {names} (data.split)")
    return chosen


def _split(path: Path) -> str | None:
    """The split that a relative path names: in its nearest such folder, or the first such word of
    the file's name."""
    for folder in reversed(path.parts[:-1]):
        if folder.lower() in SPLITS:
            return SPLITS[folder.lower()]
    words = re.split(r"[^a-z0-9]+", path.stem.lower())
    return next((SPLITS[w] for word in words if (w := word.rstrip("0123456789")) in SPLITS), None)


def _names(folder: Path, files: Sequence[Path]) -> str:
    names = [printable(file.relative_to(folder))[:NAME_LETTERS] for file in files[:NAMES_SHOWN]]
    more = len(files) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def remarks(
    path: Path, files: Sequence[Path], *, left_out: Sequence[Path], empty: Sequence[Path]
) -> Iterator[str]:
    """What to report about a folder: files that give no rows, and files that are numbered, as
    `x-00001-of-00004`, and not all there."""
    for some, what in ((left_out, "not read"), (empty, "no row in")):
        if some:
            yield f"data {printable(path)}: {what}: {_names(path, some)}"
    found: dict[tuple[Path, int], int] = {}
    for file in files:
        if match := NUMBERED.fullmatch(file.stem):
            all_of_them = file.with_stem(f"{match[1]}-*-of-{match[2]}"), int(match[2])
            found[all_of_them] = found.get(all_of_them, 0) + 1
    for (shards, count), here in found.items():
        if here < count:
            name = printable(shards.relative_to(path))
            yield f"data {printable(path)}: only {here} of the {count} files {name} are here"


# Plain text --------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """A file's text without its byte-order mark; line ends are kept."""
    try:
        data = path.read_bytes()
    except OSError as error:
        refuse(path, f"cannot be read: {error.strerror or error}")
    check_start(path, data)
    text = _decode(path, data.removeprefix(codecs.BOM_UTF8), line=1)
    if (place := text.find("\0")) >= 0:
        line = text.count("\n", 0, place) + 1
        refuse(path, f"line {line}: a NUL byte; give text in UTF-8")
    return text


def check_start(path: Path, data: bytes) -> None:
    """Refuse a Git LFS pointer, UTF-16 and UTF-32, by their first bytes."""
    if data.startswith(LFS_POINTER):
        refuse(path, "a Git LFS pointer, not the file itself: run git lfs pull")
    for bits, marks in UTF.items():
        if data.startswith(marks):
            reason = f"line 1: UTF-{bits}, not UTF-8; convert it with iconv -f utf-{bits} -t utf-8"
            refuse(path, reason)


def _decode(path: Path, data: bytes, *, line: int) -> str:
    """line: of the beginning of the data."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        byte = data[error.start]
        refuse(path, f"line {line}: not UTF-8 (byte 0x{byte:02x}); convert it with iconv")


# JSON --------------------------------------------------------------------------------------


def _column(path: Path, column: str, records: Iterable[tuple[str, object]]) -> Iterator[str]:
    """One column of (place, record) pairs, empty text where a record has none. Refuses a file
    without the column after its last record."""
    names: dict[str, None] = {}
    found: set[bool] = set()
    for place, record in records:
        if not isinstance(record, dict):
            refuse(path, f"{place}: {_type(record)}, expected an object")
        found.add(column in record)
        if column not in record and len(names) < 20:
            names.update(dict.fromkeys(record))
        text = "" if record.get(column) is None else record[column]
        if not isinstance(text, str):
            refuse(path, f"{place}: column {column!r} is {_type(text)}, expected text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            letter = f"\\u{ord(text[error.start]):04x}"
            refuse(path, f"{place}: column {column!r} holds half a character, {letter}")
        yield text
    if found == {False}:
        refuse_column(path, column, list(names))


def _type(value: object) -> str:
    names = {"NoneType": "null", "dict": "an object", "list": "a list"}
    return names.get(type(value).__name__, type(value).__name__)


def refuse_column(path: Path, column: str, names: Sequence[str]) -> NoReturn:
    listed = printable(", ".join(names[:20]) or "none")[:200]
    refuse(path, f"no column {column!r}; it has {listed} (data.column in run.toml)")


def read_json(path: Path, stream: BinaryIO, column: str) -> Iterator[str]:
    """One column of a file of JSON objects: one per line, or an array, or pretty-printed."""
    start = stream.read(len(LFS_POINTER))
    check_start(path, start)
    begin = len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0
    stream.seek(begin)
    by_line = _begins_with_a_record(stream)
    stream.seek(begin)
    records = _lines(path, stream) if by_line else _values(path, stream.read())
    yield from _column(path, column, records)


def _begins_with_a_record(stream: BinaryIO) -> bool:
    """Whether the first line that is not blank is JSON but not an array: then each line is."""
    first = next((line for line in stream if line.strip()), b"")
    try:
        return not isinstance(json.loads(first.decode("utf-8")), list)
    except (ValueError, RecursionError):
        return False


def _lines(path: Path, stream: BinaryIO) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            text = _decode(path, line, line=number)
            try:
                record = json.loads(text, object_pairs_hook=_unique)
            except (ValueError, RecursionError) as error:
                refuse(path, f"line {number}: not JSON: {_json_reason(error)}")
            yield f"line {number}", record


def _values(path: Path, data: bytes) -> Iterator[tuple[str, object]]:
    """The elements of one array, or objects one after the other."""
    text = _decode(path, data, line=1)
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    place = _skip_space(text, 0)
    is_array = text.startswith("[", place)
    number = 0
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else place
            line = text.count("\n", 0, at) + 1
            refuse(path, f"line {line}: not JSON: {_json_reason(error)}")
        place = _skip_space(text, place)
        if is_array:
            if place < len(text):
                line = text.count("\n", 0, place) + 1
                refuse(path, f"line {line}: not JSON: more follows after the array")
            yield from ((f"row {row}", record) for row, record in enumerate(value))
            return
        yield f"row {number}", value
        number += 1


def _skip_space(text: str, place: int) -> int:
    match = re.compile(r"[ \t\r\n]*").match(text, place)
    assert match is not None
    return match.end()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice!r:.80} twice in one object")
    return record


def _json_reason(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (column {error.colno})"
    return "nested too deeply" if isinstance(error, RecursionError) else first_line(error)


# Parquet -----------------------------------------------------------------------------------


def read_parquet(path: Path, stream: BinaryIO, column: str) -> Iterator[str]:
    """One column of a Parquet file, nulls as empty text."""
    check_start(path, stream.read(len(LFS_POINTER)))
    stream.seek(0)
    try:
        file = pyarrow.parquet.ParquetFile(stream)
        schema = file.schema_arrow
        if column not in schema.names:
            refuse_column(path, column, schema.names)
        if schema.names.count(column) > 1:
            refuse(path, f"more than one column {column!r}")
        check_type(path, column, schema.field(column).type)
        for batch in file.iter_batches(batch_size=256, columns=[column], use_threads=False):
            values = batch.column(column)
            values.validate(full=True)
            for value in values.to_pylist():
                yield value or ""
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        refuse(path, f"cannot be read: {first_line(error)}")


def check_type(path: Path, column: str, kind: Any) -> None:
    """Refuse an Arrow type that is not text."""
    values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if str(values) not in ("string", "large_string", "string_view"):
        refuse(path, f"column {column!r} is {str(kind)[:80]}, expected text")
