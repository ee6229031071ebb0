"""Encodes a peer's update of a round as a small blob, and decodes it.

A tensor is flattened and cut into chunks, and the values of largest magnitude in each are kept. A
blob holds, for each tensor, the coordinates that are kept, 2^(bits - 1) levels per chunk, and the
sign and the level number of each value.

    blob     version "HMU1", bits 1, chunk - 1 as 2 bytes, hotkey 32, run 8, round 4, parent 32,
             the schema's hash 8; then the tensors in the order of their names
    raw      fewer than 32 elements: float32, finite, no negative zero
    coded    count of values 4; gaps between the coordinates kept, or, past half of the tensor,
             between the others (none if dense); lowest level of each chunk with values, as the
             difference to the chunk before (zigzag); differences from level to level, 0 after
             the last; signs; numbers of the levels, lowest bit first

The encoder sends tensors of less than 32 elements raw and those smaller than a chunk dense; of all
others it keeps `density` of each chunk, at least one value. Zeros (and magnitudes below 2**-126,
which count as zeros) are never kept, so a tensor of zeros takes four bytes.

Integers are little-endian, lists of them Rice coded (see `bits`). An index takes 7.53 bits at
64 of 4096 evenly spread, 2.3% over log2 C(4096, 64) / 64 = 7.36; clustered ones take less.

Each update has a single valid encoding: `decode` refuses any other, so a blob cannot be changed
without changing its meaning. Nothing is allocated before the bytes for it have been seen: memory
and time are linear in the blob's length, whatever it claims.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hiveminer.strategies.sparseloco.bits import BlobError, Reader
from hiveminer.strategies.sparseloco.tensor import (
    Coded,
    Compression,
    Raw,
    decode_tensor,
    encode_tensor,
)

__all__ = ["BlobError", "Compression", "Header", "Update", "decode", "encode"]

VERSION = b"HMU1"
LARGEST = 2**31 - 1
"""Elements of a tensor, at most."""

_HEAD = struct.Struct("<4sBH32s8sI32s8s")
HEADER_BYTES = _HEAD.size


@dataclass(frozen=True)
class Header:
    """The author of an update, its run and round, and the state that it is based on."""

    hotkey: bytes
    run: bytes
    round: int
    parent: bytes


@dataclass(frozen=True)
class Update:
    """A decoded blob, still small in memory.

    A coordinate is touched if its value is not zero. Values are made from integers, and sums by
    one multiplication and one addition, so that the bits are the same on every machine.
    """

    header: Header
    parts: Mapping[str, Raw | Coded]
    shapes: Mapping[str, torch.Size]

    def squared_norm(self, name: str) -> float:
        """The sum of the squares of all values, rounded once."""
        return self.parts[name].squared_norm()

    def add_to(self, name: str, total: Tensor, counts: Tensor, *, factor: float) -> None:
        """Add `factor` times the values to `total`, and one to `counts` at each coordinate that is
        touched: float32 and integers, contiguous on the CPU."""
        sums, uses = total.view(-1), counts.view(-1)
        scale = torch.tensor(factor, dtype=torch.float32)
        for where, values in self.parts[name].pieces():
            there = _index(where)
            sums[there] = sums[there].add(values.mul_(scale))
            uses[there] += 1

    def dense(self, name: str) -> Tensor:
        """The whole tensor in float32, zeros where nothing was sent."""
        whole = torch.zeros(self.shapes[name])
        for where, values in self.parts[name].pieces():
            whole.view(-1)[_index(where)] = values
        return whole


def encode(tensors: Mapping[str, Tensor], *, header: Header, compression: Compression) -> bytes:
    """Encode an update; tensors of any float dtype.

    `decode` returns the values that were sent, at a fraction of the cost. Raises ValueError for a
    value that is not finite.
    """
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    parts = [
        _HEAD.pack(
            VERSION, compression.bits, compression.chunk - 1,
            header.hotkey, header.run, header.round, header.parent, _schema_hash(shapes),
        )
    ]  # fmt: skip
    for name in sorted(tensors):
        flat = tensors[name].detach().to("cpu", torch.float32).reshape(-1).numpy()
        try:
            parts.append(encode_tensor(flat, compression).to_bytes())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return b"".join(parts)


def decode(blob: bytes, *, shapes: Mapping[str, torch.Size], compression: Compression) -> Update:
    """Decode a blob for tensors of these shapes. Raises BlobError if it is not valid.

    A blob with other bits or chunks than `compression`, or with more values of a tensor than that
    keeps, is refused before it takes more memory than a regular one.
    """
    reader = Reader(blob)
    version, bits, chunk, hotkey, run, number, parent, schema = reader.unpack(_HEAD)
    if version != VERSION:
        raise BlobError(f"the version is {version!r}, not {VERSION!r}")
    if (bits, chunk + 1) != (compression.bits, compression.chunk):
        raise BlobError(f"{bits} bits and chunks of {chunk + 1} are not this run's")
    if schema != _schema_hash(shapes):
        raise BlobError("the blob is of a model with other names or shapes")
    parts: dict[str, Raw | Coded] = {}
    for name in sorted(shapes):
        try:
            parts[name] = decode_tensor(reader, math.prod(shapes[name]), compression)
        except BlobError as error:
            raise BlobError(f"{name}: {error}") from None
    if reader.left:
        raise BlobError(f"{reader.left} bytes follow the last tensor")
    return Update(Header(hotkey, run, number, parent), parts, shapes)


def _schema_hash(shapes: Mapping[str, torch.Size]) -> bytes:
    """Hash of names and shapes. Raises ValueError for a tensor of 2^31 elements or more."""
    for name, shape in shapes.items():
        if math.prod(shape) > LARGEST:
            raise ValueError(f"{name}: {math.prod(shape)} elements, at most {LARGEST} are possible")
    lines = [f"{name!r} {tuple(shapes[name])}\n" for name in sorted(shapes)]
    return hashlib.sha256("".join(lines).encode()).digest()[:8]


def _index(where: NDArray[np.int64]) -> slice | Tensor:
    """A slice if the coordinates have no gaps, which is much faster."""
    if len(where) and where[-1] - where[0] + 1 == len(where):
        return slice(int(where[0]), int(where[-1]) + 1)
    return torch.from_numpy(where)
