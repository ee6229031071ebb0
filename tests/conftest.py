"""What every test relies on: an environment of its own, and nothing left behind."""

from __future__ import annotations

import functools
import gc
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest
from preloaded import Preloaded, sessions
from xdist.scheduler import LoadScopeScheduling

from programs import ROOT

# Threads of several tests that wait for each other on two cores cost twice the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MARK = "TESTS_OF_HIVEMINER"
"""A variable that our processes inherit, so that an orphan is known to be ours."""

SHARED_MEMORY = Path("/dev/shm")

STARTS = re.compile(
    r"^from (programs|test_survival) import .*\b(Network|Program|Workers|started)\b", re.MULTILINE
)
"""What starts programs, in the source of a test."""


def pytest_configure(config: pytest.Config) -> None:
    """One server of programs for all workers; and no look for garbage while they import."""
    gc.disable()
    # The same examples each time: what a test finds by chance fails somebody else's change.
    hypothesis.settings.register_profile(
        "same",
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("same")
    if not hasattr(config, "workerinput"):
        config.add_cleanup(Preloaded().close)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch  # not at the top: xdist's controller needs none of it

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    gc.freeze()  # what was imported stays
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads the developer's settings or writes into the developer's home."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.upper().startswith("HIVEMINER_") or name == "WANDB_API_KEY":
                patch.delenv(name)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv(MARK, uuid.uuid4().hex)
        yield


WITH_DEADLINES = re.compile("test_(survival|poison|rival|intruder|exchange|export|resume)")
"""Swarms in which a late peer counts, and some more, so that both halves take as long."""


class TwoSwarms(LoadScopeScheduling):
    """Tests that start programs run first, in two workers, since programs mostly wait: those with
    deadlines in one, the others in the other. All else fills the workers that are free, test by
    test. (The groups of xdist 3.8 have no effect with pytest 9.2.)"""

    def _split_scope(self, nodeid: str) -> str:
        path = ROOT / nodeid.partition("::")[0]
        if not STARTS.search(_source(path)):
            return nodeid
        return "deadlines" if WITH_DEADLINES.match(path.stem) else "programs"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> TwoSwarms:
    return TwoSwarms(config, log)


@functools.cache
def _source(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A neuron configures logging; the next test shall not see by whom and how."""
    root, ours = logging.getLogger(), logging.getLogger("hiveminer")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    yield
    for handler in [each for each in root.handlers if each not in handlers]:
        if handler.name == "hiveminer":
            root.removeHandler(handler)
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind(own_environment: None) -> Iterator[None]:
    """At the end, no process and no shared memory of ours is left."""
    before = _shared_memory()
    yield
    deadline = time.monotonic() + 10
    while (left := _left(before)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, f"left behind: {left}"


def _left(before: set[str]) -> list[str]:
    processes = [f"process {process.pid} ({process.name()})" for process in _processes()]
    files = [name for name in _shared_memory() - before if not _has_living_maker(name)]
    return processes + files


def _processes() -> list[psutil.Process]:
    me = os.getpid()
    return [process for process in psutil.process_iter() if process.pid != me and _is_ours(process)]


def _is_ours(process: psutil.Process) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE or "resource_tracker" in _command(process):
            return False  # dead already; Python's own helper, which ends with this process
        if os.getsid(process.pid) in sessions:
            return True
        return process.environ().get(MARK) == os.environ[MARK]
    except (psutil.Error, OSError):
        return False  # gone meanwhile, or another user's


def _command(process: psutil.Process) -> str:
    return " ".join(process.cmdline())


def _shared_memory() -> set[str]:
    if not SHARED_MEMORY.is_dir():
        return set()
    return {path.name for path in SHARED_MEMORY.glob("torch_*")}


def _has_living_maker(name: str) -> bool:
    """torch_<pid>_<...>: a living maker is another program's, or cleans up when it ends."""
    found = re.match(r"torch_(\d+)_", name)
    return found is not None and psutil.pid_exists(int(found[1]))
