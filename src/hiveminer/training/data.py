"""The rows: `datasets` and plain text, behind one door.

A row has a number, and the number means the same text to everybody in the run. So each
source has a content hash, and a streaming source is cut into numbered shards.

Plain text (`.txt`, and the built-in data) is cut into rows by one rule: a row is a block
of consecutive whole lines of one file, as many as fit into `ROW_BYTES` bytes of UTF-8; a
longer line is a row of its own; blocks that hold nothing but white space are left out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sysconfig
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from hiveminer.config.run import BUILTIN, DataSection, is_local
from hiveminer.errors import OperatorError, TrainingError

logger = logging.getLogger(__name__)

ROW_BYTES = 480
"""UTF-8 bytes of a row of plain text, at most (a longer line stays whole)."""

NOT_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
)
"""Folders of the standard library that are left out: some systems ship without them."""

KEPT_SHARDS = 8
"""Shards of a streaming source that stay in memory."""


class Rows(Protocol):
    """Numbered rows of text."""

    @property
    def hash(self) -> str:
        """The content's hash: two machines with the same one hold the same rows."""

    def __len__(self) -> int: ...

    def texts(self, indices: Sequence[int]) -> list[str]:
        """The rows of these numbers, in this order.

        Raises TrainingError for a number that is no row's, or a row that holds no text.
        """


class TextRows:
    """Rows that are held in memory."""

    def __init__(self, rows: Sequence[str], content_hash: str):
        self._rows = rows
        self._hash = content_hash

    @property
    def hash(self) -> str:
        return self._hash

    def __len__(self) -> int:
        return len(self._rows)

    def texts(self, indices: Sequence[int]) -> list[str]:
        check_range(indices, len(self))
        return [self._rows[index] for index in indices]


class RecordRows:
    """Rows of a `datasets.Dataset`, read from its Arrow files as they are asked for."""

    def __init__(self, dataset: Any, column: str, content_hash: str):
        self._texts = dataset.select_columns([column])
        self._column = column
        self._hash = content_hash

    @property
    def hash(self) -> str:
        return self._hash

    def __len__(self) -> int:
        return len(self._texts)

    def texts(self, indices: Sequence[int]) -> list[str]:
        check_range(indices, len(self))
        return [_text(value, self._column) for value in self._texts[list(indices)][self._column]]


