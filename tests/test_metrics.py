"""Metrics: JSON lines, Weights & Biases, and progress bars."""

from __future__ import annotations

import io
import itertools
import json
import logging
import math
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from hiveminer.config.settings import WandbSettings
from hiveminer.errors import OperatorError
from hiveminer.runtime.metrics import JsonLines, Wandb, open_metrics, progress_bar


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


# --- JSON lines ----------------------------------------------------------------------------------


def test_one_object_a_line_at_once_after_those_of_before(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    for time in (1.5, 2.5):
        sink = JsonLines(path, clock=itertools.repeat(time).__next__)
        sink.log("train", {"loss": math.nan, "losses": [1.0, math.inf], "weights": {1: 0.5}})
        assert _lines(path)[-1] == {
            "time": time,
            "kind": "train",
            "loss": None,
            "losses": [1.0, None],
            "weights": {"1": 0.5},
        }
        sink.close()
        sink.log("late", {})
    assert len(_lines(path)) == 2


def test_processes_and_their_threads_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    code = (
        "import sys, threading; from pathlib import Path\n"
        "from hiveminer.runtime.metrics import JsonLines\n"
        "sink = JsonLines(Path(sys.argv[1]))\n"
        "def write():\n"
        "    for i in range(100): sink.log('train', {'i': i, 'text': 'x' * 500})\n"
        "for _ in range(2): threading.Thread(target=write).start()"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert len(_lines(path)) == 400


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_costs_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    sink = JsonLines(Path("/dev/full"))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            sink.log("train", {"loss": 1.0})
    sink.close()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "cannot write to /dev/full: No space left on device" in caplog.text


def test_a_file_that_cannot_be_opened_is_the_operators_to_put_right(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OperatorError, match="choose another folder"):
        JsonLines(tmp_path / "file" / "m.jsonl")


# --- Weights & Biases ----------------------------------------------------------------------------


class Run:
    """A stand-in for a run of wandb, and for the module that starts it."""

    def __init__(self, *, key: str | None = "k", fails: bool = False):
        self.api = types.SimpleNamespace(api_key=key)
        self.Settings = dict
        self.started: dict[str, Any] = {}
        self.logged: list[dict[str, Any]] = []
        self.finished = False
        self.fails = fails

    def init(self, **fields: Any) -> Run:
        self.started = fields
        return self

    def log(self, numbers: dict[str, Any]) -> None:
        if self.fails:
            raise ConnectionError("the service\nis gone")
        self.logged.append(numbers)

    def finish(self) -> None:
        self.finished = True


def _sink(tmp_path: Path, module: Any, mode: str = "online") -> Wandb:
    settings = WandbSettings.model_validate({"mode": mode, "project": "p"})
    lines = JsonLines(tmp_path / "m.jsonl")
    return Wandb(settings, lines, folder=tmp_path, name="miner-0", config={}, wandb=module)


def test_wandb_gets_the_numbers_of_an_event(tmp_path: Path) -> None:
    run = Run()
    sink = _sink(tmp_path, run)
    sink.log("train", {"loss": 2.0, "request": "r-1", "tokens": 3})
    sink.log("note", {"text": "no number"})
    sink.close()
    sink.log("train", {"loss": 1.0})
    assert run.logged == [{"train/loss": 2.0, "train/tokens": 3}]
    assert run.finished
    wanted = {"mode": "online", "project": "p", "name": "miner-0", "dir": str(tmp_path)}
    assert wanted.items() <= run.started.items()


def test_wandb_without_a_key_stays_offline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(key=None)
    _sink(tmp_path, run).close()
    assert run.started["mode"] == "offline"
    assert "wandb has no API key" in caplog.text


def test_a_failure_of_wandb_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = _sink(tmp_path, Run(fails=True))
    for _ in range(3):
        sink.log("train", {"loss": 1.0})
    sink.close()
    assert [record.getMessage() for record in caplog.records] == [
        "wandb gets no more numbers: the service is gone"
    ]


def test_wandb_that_does_not_start_is_told_and_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = _sink(tmp_path, types.SimpleNamespace(), mode="offline")
    sink.log("train", {"loss": 1.0})
    sink.close()
    assert len(caplog.records) == 1


def test_the_real_wandb_writes_offline_without_an_account(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from hiveminer.runtime.metrics import open_metrics\n"
        "from hiveminer.config.settings import WandbSettings\n"
        "offline = WandbSettings(mode='offline')\n"
        "m = open_metrics(Path(sys.argv[1]) / 'm.jsonl', offline, name='miner-0', config={})\n"
        "m.log('train', {'loss': 1.0}); m.close()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(_lines(tmp_path / "m.jsonl")) == 1


# --- the whole -----------------------------------------------------------------------------------


def test_json_lines_alone_unless_wandb_is_asked_for(tmp_path: Path) -> None:
    metrics = open_metrics(tmp_path / "m.jsonl", WandbSettings(), name="miner-0", config={})
    assert isinstance(metrics, JsonLines)
    metrics.close()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("screen", "shown", "drawn"),
    [(Terminal(), True, True), (Terminal(), False, False), (io.StringIO(), True, False)],
    ids=["shown", "not-wanted", "no-terminal"],
)
def test_a_bar_is_drawn_on_a_terminal_if_wanted(
    screen: io.StringIO, shown: bool, drawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bar(title="rows", total=3, unit="row", shown=shown) as bar:
        bar.update(3)
        bar.refresh()
    assert ("rows: 100%" in screen.getvalue()) == drawn
