"""A server that has imported the large packages once and forks the tests' programs from itself.

Importing torch, hivemind, transformers and bittensor costs five CPU-seconds in each program.
Here they are imported once for all test workers, when the first program is wanted. A forked
program gets its own session, environment, working directory and output, and runs and ends as
`python WORDS...` would.

Run: `python preloaded.py SOCKET FD`; it ends when its maker closes the other end of FD.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ADDRESS = "PRELOADED_ADDRESS"
START_SECONDS = 170.0
POLL_SECONDS = 0.02


# --- the side of the tests --------------------------------------------------------------------


class Preloaded:
    """The server of a test run; the workers find it by their environment."""

    def __init__(self) -> None:
        # A short path: a socket's may not exceed a hundred characters.
        self._folder = tempfile.TemporaryDirectory(prefix="preloaded-", dir="/tmp")
        address = str(Path(self._folder.name) / "socket")
        self._alive, theirs = socket.socketpair()
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, __file__, address, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            )
        self._alive.settimeout(START_SECONDS)
        assert self._alive.recv(1), "the server of preloaded programs did not start"
        os.environ[ADDRESS] = address

    def close(self) -> None:
        self._alive.close()
        self._server.wait(30)
        self._folder.cleanup()


def start_forked(
    words: Sequence[str], *, folder: Path, env: Mapping[str, str], log: Path
) -> Forked:
    """Start `python WORDS...` in the folder, with its output in the log."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(START_SECONDS)
    connection.connect(os.environ[ADDRESS])
    job = {"words": list(words), "folder": str(folder), "env": dict(env), "log": str(log)}
    connection.sendall(json.dumps(job).encode() + b"\n")
    forked = Forked(connection)
    sessions.add(forked.pid)
    return forked


sessions: set[int] = set()
"""Of the programs that this worker has had forked: their environment in /proc is the server's."""


class Forked:
    """A forked program, with the methods of `subprocess.Popen` that the tests use."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._lines = connection.makefile("r")
        self.pid = int(self._lines.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while the program runs; negative for a signal."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.returncode = int(self._lines.readline())
            self._lines.close()
            self._connection.close()
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            select.select([self._connection], [], [], POLL_SECONDS)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# --- the server -------------------------------------------------------------------------------


def serve(address: str, maker: socket.socket) -> dict[str, Any] | None:
    """Fork a program for each connection. Returns the job in a forked process, and None in
    the server, when its maker is gone."""
    running: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(64)
        maker.sendall(b"+")
        while True:
            ready = select.select([server, maker, *running.values()], [], [], POLL_SECONDS)[0]
            # Whoever started a program and was killed: its programs must not outlive it.
            for pid, connection in running.items():
                if maker in ready or connection in ready:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
            if maker in ready:
                return None
            if server in ready:
                connection, _ = server.accept()
                job = json.loads(connection.makefile("r").readline())
                import_packages()
                pid = os.fork()
                if pid == 0:
                    for inherited in (connection, server, maker, *running.values()):
                        inherited.close()
                    return dict(job)
                running[pid] = connection
                connection.sendall(f"{pid}\n".encode())
            report_ended(running)


@functools.cache
def import_packages() -> None:
    gc.disable()
    import hiveminer.commands.demo
    import hiveminer.miner
    import hiveminer.validator  # noqa: F401

    # For good: a program that ends with half a million objects to look through takes two seconds.
    gc.freeze()
    gc.enable()


def report_ended(running: dict[int, socket.socket]) -> None:
    """Send the exit codes of the programs that have ended."""
    for pid in list(running):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            with running.pop(pid) as connection, contextlib.suppress(OSError):
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def run(job: dict[str, Any]) -> None:
    """Become the program: its session, folder, environment and output."""
    os.setsid()
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["env"])
    log = os.open(job["log"], os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    own_locks()
    # An interpreter reads this at its start, which was the server's.
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    words = job["words"]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path[0] = job["folder"]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")


def own_locks() -> None:
    """Replace the locks between processes that Hivemind makes when it is imported.

    All forked programs would share them, and one that is stopped or killed while it holds one
    would block the others for good.
    """
    from hivemind.utils.asyncio import _AsyncContextWrapper
    from hivemind.utils.mpfuture import MPFuture

    MPFuture.reset_backend()
    _AsyncContextWrapper.EXECUTOR_LOCK = multiprocessing.Lock()


def main() -> None:
    job = serve(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
    if job is not None:
        run(job)


if __name__ == "__main__":
    main()
