"""Mistakes that operators make. Each ends the program with one line that names the cause and
the cure, and never with a traceback."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import bittensor as bt
import pytest
from embedded_network import on_testnet
from small_neurons import SmallMiner, miner_settings

from hiveminer import cli
from hiveminer.chain import named_embedded_wallet
from hiveminer.errors import OperatorError
from programs import ROOT, Program

DEAD = "ws://127.0.0.1:1"

Prepare = Callable[[Path, pytest.MonkeyPatch], contextlib.AbstractContextManager[object] | None]


@dataclass
class Mistake:
    """`words` after `hiveminer`, with {here} for a folder of the test's own."""

    name: str
    words: str
    says: list[str]
    """In the one line: what is wrong, and what to do."""
    code: int = 2
    prepare: Prepare = field(default=lambda here, patch: None)


def write(name: str, text: str) -> Prepare:
    def prepare(here: Path, _: pytest.MonkeyPatch) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(text)

    return prepare


def held_key(here: Path, _: pytest.MonkeyPatch) -> contextlib.AbstractContextManager[object]:
    return named_embedded_wallet(here / "network", "default", "mine")


def busy_port(here: Path, patch: pytest.MonkeyPatch) -> contextlib.AbstractContextManager[object]:
    listener = socket.create_server(("127.0.0.1", 0))
    patch.setenv("HIVEMINER_DHT__PORT", str(listener.getsockname()[1]))
    return listener


def good_hotkey(here: Path, _: pytest.MonkeyPatch) -> None:
    bt.Wallet("w", "h", str(here / "wallets")).create_new_hotkey(suppress=True)


REAL = "--subtensor.network test --wallet.name w --wallet.hotkey h --wallet.path {here}/wallets"
RUN = "miner --neuron.run {here}/run.toml"

RUN_FILES = {
    "[model]\nsequence_length = 1": [
        "run.toml: model.sequence_length",
        "greater than or equal to 2",
    ],
    'oldest_version = "99.0.0"': ["wants 99.0.0 or newer: upgrade hiveminer"],
    f'[data]\nhash = "{"0" * 64}"': ["the run wants", "get the run's own data"],
    '[data]\nname = "./no.txt"': ["data no.txt", "no such file or folder"],
    '[model]\nname = "./no"': ["model ./no", "save_pretrained"],
    "[model]\nsequence_length = 4096": ["model.sequence_length is 4096", "lower it in run.toml"],
}
"""Run files that a miner refuses, and what it says."""

MISTAKES = [
    # Words
    Mistake("unknown command", "minre", ["'minre' is not a command", "did you mean miner?"]),
    Mistake("unknown flag", "miner --axon.prot 1", ["--axon.prot", "did you mean --axon.port?"]),
    Mistake(
        "web address for a node",
        "miner --subtensor.network https://x",
        ["--subtensor.network", "wss://host:443"],
    ),
    Mistake("zero rows", "validator --validator.rows 0", ["--validator.rows", "from 1 to 4096"]),
    # Run, model and data
    Mistake("no run.toml", RUN, ["run.toml: no such file", "--neuron.run wants"]),
    *(
        Mistake(toml, RUN, says, prepare=write("run.toml", toml))
        for toml, says in RUN_FILES.items()
    ),
    # Keys and folders
    Mistake(
        "no hotkey",
        f"miner {REAL}",
        ["there is no hotkey at", "btcli wallet new-hotkey --wallet w --wallet-hotkey h"],
    ),
    Mistake(
        "damaged hotkey",
        f"miner {REAL}",
        ["the hotkey at", "cannot be read"],
        prepare=write("wallets/w/hotkeys/h", "junk"),
    ),
    Mistake(
        "key that another process uses",
        "miner --wallet.hotkey mine",
        ["in use by process", "choose another with --wallet.hotkey"],
        prepare=held_key,
    ),
    Mistake(
        "file where a folder should be",
        "miner --subtensor.path {here}/file",
        ["cannot be kept under", "choose a folder"],
        prepare=write("file", ""),
    ),
    Mistake(
        "state folder that cannot be made",
        "miner --neuron.path {here}/file",
        ["--neuron.path", "choose another"],
        prepare=write("file", ""),
    ),
    Mistake(
        "another program's file",
        "miner",
        ["chain.sqlite", "choose another place"],
        prepare=write("network/chain.sqlite", "junk" * 1000),
    ),
    # Chain and addresses
    Mistake(
        "node that is not there",
        f"miner {REAL.replace('test', DEAD)}",
        ["connecting on ws://127.0.0.1:1"],
        code=1,
        prepare=good_hotkey,
    ),
    Mistake("no such subnet", "miner --netuid 7", ["has no subnet 7", "--netuid"]),
    Mistake(
        "port in use", "miner", ["--dht.port", "in use on", "choose another"], prepare=busy_port
    ),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HIVEMINER_SUBTENSOR__PATH", str(tmp_path / "network"))
    monkeypatch.setenv("HIVEMINER_NEURON__PATH", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name.replace(" ", "-"))
def test_a_mistake_is_one_line(
    mistake: Mistake,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with mistake.prepare(here, monkeypatch) or contextlib.nullcontext():
        code = cli.main(mistake.words.format(here=here).split())
    told = capsys.readouterr()
    lines = [line for line in told.err.splitlines() if line.startswith("hiveminer: ")]
    assert code == mistake.code, told.err
    assert told.err.splitlines()[-1:] == lines or "stopped" in told.err.splitlines()[-1], told.err
    assert len(lines) == 1, told.err
    assert "Traceback" not in told.err
    assert told.out == ""
    assert len(lines[0]) < 600
    for words in mistake.says:
        assert words in lines[0], lines[0]


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        ("miner.py", ["--axon.prot", "1"], "did you mean --axon.port?"),
        ("validator.py", ["--netuid", "7"], "has no subnet 7"),
    ],
)
def test_so_it_is_in_the_scripts_that_people_copy(
    tmp_path: Path, script: str, words: list[str], says: str
) -> None:
    shutil.copy(ROOT / script, tmp_path / script)
    env = {
        "HIVEMINER_SUBTENSOR__PATH": str(tmp_path / "network"),
        "HIVEMINER_NEURON__PATH": str(tmp_path / "state"),
    }
    with Program([str(tmp_path / script), *words], folder=tmp_path / "run", env=env) as program:
        assert program.process.wait(60) == 2
        said = program.words
    assert says in said.splitlines()[-1]
    assert "Traceback" not in said


def test_a_hotkey_that_is_at_work_already(tmp_path: Path) -> None:
    open_chain, settings = on_testnet(tmp_path), miner_settings(tmp_path)
    with SmallMiner(settings, chain=open_chain()):
        with open_chain() as other, pytest.raises(OperatorError) as raised:
            SmallMiner(settings, chain=other)
        assert f"is in use by process {os.getpid()} on subnet 1" in str(raised.value)
        assert "choose another with --wallet.hotkey" in str(raised.value)
