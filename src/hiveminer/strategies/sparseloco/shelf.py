"""What a peer serves: the blobs of the last rounds, and the states that it holds."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from hiveminer.strategies.sparseloco.apply import State
from hiveminer.strategies.sparseloco.log import Log
from hiveminer.strategies.sparseloco.pieces import Bytes, Manifest, Piece, manifest_of, piece_bytes

SERVED_ROUNDS = 24
"""How long blobs are served: longer than any state on disk is older than them."""


class Shelf:
    """A `Source` for the exchange. Blobs are read from the log, states from memory.

    A blob is served only after `serve` was called for it: an author's own stays secret until the
    records' deadline is final. Thread-safe.
    """

    def __init__(self, log: Log):
        self._log = log
        self._lock = threading.Lock()
        self._rounds: dict[int, dict[int, bytes]] = {}
        self._states: dict[bytes, tuple[State, Manifest]] = {}
        self._pieces: dict[bytes, tuple[State, Piece]] = {}

    def serve(self, number: int, uid: int, digest: bytes) -> None:
        """Serve the blob that this uid recorded in this round."""
        with self._lock:
            self._rounds.setdefault(number, {})[uid] = digest
            for old in sorted(self._rounds)[:-SERVED_ROUNDS]:
                del self._rounds[old]

    def serve_states(self, states: Iterable[State]) -> None:
        """Serve these states, and no others."""
        known = {id(state): manifest for state, manifest in self._states.values()}
        served = [(state, known.get(id(state)) or manifest_of(state)) for state in states]
        with self._lock:
            self._states = {manifest.hash: (state, manifest) for state, manifest in served}
            self._pieces = {
                piece.hash: (state, piece)
                for state, manifest in served
                for piece in manifest.pieces
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
            return held[1].raw
        if place is not None:
            return piece_bytes(*place)
        return self._log.blob(digest) if is_blob else None
