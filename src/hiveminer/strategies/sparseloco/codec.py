"""One peer's update of one round as a small blob of bytes, and back.

A tensor is flattened and cut into chunks; of each, the values of largest magnitude are kept.
What is sent of a tensor is which coordinates are kept, two to the power of (bits - 1) levels
for each chunk, and for each value its sign and the number of its level.

    blob     version "HMU1", bits 1, chunk - 1 as 2 bytes, hotkey 32, run 8, round 4, parent 32,
             the schema's hash 8; then the tensors in the order of their names
    raw      fewer than 32 elements: float32, finite, no negative zero
    coded    count of values 4; gaps between the coordinates kept, or, past half of the tensor,
             between the others (none if dense); lowest level of each chunk with values, as the
             difference to the chunk before (zigzag); differences from level to level, 0 after
             the last; signs; numbers of the levels, lowest bit first

The encoder's rule: less than 32 elements are raw; less than a chunk is dense; all else keeps
`density` of each chunk, at least one value. Zeros (and magnitudes below 2**-126, which are taken
as zeros) are never kept, so a tensor of zeros takes four bytes.

Integers are little-endian, lists of them Rice coded (see `bits`). An index takes 7.53 bits at
64 of 4096 evenly spread, 2.3% over log2 C(4096, 64) / 64 = 7.36; clustered ones take less.

Each meaning has one encoding: `decode` refuses every other one, so a blob cannot be varied
without changing what it says. Nothing is allocated before the bytes that pay for it have been
seen: memory and time are linear in the blob's length, whatever it claims.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hiveminer.strategies.sparseloco.bits import (
    BlobError,
    Packed,
    Reader,
    pack,
    packed_size,
    read_integers,
    unpack,
    write_integers,
)
from hiveminer.strategies.sparseloco.levels import HIGHEST, LOWEST, SHIFT, SMALLEST, fit_levels

__all__ = ["BlobError", "Compression", "Header", "Update", "decode", "encode", "serialize"]

VERSION = b"HMU1"
RAW_BELOW = 32
LARGEST = 2**31 - 1
"""Elements of a tensor, at most."""

_HEAD = struct.Struct("<4sBH32s8sI32s8s")
_COUNT = struct.Struct("<I")
_PIECE = 1 << 18
"""Values or coordinates that are expanded at a time."""


@dataclass(frozen=True)
class Header:
    """Whose update it is, and the state that it stands on."""

    hotkey: bytes
    run: bytes
    round: int
    parent: bytes

    def __post_init__(self) -> None:
        if (len(self.hotkey), len(self.run), len(self.parent)) != (32, 8, 32):
            raise ValueError("a header has a hotkey of 32 bytes, a run of 8 and a parent of 32")
        if not 0 <= self.round < 2**32:
            raise ValueError(f"round {self.round} does not fit in 32 bits")


@dataclass(frozen=True)
class Compression:
    """How much is kept: `density` of the values of each `chunk`, `bits` for each (1 to 4)."""

    density: float
    bits: int
    chunk: int = 4096

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density is {self.density}: it must be above 0 and at most 1")
        if self.bits not in (1, 2, 3, 4):
            raise ValueError(f"bits is {self.bits}: it must be 1, 2, 3 or 4")
        if not 1 <= self.chunk <= 2**16:
            raise ValueError(f"chunk is {self.chunk}: it must be 1 to 65536")

    def kept(self, size: int) -> int:
        """Values kept of a chunk of `size`."""
        return max(1, round(self.density * size))


@dataclass(frozen=True)
class _Raw:
    values: NDArray[np.float32]

    def pieces(self) -> Iterator[tuple[slice | Tensor, Tensor]]:
        kept = np.flatnonzero(self.values)
        yield torch.from_numpy(kept), torch.from_numpy(self.values[kept])

    def squared_norm(self) -> float:
        return math.fsum(value * value for value in self.values.tolist())

    def to_bytes(self) -> bytes:
        return self.values.astype("<f4").tobytes()


@dataclass(frozen=True)
class _Coded:
    """A tensor as it is sent; values are in the order of their coordinates.

    `marked` are the coordinates kept or, if those are more than half, the others. `levels` has
    a row for each chunk with values; `planes` are the signs and the bits of the level numbers.
    """

    size: int
    chunk: int
    count: int
    marked: NDArray[np.int32]
    levels: NDArray[np.int64]
    planes: tuple[Packed, ...]

    def kept(self) -> Iterator[NDArray[np.int64]]:
        """The coordinates of the values, in pieces."""
        if not _by_others(self.count, self.size):
            for start in range(0, self.count, _PIECE):
                yield self.marked[start : start + _PIECE].astype(np.int64)
            return
        for start in range(0, self.size, _PIECE):
            stop = min(start + _PIECE, self.size)
            first, last = np.searchsorted(self.marked, (start, stop))
            here = np.arange(start, stop)
            yield np.delete(here, self.marked[first:last] - start) if first < last else here

    def cells(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], int]]:
        """By pieces: coordinates, the cell of `levels` that each value has, and which value
        is the first."""
        width = self.levels.shape[1]
        done, row, chunk_before = 0, -1, -1
        for where in self.kept():
            if not len(where):
                continue
            chunk_of = where // self.chunk
            cell = np.cumsum(np.diff(chunk_of, prepend=chunk_before) != 0)
            cell += row
            row, chunk_before = int(cell[-1]), int(chunk_of[-1])
            cell *= width
            for bit, plane in enumerate(self.planes[1:]):
                cell += unpack(plane, done, done + len(where)).astype(np.int64) << bit
            yield where, cell, done
            done += len(where)

    def uses(self) -> NDArray[np.int64]:
        """How many values each level has, int64[chunks, levels]."""
        uses = np.zeros(self.levels.size, np.int64)
        width = self.levels.shape[1]
        for _, cell, _ in self.cells():
            first = int(cell[0]) // width * width
            part = np.bincount(cell - first)
            uses[first : first + len(part)] += part
        return uses.reshape(self.levels.shape)

    def pieces(self) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """Coordinates, each once, and their values in float32."""
        table = (self.levels.reshape(-1) << SHIFT).astype(np.int32)
        for where, cell, done in self.cells():
            found = table[cell]
            signs = unpack(self.planes[0], done, done + len(where)).astype(np.int32)
            found |= signs << 31
            values = torch.from_numpy(found).view(torch.float32)
            first, last = int(where[0]), int(where[-1])
            if last - first + 1 == len(where):
                yield slice(first, last + 1), values
            else:
                yield torch.from_numpy(where), values

    def squared_norm(self) -> float:
        """Each product is exact in a double, and `fsum` rounds once."""
        uses = np.bincount(self.levels.reshape(-1), self.uses().reshape(-1), minlength=1)
        codes = np.flatnonzero(uses)
        levels = (codes << SHIFT).astype(np.int32).view(np.float32).tolist()
        return math.fsum(
            count * level**2 for count, level in zip(uses[codes].tolist(), levels, strict=True)
        )

    def to_bytes(self) -> bytes:
        count = _COUNT.pack(self.count)
        if not self.count:
            return count
        gaps = np.diff(self.marked.astype(np.int64), prepend=-1) - 1
        steps = np.diff(self.levels[:, 0], prepend=0)
        rises = np.diff(self.levels, axis=1)
        return b"".join(
            [
                count,
                write_integers(gaps),
                write_integers(np.where(steps < 0, -2 * steps - 1, 2 * steps)),
                write_integers(np.maximum(rises, 0).reshape(-1)),
                *(plane.tobytes() for plane in self.planes),
            ]
        )


class Update:
    """A decoded blob: what its author adds, tensor by tensor, still small in memory.

    A coordinate is touched if its value is not zero. Values come from integers, and sums from
    one multiplication and one addition, so that they have the same bits on every machine.
    """

    def __init__(
        self, header: Header, *, compression: tuple[int, int], schema: bytes,
        parts: Mapping[str, _Raw | _Coded], shapes: Mapping[str, torch.Size],
    ):  # fmt: skip
        self.header = header
        self.bits, self.chunk = compression
        self.schema = schema
        self.names = tuple(sorted(parts))
        self._parts = parts
        self._shapes = shapes

    def squared_norm(self, name: str) -> float:
        """The sum of the squares of all values, rounded once."""
        return self._parts[name].squared_norm()

    def add_to(self, name: str, into: Tensor, *, factor: float) -> None:
        """Add `factor` times the values to `into`, contiguous float32 on the CPU."""
        flat = _flat(into, self._shapes[name])
        if into.dtype != torch.float32:
            raise ValueError(f"{name}: float32 expected, not {into.dtype}")
        scale = torch.tensor(factor, dtype=torch.float32)
        for where, values in self._parts[name].pieces():
            step = values.mul_(scale)
            if isinstance(where, slice):
                flat[where].add_(step)
            else:
                flat[where] = flat[where].add_(step)

    def count_into(self, name: str, counts: Tensor) -> None:
        """Add one to `counts`, contiguous on the CPU, at each coordinate that is touched."""
        flat = _flat(counts, self._shapes[name])
        for where, _ in self._parts[name].pieces():
            flat[where] += 1

    def dense(self, name: str) -> Tensor:
        """The whole tensor in float32, zeros where nothing was sent."""
        whole = torch.zeros(self._shapes[name])
        for where, values in self._parts[name].pieces():
            whole.view(-1)[where] = values
        return whole


def encode(
    tensors: Mapping[str, Tensor], *, header: Header, compression: Compression
) -> bytes:
    """The blob of an update, of tensors in any float dtype.

    `decode` gives back what it says, at a small part of the cost. Raises ValueError for a value
    that is not finite.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    head = _head(header, compression.bits, compression.chunk, _schema_hash(shapes))
    bodies = []
    for name in sorted(tensors):
        flat = tensors[name].detach().to("cpu", torch.float32).reshape(-1).numpy()
        try:
            bodies.append(_encode(flat, compression).to_bytes())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return b"".join([head, *bodies])


