"""What deaths cost a swarm: four miners, one of them killed with -9 every minute.

Four miners on loopback (`_churn.py`), one torch thread each, paced so that two cores are not
the limit. They train undisturbed for a while; then, for `--seconds`, one main process is
killed with -9 every `--every` seconds, in turn, and started again RESTART_SECONDS later; its
children must go by themselves. Then the same with the stock `hivemind.Optimizer` and its
defaults, in the same run; its orphans are counted, and then ended.

What counts. A step's tokens count once its weights have entered an averaging in a group of
more than one: at that moment the steps that the miner has made since it last took over the
swarm's state are in the swarm's. Epochs ended alone are carried along to the next such
averaging. Not counted are steps that were thrown away, steps whose weights were replaced by
a download before they entered an averaging, and the unfinished epoch of a miner that was
killed, unless it was resumed from a checkpoint and averaged later. After the last second the
swarm goes on until each miner has averaged once more, so that the last epoch counts too; only
steps that ended within the time do.

`goodput`: those tokens per second of a live miner (from its first possible step to its death
or the end), over the same figure undisturbed. `goodput_with_restarts`: with the seconds from
the process's start on. `survivor_stall_max_s`: the longest time between two steps' ends in the
life of one process, minus the pace. `restart_s`: from a process's start to the end of its
first step in the epoch that the swarm is then in, median and longest. `divergence`: the
largest difference between two miners' weights, value by value, after an averaging in which
all who took part in the epoch were in one group. `orphans`: processes of a killed main
process that live 5 s later, and of all at the end. `cores_a_miner`: CPU seconds a second of a
live miner, over all its processes. `share_of_pace`: counted tokens per second of a live
miner over what the pace alone would let it train, so that the two kinds can be compared.
`*_stock`: the same of the stock optimizer.

The result stands in benchmarks/results/churn.json, a picture in docs/churn.png.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from matplotlib.figure import Figure

from benchmarks._churn import EPOCH_ROWS, MINERS, PACE_SECONDS, ROWS, SEQUENCE
from benchmarks._processes import cpu_seconds, end, family_of, start
from benchmarks.machine import RESULTS, aim, describe, write
from hiveminer.runtime.metrics import progress_bar
from hiveminer.swarm.processes import sweep

AIM_GOODPUT = 0.90
AIM_STALL_SECONDS = 10.0
AIM_DIVERGENCE = 1e-3

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "churn.png"
RESTART_SECONDS = 2.0
ORPHAN_SECONDS = 5.0
START_SECONDS = 120.0
DRAIN_SECONDS = 45.0
"""How long the end waits for the last averaging."""
END_SECONDS = 15.0

Line = dict[str, Any]


class Difference(NamedTuple):
    """How far apart, at most, a value of the weights was in a group after an averaging."""

    epoch: int
    group_size: int
    largest: float


@dataclass
class Life:
    """One process of a miner, from its start to its death, and what it said.

    Times are `time.time()`. `cpu_seconds` is of it and its children, when it was ended.
    """

    index: int
    number: int
    started: float
    ended: float = float("inf")
    killed: bool = False
    cpu_seconds: float | None = None
    lines: list[Line] = field(default_factory=list)

    def of(self, event: str) -> list[Line]:
        return [line for line in self.lines if line["event"] == event]

    @property
    def ready(self) -> float:
        """When its first step was possible; infinity if never."""
        return min((line["time"] for line in self.of("ready")), default=float("inf"))


class Miners:
    """The four processes of one kind, and what becomes of them. None outlives the context."""

    def __init__(self, kind: str, *, folder: Path):
        self.kind, self.folder = kind, folder
        self.lives: list[Life] = []
        self.orphans = 0
        self.failures = 0
        self.differences: list[Difference] = []
        self._running: dict[int, tuple[Life, subprocess.Popen[str]]] = {}
        self._doomed: list[tuple[float, list[psutil.Process]]] = []
        self._due: dict[int, float] = {}
        self._families: list[psutil.Process] = []
        self._ports = free_ports(MINERS)

    def start(self, index: int) -> None:
        number = sum(life.index == index for life in self.lives)
        words = [self.kind, index, number, self.folder, self._ports[index]]
        life = Life(index=index, number=number, started=time.time())
        with (self.folder / f"{index}.{number}.log").open("w") as log:
            process = start("-m", "benchmarks._churn", *words, stdout=log, stderr=log)
        self.lives.append(life)
        self._running[index] = (life, process)

    def kill(self, index: int) -> None:
        """End the main process alone, as a fault would; start it again a little later."""
        life, process = self._running.pop(index)
        family = family_of(process.pid)
        life.cpu_seconds = cpu_seconds(family)
        process.kill()
        life.ended, life.killed = time.time(), True
        process.wait(10)
        # Its address stays known for ours, as it does on a chain; the stock would be given
        # one that is dead, and has no second look at others.
        if self.kind == "stock":
            (self.folder / f"{index}.address").unlink(missing_ok=True)
        self._families += family
        self._doomed.append((time.monotonic() + ORPHAN_SECONDS, family[1:]))
        self._due[index] = time.monotonic() + RESTART_SECONDS

    def tick(self) -> None:
        """What is due: orphans to count, miners to start again, weights to compare."""
        now = time.monotonic()
        for doomed in [each for each in self._doomed if each[0] <= now]:
            self._doomed.remove(doomed)
            self.orphans += end(doomed[1])
        for index in [index for index, when in self._due.items() if when <= now]:
            del self._due[index]
            self.start(index)
        for index, (life, process) in list(self._running.items()):
            if process.poll() is not None:  # by itself
                life.ended = time.time()
                self.failures += 1
                del self._running[index]
                self._due[index] = now + RESTART_SECONDS
        self.differences += compared(self.folder, older_than_seconds=15.0)

    def wait(self, until: Callable[[], bool], *, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not (done := until()) and time.monotonic() < deadline and self.failures < 10:
            self.tick()
            time.sleep(0.2)
        return done

    def read(self) -> list[Life]:
        """The lives with all that was said so far."""
        for life in self.lives:
            path = self.folder / f"{life.index}.{life.number}.jsonl"
            if path.exists():
                life.lines = [json.loads(line) for line in path.read_text().splitlines()]
        return self.lives

    def all_ready(self) -> bool:
        self.read()
        lives = [life for life, _ in self._running.values()]
        return len(lives) == MINERS and all(life.ready < float("inf") for life in lives)

    def all_averaged(self, *, since: float) -> bool:
        """Whether each miner that lives has averaged after that time."""
        self.read()
        return all(
            any(line["size"] > 1 and line["time"] > since for line in life.of("round"))
            for life, _ in self._running.values()
        )

    def stop(self) -> None:
        """End all in order, and count who is left."""
        families: list[list[psutil.Process]] = []
        for life, process in self._running.values():
            family = family_of(process.pid)
            families.append(family)
            life.cpu_seconds, life.ended = cpu_seconds(family), time.time()
            self._families += family
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.write("stop\n")
                process.stdin.close()
        deadline = time.monotonic() + END_SECONDS
        for _, process in self._running.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        self._running.clear()
        self._doomed += [(time.monotonic() + ORPHAN_SECONDS, each[1:]) for each in families]
        self._due.clear()
        while self._doomed:
            self.tick()
            time.sleep(0.2)
        sweep()
        self.differences += compared(self.folder, older_than_seconds=0.0)

    def __enter__(self) -> Miners:
        return self

    def __exit__(self, *raised: object) -> None:
        for _, process in self._running.values():
            self._families += family_of(process.pid)
            process.kill()
        end(self._families)
        sweep()


def free_ports(count: int) -> list[int]:
    """Ports that nobody has; a miner keeps its own over its restarts."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def compared(folder: Path, *, older_than_seconds: float) -> list[Difference]:
    """Of each epoch whose weights lie in the folder and in which all averaged in one group;
    the files are removed."""
    by_epoch: dict[int, list[Path]] = {}
    for path in folder.glob("weights.*.npy"):
        by_epoch.setdefault(int(path.name.split(".")[1]), []).append(path)
    found = []
    for epoch, paths in sorted(by_epoch.items()):
        if time.time() - max(path.stat().st_mtime for path in paths) < older_than_seconds:
            continue
        sizes = {int(path.name.split(".")[2]) for path in paths}
        if sizes == {len(paths)} and len(paths) > 1:
            weights = np.stack([np.load(path) for path in paths])
            largest = float(np.ptp(weights, axis=0).max())
            found.append(Difference(epoch, len(paths), largest))
        for path in paths:
            path.unlink()
    return found


