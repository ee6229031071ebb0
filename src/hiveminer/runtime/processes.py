"""Which threads and processes are alive, and what those that ended have left behind."""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path

import psutil

from hiveminer.errors import HiveminerError

SHARED_MEMORY = Path("/dev/shm")


def require_alive(*threads: threading.Thread | None) -> None:
    """Raise HiveminerError when one of these threads has ended."""
    for thread in threads:
        if thread is not None and not thread.is_alive():
            raise HiveminerError(
                f"the thread {thread.name!r} has died; start again, and report the traceback in "
                "the log"
            )


def lives(process: psutil.Process) -> bool:
    """Whether it is running; a zombie is not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_dead(number: str) -> bool:
    """Whether no process has this pid, given as text from a file's name."""
    try:
        return number.isdecimal() and not lives(psutil.Process(int(number)))
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def left_behind(pids: Collection[int]) -> list[str]:
    """Which of these processes are alive, and which of their shared memory still exists."""
    left = [f"process {pid}" for pid in sorted(pids) if not is_dead(str(pid))]
    numbers = {str(pid) for pid in pids}
    memory = SHARED_MEMORY.glob("torch_*_*")
    return left + [str(path) for path in memory if path.name.split("_")[1] in numbers]
