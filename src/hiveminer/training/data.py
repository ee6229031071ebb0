"""The data: rows of local files, hub data sets or the built-in text, behind one interface.

A row's number means the same text to everyone in the run, so each source has a content hash, and
a streaming source is cut into numbered shards.

Plain text is cut into rows of consecutive whole lines of one file, as many as fit into
`ROW_BYTES` bytes of UTF-8; a longer line is a row of its own; blocks of white space are left
out. A record is a row; one whose text is null, missing or empty keeps its number and trains
nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import sysconfig
import tempfile
import threading
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow.compute

from hiveminer.config.run import BUILTIN, DataSection, is_local
from hiveminer.errors import OperatorError, TrainingError, first_line
from hiveminer.training.readers import (
    check_type,
    find_files,
    read_json,
    read_parquet,
    read_text,
    refuse,
    refuse_column,
    remarks,
)

logger = logging.getLogger(__name__)

ROW_BYTES = 480
"""Most UTF-8 bytes of a row of plain text (a longer line stays whole)."""

NOT_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
)
"""Folders of the standard library to leave out: some systems ship without them."""

CACHED_SHARDS = 8
"""Shards of a streaming source to keep in memory."""

MEMORY_BYTES = 256 * 2**20
"""Larger local data goes to a temporary file."""

ROW_CHARACTERS = 2**21
"""A row is cut to this length, the most that the longest sequence length can train."""


class Rows(Protocol):
    """Numbered rows of text."""

    @property
    def hash(self) -> str:
        """Hash of the content."""

    def __len__(self) -> int: ...

    def texts(self, indices: Sequence[int]) -> list[str]:
        """These rows, in this order. Raises TrainingError for one that is out of range or cannot
        be read."""


class StoredRows:
    """Rows read once into memory or an unnamed temporary file, so that they cannot change while
    the program runs, and no cache outlives it.

    digest: of the content; complete once `texts` is exhausted. Raises OperatorError when the disk
    is full.
    """

    def __init__(
        self,
        texts: Iterable[str],
        digest: Any,
        *,
        memory_bytes: int = MEMORY_BYTES,
        row_characters: int = ROW_CHARACTERS,
    ):
        self._file = tempfile.SpooledTemporaryFile(max_size=memory_bytes)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._ends = array("Q", [0])
        self._lock = threading.Lock()
        self.empty = 0
        """Rows without text."""
        for text in texts:
            data = text[:row_characters].encode("utf-8")
            try:
                self._file.write(data)
            except OSError as error:
                raise OperatorError(
                    f"no room for the data's rows in {tempfile.gettempdir()}: {error.strerror}; "
                    "free some, or name another folder in TMPDIR"
                ) from None
            self._ends.append(self._ends[-1] + len(data))
            self.empty += not data
        self.hash: str = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def texts(self, indices: Sequence[int]) -> list[str]:
        check_range(indices, len(self))
        return [self._read(self._ends[index], self._ends[index + 1]) for index in indices]

    def _read(self, start: int, end: int) -> str:
        with self._lock:
            self._file.seek(start)
            return self._file.read(end - start).decode("utf-8")

    def shorten(self, count: int) -> None:
        """Keep the first `count` rows."""
        del self._ends[count + 1 :]


class RecordRows:
    """Rows of a `datasets.Dataset`, read from its Arrow files on demand."""

    def __init__(self, dataset: Any, column: str, content_hash: str):
        self._texts = dataset.select_columns([column])
        self._column = column
        self.hash = content_hash
        lengths = pyarrow.compute.binary_length(dataset.with_format("arrow")[:][column])
        self.empty = len(lengths) - (pyarrow.compute.sum(lengths.cast("bool")).as_py() or 0)

    def __len__(self) -> int:
        return len(self._texts)

    def texts(self, indices: Sequence[int]) -> list[str]:
        check_range(indices, len(self))
        return [_text(value, self._column) for value in self._texts[list(indices)][self._column]]


class StreamedRows:
    """Rows of a `datasets.IterableDataset`, cut into numbered shards.

    Row `n` is record `n` of the stream. A shard is read whole, so ask for its rows together.
    """

    def __init__(self, stream: Any, *, column: str, count: int, shard_rows: int, content_hash: str):
        self._stream = stream
        self._column = column
        self._count = count
        self._shard_rows = shard_rows
        self.hash = content_hash
        self._shard = functools.lru_cache(CACHED_SHARDS)(self._read_shard)

    def __len__(self) -> int:
        return self._count

    def texts(self, indices: Sequence[int]) -> list[str]:
        check_range(indices, len(self))
        numbers = sorted({index // self._shard_rows for index in indices})
        shards = {number: self._shard(number) for number in numbers}
        rows = []
        for index in indices:
            number, offset = divmod(index, self._shard_rows)
            if offset >= len(shards[number]):
                raise TrainingError(f"row {index} is beyond the end of the stream")
            rows.append(shards[number][offset])
        return rows

    def _read_shard(self, number: int) -> list[str]:
        try:
            records = self._stream.skip(number * self._shard_rows).take(self._shard_rows)
            values = [record.get(self._column) for record in records]
        except Exception as error:
            raise TrainingError(f"shard {number} cannot be read: {first_line(error)}") from error
        return [_text(value, self._column) for value in values]


def load_rows(section: DataSection) -> Rows:
    """The rows that a run names. Logs what is left out and how many rows are empty.

    Raises OperatorError when they do not exist, cannot be used, or have another hash.
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
    empty = getattr(rows, "empty", 0)
    if empty == len(rows):
        raise OperatorError(f"data {section.name}: column {section.column!r} holds no text")
    if empty:
        logger.warning(
            "data %s: %d of %d rows have no text; they keep their numbers and train nothing",
            section.name, empty, len(rows),
        )  # fmt: skip
    return rows


