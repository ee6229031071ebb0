"""One check of `hiveminer doctor`, its verdicts, and what the checks share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import bittensor as bt

from hiveminer.chain import Chain
from hiveminer.config.run import Run, RunId
from hiveminer.config.settings import MinerSettings
from hiveminer.runtime import addresses

Verdict = Literal["passed", "warned", "failed"]


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, what was found, and what to do about it."""

    name: str
    verdict: Verdict
    found: str
    cure: str = ""


def passed(found: str) -> Check:
    return Check("", "passed", found)


def warned(found: str, cure: str) -> Check:
    return Check("", "warned", found, cure)


def failed(found: str, cure: str) -> Check:
    return Check("", "failed", found, cure)


class Checks:
    """The settings to check, and what the earlier checks found for the later ones.

    clock: seconds since 1970. ask_outside: asks for the public address. Both are for tests,
    as is `environ`.
    """

    def __init__(
        self,
        settings: MinerSettings,
        *,
        clock: Callable[[], float] = time.time,
        ask_outside: Callable[[], str] = addresses.ask_outside,
        environ: Mapping[str, str] = os.environ,
    ):
        self.settings = settings
        self._clock = clock
        self._ask_outside = ask_outside
        self._environ = environ
        self._wallet: Any = None
        self._chain: Chain | None = None
        self._metagraph: bt.Metagraph | None = None
        self._run: Run | None = None
        self._run_id: RunId | None = None
        self._fits = False
        self._ip: str | None = None


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
