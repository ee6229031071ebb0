"""File locks that end with the process that holds them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import weakref
from pathlib import Path


class Held:
    """A file that this process has locked, until `release`."""

    def __init__(self, descriptor: int):
        self._descriptor: int | None = descriptor
        _all.add(self)

    def release(self) -> None:
        """Unlock it. Idempotent."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


_all: weakref.WeakSet[Held] = weakref.WeakSet()


def _drop_inherited() -> None:
    # A lock lives as long as any copy of its descriptor: a child that outlives its parent would
    # keep it. Closing the copy does not unlock the parent's.
    for held in list(_all):
        held.release()


os.register_at_fork(after_in_child=_drop_inherited)


def hold(file: Path) -> Held | str:
    """Lock the file, which is created if it is missing. If another process holds it: its pid, or
    "unknown". Raises OSError if the file cannot be opened."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip()
            return holder if holder.isdigit() else "unknown"
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        undo.pop_all()
    return Held(descriptor)
