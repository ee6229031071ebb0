"""Programs as processes: start them, read what they say, end them, and see that they are gone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil
from preloaded import start_forked

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")


def wait_for(
    what: Callable[[], T], *, seconds: float, about: str = "", programs: Sequence[Program] = ()
) -> T:
    """What the condition gives, as soon as it is true. If it never is, the end of each of these
    programs' logs is in the error."""
    deadline = time.monotonic() + seconds
    while not (value := what()):
        if time.monotonic() > deadline:
            logs = [f"--- {each.log.parent.name}\n{each.words[-3000:]}" for each in programs]
            raise AssertionError("\n".join([f"not within {seconds} s: {about or what}", *logs]))
        time.sleep(0.05)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_fresh(
    words: Sequence[str], *, folder: Path, env: dict[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """A new interpreter in a session of its own."""
    with log.open("wb") as stream:
        return subprocess.Popen(
            [sys.executable, *words],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )


class Program:
    """One started program and its log.

    fresh: start a new interpreter, instead of a fork of one that has imported everything.
    """

    def __init__(
        self,
        words: Sequence[str],
        *,
        folder: Path,
        env: dict[str, str] | None = None,
        fresh: bool = False,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log"
        self.log.write_bytes(b"")
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | (env or {})
        start = start_fresh if fresh else start_forked
        self.process = start(words, folder=folder, env=env, log=self.log)

    @property
    def words(self) -> str:
        return self.log.read_text(errors="replace")

    def says(self, text: str, *, seconds: float = 60.0) -> str:
        """Wait until the log holds the text, and the rest of its line; the log."""

        def said() -> str:
            ended = self.process.poll() is not None  # before it is read what it said last
            words = self.words
            _, found, after = words.partition(text)
            assert found or not ended, f"ended: {words}"
            return words if found and ("\n" in after or ended) else ""

        with contextlib.suppress(AssertionError):
            return wait_for(said, seconds=seconds)
        raise AssertionError(f"{text!r} was not said in {seconds} s; but:\n{self.words}")

    def family(self) -> list[psutil.Process]:
        """The process and all its descendants."""
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        return []

    def interrupt(self, *, seconds: float = 10.0) -> int:
        """Ctrl-C, as a terminal sends it to one process; the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(seconds)

    def end(self) -> None:
        from hiveminer.swarm.processes import sweep  # xdist's controller needs no hivemind

        family = self.family()
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait(60)
        psutil.wait_procs(family, timeout=10)
        sweep()  # who is killed cannot clean up

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


def started(source: str, *words: str, folder: Path, env: dict[str, str] | None = None) -> Program:
    """Python source as a program of its own, with these words after it; it can import what is
    in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "script.py"
    script.write_text(source)
    env = {"PYTHONPATH": str(Path(__file__).parent)} | (env or {})
    return Program([str(script), *words], folder=folder, env=env)


class Network:
    """An embedded network in a folder, and the programs on it."""

    def __init__(self, folder: Path, *, run: str | None = None):
        self.folder = folder
        self.programs: list[Program] = []
        self.run_file = folder / "run.toml"
        folder.mkdir(parents=True, exist_ok=True)
        if run is not None:
            self.run_file.write_text(run)
        self.flags = [
            *("--subtensor.path", str(folder / "network")),
            *("--neuron.path", str(folder / "state")),
            *(("--neuron.run", str(self.run_file)) if run is not None else ()),
        ]

    def start(
        self, name: str, *flags: str, script: str | Path | None = None, ports: bool = True
    ) -> Program:
        """Start `hiveminer miner` or `validator` (by the name's first word), or a script."""
        words = [str(script)] if script else ["-m", "hiveminer", name.split("-")[0]]
        free = ["--axon.port", "0", "--dht.port", "0"] if ports and "miner" in name else []
        program = Program([*words, *flags, *self.flags, *free], folder=self.folder / name)
        self.programs.append(program)
        return program

    def numbers(self, kind: str) -> list[dict[str, Any]]:
        """All lines of this kind that any program has written so far."""
        return [
            line
            for path in (self.folder / "state").glob("*/*/*/metrics.jsonl")
            for raw in path.read_text().splitlines(keepends=True)
            if raw.endswith("\n") and (line := json.loads(raw))["kind"] == kind
        ]

    def wait_for_numbers(
        self, kind: str, enough: Callable[[list[dict[str, Any]]], bool], *, seconds: float
    ) -> list[dict[str, Any]]:
        """Wait until the lines of this kind are enough, while all programs live."""

        def look() -> list[dict[str, Any]]:
            for program in self.programs:
                assert program.process.poll() is None, f"ended: {program.words}"
            lines = self.numbers(kind)
            return lines if enough(lines) else []

        about = f"enough lines of {kind}"
        return wait_for(look, seconds=seconds, about=about, programs=self.programs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for program in self.programs:
            program.end()


def descendants_gone(family: Sequence[psutil.Process], *, seconds: float) -> None:
    """Wait until none of these processes lives."""

    def gone() -> bool:
        return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in _seen(family))

    wait_for(gone, seconds=seconds, about=f"the end of {[p.pid for p in family]}")


def _seen(family: Sequence[psutil.Process]) -> Iterator[psutil.Process]:
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.status()
            yield process