def decode(blob: bytes, *, shapes: Mapping[str, torch.Size]) -> Update:
    """What a blob says of tensors of these shapes. Raises BlobError if it is not valid."""
    reader = Reader(blob)
    version, bits, chunk, hotkey, run, number, parent, schema = reader.unpack(_HEAD)
    if version != VERSION:
        raise BlobError(f"the version is {version!r}, not {VERSION!r}")
    if bits not in (1, 2, 3, 4):
        raise BlobError(f"{bits} bits for a value")
    if schema != _schema_hash(shapes):
        raise BlobError("the blob is of a model with other names or shapes")
    parts: dict[str, _Raw | _Coded] = {}
    for name in sorted(shapes):
        try:
            parts[name] = _decode(reader, math.prod(shapes[name]), chunk + 1, bits)
        except BlobError as error:
            raise BlobError(f"{name}: {error}") from None
    if reader.left:
        raise BlobError(f"{reader.left} bytes follow the last tensor")
    return Update(
        Header(hotkey, run, number, parent),
        compression=(bits, chunk + 1), schema=schema, parts=parts, shapes=dict(shapes),
    )  # fmt: skip


def serialize(update: Update) -> bytes:
    """The blob that an update was decoded from, written again from what it means."""
    head = _head(update.header, update.bits, update.chunk, update.schema)
    return b"".join([head, *(update._parts[name].to_bytes() for name in update.names)])


