"""Processes of a benchmark: each is gone afterwards, and its children with it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any

import psutil

from hiveminer.runtime.processes import lives
from hiveminer.swarm.processes import sweep

END_SECONDS = 15.0

Output = int | IO[Any]


def start(
    *words: object, stdout: Output = subprocess.PIPE, stderr: Output | None = None
) -> subprocess.Popen[str]:
    """A Python process of one thread, in a session of its own, so that Ctrl-C is ours alone."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HIVEMINER_")}
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
        text=True,
        env=env | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


@contextlib.contextmanager
def started(
    *words: object, stdout: Output = subprocess.PIPE, stderr: Output | None = None
) -> Iterator[subprocess.Popen[str]]:
    """The same; at the end it is asked to stop, and whoever is left is killed."""
    with start(*words, stdout=stdout, stderr=stderr) as process:
        try:
            yield process
        finally:
            family = family_of(process.pid)
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            end(family)
            sweep()


def family_of(pid: int) -> list[psutil.Process]:
    """The process first, then its descendants."""
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []


def end(family: Sequence[psutil.Process]) -> int:
    """Kill those that live; how many they were."""
    living = [process for process in family if lives(process)]
    for process in living:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return len(living)


def cpu_seconds(family: Sequence[psutil.Process]) -> float:
    """What these processes have used so far."""
    total = 0.0
    for process in family:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    return total
