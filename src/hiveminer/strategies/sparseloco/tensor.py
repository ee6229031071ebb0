"""One tensor of a blob: selects its values, encodes them, and decodes them."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hiveminer.strategies.sparseloco.bits import (
    PIECE,
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

RAW_BELOW = 32
"""Tensors with fewer elements are sent uncompressed."""

_COUNT = struct.Struct("<I")


@dataclass(frozen=True)
class Compression:
    """Keeps the share `density` of the values of each `chunk` (1 to 65536), with `bits` (1 to 4)
    per value."""

    density: float
    bits: int
    chunk: int = 4096

    def __post_init__(self) -> None:  # it may come from somebody's log
        if not (0 < self.density <= 1 and 1 <= self.bits <= 4 and 1 <= self.chunk <= 2**16):
            raise ValueError(f"there is no such compression: {self}")

    def kept(self, size: int) -> int:
        """Values to keep of a chunk of `size` elements; fewer if some of them are zero."""
        return max(1, round(self.density * size))

    def kept_of_tensor(self, size: int) -> int:
        """The same for a tensor, which is dense if it is smaller than a chunk."""
        if size < self.chunk:
            return size
        rest = size % self.chunk
        return size // self.chunk * self.kept(self.chunk) + (self.kept(rest) if rest else 0)


@dataclass(frozen=True)
class Raw:
    values: NDArray[np.float32]

    def pieces(self) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        where = np.flatnonzero(self.values)
        yield where, torch.from_numpy(self.values[where])

    def squared_norm(self) -> float:
        return math.fsum(value * value for value in self.values.tolist())

    def to_bytes(self) -> bytes:
        return self.values.astype("<f4").tobytes()


@dataclass(frozen=True)
class Coded:
    """A tensor as it is sent; values are in the order of their coordinates.

    `marked` are the coordinates kept or, if those are more than half, the others. `levels` has
    a row for each chunk with values; `planes` are the signs and the bits of the level numbers.
    """

    size: int
    chunk: int
    count: int
    marked: NDArray[np.int32]
    levels: NDArray[np.uint16]
    planes: tuple[Packed, ...]

    def cells(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], int]]:
        """In pieces: coordinates, the cell of `levels` of each value, and the number of the
        first value."""
        width = self.levels.shape[1]
        done = 0
        for where, row in _rows(self.marked, count=self.count, size=self.size, chunk=self.chunk):
            cell = row * width
            for bit, plane in enumerate(self.planes[1:]):
                cell += unpack(plane, done, done + len(where)).astype(np.int64) << bit
            yield where, cell, done
            done += len(where)

    def uses(self) -> NDArray[np.int32]:
        """Number of values at each level, int32[chunks, levels]."""
        uses = np.zeros(self.levels.size, np.int32)
        width = self.levels.shape[1]
        for _, cell, _ in self.cells():
            first = int(cell[0]) // width * width
            part = np.bincount(cell - first).astype(np.int32)
            uses[first : first + len(part)] += part
        return uses.reshape(self.levels.shape)

    def pieces(self) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Coordinates, each once, and their values in float32."""
        table = self.levels.reshape(-1).astype(np.int32) << SHIFT
        for where, cell, done in self.cells():
            signs = unpack(self.planes[0], done, done + len(where)).astype(np.int32)
            found = table[cell] | signs << 31
            yield where, torch.from_numpy(found).view(torch.float32)

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
        gaps = np.diff(self.marked, prepend=np.int32(-1)) - 1
        levels = self.levels.astype(np.int32)
        steps = np.diff(levels[:, 0], prepend=np.int32(0))
        rises = np.diff(levels, axis=1)
        return b"".join(
            [
                count,
                write_integers(gaps),
                write_integers(np.where(steps < 0, -2 * steps - 1, 2 * steps)),
                write_integers(np.maximum(rises, 0).reshape(-1)),
                *(plane.tobytes() for plane in self.planes),
            ]
        )


