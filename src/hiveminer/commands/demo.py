"""`hiveminer demo`: one validator and some miners as processes, with a live table and a plot.

Everything is in one folder, the embedded network too. The demo starts the programs that an
operator runs, reads their metrics, and stops them as Ctrl-C does.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import psutil
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hiveminer.commands.demo_model import evaluations, keep_model, samples
from hiveminer.commands.demo_run import BLOCK_SECONDS, DemoRun, demo_run
from hiveminer.config.run_file import to_toml
from hiveminer.config.settings import DemoSettings
from hiveminer.errors import OperatorError
from hiveminer.runtime.addresses import port_is_free
from hiveminer.runtime.processes import left_behind
from hiveminer.runtime.program import rendered
from hiveminer.runtime.signals import Signals
from hiveminer.strategies.sparseloco.log import logs_below
from hiveminer.strategies.sparseloco.replay import verify

logger = logging.getLogger(__name__)

START_SECONDS = 180.0
"""Limit until the first request is answered, when the clock of `--seconds` starts."""

MORE_SECONDS = 60.0
"""How much longer a demo runs at most if its trained model has not been evaluated by then."""

STOP_SECONDS = 15.0

GONE_SECONDS = 10.0
"""How long what a stopped program leaves may take to disappear."""

RECORD_SECONDS = 3.0
"""How often processes and ports are recorded, which costs a little."""

Line = dict[str, Any]


@dataclass
class Program:
    """One started program, and how far its metrics were read."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    state: Path
    offset: int = 0
    family: set[int] = field(default_factory=set)
    """Pids of its processes, as far as they were seen."""
    ports: set[int] = field(default_factory=set)

    def read(self) -> Iterator[Line]:
        """The complete lines since the last call."""
        path = next(self.state.glob("*/*/*/metrics.jsonl"), None)
        if path is None:
            return
        with path.open("rb") as stream:
            stream.seek(self.offset)
            for raw in stream:
                if not raw.endswith(b"\n"):
                    break
                self.offset += len(raw)
                with contextlib.suppress(ValueError):
                    yield json.loads(raw) | {"name": self.name}

    def record(self) -> None:
        """Record its processes and their ports, which must be gone at the end."""
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self.process.pid)
            for process in [root, *root.children(recursive=True)]:
                self.family.add(process.pid)
                for connection in process.net_connections(kind="tcp"):
                    if connection.status == psutil.CONN_LISTEN:
                        self.ports.add(connection.laddr.port)


