"""What each of hivemind's processes does first, and what ends it.

Hivemind forks: the DHT node (which starts the libp2p daemon) and the averager. Left to
themselves they outlive a parent that was killed and keep its ports, and a Ctrl-C on the
terminal reaches the daemon before anybody could say goodbye.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import torch
from hivemind.utils.logging import use_hivemind_log_handler

LOOK_SECONDS = 0.5


def log_to_root() -> None:
    """Send hivemind's log lines to the root logger, like everybody's."""
    use_hivemind_log_handler("nowhere")
    dht = logging.getLogger("hivemind.dht.dht")
    if not any(isinstance(known, _NoGhosts) for known in dht.filters):
        dht.addFilter(_NoGhosts())


class _NoGhosts(logging.Filter):
    """Keeps back what the DHT says of a message whose sender ended before it was read: at a
    shutdown the averager's last ones are such, and there is nothing to mend."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, FileNotFoundError | ConnectionError | EOFError)


@functools.cache
def start_shared_memory() -> None:
    """Start torch's shared-memory manager, with nothing to disturb it.

    torch reads the manager's first words in a loop that never ends, with the interpreter's
    lock held, once a signal has interrupted it: no Ctrl-C can then be heard.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    try:
        torch.zeros(1).share_memory_()  # type: ignore[no-untyped-call]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def settle(parent: int) -> None:
    """To be called first in a forked process: leave the terminal's group, watch the parent,
    and take the daemon along when told to end."""
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)  # the parent's: what we are told is not for it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda _number, _frame: _end())
    threading.Thread(target=_end_with, args=(parent,), name="watch-parent", daemon=True).start()


def _end_with(parent: int) -> None:
    """Kill this process and its children once it has another parent.

    A look at the parent's number works on every system that forks; it costs nothing
    measurable twice a second.
    """
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    _end()


def _end() -> None:
    """End at once, and take the libp2p daemon along. Not torch's shared-memory manager, which
    may be our child as well: it removes the shared memory once all who use it are gone."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.name() == "p2pd":
                child.kill()
    os._exit(1)


def sweep(*, shared_memory: Path = Path("/dev/shm"), sockets: Path = Path("/tmp")) -> int:
    """Remove what dead processes of this user left: torch's shared memory, p2p sockets.

    Returns how many files. Only names that carry a dead process's number, and sockets that
    nobody holds open, are touched.
    """
    removed = 0
    for path in shared_memory.glob("torch_*_*"):
        owner = path.name.split("_")[1]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            removed += _remove(path)
    open_sockets = _open_sockets()
    if open_sockets is not None:
        closed = (p for p in sockets.glob("hivemind-p2p*.sock") if str(p) not in open_sockets)
        removed += sum(map(_remove, closed))
    return removed


def _remove(path: Path) -> int:
    try:
        if path.stat().st_uid != os.getuid():
            return 0
        path.unlink()
    except OSError:  # gone already, or not ours to remove
        return 0
    return 1


def _open_sockets(table: Path = Path("/proc/net/unix")) -> set[str] | None:
    """Paths of the Unix sockets that are open on this machine; None where the system does
    not tell. (To knock on one would disturb the program behind it.)"""
    try:
        lines = table.read_text().splitlines()
    except OSError:
        return None
    return {line.split()[-1] for line in lines if "/" in line}
