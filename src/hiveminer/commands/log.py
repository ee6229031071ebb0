"""`hiveminer log`: the rounds that this machine has logged, and whether they can be verified.

It only reads, so it may run beside a miner or validator. The exit code is 0, 1 where
something does not fit, and 2 without a log that can be read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bittensor as bt
from rich.markup import escape
from rich.table import Table

from hiveminer.chain import open_subnet
from hiveminer.chain.wallets import Reader
from hiveminer.config.settings import LogSettings
from hiveminer.errors import OperatorError
from hiveminer.neuron import subnet_folder
from hiveminer.runtime.metrics import progress_bar
from hiveminer.runtime.program import rendered
from hiveminer.strategies.sparseloco.log import PLAN, Log, logs_below
from hiveminer.strategies.sparseloco.onchain import SubnetRounds
from hiveminer.strategies.sparseloco.replay import (
    Comparison,
    Report,
    RoundReport,
    compare,
    summarize,
    verify,
)

SHOWN_CHARACTERS = 12
"""Of a hash, in the table."""


@dataclass(frozen=True)
class Shown:
    """What the command found. compared: with the chain, if that was asked for."""

    folder: Path
    run_id: str
    report: Report
    is_verified: bool | None
    compared: Comparison | None


def find_log(settings: LogSettings) -> Path:
    """The folder that is named, or of this machine's logs on the subnet the one whose newest
    round is the latest. Raises OperatorError."""
    if settings.folder is not None:
        if not (settings.folder / PLAN).is_file():
            raise OperatorError(
                f"{settings.folder} is not a log of rounds: it has no {PLAN}; name the folder of "
                "one, or none for the newest on this machine"
            )
        return settings.folder
    place = subnet_folder(settings)
    found = [log.folder for log in logs_below(place)]
    if not found:
        raise OperatorError(
            f"there is no log of rounds in {place}: only a run with strategy 'sparseloco' keeps "
            "one; name another folder"
        )
    return max(found, key=lambda folder: (folder / "rounds").stat().st_mtime)


OpenRounds = Callable[[LogSettings], AbstractContextManager[SubnetRounds]]


def look(settings: LogSettings, *, open_rounds: OpenRounds) -> Shown:
    """Read the log, and check it if that is asked for. Raises OperatorError and ChainError."""
    folder = find_log(settings)
    log = Log(folder)
    try:
        run_id, plan = log.plan()
    except ValueError as error:
        raise OperatorError(f"{error}; restart the neuron to write it again") from None
    if not settings.verify:
        return Shown(folder, run_id, _only(settings, summarize(log, plan)), None, None)
    total = len(log.blobs()) + len(log.states())
    bars = settings.logging.bars
    with progress_bar(title="verify", total=total, unit="file", shown=bars) as bar:
        report = verify(log, plan, on_file=bar.update)
    compared = None
    if settings.given("subtensor.network"):
        total = len(log.rounds())
        with (
            open_rounds(settings) as chain,
            progress_bar(title="compare", total=total, unit="round", shown=bars) as bar,
        ):
            compared = compare(log, plan.rules.schedule, chain, on_round=bar.update)
        report = replace(report, problems=(*report.problems, *compared.problems))
    report = _only(settings, report)
    is_verified = report.verified and (compared is None or compared.equal > 0)
    return Shown(folder, run_id, report, is_verified, compared)


def _only(settings: LogSettings, report: Report) -> Report:
    """The round that is asked for; all problems stay."""
    if settings.round is None:
        return report
    rounds = tuple(each for each in report.rounds if each.decision.round == settings.round)
    if not rounds and not report.problems:
        raise OperatorError(f"round {settings.round} is not in this log; see hiveminer log")
    return replace(report, rounds=rounds)


def as_json(shown: Shown) -> str:
    """For machines. verified: null unless that was asked for."""
    compared = shown.compared
    return json.dumps(
        {
            "folder": str(shown.folder),
            "run_id": shown.run_id,
            "verified": shown.is_verified,
            "problems": list(shown.report.problems),
            "chain": None
            if compared is None
            else {"equal": compared.equal, "unread": compared.unread, "why": compared.why_unread},
            "rounds": [_round_as_json(each, shown.is_verified) for each in shown.report.rounds],
        },
        indent=1,
    )


def _round_as_json(each: RoundReport, is_verified: bool | None) -> dict[str, Any]:
    decision = each.decision
    return {
        "round": decision.round,
        "parent": decision.parent.hex() if decision.parent else None,
        "state": each.made.hex() if each.made else None,
        "bytes": each.bytes,
        "contributors": [
            {
                "uid": blob.uid,
                "hotkey": bt.sp_core.ss58_encode(blob.hotkey),
                "bytes": blob.blob_bytes,
                "blob": blob.blob_hash.hex(),
            }
            for blob in decision.contributions
        ],
        "left_out": [{"uid": uid, "why": why} for uid, why in each.left_out],
        "empty_because": decision.reason or None,
        "verified": each.verified if is_verified is not None else None,
    }


def as_text(shown: Shown) -> str:
    """A table for people, and below it what is wrong."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("round", "on state", "contributors", "bytes", "left out", "made state"):
        table.add_column(column, overflow="fold", justify="right" if column == "bytes" else "left")
    if shown.is_verified is not None:
        table.add_column("verified")
    for each in shown.report.rounds:
        table.add_row(*_cells(each, has_verdict=shown.is_verified is not None))
    title = f"run {shown.run_id}: {len(shown.report.rounds)} rounds in {shown.folder}"
    return rendered(escape(title), table, *_conclusion(shown), width=200)


def _cells(each: RoundReport, *, has_verdict: bool) -> list[str]:
    decision = each.decision
    left_out = "; ".join(f"{uid}: {why}" for uid, why in each.left_out)
    uids = ", ".join(str(blob.uid) for blob in decision.contributions)
    cells = [
        str(decision.round),
        decision.parent.hex()[:SHOWN_CHARACTERS] if decision.parent else "",
        uids or ": ".join(filter(None, ["none", decision.reason])),
        f"{each.bytes:,}" if decision.contributions else "",
        escape(left_out),
        each.made.hex()[:SHOWN_CHARACTERS] if each.made else "",
    ]
    return [*cells, "yes" if each.verified else ""] if has_verdict else cells


def _conclusion(shown: Shown) -> list[str]:
    lines = [f"[red]{escape(problem)}[/]" for problem in shown.report.problems]
    compared = shown.compared
    if compared is not None:
        lines.append(f"{compared.equal} rounds are on the chain as they were logged")
        if compared.unread:
            lines.append(f"{compared.unread} rounds cannot be compared: {compared.why_unread}")
    if shown.is_verified:
        lines.append("every hash fits")
    elif shown.is_verified is False and not shown.report.problems:
        lines.append("nothing could be verified: no state is kept from which one can be made")
    return lines


@contextmanager
def open_rounds(settings: LogSettings) -> Iterator[SubnetRounds]:
    """The subnet on the chain that is named; nothing is signed."""
    with open_subnet(settings, Reader()) as chain:
        yield SubnetRounds(chain)


def main(settings: LogSettings, *, as_json_text: bool = False) -> int:
    """Show the log; 1 if something in it is wrong, or if nothing could be verified."""
    shown = look(settings, open_rounds=open_rounds)
    print(as_json(shown) if as_json_text else as_text(shown))
    return int(bool(shown.report.problems) or shown.is_verified is False)
