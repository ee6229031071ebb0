"""Compares the log of rounds with the chain, as far back as the node keeps it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hiveminer.errors import ChainError
from hiveminer.strategies.sparseloco.log import Log
from hiveminer.strategies.sparseloco.onchain import SubnetRounds, read_marks, read_records
from hiveminer.strategies.sparseloco.schedule import Schedule


@dataclass(frozen=True)
class Comparison:
    """equal: rounds whose data are the chain's. unread: rounds that the node no longer has.
    why_unread: its error for the first of them."""

    equal: int
    unread: int
    problems: tuple[str, ...]
    why_unread: str = ""


def compare(
    log: Log,
    schedule: Schedule,
    chain: SubnetRounds,
    *,
    on_round: Callable[[], object] = lambda: None,
) -> Comparison:
    """Read the three blocks of each logged round from the chain again, and compare."""
    equal, unread, why, problems = 0, 0, "", []
    for number in log.rounds():
        entry = log.entry(number)
        if entry is None:
            continue
        try:
            theirs = read_marks(chain, read_records(chain, schedule, number)).of_registered()
        except ChainError as error:
            unread, why = unread + 1, why or str(error)
            continue
        finally:
            on_round()
        ours = vars(entry.facts.of_registered())
        names = [name for name, value in ours.items() if value != getattr(theirs, name)]
        equal += not names
        if names:
            differing = ", ".join(names).replace("_", " ")
            problems.append(f"round {number}: the chain has different {differing}")
    return Comparison(equal, unread, tuple(problems), why)
