"""What a peer serves to others: blobs of the last rounds, and the states that it holds."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from hiveminer.strategies.sparseloco.apply import State
from hiveminer.strategies.sparseloco.log import Log
from hiveminer.strategies.sparseloco.pieces import Bytes, Piece, piece_bytes, read_manifest

SERVED_ROUNDS = 24
"""Blobs are served for as long as a state on disk may be older than they are, and some more."""


class Shelf:
    """A `Source` of the exchange. Blobs lie in the log, states in memory.

    A blob is not served before `serve` names it: an author's own stays secret until the
    records' deadline is final. Any thread may call.
    """

    def __init__(self, log: Log):
        self._log = log
        self._lock = threading.Lock()
        self._rounds: dict[int, dict[int, bytes]] = {}
        self._states: dict[bytes, tuple[State, bytes, tuple[Piece, ...]]] = {}
        self._pieces: dict[bytes, tuple[State, Piece]] = {}

    def serve(self, number: int, uid: int, digest: bytes) -> None:
        """From now on serve the blob that this uid recorded in this round."""
        with self._lock:
            self._rounds.setdefault(number, {})[uid] = digest
            for old in sorted(self._rounds)[:-SERVED_ROUNDS]:
                del self._rounds[old]

    def serve_states(self, states: Iterable[State]) -> None:
        """From now on serve these states and no others."""
        known = {id(state): digest for digest, (state, _, _) in self._states.items()}
        new: dict[bytes, tuple[State, bytes, tuple[Piece, ...]]] = {}
        for state in states:
            digest = known.get(id(state))
            if digest is not None:
                new[digest] = self._states[digest]
                continue
            raw = state.manifest()
            shapes = {name: value.shape for name, value in state.weights.items()}
            manifest = read_manifest(raw, shapes)
            new[manifest.hash] = (state, raw, manifest.pieces)
        with self._lock:
            self._states = new
            self._pieces = {
                piece.hash: (state, piece) for state, _, pieces in new.values() for piece in pieces
            }

    def blobs(self) -> set[bytes]:
        """The hashes of all blobs that are served."""
        with self._lock:
            return {digest for blobs in self._rounds.values() for digest in blobs.values()}

    def have(self, number: int) -> frozenset[int]:
        with self._lock:
            return frozenset(self._rounds.get(number, ()))

    def get(self, digest: bytes) -> Bytes | None:
        with self._lock:
            held = self._states.get(digest)
            place = self._pieces.get(digest)
            is_blob = any(digest in blobs.values() for blobs in self._rounds.values())
        if held is not None:
            return held[1]
        if place is not None:
            return piece_bytes(*place)
        return self._log.blob(digest) if is_blob else None