def split_held_out(count: int, share: float) -> tuple[range, range]:
    """(rows to train on, rows to evaluate on): the last `share` is held out."""
    held_out = min(count - 1, round(count * share)) if share > 0 else 0
    return range(count - held_out), range(count - held_out, count)


def check_range(indices: Sequence[int], count: int) -> None:
    """Raise TrainingError for a number out of range."""
    for index in indices:
        if not 0 <= index < count:
            raise TrainingError(f"row {index} is out of range: the data has {count} rows")


# Text --------------------------------------------------------------------------------------


def builtin_rows(folder: Path | None = None) -> Rows:
    """Rows of the running Python's standard library: its `.py` files ordered by name, without
    tests, installed packages and files that are not UTF-8. Another version of Python has another
    hash."""
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    return _text_rows(root, _library_texts(root))


def cut_rows(text: str) -> Iterator[str]:
    """Cut one file's text into rows, as the module's docstring says."""
    block, size = "", 0
    for line in text.splitlines(keepends=True):
        length = len(line) if line.isascii() else len(line.encode("utf-8"))
        if block and size + length > ROW_BYTES:
            if block.strip():
                yield block
            block, size = "", 0
        block += line
        size += length
    if block.strip():
        yield block


def _library_texts(root: Path) -> Iterator[tuple[Path, str]]:
    names: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_LIBRARY]
        paths = (os.path.join(folder, name) for name in files if name.endswith(".py"))
        names += (os.path.relpath(path, root) for path in paths)
    for name in sorted(names, key=os.fsencode):
        path = root / name
        try:
            yield path, path.read_bytes().decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            logger.debug("%s is left out: %s", path, error)


def _text_rows(root: Path, texts: Iterable[tuple[Path, str]]) -> StoredRows:
    digest = hashlib.sha256(f"text rows of {ROW_BYTES} bytes\n".encode())

    def rows() -> Iterator[str]:
        for path, text in texts:
            name = path.relative_to(root).as_posix()
            head = f"{len(name)} {name} {len(text)}\n"
            digest.update(head.encode("utf-8", "surrogateescape"))
            digest.update(text.encode())
            yield from cut_rows(text)

    return StoredRows(rows(), digest)