def encode_tensor(flat: NDArray[np.float32], compression: Compression) -> Raw | Coded:
    size, chunk = len(flat), compression.chunk
    if size < RAW_BELOW:
        if not np.isfinite(flat).all():
            raise ValueError("a value is not finite")
        return Raw(flat + np.float32(0))  # a negative zero becomes a zero
    dense = size < chunk
    whole = size - size % chunk
    step = max(1, PIECE // chunk) * chunk
    edges = [*range(0, whole, step), *((whole,) if whole < size else ()), size]
    levels_of: list[NDArray[np.uint16]] = []
    kept_of, signs_of, numbers_of = [], [], []
    for start, stop in pairwise(edges):
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
        return _nothing(size, compression)
    marked = np.concatenate(kept_of)
    count = len(marked)
    if _by_others(count, size):
        others = np.ones(size, np.bool_)
        others[marked] = False
        marked = np.flatnonzero(others).astype(np.int32)
    numbers = np.concatenate(numbers_of)
    packed = [pack(np.concatenate(signs_of))]
    packed += [pack((numbers >> bit) & 1) for bit in range(compression.bits - 1)]
    planes = tuple(np.frombuffer(each, np.uint8) for each in packed)
    return Coded(size, chunk, count, marked, np.concatenate(levels_of), planes)


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
    if kept == length:
        return found
    row = found // length
    if np.bincount(row, minlength=1).max() <= kept:
        return found
    tie = rows.reshape(-1)[found] == least[row, 0]
    ties = np.bincount(row, tie, minlength=len(rows)).astype(np.int64)
    above = np.bincount(row, ~tie, minlength=len(rows)).astype(np.int64)
    place = np.cumsum(tie) - (np.cumsum(ties) - ties)[row]
    chosen: NDArray[np.int64] = found[~tie | (place <= kept - above[row])]
    return chosen


def _nothing(size: int, compression: Compression) -> Coded:
    levels = np.zeros((0, 1 << (compression.bits - 1)), np.uint16)
    return Coded(size, compression.chunk, 0, np.zeros(0, np.int32), levels, ())


def decode_tensor(reader: Reader, size: int, compression: Compression) -> Raw | Coded:
    if size < RAW_BELOW:
        return _decode_raw(reader, size)
    (count,) = reader.unpack(_COUNT)
    if not count:
        return _nothing(size, compression)
    most, chunk, bits = compression.kept_of_tensor(size), compression.chunk, compression.bits
    if count > most:
        raise BlobError(f"{count} values, of {size} elements at most {most} are sent")
    if bits * packed_size(count) > reader.left:
        raise BlobError(f"the blob is truncated: {count} values in {reader.left} bytes")
    marked = _decode_marked(reader, size - count if _by_others(count, size) else count, size)
    last = 0
    for _, row in _rows(marked, count=count, size=size, chunk=chunk):
        last = int(row[-1])
    levels = _decode_levels(reader, last + 1, 1 << (bits - 1))
    planes = tuple(reader.flags(count) for _ in range(bits))
    part = Coded(size, chunk, count, marked, levels, planes)
    if not np.array_equal(part.uses() > 0, levels > 0):
        raise BlobError("a level is not used, or a value has none")
    return part


def _decode_raw(reader: Reader, size: int) -> Raw:
    values = reader.take(4 * size).view("<f4").astype(np.float32)
    if not np.isfinite(values).all():
        raise BlobError("a value is not finite")
    if np.signbit(values[values == 0]).any():
        raise BlobError("a zero is negative")
    return Raw(values)


def _decode_marked(reader: Reader, listed: int, size: int) -> NDArray[np.int32]:
    gaps = read_integers(reader, listed, largest=size - listed)
    if int(gaps.sum(dtype=np.uint64)) > size - listed:
        raise BlobError("a coordinate is past the end")
    gaps += np.uint32(1)
    np.cumsum(gaps, out=gaps)
    gaps -= np.uint32(1)
    return gaps.view(np.int32)


def _rows(
    marked: NDArray[np.int32], *, count: int, size: int, chunk: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The coordinates of the values, in pieces, and the place of each one's chunk among the chunks
    that have values."""
    row, before = -1, -1
    for where in _coordinates(marked, count=count, size=size):
        chunk_of = where // chunk
        rows = row + np.cumsum(np.diff(chunk_of, prepend=before) != 0)
        row, before = int(rows[-1]), int(chunk_of[-1])
        yield where, rows


def _decode_levels(reader: Reader, chunks: int, width: int) -> NDArray[np.uint16]:
    zigzag = read_integers(reader, chunks, largest=2 * HIGHEST).astype(np.int32)
    rises = read_integers(reader, chunks * (width - 1), largest=HIGHEST).astype(np.uint16)
    rises = rises.reshape(chunks, width - 1)
    absent = rises == 0
    if (absent[:, :-1] & ~absent[:, 1:]).any():
        raise BlobError("a level follows the last one")
    lowest = np.cumsum((zigzag >> 1) ^ -(zigzag & 1), dtype=np.int64)
    top = lowest + rises.sum(axis=1, dtype=np.int64)
    if lowest.min() < LOWEST or top.max() > HIGHEST:
        raise BlobError("a level is out of range")
    levels = np.column_stack([lowest.astype(np.uint16), rises])
    np.cumsum(levels, axis=1, out=levels)
    levels[:, 1:][absent] = 0
    return levels


def _coordinates(
    marked: NDArray[np.int32], *, count: int, size: int
) -> Iterator[NDArray[np.int64]]:
    """The coordinates of `count` values, in pieces that are never empty."""
    if not _by_others(count, size):
        for start in range(0, count, PIECE):
            yield marked[start : start + PIECE].astype(np.int64)
        return
    for start in range(0, size, PIECE):
        stop = min(start + PIECE, size)
        first, last = np.searchsorted(marked, np.array([start, stop], np.int32))
        here = np.arange(start, stop)
        if first < last:
            chosen = np.ones(len(here), np.bool_)
            chosen[marked[first:last] - start] = False
            here = here[chosen]
        if len(here):
            yield here


def _by_others(count: int, size: int) -> bool:
    """Whether the coordinates that are not kept are listed: they are fewer."""
    return 2 * count > size
