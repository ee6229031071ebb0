"""Hiveminer: a Bittensor miner that trains a language model together with other miners.

`from hiveminer import Miner` is all that a subnet's own miner needs. The names below are
loaded on first use, so that `import hiveminer` costs nothing.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hiveminer.__version__ import __version__

if TYPE_CHECKING:
    from hiveminer.base_miner import BaseMinerNeuron
    from hiveminer.miner import Miner
    from hiveminer.protocol import IsAlive, Train
    from hiveminer.validation.curves import Evidence
    from hiveminer.validator import Validator

_HOMES = {
    "BaseMinerNeuron": "hiveminer.base_miner",
    "Evidence": "hiveminer.validation.curves",
    "IsAlive": "hiveminer.protocol",
    "Miner": "hiveminer.miner",
    "Train": "hiveminer.protocol",
    "Validator": "hiveminer.validator",
}

__all__ = [
    "BaseMinerNeuron",
    "Evidence",
    "IsAlive",
    "Miner",
    "Train",
    "Validator",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        with _quiet_interrupt():
            return getattr(importlib.import_module(_HOMES[name]), name)
    except ImportError as error:
        from hiveminer.runtime.dependencies import explained

        words = explained(error)
        if words is None:
            raise
        raise ImportError(words) from error


@contextmanager
def _quiet_interrupt() -> Iterator[None]:
    """While the libraries load for a script, Ctrl-C ends it in one line.

    A KeyboardInterrupt would end in a page of traceback, or inside a library that drops
    it. Nothing is running yet that needs to be shut down.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not (in_main_thread and default and _imported_by_script()):
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: object) -> None:
    os.write(2, b"hiveminer: interrupted while starting\n")
    os._exit(128 + number)


def _imported_by_script() -> bool:
    """Whether the import is a statement of the program itself, not of a notebook or module."""
    frame = sys._getframe()
    between = (__name__, "contextlib", "importlib._bootstrap")
    while frame.f_back and frame.f_globals["__name__"] in between:
        frame = frame.f_back
    return frame.f_globals["__name__"] == "__main__" and "__file__" in frame.f_globals


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