def counted(lives: Sequence[Life]) -> list[Line]:
    """The steps of these lives whose weights entered an averaging in a group, each once."""
    entered: dict[int, Line] = {}
    for index in {life.index for life in lives}:
        mine = sorted((each for each in lives if each.index == index), key=lambda each: each.number)
        before: list[tuple[Life, list[Line]]] = []
        for life in mine:
            carried = carried_over(life, before)
            reached, _ = replayed(life, carried)
            entered |= {id(step): step for step in reached}
            before.append((life, carried))
    return list(entered.values())


def carried_over(life: Life, before: Sequence[tuple[Life, list[Line]]]) -> list[Line]:
    """The steps that were in the checkpoint that a life went on from, and in no averaging yet."""
    for resume in life.of("resume"):
        for earlier, carried in before:
            if earlier.started < resume["written_at"] < earlier.ended:
                return replayed(earlier, carried, until=resume["written_at"])[1]
    return []


def replayed(
    life: Life, carried: Sequence[Line], *, until: float = float("inf")
) -> tuple[list[Line], list[Line]]:
    """(steps that entered an averaging, steps that wait for one) of a life up to a time, when
    it began with the second of an earlier one."""
    pending = list(carried)
    entered: list[Line] = []
    # By steps, not by time: a round is told of within the step that it ends, or in the next.
    order = {"step": 0, "round": 1, "load": 2}
    told = [
        line
        for line in life.lines
        # A checkpoint is taken when a step is done, and before that is told.
        if line["event"] in order and (line.get("began") or line["time"]) < until
    ]
    told.sort(key=lambda line: (line.get("through", line["number"]), order[line["event"]]))
    for line in told:
        if line["event"] == "step" and line["kept"]:
            pending.append(line)
        elif line["event"] == "load" and line["changed"]:
            pending = []
        elif line["event"] == "round" and line["size"] > 1:
            entered += pending
            pending = []
    return entered, pending


