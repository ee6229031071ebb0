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
MAX_UIDS = 256

RECORD_KIND = 0x11
"""First byte of a record: kind 1 in the high half, version 1 in the low half."""

MARK_KIND = 0x21
"""First byte of a mark: kind 2, version 1."""

_RECORD = struct.Struct("<B8sI32sI32s")
_MARK = struct.Struct("<B8sI32s32s16s")

MAX_BLOB_BYTES = 2**32 - 1


@dataclass(frozen=True)
class Record:
    """What an author commits before block D: which blob, for which round, on which state.

    run: see `run_prefix`. parent: hash of the newest state that the author holds. blob_bytes,
    blob_hash: length and SHA-256 of the blob.
    """

    run: bytes
    round: int
    parent: bytes
    blob_bytes: int
    blob_hash: bytes

    def encode(self) -> bytes:
        """The 81 bytes to commit."""
        return _RECORD.pack(
            RECORD_KIND, self.run, self.round, self.parent, self.blob_bytes, self.blob_hash
        )


@dataclass(frozen=True)
class Mark:
    """What a validator commits before block M: the state it holds and the blobs it vouches for.

    state: hash of the newest state that the validator holds. uids: the authors whose blobs it
    has fetched, found valid and within bounds, and serves. witness: see `witness`.
    """

    run: bytes
    round: int
    state: bytes
    uids: frozenset[int]
    witness: bytes

    def encode(self) -> bytes:
        """The 93 bytes to commit."""
        return _MARK.pack(
            MARK_KIND, self.run, self.round, self.state, pack_uids(self.uids), self.witness
        )


def decode_record(raw: object) -> Record | None:
    """The record in a commitment; None for anything else. Never raises."""
    if not isinstance(raw, bytes) or len(raw) != _RECORD.size or raw[0] != RECORD_KIND:
        return None
    _, run, number, parent, blob_bytes, blob_hash = _RECORD.unpack(raw)
    return Record(run, number, parent, blob_bytes, blob_hash)


def decode_mark(raw: object) -> Mark | None:
    """The mark in a commitment; None for anything else. Never raises."""
    if not isinstance(raw, bytes) or len(raw) != _MARK.size or raw[0] != MARK_KIND:
        return None
    _, run, number, state, mask, evidence = _MARK.unpack(raw)
    return Mark(run, number, state, unpack_uids(mask), evidence)


def pack_uids(uids: Iterable[int]) -> bytes:
    """A 256-bit mask of uids, 32 bytes: uid u is bit u % 8 of byte u // 8."""
    return sum(1 << uid for uid in set(uids)).to_bytes(MAX_UIDS // 8, "little")


def unpack_uids(mask: bytes) -> frozenset[int]:
    """The uids whose bit is set in a 32-byte mask."""
    number = int.from_bytes(mask, "little")
    return frozenset(uid for uid in range(MAX_UIDS) if number >> uid & 1)


def witness(hotkey: bytes, blobs: Mapping[int, bytes]) -> bytes:
    """16 bytes that only a holder of all the marked blobs can compute.

    The first half of SHA-256 over the validator's hotkey (32 bytes) and the marked blobs by
    ascending uid. It depends on the hotkey, so it cannot be copied from another mark. `blobs`
    may load them from disk: it is read one uid at a time.
    """
    digest = hashlib.sha256(hotkey)
    for uid in sorted(blobs):
        digest.update(blobs[uid])
    return digest.digest()[:16]


def run_prefix(run_id: str) -> bytes:
    """The 8 bytes by which records and marks name their run, from the whole run id."""
    return hashlib.sha256(run_id.encode()).digest()[:8]
