"""Metrics: JSON lines, Weights & Biases, and progress bars."""

from __future__ import annotations

import io
import json
import logging
import math
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from hiveminer.config.settings import WandbSettings
from hiveminer.errors import OperatorError
from hiveminer.runtime.metrics import JsonLines, Tee, Wandb, open_metrics, progress_bar


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


# --- JSON lines ----------------------------------------------------------------------------------


def test_one_object_a_line_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    sink = JsonLines(path, clock=lambda: 1.5)
    sink.log("train", {"loss": 2.25, "tokens": 7, "weights": {1: 0.5}, "path": tmp_path})
    assert _lines(path) == [
        {
            "time": 1.5,
            "kind": "train",
            "loss": 2.25,
            "tokens": 7,
            "weights": {"1": 0.5},
            "path": str(tmp_path),
        }
    ]
    sink.close()
    sink.log("late", {})
    assert len(_lines(path)) == 1


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "m.jsonl")
    sink.log("train", {"loss": math.nan, "losses": [1.0, math.inf]})
    sink.close()
    (event,) = _lines(tmp_path / "m.jsonl")
    assert event["loss"] is None
    assert event["losses"] == [1.0, None]


def test_lines_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "old"}\n', encoding="utf-8")
    sink = JsonLines(path)
    sink.log("new", {})
    sink.close()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["old", "new"]


def test_threads_do_not_cut_one_anothers_lines(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "m.jsonl")

    def write(n: int) -> None:
        for i in range(100):
            sink.log("train", {"n": n, "i": i, "text": "x" * 500})

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sink.close()
    assert len(_lines(tmp_path / "m.jsonl")) == 400


def test_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    code = (
        "import sys; from pathlib import Path; from hiveminer.runtime.metrics import JsonLines\n"
        "sink = JsonLines(Path(sys.argv[1]))\n"
        "for i in range(200): sink.log('train', {'i': i, 'text': 'x' * 500})"
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
    """A stand-in for a run of wandb."""

    def __init__(self, *, fails: bool = False):
        self.logged: list[dict[str, Any]] = []
        self.finished = False
        self.fails = fails

    def log(self, numbers: dict[str, Any]) -> None:
        if self.fails:
            raise ConnectionError("the service\nis gone")
        self.logged.append(numbers)

    def finish(self) -> None:
        self.finished = True


def _wandb(run: Run, *, key: str | None = None) -> Any:
    module = types.SimpleNamespace(api=types.SimpleNamespace(api_key=key), started=[])
    module.Settings = lambda **fields: fields

    def init(**fields: Any) -> Run:
        module.started.append(fields)
        return run

    module.init = init
    return module


def _sink(tmp_path: Path, module: Any, mode: str = "online") -> Wandb:
    settings = WandbSettings.model_validate({"mode": mode, "project": "p"})
    return Wandb(settings, folder=tmp_path, name="miner-0", config={"netuid": 1}, wandb=module)


def test_wandb_gets_the_numbers_of_an_event(tmp_path: Path) -> None:
    run = Run()
    module = _wandb(run, key="k")
    sink = _sink(tmp_path, module)
    sink.log("train", {"loss": 2.0, "request": "r-1", "tokens": 3})
    sink.log("note", {"text": "no number"})
    sink.close()
    sink.log("train", {"loss": 1.0})
    assert run.logged == [{"train/loss": 2.0, "train/tokens": 3}]
    assert run.finished
    (started,) = module.started
    assert (started["mode"], started["project"], started["name"]) == ("online", "p", "miner-0")
    assert started["dir"] == str(tmp_path)


def test_wandb_without_a_key_stays_offline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = _wandb(Run())
    _sink(tmp_path, module)
    assert module.started[0]["mode"] == "offline"
    assert "wandb has no API key" in caplog.text


def test_a_failure_of_wandb_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = _sink(tmp_path, _wandb(Run(fails=True), key="k"))
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
        "m = open_metrics(Path(sys.argv[1]) / 'm.jsonl', wandb=WandbSettings(mode='offline'))\n"
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
    metrics = open_metrics(tmp_path / "m.jsonl", wandb=WandbSettings())
    assert isinstance(metrics, JsonLines)
    metrics.close()


def test_a_tee_hands_on_to_all(tmp_path: Path) -> None:
    first, second = JsonLines(tmp_path / "1"), JsonLines(tmp_path / "2")
    tee = Tee(first, second)
    tee.log("train", {"loss": 1.0})
    tee.close()
    assert _lines(tmp_path / "1")[0]["loss"] == _lines(tmp_path / "2")[0]["loss"] == 1.0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("shown", [True, False])
def test_a_bar_is_drawn_on_a_terminal_if_wanted(
    shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    with progress_bar(title="rows", total=3, unit="row", shown=shown) as bar:
        bar.update(3)
        bar.refresh()
    assert ("rows: 100%" in screen.getvalue()) == shown


def test_no_bar_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(title="rows", total=3, unit="row", shown=True) as bar:
        bar.update(2)
    assert capsys.readouterr().err == ""