@dataclass(frozen=True)
class Window:
    """A stretch of time, in `time.time()`."""

    begin: float
    end: float

    def overlap(self, begin: float, end: float) -> float:
        return max(0.0, min(end, self.end) - max(begin, self.begin))

    def holds(self, when: float) -> bool:
        return self.begin < when <= self.end


def rate(lives: Sequence[Life], window: Window, *, with_restarts: bool = False) -> float:
    """Counted tokens per second of a live miner."""
    tokens = sum(step["tokens"] for step in counted(lives) if window.holds(step["time"]))
    live = sum(
        window.overlap(life.started if with_restarts else life.ready, life.ended) for life in lives
    )
    return float(tokens / live) if live else 0.0


def longest_stall(lives: Sequence[Life], window: Window) -> float:
    """The longest time between two steps of one process, less the pace."""
    gaps = [0.0]
    for life in lives:
        ends = [step["time"] for step in life.of("step")]
        if life.ended < float("inf"):
            ends.append(life.ended)  # a stall does not end by being killed in it
        gaps += [
            after - before - PACE_SECONDS
            for before, after in itertools.pairwise(ends)
            if window.overlap(before, after) > 0
        ]
    return max(gaps)


def restarts(lives: Sequence[Life]) -> list[float]:
    """Of each miner that was started again: seconds to its first step beside the others."""
    took = []
    for life in lives:
        if life.number == 0:
            continue
        for step in life.of("step"):
            others = [
                line["epoch"]
                for other in lives
                if other.index != life.index
                for line in other.of("step")
                if line["time"] < step["began"]
            ]
            if step["kept"] and step["epoch"] >= max(others, default=0):
                took.append(step["time"] - life.started)
                break
    return took


