"""Checks of the rounds of strategy `sparseloco`: their schedule, and what this machine logged."""

from __future__ import annotations

from functools import partial

from hiveminer.chain.embedded.schema import HYPERPARAMETERS
from hiveminer.commands.checks.base import Check, Examination, failed, passed, warned
from hiveminer.neuron import subnet_folder
from hiveminer.strategies.sparseloco.log import logs_below
from hiveminer.strategies.sparseloco.replay import disagreement
from hiveminer.strategies.sparseloco.schedule import Schedule, latency_of, schedule_problems


def rounds(exam: Examination) -> Check:
    """The run's schedule against the chain's tempo and space for commitments, and whether a log
    on this machine contradicts the chain."""
    if exam.run is None:
        return failed("unknown without the run", "fix the run first")
    if exam.run.strategy != "sparseloco":
        return passed(f"none: the run's strategy is {exam.run.strategy}")
    if exam.chain is None and not exam.settings.embedded:
        return failed("unknown without the chain", "fix the chain first")
    schedule = Schedule.of(exam.run.sparseloco)
    tempo, space = HYPERPARAMETERS["tempo"].default, None
    if exam.chain is not None:
        tempo = int(exam.chain.hyperparameters()["tempo"])
        space = exam.chain.commitment_space()
    latency = latency_of(embedded=exam.settings.embedded)
    problems_for = partial(
        schedule_problems, schedule, tempo=tempo, latency=latency, space_bytes=space
    )
    if problems := problems_for(roles=1):
        return failed("; ".join(problems), "set them in [sparseloco] of run.toml")
    if contradiction := _disagreement(exam):
        return failed(contradiction, "compare with others: hiveminer log --verify")
    found = (
        f"{schedule.round_blocks} blocks per round, {latency.blocks} from a cut to its settling; "
        f"tempo {tempo}"
    )
    if problems := problems_for(roles=2):
        return warned(
            f"{found}; with a miner and a validator on one hotkey, {problems[0]}",
            "give the validator a hotkey of its own",
        )
    return passed(found)


def _disagreement(exam: Examination) -> str:
    """How a log on this machine contradicts the chain, if it is of this run and one does."""
    assert exam.run is not None
    for log in logs_below(subnet_folder(exam.settings)):
        try:
            run_id, plan = log.plan()
        except ValueError as error:
            return str(error)
        if run_id.startswith(f"{exam.run.name}-{exam.run.hash[:12]}-"):
            found = disagreement(log, plan)
            if found:
                return f"{log.folder.parent.parent.name[:8]}: {found}"
    return ""
