"""Packed flags and Rice-coded integers, each with exactly one valid encoding.

Integers are Rice coded (R. F. Rice, 1979): the quotient by 2**parameter in unary, the remainder
in `parameter` bits. All unary codes come first, and the remainders follow as bit planes, so that
encoding and decoding take a handful of array operations.

Only the parameter that makes the code shortest is valid. A code therefore takes between
`count` and 3 `count` unary bits, which bounds what a hostile length can claim before anything
is allocated.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

Packed = NDArray[np.uint8]
"""Eight flags per byte, the first in the lowest bit; the padding is zero."""

PIECE = 1 << 18
"""Values to expand at a time."""
MOST = 2**30
"""Limit of integers in a list."""

_STREAM = struct.Struct("<BI")  # Rice parameter, bytes of unary code


class BlobError(ValueError):
    """The bytes are not a valid blob; the message is one line that says why."""


class Reader:
    """Reads a blob from its front, and never past its end."""

    def __init__(self, blob: bytes):
        self._bytes = np.frombuffer(blob, np.uint8)
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._bytes) - self._at

    def take(self, length: int) -> Packed:
        """The next bytes, as a view. Raises BlobError when there are fewer."""
        if length > self.left:
            raise BlobError(f"the blob is truncated: {length} bytes expected, {self.left} left")
        self._at += length
        return self._bytes[self._at - length : self._at]

    def unpack(self, form: struct.Struct) -> tuple[Any, ...]:
        return form.unpack(self.take(form.size).tobytes())

    def flags(self, count: int) -> Packed:
        """The next `count` flags, still packed. Raises BlobError for padding that is not zero."""
        packed = self.take(packed_size(count))
        if count % 8 and packed[-1] >> (count % 8):
            raise BlobError("padding bits are not zero")
        return packed


def packed_size(count: int) -> int:
    return (count + 7) // 8


def pack(flags: NDArray[Any]) -> bytes:
    return np.packbits(flags, bitorder="little").tobytes()


def unpack(packed: Packed, start: int, stop: int) -> NDArray[np.uint8]:
    """Flags `start` to `stop` as zeros and ones."""
    first = start // 8
    flags = np.unpackbits(packed[first : packed_size(stop)], bitorder="little")
    return flags[start - 8 * first : stop - 8 * first]


def write_integers(values: NDArray[Any]) -> bytes:
    """Rice code of integers >= 0; no bytes for an empty list."""
    if not len(values):
        return b""
    parameter = 0
    while _gain(values, parameter) > len(values):
        parameter += 1
    ends = np.cumsum((values >> parameter) + 1)
    unary = np.zeros(int(ends[-1]), np.bool_)
    unary[ends - 1] = True
    coded = pack(unary)
    planes = [pack((values >> bit) & 1) for bit in range(parameter)]
    return b"".join([_STREAM.pack(parameter, len(coded)), coded, *planes])


def read_integers(reader: Reader, count: int, *, largest: int) -> NDArray[np.uint32]:
    """`count` integers from 0 to `largest`, itself below 2**31. Raises BlobError."""
    if not count:
        return np.zeros(0, np.uint32)
    parameter, size = reader.unpack(_STREAM)
    if parameter and (parameter > 32 or 1 << (parameter - 1) >= largest):
        raise BlobError(f"a Rice parameter of {parameter} is out of range")
    if count > MOST or not packed_size(count) <= size <= packed_size(3 * count):
        raise BlobError(f"{size} bytes of unary code for {count} integers")
    if size + parameter * packed_size(count) > reader.left:
        raise BlobError("the blob is truncated inside a list of integers")
    values = _read_unary(reader.take(size), count)
    if int(values.max()) << parameter > largest:
        raise BlobError(f"an integer is above {largest}")
    values <<= np.uint32(parameter)
    for bit in range(parameter):
        plane = reader.flags(count)
        for start in range(0, count, PIECE):
            part = values[start : start + PIECE]
            part |= unpack(plane, start, start + len(part)).astype(np.uint32) << np.uint32(bit)
    if int(values.max()) > largest:
        raise BlobError(f"an integer is above {largest}")
    if _gain(values, parameter) > count or (parameter and _gain(values, parameter - 1) <= count):
        raise BlobError(f"{parameter} is not the shortest Rice parameter")
    return values


def _read_unary(coded: Packed, count: int) -> NDArray[np.uint32]:
    """The zeros before each of `count` ones; the last one must be in the last byte."""
    ends = np.empty(count, np.uint32)
    done = 0
    for start in range(0, len(coded), PIECE // 8):
        flags = np.unpackbits(coded[start : start + PIECE // 8], bitorder="little")
        ones = np.flatnonzero(flags)
        if done + len(ones) > count:
            break
        ends[done : done + len(ones)] = ones + 8 * start
        done += len(ones)
    else:
        if done == count and coded[-1]:
            ends[1:] -= ends[:-1].copy()
            ends[1:] -= np.uint32(1)
            return ends
    raise BlobError(f"the unary code is not that of {count} integers")


def _gain(values: NDArray[Any], parameter: int) -> int:
    """Unary bits that the next parameter saves; it costs one bit per value."""
    parts = (values[start : start + PIECE] for start in range(0, len(values), PIECE))
    shift = values.dtype.type(parameter)
    return sum(int(((part >> shift) + 1 >> 1).sum()) for part in parts)
