"""A peer dies, and the others go on: real processes, and a fault at a chosen moment.

Each scenario also runs around the stock `hivemind.Optimizer` (slow), to show that the fault
is one: there the survivors wait far longer.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from programs import Program, descendants_gone, wait_for

WORKER = Path(__file__).resolve().with_name("swarm_worker.py")

MOST_SECONDS = 10.0
"""What a peer's death may cost each of the others, once."""

NOTICED_SECONDS = 4.0
"""A step that took longer was a stall: less than the matchmaking time (5 s), so that waiting
it out is one, and more than a busy machine makes of an averaging."""

START_SECONDS = 90.0

Event = dict[str, Any]
T = TypeVar("T")


class Worker(Program):
    """A peer's process, and what it said."""

    def __init__(self, name: str, words: Sequence[str], *, folder: Path):
        super().__init__(words, folder=folder)
        self.name = name

    def events(self, kind: str, *, since: float = 0.0) -> list[Event]:
        found = []
        for line in self.words.splitlines(keepends=True):
            if line.startswith('{"event"') and line.endswith("\n"):
                event: Event = json.loads(line)
                if event["event"] == kind and event["time"] > since:
                    found.append(event)
        return found

    def arm(self) -> None:
        """Let the fault come in the next round."""
        os.kill(self.process.pid, signal.SIGUSR1)

    def epochs(self, *, since: float) -> int:
        """How many ended after that time."""
        return len(self.events("round", since=since))

    def stalls(self, *, since: float) -> list[float]:
        """Seconds of each step after that time that took notably long."""
        return [
            step["seconds"]
            for step in self.events("step", since=since)
            if step["seconds"] > NOTICED_SECONDS
        ]


class Workers:
    """A small swarm of processes in a folder. None outlives the context."""

    def __init__(self, folder: Path, *, kind: str = "ours", size: int, peer_rows: int = 30):
        self.folder, self.kind, self.size = folder, kind, size
        self.rows = peer_rows * size  # of an epoch
        self.all: dict[str, Worker] = {}

    def start(self, name: str, *more: str, script: Sequence[str] = (str(WORKER),)) -> Worker:
        """Start one, with more words for swarm_worker.py."""
        words = [*script, self.kind, name, str(self.folder), "--rows", str(self.rows)]
        words += ["--group", str(self.size), *more]
        worker = self.all[name] = Worker(name, words, folder=self.folder / name)
        return worker

    def start_all(self, names: str, *, faults: dict[str, tuple[str, str]] | None = None) -> None:
        """Start a worker a letter, with its fault, and wait until they average together."""
        for name in names:
            fault = (faults or {}).get(name)
            self.start(name, *(("--fault", *fault) if fault else ()))
            if name == names[0]:
                self.wait(lambda: (self.folder / f"{names[0]}.address").exists(), START_SECONDS)
        self.wait(lambda: all(self.averaged(name, len(names)) for name in names), START_SECONDS)

    def averaged(self, name: str, size: int, *, since: float = 0.0) -> bool:
        return any(each["size"] == size for each in self.all[name].events("round", since=since))

    def wait(self, what: Callable[[], T], seconds: float) -> T:
        return wait_for(what, seconds=seconds, programs=list(self.all.values()))

    def told(self) -> str:
        return "\n".join(f"--- {each.name}\n{each.words[-2500:]}" for each in self.all.values())

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.all.values():
            worker.end()

    def strike(self, name: str) -> float:
        """Let this one fail in its next round; when it did."""
        self.all[name].arm()
        fault: Event = self.wait(lambda: self.all[name].events("fault"), 60)[0]
        return float(fault["time"])


def went_on(workers: Sequence[Worker], *, since: float) -> bool:
    """Whether each has ended three epochs since: the one of the fault, and two after it."""
    return all(worker.epochs(since=since) >= 3 for worker in workers)


