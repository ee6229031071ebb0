"""One check of `hiveminer doctor`, its verdicts, and what the checks share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import bittensor as bt

from hiveminer.chain import Chain
from hiveminer.config.run import Run, RunId
from hiveminer.config.settings import MinerSettings
from hiveminer.runtime import addresses


@dataclass(frozen=True)
class Check:
    """The result of one check: what was found, and what to do about it."""

    verdict: Literal["passed", "warned", "failed"]
    found: str
    cure: str = ""
    name: str = ""


passed = partial(Check, "passed")
warned = partial(Check, "warned")
failed = partial(Check, "failed")


@dataclass
class Examination:
    """The settings to check, and what the earlier checks found for the later ones.

    clock: seconds since 1970. ask_outside: returns the public address. ip: the address to
    publish.
    """

    settings: MinerSettings
    clock: Callable[[], float] = time.time
    ask_outside: Callable[[], str] = addresses.ask_outside
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    wallet: Any = None
    chain: Chain | None = None
    metagraph: bt.Metagraph | None = None
    run: Run | None = None
    run_id: RunId | None = None
    fits: bool = False
    ip: str | None = None


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
