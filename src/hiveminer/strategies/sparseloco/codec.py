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

__all__ = ["BlobError", "Compression", "Header", "Update", "decode", "encode", "serialize"]

VERSION = b"HMU1"
LARGEST = 2**31 - 1
"""Elements of a tensor, at most."""

_HEAD = struct.Struct("<4sBH32s8sI32s8s")


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


class Update:
    """A decoded blob: what its author adds, tensor by tensor, still small in memory.

    A coordinate is touched if its value is not zero. Values come from integers, and sums from
    one multiplication and one addition, so that they have the same bits on every machine.
    """

    def __init__(
        self, header: Header, *, compression: tuple[int, int], schema: bytes,
        parts: Mapping[str, Raw | Coded], shapes: Mapping[str, torch.Size],
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
            there = _index(where)
            flat[there] = flat[there].add(step)

    def count_into(self, name: str, counts: Tensor) -> None:
        """Add one to `counts`, contiguous on the CPU, at each coordinate that is touched."""
        flat = _flat(counts, self._shapes[name])
        for where in self._parts[name].kept():
            flat[_index(where)] += 1

    def dense(self, name: str) -> Tensor:
        """The whole tensor in float32, zeros where nothing was sent."""
        whole = torch.zeros(self._shapes[name])
        for where, values in self._parts[name].pieces():
            whole.view(-1)[_index(where)] = values
        return whole


def encode(tensors: Mapping[str, Tensor], *, header: Header, compression: Compression) -> bytes:
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
            bodies.append(encode_tensor(flat, compression).to_bytes())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return b"".join([head, *bodies])


def decode(
    blob: bytes, *, shapes: Mapping[str, torch.Size], compression: Compression | None = None
) -> Update:
    """What a blob says of tensors of these shapes. Raises BlobError if it is not valid.

    With `compression`, also a blob of other bits or chunks, or with more values than that
    keeps of a tensor, is refused, before it can take more memory than those that are usual.
    """
    reader = Reader(blob)
    version, bits, chunk, hotkey, run, number, parent, schema = reader.unpack(_HEAD)
    if version != VERSION:
        raise BlobError(f"the version is {version!r}, not {VERSION!r}")
    if bits not in (1, 2, 3, 4):
        raise BlobError(f"{bits} bits for a value")
    if compression and (bits, chunk + 1) != (compression.bits, compression.chunk):
        raise BlobError(f"{bits} bits and chunks of {chunk + 1} are not this run's")
    if schema != _schema_hash(shapes):
        raise BlobError("the blob is of a model with other names or shapes")
    parts: dict[str, Raw | Coded] = {}
    for name in sorted(shapes):
        try:
            size = math.prod(shapes[name])
            most = compression.kept_of_tensor(size) if compression else size
            parts[name] = decode_tensor(reader, size, chunk=chunk + 1, bits=bits, most=most)
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


def _flat(tensor: Tensor, shape: torch.Size) -> Tensor:
    if tensor.shape != shape:
        raise ValueError(f"shape {tuple(shape)} expected, not {tuple(tensor.shape)}")
    return tensor.view(-1)


def _index(where: NDArray[np.int64]) -> slice | Tensor:
    """A slice where the coordinates have no gap: much faster."""
    if len(where) and where[-1] - where[0] + 1 == len(where):
        return slice(int(where[0]), int(where[-1]) + 1)
    return torch.from_numpy(where)