class Demo:
    """Runs the programs and collects their metrics.

    settings: `seconds` count from the first answer on, and at most MORE_SECONDS are added until a
    trained model was evaluated.
    """

    def __init__(self, settings: DemoSettings, task: DemoRun, console: Console):
        self.settings = settings
        self.out = settings.out
        self.task = task
        self.console = console
        self.lines: list[Line] = []
        self.programs: list[Program] = []
        self.interrupted = threading.Event()

    def run(self) -> dict[str, Any]:
        """Run the demo and return the summary, which is also written to OUT/summary.json.

        Raises OperatorError when a program does not start or dies.
        """
        self._prepare()
        signals = Signals(self.interrupted)
        signals.take()
        try:
            with (self.out / "metrics.jsonl").open("w", encoding="utf-8") as numbers:
                try:
                    self._launch("validator", "--validator.rows", str(self.task.request_rows))
                    for number in range(self.settings.miners):
                        self._launch(f"miner-{number}", "--axon.port", "0")
                    self._watch(numbers)
                finally:
                    signals.allow(STOP_SECONDS + 2 * GONE_SECONDS)
                    clean = self._stop()
                    self._gather(numbers)
        finally:
            signals.give_back()
        kept = keep_model(self.out / "state" / "validator", self.lines, self.out / "model")
        summary = summarise(self.lines, miners=self.settings.miners) | {"exit_clean": clean}
        if self.task.has_rounds:
            summary |= rounds_summary(self.out / "state")
        if kept and not self.interrupted.is_set():
            summary["sample"] = samples(self.task.run, self.out / "model")
        (self.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        plot(self.lines, self.out / "loss.png")
        return summary

    def _prepare(self) -> None:
        """Create the folder; remove what an earlier demo left there, and nothing else."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if (self.out / "model" / "hiveminer.json").exists():
                shutil.rmtree(self.out / "model")
            elif (self.out / "model").exists():
                raise OperatorError(f"{self.out / 'model'} is not a demo's; choose another --out")
            for name in ("network", "state", "logs"):
                shutil.rmtree(self.out / name, ignore_errors=True)
            (self.out / "logs").mkdir()
            (self.out / "run.toml").write_text(to_toml(self.task.run), encoding="utf-8")
        except OSError as error:
            raise OperatorError(f"--out {self.out}: {error.strerror}; choose another") from None

    def _launch(self, name: str, *flags: str) -> None:
        out = self.out.resolve()
        log = out / "logs" / f"{name}.log"
        state = out / "state" / name
        common = [
            *("--subtensor.network", "embedded"),
            *("--subtensor.path", str(out / "network")),
            *("--neuron.path", str(state)),
            *("--neuron.run", str(out / "run.toml")),
            *(("--subtensor.block_seconds", str(BLOCK_SECONDS)) if self.task.has_rounds else ()),
            *("--dht.port", "0"),
        ]
        env = {key: value for key, value in os.environ.items() if not key.startswith("HIVEMINER_")}
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "hiveminer", name.partition("-")[0], *common, *flags],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=env | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                # The terminal's Ctrl-C is for us; we pass it on.
                start_new_session=True,
            )
        self.programs.append(Program(name, process, log, state))

    def _watch(self, numbers: TextIO) -> None:
        """Collect and show metrics until the time is up."""
        began = recorded = time.monotonic()
        first_answer: float | None = None
        with Live(console=self.console, refresh_per_second=4, transient=True) as live:
            while not self.interrupted.wait(0.25):
                self._gather(numbers)
                self._check()
                now = time.monotonic()
                if now - recorded > RECORD_SECONDS:
                    recorded = now
                    for program in self.programs:
                        program.record()
                if first_answer is None and any(x["kind"] == "answer" for x in self.lines):
                    first_answer = now
                if first_answer is None and now - began > START_SECONDS:
                    raise OperatorError(
                        f"no request was answered in {START_SECONDS:.0f} seconds; see "
                        f"{self.out / 'logs'}"
                    )
                done = 0.0 if first_answer is None else now - first_answer
                live.update(self._picture(done))
                more = done - self.settings.seconds
                if more >= MORE_SECONDS or (more >= 0 and len(evaluations(self.lines)) > 1):
                    return

    def _check(self) -> None:
        for program in self.programs:
            code = program.process.poll()
            if code is not None:
                words = program.log.read_text(errors="replace").strip().splitlines()
                raise OperatorError(
                    f"{program.name} ended with {code}: {words[-1] if words else 'no word'} "
                    f"(see {program.log})"
                )

    def _gather(self, numbers: TextIO) -> None:
        for program in self.programs:
            for line in program.read():
                self.lines.append(line)
                numbers.write(json.dumps(line) + "\n")

    def _stop(self) -> bool:
        """Stop everything, the validator first; returns whether nothing was left behind."""
        for program in self.programs:
            program.record()
            program.process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + STOP_SECONDS
        codes = []
        for program in self.programs:
            try:
                codes.append(program.process.wait(max(0.1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                logger.warning("%s did not stop in time and is killed", program.name)
                program.process.kill()
                codes.append(program.process.wait())
        left = self._left_behind()
        for thing in left:
            logger.warning("left behind: %s", thing)
        return not left and all(code == 0 for code in codes)

    def _left_behind(self) -> list[str]:
        """What of the programs is still there after GONE_SECONDS."""
        pids = {pid for program in self.programs for pid in program.family}
        ports = {port for program in self.programs for port in program.ports}
        deadline = time.monotonic() + GONE_SECONDS
        while True:
            taken = [port for port in sorted(ports) if not port_is_free("127.0.0.1", port)]
            left = left_behind(pids) + [f"port {port}" for port in taken]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.2)

    def _picture(self, done: float) -> Group:
        """The live table: one row per miner, and the demo's progress."""
        table = Table(title="hiveminer demo: the embedded network", title_justify="left")
        table.add_column("miner")
        for heading in ["requests", "tokens", "tokens/s", "loss", "epoch", "group", "score"]:
            table.add_column(heading, justify="right")
        for program in self.programs[1:]:
            table.add_row(*_row(program.name, self.lines))
        held = evaluations(self.lines)
        words = "starting: the first answers take about half a minute"
        if done:
            words = f"{done:.0f} of {self.settings.seconds:.0f} s"
        if held:
            words += f"; held-out loss {held[0]['loss']:.3f} -> {held[-1]['loss']:.3f}"
        bar = ProgressBar(total=self.settings.seconds, completed=done, width=72)
        return Group(table, words, bar)


def summarise(lines: Sequence[Line], *, miners: int) -> dict[str, Any]:
    """The demo's summary, from the programs' metrics; losses in nats per token."""
    answers = [line for line in lines if line["kind"] == "answer" and line["loss"] is not None]
    first = {line["hotkey"]: line["loss"] for line in reversed(answers)}
    last = {line["hotkey"]: line["loss"] for line in answers}
    rounds = [line for line in lines if line["kind"] == "epoch" and line["group_size"] > 1]
    held_out = [line["loss"] for line in evaluations(lines)]
    started = min((line["time"] for line in answers), default=math.inf)
    alive = [
        line["milliseconds"]
        for line in lines
        if line["kind"] == "alive" and line["time"] >= started
    ]
    weights = [line["weights"] for line in lines if line["kind"] == "weights"]
    return {
        "miners": miners,
        "train_requests": len(answers),
        "epochs": len({line["epoch"] for line in rounds}),
        "group_size_max": max((line["group_size"] for line in rounds), default=0),
        "tokens": sum(line["tokens"] for line in answers),
        "loss_first": _mean(first.values()),
        "loss_last": _mean(last.values()),
        "held_out_loss_first": held_out[0] if held_out else None,
        "held_out_loss_last": held_out[-1] if held_out else None,
        "is_alive_p50_ms": _quantile(alive, 0.5),
        "is_alive_p99_ms": _quantile(alive, 0.99),
        "weights": weights[-1] if weights else {},
    }


def rounds_summary(state: Path) -> dict[str, Any]:
    """Figures of the rounds of strategy `sparseloco`, from all programs' logs below `state`.

    rounds: those in which updates counted. hashes_equal: whether all who made the state of a
    round made the same. bytes_per_round: of the updates that counted. log_verified: whether each
    log was decided and computed again with the same result.
    """
    reports = [verify(log, log.plan()[1]) for log in logs_below(state)]
    counted = [each for report in reports for each in report.rounds if each.decision.contributions]
    size = {each.decision.round: each.bytes for each in counted}
    made = {(each.decision.round, each.made) for each in counted if each.made is not None}
    return {
        "rounds": len(size),
        "hashes_equal": bool(made) and len(made) == len({number for number, _ in made}),
        "bytes_per_round": round(sum(size.values()) / len(size)) if size else 0,
        "log_verified": bool(reports) and all(report.verified for report in reports),
    }


def _mean(values: Collection[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least this share of the values does not exceed."""
    if not values:
        return None
    return round(float(np.quantile(values, share, method="inverted_cdf")), 3)


def plot(lines: Sequence[Line], path: Path) -> None:
    """Draw the miners' losses, the held-out loss and the averaging rounds over time."""
    from matplotlib.figure import Figure

    if not lines:
        return
    start = min(line["time"] for line in lines)
    figure = Figure(figsize=(9, 4.5), dpi=120, layout="tight")
    axes = figure.subplots()
    trained = [line for line in lines if line["kind"] == "train" and line["loss"] is not None]
    for name in sorted({line["name"] for line in trained}):
        points = [(line["time"] - start, line["loss"]) for line in trained if line["name"] == name]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=name)
    held = evaluations(lines)
    if held:
        axes.plot(
            [line["time"] - start for line in held],
            [line["loss"] for line in held],
            color="black", linewidth=2, marker="s", markersize=4, label="held-out rows",
        )  # fmt: skip
    rounds = {
        line["epoch"]: line["time"] - start
        for line in reversed(lines)
        if line["kind"] == "epoch" and line["group_size"] > 1
    }
    for number, at in enumerate(rounds.values()):
        label = None if number else "the swarm averages"
        axes.axvline(at, color="grey", linewidth=0.7, alpha=0.6, label=label)
    axes.set_xlabel("seconds")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main(settings: DemoSettings) -> int:
    """Run the demo and print its summary; 0 for success, 130 after Ctrl-C."""
    console = Console(stderr=True)
    task = demo_run(settings)
    console.print(
        f"One validator and {settings.miners} miners on the embedded network: a chain in "
        f"{settings.out / 'network'}, on this machine alone.",
        highlight=False,
    )
    demo = Demo(settings, task, console)
    summary = demo.run()
    table = Table(show_header=False)
    for key, value in summary.items():
        if key != "sample":
            shown = f"{value:.3f}" if isinstance(value, float) else json.dumps(value)
            table.add_row(key, shown)
    print(rendered(table))
    console.print(
        f"Metrics: {settings.out / 'metrics.jsonl'}; plot: {settings.out / 'loss.png'}; "
        f"summary: {settings.out / 'summary.json'}; logs: {settings.out / 'logs'}",
        highlight=False,
        soft_wrap=True,
    )
    if "sample" in summary:
        _print_sample(console, summary["sample"], settings.out / "model")
    if demo.interrupted.is_set():
        return 130
    checked = all(summary.get(key, True) for key in ("hashes_equal", "log_verified"))
    return 0 if summary["exit_clean"] and summary["train_requests"] and checked else 1


def _print_sample(console: Console, sample: dict[str, str], model: Path) -> None:
    table = Table(title="What the model wrote", title_justify="left", show_header=False)
    for name, text in sample.items():
        # An untrained model writes any byte.
        shown = "".join(each if each.isprintable() or each == "\n" else "\ufffd" for each in text)
        table.add_row(name, Text(shown))
    console.print(table)
    console.print(f'Try it: hiveminer generate "text" --model {model}', soft_wrap=True)


def _row(name: str, lines: Sequence[Line]) -> tuple[str, ...]:
    mine = [line for line in lines if line["name"] == name]
    trained = [line for line in mine if line["kind"] == "train"]
    rounds = [line for line in mine if line["kind"] == "epoch"]
    if not trained:
        return name, "0"
    tokens = sum(line["tokens"] for line in trained)
    seconds = sum(line["seconds"] for line in trained)
    requests = {line["request_id"] for line in trained}
    scores = [
        line["average"]
        for line in lines
        if line["kind"] == "evidence" and line["request_id"] in requests
    ]
    loss = trained[-1]["loss"]
    return (
        name,
        str(len(trained)),
        f"{tokens:,}",
        f"{tokens / max(seconds, 1e-9):,.0f}",
        "" if loss is None else f"{loss:.3f}",
        str(rounds[-1]["epoch"]) if rounds else "0",
        str(rounds[-1]["group_size"]) if rounds else "",
        f"{scores[-1]:.2f}" if scores else "",
    )
