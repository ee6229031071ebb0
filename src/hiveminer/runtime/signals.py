"""Ctrl-C, SIGTERM and SIGHUP: the first stops the program in order, the second at once.

A Python signal handler can interrupt anything in the main thread: a log line, a lock, a library's
start. So the handlers do nothing; the interpreter writes the signal's number into a pipe, and a
thread reads it, which may wait, lock and log, even while the main thread is in C code.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
import time
from typing import Any

import psutil

logger = logging.getLogger(__name__)

SAME_SECONDS = 0.2
"""One Ctrl-C can arrive twice: for the process, and for its group."""

SHUTDOWN_SECONDS = 8.0
"""The program is killed this long after the first signal, unless `allow` gave it more time."""

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

CLOSED = 0
"""The end of the pipe; not a signal's number."""


class Signals:
    """Handles the signals of this process between `take` and `give_back`.

    stopping: set at the first signal. Does nothing outside the main thread, where Python does
    not allow it.
    """

    def __init__(self, stopping: threading.Event):
        self.stopping = stopping
        self._deadline = 0.0
        self._old: dict[int, Any] = {}
        self._write: int | None = None
        self._old_wakeup = -1

    def take(self) -> None:
        """Install the handlers. Idempotent."""
        if threading.current_thread() is not threading.main_thread() or self._write is not None:
            return
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in NUMBERS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # started with nohup
            self._old[number] = signal.signal(number, lambda _number, _frame: None)
        threading.Thread(target=self._watch, args=(read,), name="signals", daemon=True).start()

    def give_back(self) -> None:
        """Restore the previous handlers."""
        if self._write is None:
            return
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._write)  # ends the thread
        self._write = None

    def allow(self, seconds: float) -> None:
        """Allow the shutdown this many seconds from now."""
        self._deadline = max(self._deadline, time.monotonic() + seconds)

    def _watch(self, read: int) -> None:
        try:
            while (first := _next(read, None)) is None:
                pass
            if first == CLOSED:
                return
            logger.info("stopping (%s); once more to end at once", signal.Signals(first).name)
            self.stopping.set()
            began = time.monotonic()
            self.allow(SHUTDOWN_SECONDS)
            while (left := self._deadline - time.monotonic()) > 0:
                number = _next(read, left)
                if number == CLOSED:
                    return
                if number is not None and time.monotonic() - began > SAME_SECONDS:
                    end_at_once(128 + number)
            logger.error("still not stopped after %.0f seconds: ending", time.monotonic() - began)
            end_at_once(128 + first)
        finally:
            os.close(read)


def _next(read: int, timeout_seconds: float | None) -> int | None:
    """The next signal in the pipe; CLOSED at its end, None after the timeout or for a signal that
    is not ours."""
    if not select.select([read], [], [], timeout_seconds)[0]:
        return None
    said = os.read(read, 1)
    number = said[0] if said else CLOSED
    return number if number in (*NUMBERS, CLOSED) else None


def end_at_once(code: int) -> None:
    """Kill our children and exit. torch's shared-memory manager ends by itself, after cleanup."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.name() != "torch_shm_manager":
                child.kill()
    os._exit(code)
