"""Bytes that a process and its children have sent over TCP, as the kernel counts them. Linux only.

A socket of another process is looked at through a copy of its descriptor (`pidfd_getfd`); the
count of a connection that has ended since is the last one that was seen.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import threading
from pathlib import Path

import psutil

PIDFD_GETFD = 438
BYTES_SENT = 200
"""Where `tcpi_bytes_sent` is in struct tcp_info; without the headers of packets."""

SECONDS = 0.5
"""Between two looks."""

_libc = ctypes.CDLL(None, use_errno=True)


class Sent:
    """Counts from when it is made; a thread looks until `close`."""

    def __init__(self, pid: int):
        self._pid = pid
        self._seen: dict[str, int] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sent", daemon=True)
        self._thread.start()

    def bytes(self) -> int:
        """Sent so far by all connections that were ever seen."""
        self._look()
        with self._lock:
            return sum(self._seen.values())

    def close(self) -> None:
        self._stop.set()
        self._thread.join(5)

    def _run(self) -> None:
        while not self._stop.wait(SECONDS):
            self._look()

    def _look(self) -> None:
        with contextlib.suppress(psutil.Error):
            me = psutil.Process(self._pid)
            for process in [me, *me.children(recursive=True)]:
                with contextlib.suppress(OSError):
                    self._look_at(process.pid)

    def _look_at(self, pid: int) -> None:
        pidfd = os.pidfd_open(pid)
        try:
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    name = str(link.readlink())
                    if name.startswith("socket:"):
                        self._count(name, pidfd, int(link.name))
        finally:
            os.close(pidfd)

    def _count(self, name: str, pidfd: int, number: int) -> None:
        copy = _libc.syscall(PIDFD_GETFD, pidfd, number, 0)
        if copy < 0:
            return
        with socket.socket(fileno=copy) as found:
            if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == (
                socket.SOCK_STREAM
            ):
                info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
                if len(info) >= BYTES_SENT + 8:
                    (count,) = struct.unpack_from("=Q", info, BYTES_SENT)
                    with self._lock:
                        self._seen[name] = max(count, self._seen.get(name, 0))
