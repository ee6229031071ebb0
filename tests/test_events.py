"""What goes wrong is told with its cause and its cure: each event for what really causes it."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import logging
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from in_process import Hub, InProcessStrategy
from small_neurons import (
    SmallMiner,
    miner_alone,
    miner_settings,
    told,
)

import hiveminer
from hiveminer import cli
from hiveminer.commands.checks import machine
from hiveminer.commands.checks.base import Examination
from hiveminer.protocol import Train
from hiveminer.runtime.dependencies import unmet
from hiveminer.runtime.events import EVENTS, tell
from hiveminer.runtime.logs import JsonFormatter, configure_logging
from hiveminer.runtime.watchdog import watch
from hiveminer.swarm.processes import log_to_root
from programs import ROOT, started, wait_for


def request(**changes: Any) -> Train:
    fields: dict[str, Any] = {
        "request_id": "request1",
        "run_id": "a-b-c-d",
        "data_hash": "0" * 64,
        "dataset_indices": list(range(8)),
        "batch_size": 8,
    }
    return Train(**fields | changes)


# The table and the line


def test_each_event_has_its_section_in_the_docs() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert re.findall(r"^## `(\w+)`", text, re.MULTILINE) == list(EVENTS)
    assert "docs/troubleshooting.md" in (ROOT / "README.md").read_text()


def test_warnings_are_in_the_docs() -> None:
    docs = " ".join((ROOT / "docs" / "troubleshooting.md").read_text().replace("`", "").split())
    warnings = [
        call.args[0].value.replace("`", "")
        for path in sorted((ROOT / "src").rglob("*.py"))
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) == "logger.warning"
        and isinstance(call.args[0], ast.Constant)
    ]
    assert len(warnings) > 6
    for said in warnings:
        fixed = [part.strip(" :;,") for part in re.split(r"%%|%[.\d]*[sdrf]", said)]
        known = [part in docs for part in fixed if len(part) >= 12]
        assert any(known) or not known, said


def test_only_events_of_the_table_are_told() -> None:
    """A name that is misspelled somewhere would raise where it is needed least."""
    names = [
        name
        for path in (ROOT / "src").rglob("*.py")
        for name in re.findall(r'\btell\(\s*\w+,\s*"(\w+)"', path.read_text())
    ]
    assert len(names) > 10
    assert set(names) <= set(EVENTS)


def test_an_event_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    log_to_root()  # hivemind has shortened "WARNING" for everybody
    tell(logging.getLogger("hiveminer.test"), "poison", "100% of peer x is NaN")
    logging.getLogger("hiveminer.test").warning("something")
    record, other = caplog.records
    message = f"100% of peer x is NaN; {EVENTS['poison']} [poison]"
    assert record.getMessage() == message
    assert record.funcName == "test_an_event_is_one_line"  # who told it, not who wrote it
    line = JsonFormatter("miner-0").format(record)
    said = json.loads(line)
    assert (said["event"], said["neuron"], said["level"]) == ("poison", "miner-0", "warning")
    assert said["message"] == message
    assert "\n" not in line
    assert "event" not in json.loads(JsonFormatter("miner-0").format(other))


# Names in the log


@pytest.mark.parametrize(
    ("key", "named"), [({}, "miner-0"), ({"hotkey": "mine"}, "miner mine")], ids=["own", "given"]
)
def test_each_line_names_role_and_key(
    key: dict[str, str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with SmallMiner(miner_settings(tmp_path, wallet=key)) as miner:
        assert miner.neuron.name == named
        hotkey = miner.neuron.hotkey
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3
    assert all(re.match(rf"\d\d:\d\d:\d\d {named} INFO ", line) for line in lines), lines
    # On a real network a key has no name that would tell it from others.
    configure_logging(miner_settings(tmp_path), f"miner {hotkey[:8]}")
    logging.getLogger("bittensor.x").warning("theirs")
    logging.getLogger("hivemind.x").warning("theirs too")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        f"miner {hotkey[:8]} WARNING theirs",
        f"miner {hotkey[:8]} WARNING theirs too",
    ]


FORKED = """
import logging, sys
from pathlib import Path
from hiveminer.runtime.logs import configure_logging
from hiveminer.config.settings import MinerSettings
from hiveminer.swarm.peer import Peer
from hiveminer.swarm.processes import log_to_root
from identities import who

async def speak(_dht, node):
    logging.getLogger("hivemind.dht.node").warning("from the fork")

