"""What a peer serves: the blobs of the last rounds, and the states that it holds."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Collection, Iterable

from hiveminer.strategies.sparseloco.apply import State
from hiveminer.strategies.sparseloco.log import Log
from hiveminer.strategies.sparseloco.pieces import Bytes, Piece, manifest_of, piece_bytes

SERVED_ROUNDS = 24
"""How long blobs are served: longer than any state on disk is older than them."""

DOWNLOAD_ROUNDS = SERVED_ROUNDS - 4
"""How long a state is served to who has begun to download it: with the blobs since, the state of
today follows from it."""

DOWNLOAD_PAUSE_SECONDS = 300.0
"""A download has ended if no part of the state was asked for in this time: a piece takes that long
on the slowest link that is served."""


class Shelf:
    """The blobs, read from the log, and the states, from memory, that the exchange serves.

    A blob is served only after `serve` was called for it: an author's own stays secret until the
    records' deadline is final. Besides the states of now, one older state is kept while somebody
    downloads it. Thread-safe.
    """

    def __init__(self, log: Log):
        self._log = log
        self._lock = threading.Lock()
        self._rounds: dict[int, dict[int, bytes]] = {}
        self._states: dict[bytes, State] = {}
        self._pieces: dict[bytes, tuple[bytes, Piece]] = {}
        """By hash, the state's hash and the piece."""
        self._asked_at: dict[bytes, float] = {}
        """When a part of a state was last asked for, by the state's hash."""
        self._older: tuple[bytes, int] | None = None
        """The older state's hash, and the round since which it is kept."""

    def serve(self, number: int, uid: int, digest: bytes) -> None:
        """Serve the blob that this uid recorded in this round."""
        with self._lock:
            self._rounds.setdefault(number, {})[uid] = digest
            for old in sorted(self._rounds)[:-SERVED_ROUNDS]:
                del self._rounds[old]

    def serve_states(self, states: Iterable[State]) -> None:
        """Serve these states, an older one that is being downloaded, and no others."""
        now = {state.hash(): state for state in states}
        with self._lock:
            self._states = now | self._downloaded(now)
            self._pieces = {
                piece.hash: (digest, piece)
                for digest, state in self._states.items()
                for piece in manifest_of(state).pieces
            }
            asked = self._asked_at.items()
            self._asked_at = {digest: at for digest, at in asked if digest in self._states}

    def _downloaded(self, now: Collection[bytes]) -> dict[bytes, State]:
        """The older state to keep, if any: the one that has been kept until now comes first."""
        newest, late = max(self._rounds, default=0), time.monotonic() - DOWNLOAD_PAUSE_SECONDS
        kept, since = self._older or (b"", newest)
        self._older = None
        for digest in sorted(self._states.keys() - set(now), key=lambda each: each != kept):
            began = since if digest == kept else newest
            is_asked = self._asked_at.get(digest, -math.inf) > late
            if is_asked and newest - began < DOWNLOAD_ROUNDS:
                self._older = digest, began
                return {digest: self._states[digest]}
        return {}

    def blobs(self) -> set[bytes]:
        """The hashes of all blobs that are served."""
        with self._lock:
            return {digest for blobs in self._rounds.values() for digest in blobs.values()}

    def have(self, number: int) -> frozenset[int]:
        """The uids whose blobs of this round are served."""
        with self._lock:
            return frozenset(self._rounds.get(number, ()))

    def get(self, digest: bytes) -> Bytes | None:
        """The bytes with this SHA-256, if they are served."""
        with self._lock:
            owner, piece = self._pieces.get(digest, (digest, None))
            state = self._states.get(owner)
            if state is not None:
                self._asked_at[owner] = time.monotonic()
            is_blob = any(digest in blobs.values() for blobs in self._rounds.values())
        if state is not None:
            return state.manifest if piece is None else piece_bytes(state, piece)
        return self._log.blob(digest) if is_blob else None
