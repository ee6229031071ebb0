"""Hivemind's processes: how they start, end with their parent, and are watched.

Hivemind forks the DHT node (which starts the libp2p daemon) and the averager. By themselves they
would outlive a parent that was killed, keep its ports, and get the terminal's Ctrl-C. So each
leads its own process group, which includes the daemon, watches its parent, and ends with the
whole group. Leftover files are removed when the next peer starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import multiprocessing.util
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from hivemind.utils.logging import use_hivemind_log_handler

from hiveminer.errors import OperatorError, SwarmError
from hiveminer.runtime.processes import SHARED_MEMORY, is_dead, lives
from hiveminer.runtime.signals import NUMBERS

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5

DAEMON = "p2pd"
"""The libp2p daemon's name among processes."""


def log_to_root() -> None:
    """Send Hivemind's log lines to the root logger."""
    use_hivemind_log_handler("nowhere")
    logging.addLevelName(logging.WARNING, "WARNING")  # hivemind has shortened it for everybody
    logging.getLogger("hivemind.dht.dht").addFilter(_has_sender)


def _has_sender(record: logging.LogRecord) -> bool:
    """False for the DHT's errors about messages whose sender has ended, as at each shutdown."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, FileNotFoundError | ConnectionError | EOFError)


def before_fork() -> None:
    """Exclude all existing objects from garbage collection: it writes into each object, and so
    would copy every page that parent and child share, more than 110 MB."""
    gc.collect()
    gc.freeze()


SHARED_MARGIN_BYTES = 2**20
"""Shared memory besides the averaged tensors, for the state of Hivemind's futures."""


def require_shared_memory(parameters: int, *, folder: Path = SHARED_MEMORY) -> None:
    """Raise OperatorError when a model of this size cannot be averaged on this machine.

    The averager keeps the model in shared memory in 32 bits. When that runs out, the system kills
    the process.
    """
    needed = 4 * parameters + SHARED_MARGIN_BYTES
    try:
        free = shutil.disk_usage(folder).free
    except OSError:  # no such folder: this system has no limit of its own
        return
    if free < needed:
        raise OperatorError(
            f"shared memory: {folder} has {free / 1e6:.1f} MB free, and the model needs "
            f"{needed / 1e6:.1f} MB; make it larger (docker run --shm-size)"
        )


@functools.cache
def start_shared_memory() -> None:
    """Start torch's shared-memory manager with signals blocked: one that interrupts torch here
    makes it loop forever with the interpreter's lock held."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
    try:
        torch.zeros(1).share_memory_()  # type: ignore[no-untyped-call]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def mark_temporary_folder() -> None:
    """Mark multiprocessing's folder as ours: Python removes it at an ordinary end, `sweep` after
    any other."""
    folder = Path(multiprocessing.util.get_temp_dir())
    (folder / f"hiveminer-{os.getpid()}").touch()


def detach_from_parent(parent: int) -> None:
    """Call first in a forked process: lead a new process group, and end it with the parent.

    parent: its pid, taken before the fork, so that one that is already dead is noticed.
    """
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)  # it was the parent's
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda _number, _frame: _end())
    threading.Thread(target=_end_with, args=(parent,), name="watch-parent", daemon=True).start()


def _end_with(parent: int) -> None:
    """Kill this process group once it has another parent."""
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    _end()


def _end() -> None:
    """Kill the whole process group at once, which also covers a daemon that is still starting.
    torch's shared-memory manager leads its own group: it cleans up once its users are gone."""
    os.killpg(os.getpgrp(), signal.SIGKILL)


LASTING_TASKS = {
    "_declare_for_download_periodically": "that declares this peer as a donor",
    "_read_from_persistent_conn": "that reads the libp2p daemon's answers",
    "_write_to_persistent_conn": "that calls the libp2p daemon",
    "_read_outputs": "that reads the libp2p daemon's log",
    "listen": "that takes other peers' calls",
}
"""Hivemind's asyncio tasks that run as long as their process, by the name of their coroutine."""


def guard_tasks(p2p: Any, *, end: Callable[[], None] = _end) -> None:
    """End this process when one of Hivemind's lasting tasks in it dies; to be called in its event
    loop.

    Nothing else would: asyncio keeps the exception of a task that nobody awaits, and the process
    would live on without it, deaf to its daemon for instance.
    """
    control = p2p._client.control
    control._pending_calls = _PendingCalls(control._pending_calls)
    for task in asyncio.all_tasks():
        what = LASTING_TASKS.get(getattr(task.get_coro(), "__name__", ""))
        if what is not None:
            task.add_done_callback(functools.partial(_end_without, what, end))


