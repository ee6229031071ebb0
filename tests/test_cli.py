from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

import hiveminer
from hiveminer import cli
from hiveminer.config.settings import (
    DemoSettings,
    MinerSettings,
    ProgramSettings,
    ValidatorSettings,
)
from hiveminer.errors import NotRegistered

ROOT = Path(__file__).resolve().parent.parent

Main = Callable[[ProgramSettings], int | None]


def _stand_in(patch: pytest.MonkeyPatch, name: str, main: Main) -> None:
    module = types.ModuleType(f"hiveminer.{name}")
    patch.setattr(module, "main", main, raising=False)
    patch.setitem(sys.modules, module.__name__, module)
    patch.setattr(hiveminer, name, module, raising=False)


@pytest.mark.parametrize(
    ("name", "words", "kind"),
    [
        ("miner", ["--netuid", "7"], MinerSettings),
        ("validator", ["--validator.rows", "7"], ValidatorSettings),
        ("demo", ["--miners", "7"], DemoSettings),
    ],
)
def test_a_command_hands_its_settings_on(
    monkeypatch: pytest.MonkeyPatch, name: str, words: list[str], kind: type[ProgramSettings]
) -> None:
    seen: list[ProgramSettings] = []

    def main(settings: ProgramSettings) -> int:
        seen.append(settings)
        return 5

    _stand_in(monkeypatch, name, main)
    assert cli.main([name, *words]) == 5
    assert [type(settings) for settings in seen] == [kind]


def test_a_commands_mistake_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(settings: ProgramSettings) -> None:
        raise NotRegistered("this hotkey is not registered")

    _stand_in(monkeypatch, "miner", main)
    assert cli.main(["miner"]) == 3
    assert capsys.readouterr().err == "hiveminer: this hotkey is not registered\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["minre"], "hiveminer: 'minre' is not a command; did you mean miner?"),
        (["zzz"], "hiveminer: 'zzz' is not a command: there are demo, miner, validator"),
        (["miner", "--axon.prot", "1"], "hiveminer: --axon.prot: no such flag; did you mean "),
    ],
)
def test_a_wrong_word_is_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    assert cli.main(words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(line)
    assert told.err.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["--help"], ["help"], ["demo", "--help"], ["miner", "-h"]])
def test_help_ends_well(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert cli.main(words) == 0
    assert capsys.readouterr().out.startswith("usage: hiveminer ")


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)


def test_the_program_says_its_version_without_loading_torch() -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "hiveminer", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == f"hiveminer {hiveminer.__version__}\n"
    assert " torch" not in result.stderr


@pytest.mark.parametrize("name", ["demo", "test", "check", "bench", "setup"])
def test_scripts_can_be_run(name: str) -> None:
    script = ROOT / "scripts" / name
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_bench_lists_names_and_refuses_an_unknown_one() -> None:
    bench = str(ROOT / "scripts" / "bench")
    listed = subprocess.run([bench], capture_output=True, text=True, check=True)
    assert listed.stdout.startswith("usage: scripts/bench NAME")
    refused = subprocess.run([bench, "../x"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("scripts/bench: there is no benchmark ../x; there are:")
