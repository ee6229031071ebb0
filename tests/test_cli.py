"""The command line: commands, help, and how a program ends."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

import hiveminer
from hiveminer import cli
from hiveminer.config import settings
from hiveminer.config.settings import DemoSettings, MinerSettings, ProgramSettings
from hiveminer.errors import NotRegistered


@pytest.mark.parametrize(
    ("name", "words", "module", "kind"),
    [
        ("miner", ["--netuid", "7"], "hiveminer.miner", MinerSettings),
        ("demo", ["--miners", "7"], "hiveminer.commands.demo", DemoSettings),
        ("status", ["--json", "--netuid", "7"], "hiveminer.commands.status", MinerSettings),
    ],
)
def test_a_command_hands_its_settings_on(
    name: str, words: list[str], module: str, kind: type[ProgramSettings]
) -> None:
    seen: list[object] = []

    def load(name: str) -> object:
        seen.append(name)
        return types.SimpleNamespace(main=lambda settings, **_options: seen.append(settings) or 5)

    assert cli.main([name, *words], load=load) == 5
    assert seen[0] == module
    assert type(seen[1]) is kind


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_can_be_loaded(name: str) -> None:
    assert callable(importlib.import_module(cli.module_of(name)).main)
    assert issubclass(getattr(settings, cli.COMMANDS[name].settings), ProgramSettings)


def test_a_commands_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def load(_name: str) -> object:
        raise NotRegistered("this hotkey is not registered")

    assert cli.main(["miner"], load=load) == 3
    assert capsys.readouterr().err == "hiveminer: this hotkey is not registered\n"


def test_ctrl_c_during_an_import_is_one_line(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time, importlib\n"
        "from hiveminer import cli\n"
        "def load(name):\n"
        "    print('importing', flush=True)\n"
        "    try:\n"
        "        time.sleep(60)\n"
        "    except BaseException as error:\n"  # as some extension modules do
        "        raise ImportError('cannot be imported') from error\n"
        "sys.exit(cli.main(['miner'], load=load))\n"
    )
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "hiveminer: interrupted\n"


def test_an_unknown_command_is_answered_with_those_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["zzz"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("hiveminer: 'zzz' is not a command: there are demo, miner, ")
    assert told.err.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["--help"], ["help"], ["demo", "--help"], ["miner", "-h"]])
def test_help_ends_well(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert cli.main(words) == 0
    assert capsys.readouterr().out.startswith("usage: hiveminer ")


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)


def test_the_program_says_its_version_without_loading_anything_heavy() -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "hiveminer", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == f"hiveminer {hiveminer.__version__}\n"
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "hiveminer.cli" in loaded
    assert not loaded & {"bittensor", "hivemind", "torch", "transformers", "wandb"}