def _head(header: Header, bits: int, chunk: int, schema: bytes) -> bytes:
    return _HEAD.pack(
        VERSION, bits, chunk - 1, header.hotkey, header.run, header.round, header.parent, schema
    )


def _schema_hash(shapes: Mapping[str, torch.Size]) -> bytes:
    """Also refuses tensors whose coordinates do not fit in 31 bits."""
    for name, shape in shapes.items():
        if math.prod(shape) > LARGEST:
            raise ValueError(f"{name}: {math.prod(shape)} elements, at most {LARGEST} are possible")
    lines = [f"{name!r} {tuple(shapes[name])}\n" for name in sorted(shapes)]
    return hashlib.sha256("".join(lines).encode()).digest()[:8]


def _by_others(count: int, size: int) -> bool:
    """Whether the coordinates that are not kept are listed: they are fewer."""
    return 2 * count > size


def _flat(tensor: Tensor, shape: torch.Size) -> Tensor:
    if tensor.shape != shape:
        raise ValueError(f"shape {tuple(shape)} expected, not {tuple(tensor.shape)}")
    return tensor.view(-1)


def _encode(flat: NDArray[np.float32], compression: Compression) -> _Raw | _Coded:
    size, chunk = len(flat), compression.chunk
    if size < RAW_BELOW:
        if not np.isfinite(flat).all():
            raise ValueError("a value is not finite")
        return _Raw(flat + np.float32(0))  # a negative zero becomes a zero
    dense = size < chunk
    whole = size - size % chunk
    step = max(1, _PIECE // chunk) * chunk
    edges = [*range(0, whole, step), *((whole,) if whole < size else ()), size]
    levels_of: list[NDArray[np.int64]] = []
    kept_of, signs_of, numbers_of = [], [], []
    for start, stop in zip(edges, edges[1:], strict=False):
        rows = np.abs(flat[start:stop]).reshape(-1, min(chunk, stop - start))
        length = rows.shape[1]
        kept = _select(rows, length if dense else compression.kept(length))
        if not len(kept):
            continue
        counts = np.bincount(kept // length)
        magnitudes = rows.reshape(-1)[kept]
        levels, numbers = fit_levels(magnitudes, counts[counts > 0], 1 << (compression.bits - 1))
        kept += start
        levels_of.append(levels)
        kept_of.append(kept.astype(np.int32))
        signs_of.append(flat[kept] < 0)
        numbers_of.append(numbers)
    if not kept_of:
        nothing = np.zeros((0, 1 << (compression.bits - 1)), np.int64)
        return _Coded(size, chunk, 0, np.zeros(0, np.int32), nothing, ())
    marked = np.concatenate(kept_of)
    count = len(marked)
    if _by_others(count, size):
        others = np.ones(size, np.bool_)
        others[marked] = False
        marked = np.flatnonzero(others).astype(np.int32)
    numbers = np.concatenate(numbers_of)
    flags = [np.concatenate(signs_of)]
    flags += [(numbers >> bit) & 1 for bit in range(compression.bits - 1)]
    planes = tuple(np.frombuffer(pack(each), np.uint8) for each in flags)
    return _Coded(size, chunk, count, marked, np.concatenate(levels_of), planes)


def _select(rows: NDArray[np.float32], kept: int) -> NDArray[np.int64]:
    """Flat coordinates, in order, of the `kept` largest magnitudes of each row; zeros never.

    Of equal ones those that come first. Raises ValueError for a value that is not finite.
    """
    length = rows.shape[1]
    if not math.isfinite(rows.max()):
        raise ValueError("a value is not finite")
    least = np.zeros((len(rows), 1), np.float32)
    if kept < length:
        least = np.partition(rows, length - kept, axis=1)[:, length - kept, None]
    least = np.maximum(least, np.float32(SMALLEST))
    found = np.flatnonzero(rows >= least)
    if len(found) <= len(rows) * kept and kept == length:
        return found
    row = found // length
    if np.bincount(row, minlength=1).max() <= kept:
        return found
    tie = rows.reshape(-1)[found] == least[row, 0]
    ties = np.bincount(row, tie, minlength=len(rows)).astype(np.int64)
    above = np.bincount(row, ~tie, minlength=len(rows)).astype(np.int64)
    place = np.cumsum(tie) - (np.cumsum(ties) - ties)[row]
    return found[~tie | (place <= kept - above[row])]


def _decode(reader: Reader, size: int, chunk: int, bits: int) -> _Raw | _Coded:
    if size < RAW_BELOW:
        return _decode_raw(reader, size)
    (count,) = reader.unpack(_COUNT)
    width = 1 << (bits - 1)
    if not count:
        return _Coded(
            size, chunk, 0, np.zeros(0, np.int32), np.zeros((0, width), np.int64), ()
        )
    if count > size:
        raise BlobError(f"{count} values of {size} elements")
    if bits * packed_size(count) > reader.left:
        raise BlobError(f"the blob is truncated: {count} values in {reader.left} bytes")
    listed = size - count if _by_others(count, size) else count
    gaps = read_integers(reader, listed, most=size - listed)
    gaps += 1
    marked = (np.cumsum(gaps, out=gaps) - 1).astype(np.int32)
    del gaps
    chunks = _chunks_used(marked, size, chunk, count)
    levels = _decode_levels(reader, chunks, width)
    planes = tuple(reader.flags(count) for _ in range(bits))
    part = _Coded(size, chunk, count, marked, levels, planes)
    if not np.array_equal(part.uses() > 0, levels > 0):
        raise BlobError("a level is not used, or a value has none")
    return part


def _decode_raw(reader: Reader, size: int) -> _Raw:
    values = reader.take(4 * size).view("<f4").astype(np.float32)
    if not np.isfinite(values).all():
        raise BlobError("a value is not finite")
    if np.signbit(values[values == 0]).any():
        raise BlobError("a zero is negative")
    return _Raw(values)


def _chunks_used(marked: NDArray[np.int32], size: int, chunk: int, count: int) -> int:
    """How many chunks have values."""
    if not len(marked):
        return -(-size // chunk)
    chunk_of = marked // chunk
    ends = np.flatnonzero(np.diff(chunk_of, append=-1))
    if not _by_others(count, size):
        return len(ends)
    listed = np.diff(ends, prepend=-1)
    lengths = np.minimum(chunk, size - chunk_of[ends].astype(np.int64) * chunk)
    return -(-size // chunk) - int(np.count_nonzero(listed == lengths))


def _decode_levels(reader: Reader, chunks: int, width: int) -> NDArray[np.int64]:
    zigzag = read_integers(reader, chunks, most=2 * HIGHEST * chunks)
    rises = read_integers(reader, chunks * (width - 1), most=HIGHEST * chunks)
    rises = rises.reshape(chunks, width - 1)
    lowest = np.cumsum((zigzag >> 1) ^ -(zigzag & 1))
    levels = np.cumsum(np.column_stack([lowest, rises]), axis=1)
    if lowest.min() < LOWEST or levels[:, -1].max() > HIGHEST:
        raise BlobError("a level is out of range")
    absent = rises == 0
    if (absent[:, :-1] & ~absent[:, 1:]).any():
        raise BlobError("a level follows the last one")
    levels[:, 1:][absent] = 0
    return levels