slow = pytest.mark.slow


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("third", "second"),
    [
        (("allreduce", "stop"), ("matchmaking", "kill")),
        pytest.param(("matchmaking", "stop"), ("allreduce", "kill"), marks=slow),
        pytest.param(("allreduce", "kill"), ("matchmaking", "stop"), marks=slow),
        pytest.param(("matchmaking", "kill"), ("allreduce", "stop"), marks=slow),
    ],
)
def test_a_death_costs_the_others_little_and_once(
    third: tuple[str, str], second: tuple[str, str], tmp_path: Path
) -> None:
    """One of three fails, then one of the two that are left."""
    with Workers(tmp_path, size=3) as swarm:
        swarm.start_all("abc", faults={"b": second, "c": third})
        for victim, left in (("c", "ab"), ("b", "a")):
            when = swarm.strike(victim)
            workers = [swarm.all[name] for name in left]
            swarm.wait(functools.partial(went_on, workers, since=when), 90)
            for worker in workers:
                stalls = worker.stalls(since=when)
                assert len(stalls) <= 1, f"{stalls}\n{swarm.told()}"
                assert max(stalls, default=0.0) <= MOST_SECONDS, f"{stalls}\n{swarm.told()}"
            for worker in workers:  # and they go on together
                assert swarm.averaged(worker.name, len(left), since=when), swarm.told()


@slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["kill", "stop"])
@pytest.mark.parametrize("where", ["matchmaking", "allreduce"])
@pytest.mark.parametrize("size", [2, 3])
def test_the_same_death_freezes_the_stock_optimizer(
    size: int, where: str, how: str, tmp_path: Path
) -> None:
    names = "abc"[:size]
    with Workers(tmp_path, kind="stock", size=size) as swarm:
        swarm.start_all(names, faults={names[-1]: (where, how)})
        when = swarm.strike(names[-1])
        left = [swarm.all[name] for name in names[:-1]]

        def frozen() -> bool:
            return any(
                max(stalls, default=0.0) > MOST_SECONDS or len(stalls) > 1
                for stalls in (each.stalls(since=when) for each in left)
            )

        swarm.wait(frozen, 150)


@slow
@pytest.mark.timeout(240)
def test_the_first_peer_is_killed_and_a_late_one_equals_the_others(tmp_path: Path) -> None:
    with Workers(tmp_path, size=3) as swarm:
        swarm.start_all("abc")
        first = swarm.all["a"]
        family = first.family()
        assert len(family) > 3  # the DHT, its daemon, the averager
        died = first.events("step")[-1]["time"]
        first.process.kill()
        descendants_gone(family, seconds=20)
        swarm.wait(lambda: all(swarm.averaged(name, 2, since=died) for name in "bc"), 60)

        late = swarm.start("d")  # it is told of the dead one's address too
        load = swarm.wait(
            lambda: [each for each in late.events("load") if each["loaded"]], START_SECONDS
        )[0]
        assert load["epoch"] > 0
        ours = np.load(tmp_path / f"d.{load['epoch']}.load.npy")
        begun = [tmp_path / f"{name}.{load['epoch']}.round.npy" for name in "bc"]
        for path in begun:
            swarm.wait(path.exists, 10)
            np.testing.assert_allclose(ours, np.load(path), rtol=0, atol=1e-3)

        swarm.wait(lambda: all(swarm.averaged(name, 3, since=load["time"]) for name in "bcd"), 60)
        epoch = min(
            each["epoch"] for each in late.events("round", since=load["time"]) if each["size"] == 3
        )
        paths = [tmp_path / f"{name}.{epoch}.round.npy" for name in "bcd"]
        swarm.wait(lambda: all(path.exists() for path in paths), 10)
        weights = np.stack([np.load(path) for path in paths])
        assert np.ptp(weights, axis=0).max() <= 1e-3
        assert np.ptp(weights[0]) > 0


@slow
@pytest.mark.timeout(240)
def test_who_comes_back_is_averaged_with_again(tmp_path: Path) -> None:
    """Under its old peer id, which the others have just left out."""
    with Workers(tmp_path, size=3) as swarm:
        swarm.start_all("abc", faults={"c": ("allreduce", "stop")})
        lost, left = swarm.all["c"], [swarm.all[name] for name in "ab"]
        struck = swarm.strike("c")
        swarm.wait(lambda: any("it is left out" in worker.words for worker in left), 60)
        swarm.wait(lambda: went_on(left, since=struck), 60)
        lost.end()
        when = time.time()
        swarm.start("c")
        swarm.wait(
            lambda: all(swarm.averaged(name, 3, since=when) for name in "abc"), START_SECONDS
        )
        back = max(worker.events("round", since=when)[-1]["time"] for worker in left)
        swarm.wait(lambda: all(worker.epochs(since=back) >= 3 for worker in left), 60)
        for worker in left:
            assert not worker.stalls(since=back), swarm.told()