def cores(lives: Sequence[Life]) -> float:
    """CPU seconds a second of a live miner, its start not counted."""
    used = live = 0.0
    for life in lives:
        if life.cpu_seconds is None or life.ready == float("inf"):
            continue
        used += life.cpu_seconds - life.of("ready")[0]["cpu_seconds"]
        live += life.ended - life.ready
    return used / live if live else 0.0


def figures(miners: Miners, calm: Window, churn: Window) -> dict[str, Any]:
    lives = miners.read()
    undisturbed = rate(lives, calm)
    pace = ROWS * SEQUENCE / PACE_SECONDS
    took = restarts(lives)
    rounds = [line for life in lives for line in life.of("round")]
    sizes = [line["size"] for line in rounds if churn.holds(line["time"])]
    return {
        "goodput": round(rate(lives, churn) / undisturbed, 3) if undisturbed else 0.0,
        "goodput_with_restarts": round(rate(lives, churn, with_restarts=True) / undisturbed, 3)
        if undisturbed
        else 0.0,
        "survivor_stall_max_s": round(longest_stall(lives, churn), 2),
        "undisturbed_stall_max_s": round(longest_stall(lives, calm), 2),
        "restart_s": {
            "median": round(statistics.median(took), 1) if took else None,
            "max": round(max(took), 1) if took else None,
            "all": [round(each, 1) for each in took],
        },
        "divergence": max((each.largest for each in miners.differences), default=None),
        "divergences": [each._asdict() for each in miners.differences],
        "orphans": miners.orphans,
        "failures": miners.failures,
        "share_of_pace_undisturbed": round(undisturbed / pace, 3),
        "share_of_pace": round(rate(lives, churn) / pace, 3),
        "tokens_per_second_undisturbed": round(undisturbed, 1),
        "tokens_per_second": round(rate(lives, churn), 1),
        "group_sizes": {str(size): sizes.count(size) for size in sorted(set(sizes))},
        "discarded_steps": sum(not step["kept"] for life in lives for step in life.of("step")),
        "resumed": sum(bool(life.of("resume")) for life in lives),
        "downloads": sum(line["changed"] for life in lives for line in life.of("load")),
        "cores_a_miner": round(cores(lives), 2),
    }


@dataclass
class Measured:
    """One kind's run."""

    figures: dict[str, Any]
    lives: list[Life]
    calm: Window
    churn: Window


def measure(
    kind: str, *, folder: Path, calm_seconds: float, seconds: float, every_seconds: float
) -> Measured:
    folder.mkdir()
    total = calm_seconds + seconds
    with (
        Miners(kind, folder=folder) as miners,
        progress_bar(title=kind, total=total, unit="s", shown=True) as bar,
    ):
        miners.start(0)
        known = folder / "0.address"
        if not miners.wait(known.exists, seconds=START_SECONDS):
            raise SystemExit(f"the first miner does not start: {_last_words(folder)}")
        for index in range(1, MINERS):
            miners.start(index)
        if not miners.wait(miners.all_ready, seconds=START_SECONDS):
            raise SystemExit(f"the miners do not start: {_last_words(folder)}")
        begin = time.time()
        calm = Window(begin, begin + calm_seconds)
        churn = Window(calm.end, calm.end + seconds)
        kills = [calm.end + when for when in moments(seconds, every_seconds)]
        for number, when in enumerate([*kills, churn.end]):
            while (now := time.time()) < when:
                miners.tick()
                bar.update(round(min(total, now - begin), 1) - bar.n)
                time.sleep(0.2)
            if when < churn.end:
                miners.kill(number % MINERS)
        miners.wait(lambda: miners.all_averaged(since=churn.end), seconds=DRAIN_SECONDS)
        miners.stop()
        return Measured(figures(miners, calm, churn), miners.read(), calm, churn)


