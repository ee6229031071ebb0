"""Says where a thread stands that does not come back.

A hang writes nothing into the log by itself. Whoever begins something that has to end says
so here; what has not ended in its time is told once, with the calls that the thread is in.
It reads, and changes nothing: to interrupt a thread in somebody else's code would break
more than it mends. The looks cost a wake-up every few seconds, whatever is watched.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hiveminer.runtime.events import tell

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0

FRAMES = 10
"""Calls that a line names, the innermost first."""


@dataclass(eq=False)
class _Watched:
    what: str
    thread: int
    began: float
    limit_seconds: float
    told: bool = False


class Watchdog:
    """Watches over what threads have begun. Its own thread starts with the first."""

    def __init__(self, *, look_seconds: float = LOOK_SECONDS):
        self._look_seconds = look_seconds
        self._lock = threading.Lock()
        self._watched: list[_Watched] = []
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def watch(self, what: str, *, limit_seconds: float) -> Iterator[None]:
        """Around what this thread is to have done within `limit_seconds`.

        May stand within another of the same thread; between them they tell once.
        """
        watched = _Watched(what, threading.get_ident(), time.monotonic(), limit_seconds)
        with self._lock:
            self._watched.append(watched)
        self._start()
        try:
            yield
        finally:
            with self._lock:
                self._watched.remove(watched)
            if watched.told:
                took = time.monotonic() - watched.began
                logger.info("%s has ended after all, after %.0f s", what, took)

    def stop(self) -> None:
        """Look no more. Doing it again changes nothing."""
        self._stopping.set()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._look_again, name="watchdog", daemon=True)
            self._thread.start()

    def _look_again(self) -> None:
        while not self._stopping.wait(self._look_seconds):
            for late in self._late():
                seconds = time.monotonic() - late.began
                cause = f"{late.what} has not ended in {seconds:.0f} s; the thread stands in "
                tell(logger, "stall", cause + standing(late.thread))

    def _late(self) -> list[_Watched]:
        """What has outlasted its time and was not told yet: one of a thread."""
        now = time.monotonic()
        with self._lock:
            late = {}
            for each in self._watched:
                if now - each.began > each.limit_seconds and not each.told:
                    late[each.thread] = each
            for each in self._watched:
                each.told = each.told or each.thread in late
        return list(late.values())


def standing(thread: int) -> str:
    """The calls that a thread is in, the innermost first, in one line."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "nothing: it has ended"
    calls = [
        f"{'/'.join(Path(code.co_filename).parts[-2:])}:{line} {code.co_name}"
        for code, line in ((at.f_code, line) for at, line in traceback.walk_stack(frame))
    ]
    del frame  # or its locals would live as long as this call
    return " < ".join(calls[:FRAMES])
