"""The program `hiveminer`: from flags to objects, and nothing else.

What a command needs is imported when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from hiveminer.__version__ import __version__
from hiveminer.config import flags
from hiveminer.config.settings import DemoSettings, MinerSettings, ValidatorSettings, parse
from hiveminer.errors import OperatorError
from hiveminer.runtime.dependencies import explained
from hiveminer.runtime.program import run_program

__all__ = ["main", "run_program"]


def _demo(argv: Sequence[str]) -> int | None:
    """Start a validator and miners on this machine, and show how they learn."""
    settings = parse(argv, cls=DemoSettings, prog="hiveminer demo", description=_sentence(_demo))
    from hiveminer.commands import demo

    return demo.main(settings)


def _miner(argv: Sequence[str]) -> int | None:
    """Train what validators send, together with the other miners."""
    settings = parse(argv, cls=MinerSettings, prog="hiveminer miner", description=_sentence(_miner))
    from hiveminer import miner

    return miner.main(settings)


def _validator(argv: Sequence[str]) -> int | None:
    """Give miners rows to train on, judge their answers, and set weights."""
    settings = parse(
        argv, cls=ValidatorSettings, prog="hiveminer validator", description=_sentence(_validator)
    )
    from hiveminer import validator

    return validator.main(settings)


def _doctor(argv: Sequence[str]) -> int | None:
    """Look at this machine with a miner's flags, and say what is wrong (--json for machines)."""
    words, as_json = _without_json(argv)
    settings = parse(
        words, cls=MinerSettings, prog="hiveminer doctor", description=_sentence(_doctor)
    )
    from hiveminer.commands import doctor

    return doctor.main(settings, as_json_text=as_json)


def _status(argv: Sequence[str]) -> int | None:
    """Show the subnet's neurons, with a miner's flags (--json for machines)."""
    words, as_json = _without_json(argv)
    settings = parse(
        words, cls=MinerSettings, prog="hiveminer status", description=_sentence(_status)
    )
    from hiveminer.commands import status

    return status.main(settings, as_json_text=as_json)


def _without_json(argv: Sequence[str]) -> tuple[list[str], bool]:
    return [word for word in argv if word != "--json"], "--json" in argv


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "demo": _demo,
    "miner": _miner,
    "validator": _validator,
    "doctor": _doctor,
    "status": _status,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` are the words after `hiveminer`. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return run_program(lambda: _run(words))


def _run(words: Sequence[str]) -> int | None:
    command, *rest = words or ["--help"]
    if command in COMMANDS:
        try:
            return COMMANDS[command](rest)
        except ImportError as error:
            said = explained(error)
            if said is None:
                raise
            raise OperatorError(said) from error
    if command in ("-h", "--help", "help"):
        print(_overview())
    elif command == "--version":
        print(f"hiveminer {__version__}")
    else:
        hint = flags.did_you_mean(command, COMMANDS)
        raise OperatorError(
            f"{command!r} is not a command{hint or ': there are ' + ', '.join(COMMANDS)}"
        )
    return 0


def _overview() -> str:
    lines = [f"  {name:<11}{_sentence(command)}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hiveminer COMMAND [--flag value ...]",
            "",
            "Train a language model together with other miners, on Bittensor.",
            "",
            *lines,
            "",
            "hiveminer COMMAND --help lists the command's flags; hiveminer --version the version.",
        ]
    )


def _sentence(command: Callable[..., object]) -> str:
    return (command.__doc__ or "").strip()