configure_logging(MinerSettings(), "miner-7")
log_to_root()
peer = Peer(identity=who("Alice"))
peer.dht.run_coroutine(speak)
peer.close()
print("closed", flush=True)
"""


@pytest.mark.timeout(120)
def test_the_processes_of_hivemind_log_as_their_neuron_does(tmp_path: Path) -> None:
    with started(FORKED, folder=tmp_path / "forked") as program:
        words = program.says("closed", seconds=90)
    assert re.search(r"^\d\d:\d\d:\d\d miner-7 WARNING from the fork$", words, re.MULTILINE)


# stall


class StuckMiner(SmallMiner):
    grace_seconds = 0.05
    released = threading.Event()

    def forward(self, synapse: Train) -> Train:
        self.wait_for_what_never_comes()
        return synapse

    def wait_for_what_never_comes(self) -> None:
        self.released.wait(60)


def test_a_request_that_hangs_is_reported_once_with_the_calls_of_its_thread(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with StuckMiner(miner_settings(tmp_path)) as miner:
        miner.queue.start()
        asked = request(timeout_seconds=0.05)
        job = miner.queue.submit(lambda: miner._forward(asked), caller="5", key="1", priority=1)
        wait_for(lambda: told(caplog, "stall"), seconds=60)
        calls = ""

        def dumped() -> bool:
            nonlocal calls
            calls += capfd.readouterr().err
            return "wait_for_what_never_comes" in calls

        wait_for(dumped, seconds=60)
        (words,) = told(caplog, "stall")
        miner.released.set()
        assert job.result(60) is asked
    assert words.startswith("request request1 of ")
    assert "restart this neuron" in words
    assert any("has ended after all" in line for line in caplog.messages)


def test_what_ends_in_time_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(5):
        with watch("a short one", limit_seconds=60):
            pass
    wait_for(
        lambda: not any(thread.name == "watchdog" for thread in threading.enumerate()), seconds=60
    )
    assert not told(caplog, "stall")


# dependencies


@pytest.fixture
def other_hiveminer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Package metadata that asks for what this machine does not have."""
    folder = tmp_path / "site" / "hiveminer-9.9.9.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: hiveminer\nVersion: 9.9.9\n"
        "Requires-Dist: numpy<99,>=98\n"
        "Requires-Dist: torch<2.14,>=2.4\n"
        "Requires-Dist: no-such-package-at-all<2\n"
        "Requires-Dist: pydantic>=99; python_version < '3'\n"
        "Requires-Dist: pytest==0.1; extra == 'dev'\n"
    )
    monkeypatch.syspath_prepend(str(folder.parent))


def test_a_clash_names_package_version_range_and_the_pip_line(other_hiveminer: None) -> None:
    found = importlib.metadata.version("numpy")
    assert unmet() == [
        f"numpy {found} is installed, and >=98,<99 is wanted: pip install 'numpy>=98,<99'",
        "no-such-package-at-all is missing, and <2 is wanted: "
        "pip install 'no-such-package-at-all<2'",
    ]


def test_a_neuron_and_doctor_tell_of_a_clash(
    tmp_path: Path, other_hiveminer: None, caplog: pytest.LogCaptureFixture
) -> None:
    settings = miner_settings(tmp_path)
    with SmallMiner(settings):
        words = told(caplog, "dependencies")
    assert [line.split()[0] for line in words] == ["numpy", "no-such-package-at-all"]
    check = machine.packages(Examination(settings))
    assert (check.verdict, check.found) == ("failed", "; ".join(unmet()))


def test_an_import_that_fails_for_a_clash_is_one_line(
    other_hiveminer: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "hiveminer.commands.status", None)
    monkeypatch.delattr(hiveminer, "status", raising=False)  # if it was imported before
    assert cli.main(["status"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hiveminer: ")
    assert "pip install 'numpy>=98,<99'" in line


def test_an_import_that_fails_for_no_clash_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hiveminer.commands.status", None)
    monkeypatch.delattr(hiveminer, "status", raising=False)  # if it was imported before
    with pytest.raises(ImportError):
        cli.main(["status"])


# embedded_chain, batch_meaning and catch_up


def test_the_embedded_network_says_that_it_is_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with SmallMiner(miner_settings(tmp_path)):
        pass
    (words,) = told(caplog, "embedded_chain")
    assert words.startswith(f"This is the embedded network: a chain in {tmp_path / 'network'}")
    assert "--subtensor.network finney" in words


def test_what_steps_epochs_and_the_rate_are_and_a_step_larger_than_an_epoch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with miner_alone(tmp_path, toml="[swarm]\nepoch_samples = 7") as miner:
        (words,) = told(caplog, "batch_meaning")
        assert "after 7 rows of all peers together" in words
        assert "the learning rate of 0.003 is that of each peer's own steps" in words
        caplog.clear()
        for name in ("one", "two"):
            miner.forward(request(request_id=name))
        (words,) = told(caplog, "batch_meaning")  # once
        assert "request one holds 8 rows and an epoch 7" in words
        caplog.clear()
        miner.forward(request(batch_size=7))
        # So many rows in a step are asked for, and the request does not have them.
        miner.forward(request(dataset_indices=[1, 2], gradient_accumulation_steps=4))
        assert not told(caplog, "batch_meaning")
        assert not told(caplog, "catch_up")


class Discarding(InProcessStrategy):
    def step(self, *, batch_size: int) -> bool:
        return False


def test_rows_that_were_thrown_away_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with miner_alone(tmp_path, strategy=lambda context: Discarding(Hub(), context)) as miner:
        assert miner.forward(request()).discarded == 8
    (words,) = told(caplog, "catch_up")
    assert "8 rows of request request1 were discarded" in words
    assert "do not count for the answer" in words
