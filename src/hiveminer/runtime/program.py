"""How a program ends: one line for an operator's mistake, flushed output, an exit code."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from hiveminer.errors import ChainError, OperatorError, SwarmError, one_line
from hiveminer.runtime.logs import report


@contextmanager
def script() -> Iterator[None]:
    """Context of a user's own `miner.py`. Raises SystemExit: after one line on stderr for an
    OperatorError, ChainError or SwarmError, and with exit code 130 for Ctrl-C."""
    fill_standard_descriptors()
    try:
        yield
    except (OperatorError, ChainError, SwarmError) as error:
        report(one_line(error))
        raise SystemExit(getattr(error, "exit_code", 1)) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def fill_standard_descriptors() -> None:
    """Open /dev/null for a missing stdin, stdout or stderr: otherwise the next file or socket
    would get its number, and its output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # gets the lowest free number


def rendered(*parts: Any, width: int | None = None) -> str:
    """Rich renderables as text for stdout. width: of a file or a pipe."""
    from rich.console import Console

    console = Console()
    if width is not None and not console.is_terminal:
        console = Console(width=width)  # nothing is cut
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return capture.get().removesuffix("\n")


def run_program(main: Callable[[], int | None]) -> int:
    """Run a program's main function and return its exit code: 130 after Ctrl-C, 0 for None.

    Output that cannot be written is reported in one line, with a code above 0.
    """
    fill_standard_descriptors()
    if sys.stdout is sys.__stdout__:  # and not a test's own
        if sys.stdout is not None:
            sys.stdout.flush()
        sys.stdout = Output()
    return _code_of(main) or _code_of(sys.stdout.flush)


def _code_of(main: Callable[[], int | None]) -> int:
    try:
        with script():
            return main() or 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)


class Output(io.TextIOWrapper):
    """This process's stdout. Raises OperatorError when it cannot be written to."""

    def __init__(self) -> None:
        super().__init__(
            os.fdopen(1, "wb", closefd=False), errors="replace", line_buffering=os.isatty(1)
        )

    def write(self, text: str) -> int:
        with self._arriving():
            return super().write(text)

    def flush(self) -> None:
        with self._arriving():
            super().flush()

    @contextmanager
    def _arriving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with suppress(OSError):  # or Python would try again at its end, and fail loudly
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise OperatorError(
                f"the output could not be written: {error.strerror}; look where stdout goes"
            ) from None