class StreamedRows:
    """Rows of a `datasets.IterableDataset`, cut into numbered shards.

    Row `n` is record `n` of the stream. A shard is read whole, by skipping to its start,
    and a few stay in memory: ask for rows of one shard together.
    """

    def __init__(self, stream: Any, *, column: str, count: int, shard_rows: int, hash_of: str):
        self._stream = stream
        self._column = column
        self._count = count
        self._shard_rows = shard_rows
        self._hash = hash_of
        self._shards: OrderedDict[int, list[str]] = OrderedDict()

    @property
    def hash(self) -> str:
        return self._hash

    def __len__(self) -> int:
        return self._count

    def texts(self, indices: Sequence[int]) -> list[str]:
        check_range(indices, len(self))
        wanted = sorted({index // self._shard_rows for index in indices})
        shards = {number: self._shard(number) for number in wanted}
        rows = []
        for index in indices:
            shard = shards[index // self._shard_rows]
            offset = index % self._shard_rows
            if offset >= len(shard):
                raise TrainingError(f"row {index} is beyond the end of the stream")
            rows.append(shard[offset])
        return rows

    def _shard(self, number: int) -> list[str]:
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        start = number * self._shard_rows
        try:
            records = list(self._stream.skip(start).take(self._shard_rows))
        except Exception as error:
            raise TrainingError(f"shard {number} cannot be read: {_first_line(error)}") from error
        shard = [_text(record.get(self._column), self._column) for record in records]
        self._shards[number] = shard
        while len(self._shards) > KEPT_SHARDS:
            self._shards.popitem(last=False)
        return shard


def load_rows(section: DataSection) -> Rows:
    """The rows that a run names.

    Raises OperatorError when there is no such data, or its hash is not the run's.
    """
    if section.name == BUILTIN:
        rows: Rows = builtin_rows()
    elif is_local(section.name):
        rows = _local_rows(section)
    else:
        rows = _hub_rows(section)
    if not len(rows):
        raise OperatorError(f"data {section.name}: it holds no row")
    if section.hash and section.hash != rows.hash:
        raise OperatorError(
            f"data {section.name}: its hash is {rows.hash}, the run wants {section.hash}; "
            "get the run's own data, or another run.toml"
        )
    return rows


def split_held_out(count: int, share: float) -> tuple[range, range]:
    """(rows to train on, rows to measure on): the last `share` of them are held out."""
    held_out = min(count - 1, round(count * share)) if share > 0 else 0
    return range(count - held_out), range(count - held_out, count)


def check_range(indices: Sequence[int], count: int) -> None:
    """Raise TrainingError unless every number is a row's."""
    for index in indices:
        if not 0 <= index < count:
            raise TrainingError(f"row {index} is out of range: the data has {count} rows")


def builtin_rows(folder: Path | None = None) -> Rows:
    """The running Python's own standard library as text.

    Its `.py` files in the order of their names (as bytes), without tests and without what
    was installed beside them, each cut into rows. Another version of Python holds other
    text: the hash tells.
    """
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    return _rows_of_files(root, _library_files(root))


def cut_rows(text: str) -> Iterator[str]:
    """Cut one file's text into rows, by the rule at the head of this module."""
    block: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        length = len(line.encode("utf-8", errors="replace"))
        if block and size + length > ROW_BYTES:
            yield from _block(block)
            block, size = [], 0
        block.append(line)
        size += length
    yield from _block(block)


def _block(lines: list[str]) -> Iterator[str]:
    text = "".join(lines)
    if text.strip():
        yield text


def _library_files(root: Path) -> list[Path]:
    files = (
        path
        for path in root.rglob("*.py")
        if not NOT_LIBRARY.intersection(path.relative_to(root).parts) and path.is_file()
    )
    return sorted(files, key=lambda path: path.relative_to(root).as_posix().encode())


def _rows_of_files(root: Path, files: Iterable[Path]) -> Rows:
    digest = hashlib.sha256(f"text rows of {ROW_BYTES} bytes\n".encode())
    rows: list[str] = []
    for path in files:
        try:
            text = path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            logger.debug("%s is left out: %s", path, error)
            continue
        name = path.relative_to(root).as_posix()
        digest.update(f"{len(name)} {name} {len(text)}\n".encode())
        digest.update(text.encode())
        rows.extend(cut_rows(text))
    return TextRows(rows, digest.hexdigest())


def _local_rows(section: DataSection) -> Rows:
    path = Path(section.name).expanduser()
    if not path.exists():
        raise OperatorError(f"data {section.name}: no such file or folder")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    kinds = {_kind(file) for file in files} - {None}
    if len(kinds) != 1:
        found = ", ".join(sorted(str(kind) for kind in kinds)) or "none of them"
        raise OperatorError(
            f"data {section.name}: wants files of one kind, .txt, .jsonl, .json or .parquet; "
            f"found {found}"
        )
    kind = kinds.pop()
    files = [file for file in files if _kind(file) == kind]
    if kind == "text":
        return _rows_of_files(path if path.is_dir() else path.parent, files)
    return _local_records(section, str(kind), files)


def _kind(path: Path) -> str | None:
    suffixes = {
        ".txt": "text",
        ".jsonl": "json",
        ".ndjson": "json",
        ".json": "json",
        ".parquet": "parquet",
    }
    return suffixes.get(path.suffix.lower())


def _local_records(section: DataSection, kind: str, files: list[Path]) -> Rows:
    import datasets

    content_hash = _files_hash(files, section.column)
    try:
        dataset = datasets.load_dataset(
            kind,
            data_files=[str(file) for file in files],
            split="train",
            streaming=section.streaming,
        )
    except Exception as error:
        raise OperatorError(f"data {section.name}: cannot be read: {_first_line(error)}") from error
    return _records(section, dataset, content_hash)


def _hub_rows(section: DataSection) -> Rows:
    import datasets

    try:
        dataset = datasets.load_dataset(
            section.name,
            section.config or None,
            split=section.split,
            revision=section.revision or None,
            streaming=section.streaming,
        )
    except Exception as error:
        raise OperatorError(
            f"data {section.name}: cannot be loaded ({_first_line(error)}); give {BUILTIN!r}, a "
            "local file or folder, or a hub name this machine can reach"
        ) from error
    # The hub's content is fixed by its revision. Reading all of it to hash it would be a
    # second download for a streaming source, so the first rows stand for the rest.
    said = [section.name, section.config, section.split, section.revision, section.column]
    sample = list(dataset.take(16)) if section.streaming else dataset[: min(16, len(dataset))]
    text = json.dumps([said, section.rows, sample], sort_keys=True, default=str)
    return _records(section, dataset, hashlib.sha256(text.encode()).hexdigest())


def _records(section: DataSection, dataset: Any, content_hash: str) -> Rows:
    columns = dataset.column_names
    if columns is not None and section.column not in columns:
        raise OperatorError(
            f"data {section.name}: no column {section.column!r}; it has {', '.join(columns)} "
            "(data.column in run.toml)"
        )
    if not section.streaming:
        return RecordRows(dataset, section.column, content_hash)
    return StreamedRows(
        dataset,
        column=section.column,
        count=section.rows,
        shard_rows=section.shard_rows,
        hash_of=content_hash,
    )


def _files_hash(files: Iterable[Path], column: str) -> str:
    digest = hashlib.sha256(f"records, column {column}\n".encode())
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _text(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise TrainingError(f"a row's {column!r} is no text but {type(value).__name__}")
    return value


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