def moments(seconds: float, every_seconds: float) -> list[float]:
    """When a miner is killed: in the middle of each of the stretches."""
    count = max(1, int(seconds // every_seconds))
    return [every_seconds * (number + 0.5) for number in range(count)]


def _last_words(folder: Path) -> str:
    last = max(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)
    return last.read_text(errors="replace")[-2000:]


def plot(measured: dict[str, Measured], path: Path, *, bin_seconds: float = 10.0) -> None:
    """Tokens that reached the swarm's state over time, and the deaths."""
    figure = Figure(figsize=(9, 4.5), dpi=120, layout="tight")
    axes = figure.subplots()
    names = {"ours": "hiveminer", "stock": "hivemind.Optimizer, its defaults"}
    for kind, one in measured.items():
        begin, finish = one.calm.begin, one.churn.end
        edges = np.arange(0.0, finish - begin + 0.1, bin_seconds)
        steps = counted(one.lives)
        when = [step["time"] - begin for step in steps]
        tokens, _ = np.histogram(when, bins=edges, weights=[step["tokens"] for step in steps])
        axes.step(edges[:-1], tokens / bin_seconds, where="post", label=names[kind])
    ours = measured["ours"]
    deaths = [life.ended - ours.calm.begin for life in ours.lives if life.killed]
    for number, death in enumerate(deaths):
        label = None if number else "one of the four is killed"
        axes.axvline(death, color="black", linewidth=0.8, linestyle=":", label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds")
    axes.set_ylabel("tokens/s into the swarm's state, four miners")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


@contextlib.contextmanager
def place(keep: Path | None) -> Iterator[Path]:
    """A folder for the miners' files: a temporary one, or the one asked for."""
    if keep is not None:
        keep.mkdir(parents=True)
        yield keep
    else:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)


def aims(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "goodput": aim(found["goodput"], least=AIM_GOODPUT),
        "survivor_stall_max_s": aim(found["survivor_stall_max_s"], most=AIM_STALL_SECONDS),
        "divergence": aim(found["divergence"], most=AIM_DIVERGENCE),
        "orphans": aim(found["orphans"], most=0),
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench churn", description=__doc__)
    parser.add_argument("--seconds", type=float, default=360.0, help="with deaths, of each kind")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two deaths")
    parser.add_argument("--calm", type=float, help="seconds before; a third of --seconds")
    parser.add_argument("--only", choices=("ours", "stock"), help="one kind, for a quick look")
    parser.add_argument("--folder", type=Path, help="keep the miners' logs there")
    parser.add_argument("--out", type=Path, default=RESULTS / "churn.json")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args(argv)
    calm_seconds = options.seconds / 3 if options.calm is None else options.calm
    result: dict[str, Any] = {"benchmark": "churn", "machine": describe()}
    measured: dict[str, Measured] = {}

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with place(options.folder) as folder:
        for kind in [options.only] if options.only else ["ours", "stock"]:
            say(
                f"{kind}: {calm_seconds:.0f} s undisturbed, then {options.seconds:.0f} s with a "
                f"death every {options.every:.0f} s ..."
            )
            measured[kind] = measure(
                kind,
                folder=folder / kind,
                calm_seconds=calm_seconds,
                seconds=options.seconds,
                every_seconds=options.every,
            )
    if options.only:
        print(json.dumps(measured[options.only].figures, indent=2))
        return 0
    ours, stock = measured["ours"].figures, measured["stock"].figures
    result |= ours | {f"{key}_stock": value for key, value in stock.items()}
    result |= {
        "aims": aims(ours),
        "miners": MINERS,
        "batch_rows": ROWS,
        "sequence_length": SEQUENCE,
        "pace_seconds": PACE_SECONDS,
        "epoch_rows": EPOCH_ROWS,
        "calm_seconds": calm_seconds,
        "seconds": options.seconds,
        "every_seconds": options.every,
        "restart_after_seconds": RESTART_SECONDS,
        "deaths": len(moments(options.seconds, options.every)),
    }
    write(options.out, result)
    plot(measured, options.picture)
    shown = ("goodput", "goodput_stock", "survivor_stall_max_s", "divergence", "orphans")
    print(json.dumps({key: result[key] for key in shown}))
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
    try:
        code = main(sys.argv[1:])
    except KeyboardInterrupt:  # the miners are gone by now
        code = 130
    raise SystemExit(code)
