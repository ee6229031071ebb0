"""One write at a time: concurrent calls of a hotkey would be signed with the same nonce."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator

from hiveminer.errors import ChainError


class Turns:
    """A lock that goes to urgent waiters first, and otherwise in order of arrival."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._waiting: set[tuple[int, int]] = set()
        self._taken = False

    @contextlib.contextmanager
    def take(self, *, urgent: bool = False, timeout_seconds: float) -> Iterator[None]:
        """Hold the lock during the body. Raises ChainError if it is not free in time."""
        with self._changed:
            ticket = (0 if urgent else 1, next(self._numbers))
            self._waiting.add(ticket)
            free = self._changed.wait_for(
                lambda: not self._taken and ticket == min(self._waiting), timeout_seconds
            )
            self._waiting.remove(ticket)
            if not free:
                self._changed.notify_all()
                raise ChainError(f"other calls of this hotkey took {timeout_seconds:g} s")
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._taken = False
                self._changed.notify_all()
