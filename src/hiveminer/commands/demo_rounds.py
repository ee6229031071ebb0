"""What the logs of a demo's programs say of its rounds, checked against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hiveminer.strategies.sparseloco.log import logs_below
from hiveminer.strategies.sparseloco.replay import verify


def rounds_summary(state: Path) -> dict[str, Any]:
    """Figures of the rounds, from the logs of all programs below `state`.

    rounds: those in which updates counted. hashes_equal: whether all who made the state of a
    round made the same. bytes_per_round: of the updates that counted. log_verified: whether each
    log was decided and computed again with the same result.
    """
    reports = [verify(log, log.plan()[1]) for log in logs_below(state)]
    made: dict[int, set[bytes]] = {}
    size: dict[int, int] = {}
    for each in (each for report in reports for each in report.rounds):
        if each.decision.contributions:
            size[each.decision.round] = each.bytes
            if each.made is not None:
                made.setdefault(each.decision.round, set()).add(each.made)
    return {
        "rounds": len(size),
        "hashes_equal": bool(made) and all(len(hashes) == 1 for hashes in made.values()),
        "bytes_per_round": round(sum(size.values()) / len(size)) if size else 0,
        "log_verified": bool(reports) and all(report.verified for report in reports),
    }