def _end_without(what: str, end: Callable[[], None], task: asyncio.Task[Any]) -> None:
    if task.cancelled() or task.exception() is None:  # at the end of the process, or its daemon's
        return
    logger.critical("Hivemind's task %s has died", what, exc_info=task.exception())
    end()


class _PendingCalls(dict[Any, Any]):
    """The calls of a libp2p daemon that can still take an answer.

    The reader of all answers dies of one to a call that was cancelled in the same turn of the
    event loop, which is what a timeout does on a busy machine.
    """

    def __contains__(self, key: object) -> bool:
        call = self.get(key)
        return call is not None and not call.done()


class ChildProcesses:
    """The processes and threads that a peer needs. Nothing else would report that one has died,
    and training would continue alone."""

    def __init__(self) -> None:
        self._watched: dict[str, psutil.Process] = {}
        self._threads: dict[str, threading.Thread] = {}

    def watch_thread(self, name: str, thread: threading.Thread) -> None:
        """Watch a thread that must not end."""
        self._threads[name] = thread

    def watch(self, name: str, process: int) -> None:
        """Watch a child, by its pid, and its daemon if it has one."""
        with contextlib.suppress(psutil.Error):
            self._watched[name] = psutil.Process(process)
            for child in self._watched[name].children():
                if child.name() == DAEMON:
                    self._watched[f"the libp2p daemon of {name}"] = child

    def lost(self) -> list[str]:
        """The names of those that have ended."""
        return [name for name, process in self._watched.items() if not lives(process)]

    def check(self) -> None:
        """Raise SwarmError when one has ended."""
        for name, thread in self._threads.items():
            if not thread.is_alive():
                raise SwarmError(
                    f"the thread of {name} has died, and without it there is no swarm; start "
                    "again, and report the traceback in the log"
                )
        lost = self.lost()
        if lost:
            raise SwarmError(
                f"{' and '.join(lost)} has ended, and without it there is no swarm; the log says "
                "why, or the system has ended it for lack of memory: see dmesg, and start again"
            )

    def end(self) -> None:
        """Kill those that are still alive."""
        for process in self._watched.values():
            with contextlib.suppress(psutil.Error):
                process.kill()


def open_sockets(table: Path = Path("/proc/net/unix")) -> set[str] | None:
    """Paths of the open Unix sockets on this machine; None if the system does not list them."""
    try:
        lines = table.read_text().splitlines()
    except OSError:
        return None
    return {line.split()[-1] for line in lines if "/" in line}


def sweep(
    *,
    shared_memory: Path = SHARED_MEMORY,
    sockets: Path = Path("/tmp"),
    open_sockets: Callable[[], set[str] | None] = open_sockets,
) -> int:
    """Remove what dead processes of this user left, and return how much: torch's shared memory,
    p2p sockets, and multiprocessing's and torch's socket folders.

    Only files with a dead process's pid, and sockets that are not open, are removed.
    """
    removed = 0
    for path in shared_memory.glob("torch_*_*"):
        removed += is_dead(path.name.split("_")[1]) and _remove(path)
    for folder in Path(tempfile.gettempdir()).glob("pymp-*"):
        for number in _marks(folder):
            removed += is_dead(number) and _remove(folder)
    # First the files, then the table, so that a socket created in between is not removed.
    files = [*sockets.glob("hivemind-p2p*.sock"), *sockets.glob("torch-shm-dir-*/manager.sock")]
    in_use = open_sockets()
    if in_use is not None:
        for file in files:
            if str(file) not in in_use:
                removed += _remove(file.parent if file.name == "manager.sock" else file)
    return removed


def _marks(folder: Path) -> list[str]:
    """Pids of our processes that marked this folder."""
    try:
        return [each.name.partition("-")[2] for each in folder.glob("hiveminer-*")]
    except OSError:  # its process is removing it
        return []


def _remove(path: Path) -> int:
    try:
        if path.lstat().st_uid != os.getuid():
            return 0
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError:  # gone already, or not ours to remove
        return 0
    return 1
