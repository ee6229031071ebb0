"""Bits of a blob: packed flags and Rice-coded integers, each with exactly one encoding.

Integers are Rice coded (R. F. Rice, 1979): the quotient by 2**parameter in unary, the remainder
in `parameter` bits. All unary codes come first and the remainders follow as bit planes, so that
both directions are a handful of array operations.

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
"""Eight flags a byte, the first in the lowest bit; the padding is zero."""

_STREAM = struct.Struct("<BI")  # Rice parameter, bytes of unary code


class BlobError(ValueError):
    """The bytes are not a valid blob; the message is one line that says why."""


class Reader:
    """Takes bytes off the front of a blob, and never more than there are."""

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


def write_integers(values: NDArray[np.int64]) -> bytes:
    """Rice code of integers >= 0; nothing for none."""
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


def read_integers(reader: Reader, count: int, *, most: int) -> NDArray[np.int64]:
    """`count` integers >= 0, the sum of which is at most `most`. Raises BlobError."""
    if not count:
        return np.zeros(0, np.int64)
    parameter, size = reader.unpack(_STREAM)
    # A larger parameter is never the best one for a sum within `most`.
    if parameter and (parameter > 40 or count << (parameter - 1) >= most):
        raise BlobError(f"a Rice parameter of {parameter} is out of range")
    if not packed_size(count) <= size <= packed_size(3 * count):
        raise BlobError(f"{size} bytes of unary code for {count} integers")
    planes_at = parameter * packed_size(count)
    if size + planes_at > reader.left:
        raise BlobError("the blob is truncated inside a list of integers")
    coded = reader.take(size)
    unary = np.unpackbits(coded, bitorder="little")
    if np.count_nonzero(unary) != count or not coded[-1]:
        raise BlobError(f"the unary code is not that of {count} integers")
    values = np.diff(np.flatnonzero(unary), prepend=-1) - 1
    del unary
    values <<= parameter
    for bit in range(parameter):
        values |= unpack(reader.flags(count), 0, count).astype(np.int64) << bit
    if int(values.sum()) > most:
        raise BlobError(f"integers add up to more than {most}")
    if _gain(values, parameter) > count or (
        parameter and _gain(values, parameter - 1) <= count
    ):
        raise BlobError(f"{parameter} is not the shortest Rice parameter")
    return values


def _gain(values: NDArray[np.int64], parameter: int) -> int:
    """Unary bits that the next parameter saves; it costs one bit for each value."""
    return int((((values >> parameter) + 1) >> 1).sum())
