"""`hiveminer doctor`: is this machine ready to mine? Checks everything, changes nothing.

Each check is one line, passed, warned or failed, with what to do. It takes the miner's own
settings, needs no network for the embedded one, starts no swarm and registers nothing. A
check that hangs is cut off, so that the whole ends within half a minute.
"""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

from rich.table import Table

from hiveminer.commands.checks.base import Check, failed
from hiveminer.commands.checks.chain import ChainChecks
from hiveminer.commands.checks.machine import MachineChecks
from hiveminer.commands.checks.training import TrainingChecks
from hiveminer.config.settings import MinerSettings
from hiveminer.errors import ChainError, OperatorError
from hiveminer.runtime.program import rendered

TOTAL_SECONDS = 28.0
"""All checks together; one that is unfinished by then is cut off and fails."""

CHECK_SECONDS = 12.0
"""One check, at most."""

LOAD_SECONDS = 300.0
"""The check that loads model and data, at most; not counted in TOTAL_SECONDS."""

MAX_EXIT_CODE = 100


class Doctor(MachineChecks, ChainChecks, TrainingChecks):
    """All checks of one machine with one set of settings, in their order."""

    def checks(self) -> list[tuple[str, Callable[[], Check]]]:
        """Every check with its name, in the order that the later ones need the earlier."""
        return [
            ("python", self.python),
            ("packages", self.packages),
            ("temporary and open files", self.limits),
            ("run", self.run_file),
            ("device and memory", self.memory),
            ("disk", self.disk),
            ("ports", self.ports),
            ("wallet", self.wallet),
            ("chain", self.chain),
            ("clock", self.clock),
            ("registered", self.registered),
            ("stake and permit", self.stake),
            ("address", self.address),
            ("axon on the chain", self.axon),
            ("model and data", self.task),
            ("bootstrap peers", self.peers),
            ("wandb", self.wandb),
            ("reachable from outside", self.outside),
        ]

    def examine(self) -> Iterator[Check]:
        """Do every check, each within its time."""
        deadline = time.monotonic() + TOTAL_SECONDS
        try:
            for name, look in self.checks():
                began = time.monotonic()
                loads = look == self.task
                left = LOAD_SECONDS if loads else min(CHECK_SECONDS, deadline - began)
                found = within(look, seconds=left)
                deadline += time.monotonic() - began if loads else 0.0
                yield Check(name, found.verdict, found.found, found.cure)
        finally:
            if self._chain is not None:
                self._chain.close()


def within(look: Callable[[], Check], *, seconds: float) -> Check:
    """A check's outcome; its mistakes are failures, and so is taking too long."""
    future: concurrent.futures.Future[Check] = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(look())
        except BaseException as error:  # noqa: BLE001 - told below
            future.set_exception(error)

    if seconds <= 0:
        return failed("not looked at: the checks before it took too long", "put those right first")
    # A thread of our own: one that hangs for ever must not keep the program from ending.
    threading.Thread(target=work, name="check", daemon=True).start()
    try:
        return future.result(seconds)
    except concurrent.futures.TimeoutError:
        return failed(f"no answer within {seconds:.0f} s", "look at the network, and try again")
    except (OperatorError, ChainError) as error:
        found, _, cure = " ".join(str(error).split()).partition("; ")
        return failed(found, cure or "try again in a minute")
    except Exception as error:  # noqa: BLE001 - one broken check must not hide the others
        return failed(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", "report it")


MARKS = {"passed": "[green]passed[/]", "warned": "[yellow]warned[/]", "failed": "[red]failed[/]"}


def as_text(checks: Sequence[Check]) -> str:
    """A table for people."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for column in ("verdict", "name", "found"):
        table.add_column(column, overflow="fold")
    for check in checks:
        cure = f"\n-> {check.cure}" if check.cure else ""
        table.add_row(MARKS[check.verdict], check.name, _plain(check.found + cure))
    count = {v: sum(c.verdict == v for c in checks) for v in ("passed", "warned", "failed")}
    return rendered(table, ", ".join(f"{number} {verdict}" for verdict, number in count.items()))


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def as_json(checks: Sequence[Check]) -> str:
    """The same for machines."""
    failures = sum(check.verdict == "failed" for check in checks)
    return json.dumps({"failed": failures, "checks": [asdict(check) for check in checks]}, indent=1)


def main(settings: MinerSettings, *, as_json_text: bool = False) -> int:
    """Examine this machine; the exit code is the number of failures, 100 at most."""
    checks = list(Doctor(settings).examine())
    print(as_json(checks) if as_json_text else as_text(checks))
    return min(MAX_EXIT_CODE, sum(check.verdict == "failed" for check in checks))