# Local files -------------------------------------------------------------------------------


def _local_rows(section: DataSection) -> StoredRows:
    path = Path(section.name).expanduser()
    kind, files, left_out = find_files(path, split=section.split)
    empty: list[Path] = []
    if kind == "text":
        root = path if path.is_dir() else path.parent
        rows = _text_rows(root, _texts(files, empty))
    else:
        digest = hashlib.sha256(f"records, column {section.column}\n".encode())
        rows = StoredRows(read_records(files, kind, section.column, digest, empty), digest)
    if path.is_dir():
        for line in remarks(path, files, left_out=left_out, empty=empty):
            logger.warning("%s", line)
    if section.streaming and section.rows:
        if section.rows > len(rows):
            refuse(path, f"data.rows is {section.rows}, and it has {len(rows)} rows")
        rows.shorten(section.rows)
    return rows


def _texts(files: Iterable[Path], empty: list[Path]) -> Iterator[tuple[Path, str]]:
    for file in files:
        text = read_text(file)
        if not text.strip():
            empty.append(file)
        yield file, text


def read_records(
    files: Iterable[Path], kind: str, column: str, digest: Any, empty: list[Path]
) -> Iterator[str]:
    """The texts of all files, which are added to the digest; those without a row to `empty`."""
    read = read_json if kind == "json" else read_parquet
    for file in files:
        try:
            with file.open("rb") as stream:
                before = os.fstat(stream.fileno())
                digest.update(hashlib.file_digest(stream, "sha256").digest())
                stream.seek(0)
                count = 0
                for text in read(file, stream, column):
                    count += 1
                    yield text
                after = os.fstat(stream.fileno())
        except OSError as error:
            refuse(file, f"cannot be read: {error.strerror or error}")
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            refuse(file, "it changed while it was read; start again when it is complete")
        if not count:
            empty.append(file)


# The hub -----------------------------------------------------------------------------------


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
        # The revision fixes the hub's content, and hashing all of it would be a second download
        # for a streaming source, so only the first rows are hashed.
        sample = list(dataset.take(16)) if section.streaming else dataset[: min(16, len(dataset))]
    except Exception as error:
        raise OperatorError(
            f"data {section.name}: cannot be loaded ({_first_cause(error)}); give {BUILTIN!r}, a "
            "local file or folder, or a hub name this machine can reach"
        ) from error
    source = [section.name, section.config, section.split, section.revision, section.column]
    text = json.dumps([source, section.rows, sample], sort_keys=True, default=str)
    content_hash = hashlib.sha256(text.encode()).hexdigest()
    _check_column(section, dataset, sample)
    if not section.streaming:
        return RecordRows(dataset, section.column, content_hash)
    return StreamedRows(
        dataset,
        column=section.column,
        count=section.rows,
        shard_rows=section.shard_rows,
        content_hash=content_hash,
    )


def _check_column(section: DataSection, dataset: Any, sample: Any) -> None:
    path, column = Path(section.name), section.column
    if dataset.features is not None:
        if column not in dataset.features:
            refuse_column(path, column, list(dataset.features))
        check_type(path, column, dataset.features.arrow_schema.field(column).type)
        return
    for record in sample:
        if column not in record:
            refuse_column(path, column, list(record))
        if not isinstance(record[column], str | None):
            refuse(path, f"column {column!r} is {type(record[column]).__name__}, expected text")


def _first_cause(error: BaseException) -> str:
    """The first line of an error's first cause: `datasets` wraps a reader's own reason."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _text(value: object, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TrainingError(f"column {column!r} is {type(value).__name__}, expected text")
    return value[:ROW_CHARACTERS]
