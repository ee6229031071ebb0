"""Whether anything grows: two miners and a validator for an hour, watched from outside.

Every few seconds, for each process of each program: its own memory (USS), its share of what it
maps (PSS), all of that (RSS), open descriptors and threads; and the bytes of shared memory on the
machine. USS also grows when a page that forked processes shared is copied, RSS does not. The first
minutes are the start; growth is the slope of a least-squares line over the rest, and over its last
half.
The result is in benchmarks/results/soak.json, all samples and a plot beside it. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from matplotlib.figure import Figure

from benchmarks._processes import family_of, started
from benchmarks.machine import RESULTS, aim, describe, write
from hiveminer.runtime.processes import SHARED_MEMORY, lives
from hiveminer.swarm.processes import DAEMON

AIM_MB_PER_MINUTE = 0.5
"""Growth of a miner's memory, over all its processes, in the last half of a soak."""

WARM_UP = 0.2
"""The share of the time that counts as the start."""

MEMORY = ("pss_megabytes", "rss_megabytes")
"""Besides `megabytes`, which are a process's own."""

PROGRAMS = ("miner-0", "miner-1", "validator")


def parts(process: psutil.Process) -> dict[str, psutil.Process]:
    """A program's processes by what they are."""
    named = {"program": process}
    for child in process.children():
        daemons = [each for each in child.children() if each.name() == DAEMON]
        for daemon in daemons:
            named["libp2p daemon"] = daemon
        if "shm_manager" in child.name():
            named["shared memory manager"] = child
        else:
            named["DHT" if daemons else "averager"] = child
    return named


def sample(process: psutil.Process) -> dict[str, dict[str, float]]:
    """Megabytes, descriptors and threads of each of a program's processes."""
    found = {}
    for name, each in parts(process).items():
        with contextlib.suppress(psutil.Error), each.oneshot():
            found[name] = {
                "megabytes": round((memory := each.memory_full_info()).uss / 1e6, 2),
                "pss_megabytes": round(memory.pss / 1e6, 2),
                "rss_megabytes": round(memory.rss / 1e6, 2),
                "descriptors": each.num_fds(),
                "threads": each.num_threads(),
            }
    return found


def shared_memory_megabytes(processes: Iterable[psutil.Process]) -> float:
    """What the shared memory files of these programs take, each counted once."""
    pids = {str(each.pid) for process in processes for each in family_of(process.pid)}
    total = 0
    for path in SHARED_MEMORY.glob("torch_*_*"):
        if path.name.split("_")[1] in pids:
            with contextlib.suppress(OSError):
                total += path.stat().st_blocks * 512
    return round(total / 1e6, 2)


def soak(*, minutes: float, every_seconds: float, rows: int) -> dict[str, Any]:
    """All samples, with their times in minutes."""
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        common = ["--subtensor.path", str(folder / "net"), "--neuron.path", str(folder / "state")]
        processes = {}
        for program in PROGRAMS:
            own = ["--axon.port", "0", "--dht.port", "0"]
            if program == "validator":
                own = ["--validator.rows", str(rows)]
            log = stack.enter_context((folder / f"{program}.log").open("w"))
            words = ["-m", "hiveminer", program.partition("-")[0], *common, *own]
            begun = stack.enter_context(started(*words, stdout=log, stderr=log))
            processes[program] = psutil.Process(begun.pid)
        began = time.monotonic()
        while (now := time.monotonic()) < began + 60 * minutes:
            for program, process in processes.items():
                if not lives(process):
                    said = (folder / f"{program}.log").read_text(errors="replace")
                    raise SystemExit(f"{program} has ended:\n{said[-3000:]}")
            at = round((now - began) / 60, 3)
            programs = {program: sample(process) for program, process in processes.items()}
            shared = shared_memory_megabytes(processes.values())
            samples.append({"minutes": at, "programs": programs, "shared_megabytes": shared})
            time.sleep(every_seconds)
        lines = [
            json.loads(line)
            for path in (folder / "state").glob("*/*/*/metrics.jsonl")
            for line in path.read_text().splitlines()
        ]
    epochs = {line["epoch"] for line in lines if line["kind"] == "epoch" and line["group_size"] > 1}
    answers = sum(line["kind"] == "answer" for line in lines)
    return {"samples": samples, "averaged_epochs": len(epochs), "answers": answers}


def series(samples: Sequence[Mapping[str, Any]], program: str, what: str) -> list[float]:
    """A program's figure over time, summed over its processes."""
    return [sum(each[what] for each in one["programs"][program].values()) for one in samples]


def slope(minutes: Sequence[float], values: Sequence[float]) -> float:
    """Per minute, of the least-squares line."""
    return float(np.polyfit(minutes, values, 1)[0])


def growth(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """How much each program grows per minute: megabytes, descriptors and threads."""
    warm = samples[int(len(samples) * WARM_UP) :]
    late = warm[len(warm) // 2 :]
    found = {}
    for program in PROGRAMS:
        found[program] = {
            f"{what}_per_minute{suffix}": round(
                slope([one["minutes"] for one in part], series(part, program, what)), 4
            )
            for what in ("megabytes", *MEMORY, "descriptors", "threads")
            for suffix, part in (("", warm), ("_in_last_half", late))
        }
    return found


def write_table(samples: Sequence[Mapping[str, Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        table = csv.writer(stream)
        figures = ("megabytes", *MEMORY, "descriptors", "threads")
        table.writerow(["minutes", "program", "process", *figures])
        for one in samples:
            for program, processes in one["programs"].items():
                for name, found in processes.items():
                    table.writerow([one["minutes"], program, name, *found.values()])


def plot(samples: Sequence[Mapping[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(4, 1, sharex=True)
    minutes = [one["minutes"] for one in samples]
    for axis, what in zip(axes, ("megabytes", "descriptors", "threads"), strict=False):
        for program in PROGRAMS:
            axis.plot(minutes, series(samples, program, what), label=program)
        axis.set_ylabel(what)
    axes[3].plot(minutes, [one["shared_megabytes"] for one in samples], color="black")
    axes[3].set_ylabel("shared megabytes")
    axes[3].set_xlabel("minutes")
    axes[0].legend(loc="lower right")
    axes[0].set_title("Two miners and a validator: memory, descriptors, threads, shared memory")
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every-seconds", type=float, default=20.0, help="between two samples")
    parser.add_argument("--rows", type=int, default=64, help="in each request")
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    options = parser.parse_args(argv)
    machine = describe()
    run = soak(minutes=options.minutes, every_seconds=options.every_seconds, rows=options.rows)
    grown = growth(run["samples"])
    worst = max(
        grown[program]["megabytes_per_minute_in_last_half"]
        for program in PROGRAMS
        if program.startswith("miner")
    )
    result = {
        "benchmark": "soak",
        "machine": machine,
        "minutes": options.minutes,
        "growth": grown,
        "aims": {"miner_megabytes_per_minute_in_last_half": aim(worst, most=AIM_MB_PER_MINUTE)},
        "averaged_epochs": run["averaged_epochs"],
        "answers": run["answers"],
        "shared_megabytes": run["samples"][-1]["shared_megabytes"],
    }
    write(options.out, result)
    write_table(run["samples"], options.out.with_suffix(".csv"))
    plot(run["samples"], options.out.with_suffix(".png"))
    print(json.dumps({key: result[key] for key in ("growth", "averaged_epochs", "answers")}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
