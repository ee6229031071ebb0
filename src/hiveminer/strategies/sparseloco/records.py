"""Records and marks: the two commitments of a round, as the bytes that go on the chain.

An author commits a record of its blob, a validator a mark of the blobs that it has fetched and
checked. Integers are little-endian. Each type has a single encoding of fixed length, and every
byte string of that length and kind is valid.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

HASH_BYTES = 32
RUN_BYTES = 8
WITNESS_BYTES = 16
MAX_UIDS = 256
_UIDS = frozenset(range(MAX_UIDS))

RECORD_KIND = 0x11
"""First byte of a record: kind 1 in the high half, version 1 in the low half."""

MARK_KIND = 0x21
"""First byte of a mark: kind 2, version 1."""

_RECORD = struct.Struct("<B8sI32sI32s")
_MARK = struct.Struct("<B8sI32s32s16s")

RECORD_BYTES = _RECORD.size
MARK_BYTES = _MARK.size

MAX_ROUND = 2**32 - 1
MAX_BLOB_BYTES = 2**32 - 1


@dataclass(frozen=True)
class Record:
    """What an author commits before block D: which blob, for which round, on which state.

    run: see `run_prefix`. parent: hash of the newest state that the author holds. blob_bytes,
    blob_hash: length and SHA-256 of the blob. Raises ValueError for a field that cannot be
    encoded.
    """

    run: bytes
    round: int
    parent: bytes
    blob_bytes: int
    blob_hash: bytes

    def __post_init__(self) -> None:
        _check_length(run=(self.run, RUN_BYTES))
        _check_length(parent=(self.parent, HASH_BYTES), blob_hash=(self.blob_hash, HASH_BYTES))
        _check_range(round=(self.round, MAX_ROUND), blob_bytes=(self.blob_bytes, MAX_BLOB_BYTES))

    def encode(self) -> bytes:
        """The 81 bytes to commit."""
        return _RECORD.pack(
            RECORD_KIND, self.run, self.round, self.parent, self.blob_bytes, self.blob_hash
        )


@dataclass(frozen=True)
class Mark:
    """What a validator commits before block M: the state it holds and the blobs it vouches for.

    state: hash of the newest state that the validator holds. uids: the authors whose blobs it
    has fetched, found valid and within bounds, and serves. witness: see `witness`. Raises
    ValueError for a field that cannot be encoded.
    """

    run: bytes
    round: int
    state: bytes
    uids: frozenset[int]
    witness: bytes

    def __post_init__(self) -> None:
        _check_length(run=(self.run, RUN_BYTES), state=(self.state, HASH_BYTES))
        _check_length(witness=(self.witness, WITNESS_BYTES))
        _check_range(round=(self.round, MAX_ROUND))
        if not self.uids <= _UIDS:
            raise ValueError(f"uids must be from 0 to {MAX_UIDS - 1}: {sorted(self.uids)}")

    def encode(self) -> bytes:
        """The 93 bytes to commit."""
        return _MARK.pack(
            MARK_KIND, self.run, self.round, self.state, pack_uids(self.uids), self.witness
        )


def decode_record(raw: object) -> Record | None:
    """The record in a commitment; None for anything else. Never raises."""
    if not isinstance(raw, bytes) or len(raw) != RECORD_BYTES or raw[0] != RECORD_KIND:
        return None
    _, run, number, parent, blob_bytes, blob_hash = _RECORD.unpack(raw)
    return Record(run, number, parent, blob_bytes, blob_hash)


def decode_mark(raw: object) -> Mark | None:
    """The mark in a commitment; None for anything else. Never raises."""
    if not isinstance(raw, bytes) or len(raw) != MARK_BYTES or raw[0] != MARK_KIND:
        return None
    _, run, number, state, mask, evidence = _MARK.unpack(raw)
    return Mark(run, number, state, unpack_uids(mask), evidence)


def pack_uids(uids: Iterable[int]) -> bytes:
    """A 256-bit mask of uids, 32 bytes: uid u is bit u % 8 of byte u // 8."""
    mask = 0
    for uid in uids:
        mask |= 1 << uid
    return mask.to_bytes(MAX_UIDS // 8, "little")


def unpack_uids(mask: bytes) -> frozenset[int]:
    """The uids whose bit is set in a 32-byte mask."""
    return frozenset(
        8 * i + bit for i, byte in enumerate(mask) if byte for bit in range(8) if byte >> bit & 1
    )


def witness(hotkey: bytes, blobs: Mapping[int, bytes]) -> bytes:
    """16 bytes that only a holder of all the marked blobs can compute.

    The first half of SHA-256 over the validator's hotkey (32 bytes) and the marked blobs by
    ascending uid. It depends on the hotkey, so it cannot be copied from another mark. `blobs`
    may load them from disk: it is read one uid at a time.
    """
    _check_length(hotkey=(hotkey, HASH_BYTES))
    digest = hashlib.sha256(hotkey)
    for uid in sorted(blobs):
        digest.update(blobs[uid])
    return digest.digest()[:WITNESS_BYTES]


def run_prefix(run_id: str) -> bytes:
    """The 8 bytes by which records and marks name their run, from the whole run id."""
    return hashlib.sha256(run_id.encode()).digest()[:RUN_BYTES]


def _check_length(**fields: tuple[bytes, int]) -> None:
    for name, (value, length) in fields.items():
        if len(value) != length:
            raise ValueError(f"{name} must be {length} bytes: {value!r}")


def _check_range(**fields: tuple[int, int]) -> None:
    for name, (value, largest) in fields.items():
        if not 0 <= value <= largest:
            raise ValueError(f"{name} must be an integer from 0 to {largest}: {value!r}")
