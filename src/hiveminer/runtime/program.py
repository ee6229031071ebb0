"""How a program ends: one line for an operator's mistake, and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hiveminer.errors import ChainError, HiveminerError, OperatorError, SwarmError


@contextmanager
def exit_on_operator_error() -> Iterator[None]:
    """End the program with one line on stderr, where an operator's mistake comes out of here.

    Also for a chain or a swarm that does not answer. Works as a decorator as well. Raises
    SystemExit with the error's exit code; all other exceptions pass through.
    """
    try:
        yield
    except (OperatorError, ChainError, SwarmError) as error:
        print(f"hiveminer: {_words(error)}", file=sys.stderr, flush=True)
        raise SystemExit(getattr(error, "exit_code", 1)) from error


@contextmanager
def script() -> Iterator[None]:
    """What a user's own `miner.py` runs in: one line for a mistake, 130 for Ctrl-C."""
    with exit_on_operator_error():
        try:
            yield
        except KeyboardInterrupt:
            raise SystemExit(130) from None


def _words(error: HiveminerError) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def run_program(main: Callable[[], int | None]) -> int:
    """Run a program's main function to its exit code: 130 after Ctrl-C, 0 for None."""
    try:
        with script():
            return main() or 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
