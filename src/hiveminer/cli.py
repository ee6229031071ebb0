"""The `hiveminer` program: parses the command line and runs one command.

Commands are imported when they run, so that `--help` answers at once.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from hiveminer.__version__ import __version__


class Command(NamedTuple):
    """A command's settings class, its description, and what it takes besides flags."""

    settings: str
    sentence: str
    has_json: bool = False
    word: str = ""
    """The setting that a first argument without a flag sets."""


COMMANDS = {
    "demo": Command(
        "DemoSettings", "Start a validator and miners on this machine, and show how they learn."
    ),
    "miner": Command(
        "MinerSettings", "Train what validators send, together with the other miners."
    ),
    "validator": Command(
        "ValidatorSettings", "Give miners rows to train on, judge their answers, and set weights."
    ),
    "doctor": Command(
        "MinerSettings",
        "Check this machine with a miner's flags, and say what is wrong (--json for machines).",
        has_json=True,
    ),
    "status": Command(
        "MinerSettings",
        "Show the subnet's neurons, with a miner's flags (--json for machines).",
        has_json=True,
    ),
    "export": Command(
        "ExportSettings", "Write the trained model as a folder that transformers loads anywhere."
    ),
    "generate": Command(
        "GenerateSettings",
        "Continue a text with the trained model.",
        word="text",
    ),
    "evaluate": Command(
        "EvaluateSettings",
        "Measure the trained model on held-out rows, and what the run began with (--json).",
        has_json=True,
    ),
    "log": Command(
        "LogSettings",
        "List the rounds of strategy sparseloco, and --verify them (--json for machines).",
        has_json=True,
        word="folder",
    ),
    "run new": Command(
        "RunNewSettings", "Write a commented run.toml, with the data's hash filled in."
    ),
    "run check": Command(
        "RunCheckSettings",
        "Say what is wrong or unwise in a run.toml.",
        word="file",
    ),
}


def main(
    argv: Sequence[str] | None = None, *, load: Callable[[str], Any] = importlib.import_module
) -> int:
    """Run one command and return its exit code. argv: the arguments after `hiveminer`."""
    words = list(sys.argv[1:] if argv is None else argv)
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # and not ignored, as in a shell's background
        signal.signal(signal.SIGINT, _interrupted)
    try:
        from hiveminer.runtime.program import run_program

        return run_program(lambda: _run(words, load))
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupted(_number: int, _frame: FrameType | None) -> NoReturn:
    """Ctrl-C before a command handles signals: a KeyboardInterrupt in the middle of an import
    could be swallowed by a library."""
    os.write(2, b"hiveminer: interrupted\n")
    os._exit(130)


def _run(words: Sequence[str], load: Callable[[str], Any]) -> int | None:
    from hiveminer.config import settings as config
    from hiveminer.config.flags import did_you_mean, parse
    from hiveminer.errors import OperatorError
    from hiveminer.runtime.dependencies import explained

    name, *rest = words or ["--help"]
    if rest and f"{name} {rest[0]}" in COMMANDS:
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name == "--version":
        print(f"hiveminer {__version__}")
        return 0
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or f": there are {', '.join(COMMANDS)}"
        raise OperatorError(f"{name!r} is not a command{hint}")
    command = COMMANDS[name]
    options: dict[str, Any] = {}
    if command.has_json:
        options["as_json_text"] = "--json" in rest
        rest = [word for word in rest if word != "--json"]
    if command.word and rest and not rest[0].startswith("-"):
        rest = [f"--{command.word}={rest[0]}", *rest[1:]]
    tree = getattr(config, command.settings)
    settings = parse(rest, cls=tree, prog=f"hiveminer {name}", description=command.sentence)
    try:
        code: int | None = load(module_of(name)).main(settings, **options)
    except ImportError as error:
        reason = explained(error)
        if reason is None:
            raise
        raise OperatorError(reason) from error
    return code


def module_of(name: str) -> str:
    """The module whose `main(settings)` is this command."""
    package = "hiveminer" if name in ("miner", "validator") else "hiveminer.commands"
    return f"{package}.{name.replace(' ', '_')}"


def _overview() -> str:
    commands = "\n".join(f"  {name:<11}{each.sentence}" for name, each in COMMANDS.items())
    return (
        "usage: hiveminer COMMAND [--flag value ...]\n\n"
        "Train a language model together with other miners, on Bittensor.\n\n"
        f"{commands}\n\n"
        "hiveminer COMMAND --help lists the command's flags; hiveminer --version the version."
    )
