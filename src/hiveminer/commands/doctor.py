"""`hiveminer doctor`: checks whether this machine is ready to mine, and changes nothing.

Each check prints one line: passed, warned or failed, with the remedy. It takes the miner's own
settings, needs no internet for the embedded network, starts no swarm and registers nothing. A
check that hangs is cut off, so that everything ends within half a minute.
"""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial

from rich.markup import escape
from rich.table import Table

from hiveminer.commands.checks import chain, machine, rounds, training
from hiveminer.commands.checks.base import Check, Examination, failed
from hiveminer.config.settings import MinerSettings
from hiveminer.errors import ChainError, OperatorError, one_line
from hiveminer.runtime.program import rendered

TOTAL_SECONDS = 28.0
"""Limit of all checks together; one that is unfinished by then fails."""

CHECK_SECONDS = 12.0

LOAD_SECONDS = 300.0
"""Limit of the check that loads model and data; not counted in TOTAL_SECONDS."""

CHECKS: tuple[tuple[str, Callable[[Examination], Check]], ...] = (
    ("python", machine.python),
    ("packages", machine.packages),
    ("temporary and open files", machine.limits),
    ("run", training.run_file),
    ("device and memory", training.memory),
    ("disk", machine.disk),
    ("ports", machine.ports),
    ("wallet", chain.wallet),
    ("chain", chain.chain),
    ("clock", chain.clock),
    ("registered", chain.registered),
    ("stake and permit", chain.stake),
    ("address", chain.address),
    ("axon on the chain", chain.axon),
    ("rounds", rounds.rounds),
    ("model and data", training.task),
    ("bootstrap peers", training.peers),
    ("wandb", machine.wandb),
    ("reachable from outside", chain.outside),
)
"""Every check, in the order in which they need each other."""


def examine(exam: Examination) -> Iterator[Check]:
    """Run every check, each within its time limit."""
    deadline = time.monotonic() + TOTAL_SECONDS
    try:
        for name, check in CHECKS:
            began = time.monotonic()
            loads = check is training.task
            left = LOAD_SECONDS if loads else min(CHECK_SECONDS, deadline - began)
            found = within(partial(check, exam), seconds=left)
            deadline += time.monotonic() - began if loads else 0.0
            yield replace(found, name=name)
    finally:
        if exam.chain is not None:
            exam.chain.close()


def within(check: Callable[[], Check], *, seconds: float) -> Check:
    """The result of a check; an error or a timeout is a failure."""
    future: concurrent.futures.Future[Check] = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(check())
        except BaseException as error:  # noqa: BLE001 - reported below
            future.set_exception(error)

    if seconds <= 0:
        return failed("not checked: the checks before it took too long", "fix those first")
    # A daemon thread, so that a check that hangs does not keep the program from ending.
    threading.Thread(target=work, name="check", daemon=True).start()
    try:
        return future.result(seconds)
    except concurrent.futures.TimeoutError:
        return failed(f"no answer within {seconds:.0f} s", "check the network, and try again")
    except (OperatorError, ChainError) as error:
        found, _, cure = one_line(error).partition("; ")
        again = (
            "try again in a minute" if isinstance(error, ChainError) else "fix it, then try again"
        )
        return failed(found, cure or again)
    except Exception as error:  # noqa: BLE001 - one broken check must not hide the others
        return failed(f"{type(error).__name__}: {one_line(error)[:200]}", "report it")


MARKS = {"passed": "[green]passed[/]", "warned": "[yellow]warned[/]", "failed": "[red]failed[/]"}


def as_text(checks: Sequence[Check]) -> str:
    """A table for people."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for column in ("verdict", "name", "found"):
        table.add_column(column, overflow="fold")
    for check in checks:
        cure = f"\n-> {check.cure}" if check.cure else ""
        table.add_row(MARKS[check.verdict], check.name, escape(check.found + cure))
    count = {v: sum(c.verdict == v for c in checks) for v in ("passed", "warned", "failed")}
    return rendered(table, ", ".join(f"{number} {verdict}" for verdict, number in count.items()))


def main(settings: MinerSettings, *, as_json_text: bool = False) -> int:
    """Check this machine; the exit code is the number of failures, at most 100."""
    checks = list(examine(Examination(settings)))
    failures = sum(check.verdict == "failed" for check in checks)
    if as_json_text:
        found = {"failed": failures, "checks": [asdict(check) for check in checks]}
        print(json.dumps(found, indent=1))
    else:
        print(as_text(checks))
    return min(100, failures)
