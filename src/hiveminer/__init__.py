"""Hiveminer: a Bittensor miner that trains a language model together with other miners.

`from hiveminer import Miner` is all that a subnet's own miner needs. The names below are
loaded when they are first used, so that `import hiveminer` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hiveminer.__version__ import __version__

if TYPE_CHECKING:
    from hiveminer.miner import Miner
    from hiveminer.neuron import BaseMinerNeuron
    from hiveminer.protocol import IsAlive, Train
    from hiveminer.validation.scoring import Evidence
    from hiveminer.validator import Validator

_HOMES = {
    "BaseMinerNeuron": "hiveminer.neuron",
    "Evidence": "hiveminer.validation.scoring",
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
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ImportError as error:
        from hiveminer.runtime.dependencies import explained

        words = explained(error)
        if words is None:
            raise
        raise ImportError(words) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
