"""A state as bytes: a manifest, and pieces of at most 16 MiB whose hashes are in it.

A peer that downloads a state checks the manifest against the hash on the chain, and then each
piece against the manifest, so that a wrong byte is noticed within one piece.
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

from hiveminer.strategies.sparseloco.apply import (
    MANIFEST,
    PIECE_BYTES,
    State,
    manifest_head,
    tensor_bytes,
)
from hiveminer.strategies.sparseloco.records import HASH_BYTES

Bytes = bytes | memoryview


class StateError(ValueError):
    """The bytes are not the expected state; the message is one line."""


@dataclass(frozen=True)
class Piece:
    """`length` bytes of a tensor from `start` on."""

    name: str
    start: int
    length: int
    hash: bytes


@dataclass(frozen=True)
class Manifest:
    """A parsed manifest."""

    clip_norms: Mapping[str, float]
    pieces: tuple[Piece, ...]


def manifest_length(shapes: Mapping[str, torch.Size]) -> int:
    """Bytes of the manifest of any state with these shapes."""
    pieces = sum(-(-4 * math.prod(shape) // PIECE_BYTES) for shape in shapes.values())
    heads = sum(len(manifest_head(name, shape)) + 4 for name, shape in shapes.items())
    return len(MANIFEST) + heads + HASH_BYTES * pieces


def read_manifest(raw: bytes, shapes: Mapping[str, torch.Size]) -> Manifest:
    """Parse a manifest of a state with these shapes. Raises StateError for anything else."""
    if len(raw) != manifest_length(shapes) or not raw.startswith(MANIFEST):
        raise StateError("not the manifest of a state of this model")
    at = len(MANIFEST)
    clip_norms: dict[str, float] = {}
    pieces: list[Piece] = []
    for name in sorted(shapes):
        head = manifest_head(name, shapes[name])
        if raw[at : at + len(head)] != head:
            raise StateError(f"the manifest has another tensor instead of {name}")
        at += len(head)
        (clip_norms[name],) = struct.unpack_from("<f", raw, at)
        if not (math.isfinite(clip_norms[name]) and clip_norms[name] >= 0):
            raise StateError(f"{name}: a clip norm of {clip_norms[name]}")
        at += 4
        size = 4 * math.prod(shapes[name])
        for start in range(0, size, PIECE_BYTES):
            digest = raw[at : at + HASH_BYTES]
            pieces.append(Piece(name, start, min(PIECE_BYTES, size - start), digest))
            at += HASH_BYTES
    return Manifest(clip_norms, tuple(pieces))


def manifest_of(state: State) -> Manifest:
    """The manifest of a state that this machine holds."""
    shapes = {name: value.shape for name, value in state.weights.items()}
    return read_manifest(state.manifest, shapes)


def piece_bytes(state: State, piece: Piece) -> memoryview:
    return tensor_bytes(state.weights[piece.name])[piece.start : piece.start + piece.length]


class StateBuilder:
    """Assembles a state from its pieces, in any order."""

    def __init__(self, manifest: Manifest, shapes: Mapping[str, torch.Size]):
        self.manifest = manifest
        self._shapes = dict(shapes)
        self._missing = set(manifest.pieces)
        self._buffers: dict[str, NDArray[np.uint8]] = {
            name: np.empty(4 * math.prod(shape), np.uint8) for name, shape in shapes.items()
        }

    def add(self, piece: Piece, data: Bytes) -> None:
        """Add a piece. Raises StateError if its hash differs."""
        if len(data) != piece.length or hashlib.sha256(data).digest() != piece.hash:
            raise StateError(f"{piece.name}: the hash of a piece differs")
        place = self._buffers[piece.name][piece.start : piece.start + piece.length]
        place[:] = np.frombuffer(data, np.uint8)
        self._missing.discard(piece)

    def build(self) -> State:
        """The state. Raises StateError while a piece is missing."""
        if self._missing:
            raise StateError(f"{len(self._missing)} pieces are missing")
        weights = {}
        for name, shape in self._shapes.items():
            numbers = self._buffers[name].view("<f4").astype(np.float32, copy=False)
            weights[name] = torch.from_numpy(numbers).view(shape)
        return State(weights, self.manifest.clip_norms)
