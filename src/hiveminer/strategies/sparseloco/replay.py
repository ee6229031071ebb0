"""Makes logged states again, offline, and checks every hash against every other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hiveminer.strategies.sparseloco.apply import CountedBlob, State, apply_blobs
from hiveminer.strategies.sparseloco.codec import Header
from hiveminer.strategies.sparseloco.log import Log
from hiveminer.strategies.sparseloco.plan import Plan
from hiveminer.strategies.sparseloco.rounds import Contribution, Decision, decide


@dataclass(frozen=True)
class Replayed:
    """A round that was decided again. state: the one after it; None if a blob is missing, or
    the round is empty. hash: its hash. left_out: blobs that count and do not decode, by uid."""

    decision: Decision
    state: State | None = None
    hash: bytes | None = None
    left_out: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class RoundReport:
    """One round of the log, for people. verified: whether its state was made again, and has
    the hash that was logged."""

    decision: Decision
    made: bytes | None
    verified: bool

    @property
    def bytes(self) -> int:
        """Of the blobs that count."""
        return sum(each.blob_bytes for each in self.decision.contributions)


@dataclass(frozen=True)
class Report:
    """What `verify` found; problems are one line each."""

    rounds: tuple[RoundReport, ...]
    problems: tuple[str, ...]

    @property
    def verified(self) -> bool:
        """Whether every hash fits, and at least one state was made again."""
        return not self.problems and any(each.verified for each in self.rounds)


def contributions_apply(
    plan: Plan, state: State, decision: Decision, blobs: dict[bytes, bytes]
) -> Replayed:
    """The round after its blobs, by their hash, were applied to its parent state."""
    assert decision.parent is not None
    counted = [
        CountedBlob(
            each.uid,
            Header(each.hotkey, plan.rules.run, decision.round, decision.parent),
            blobs[each.blob_hash],
        )
        for each in decision.contributions
    ]
    applied = apply_blobs(state, counted, step=plan.step, compression=plan.compression)
    left_out = tuple(sorted(applied.left_out.items()))
    return Replayed(decision, applied.state, applied.state.hash(), left_out)


def replay(log: Log, plan: Plan, *, number: int, state: State) -> Iterator[Replayed]:
    """Decide and apply the logged rounds again, from round `number` on, whose parent is `state`.

    Ends at the first round whose parent was not made: after a gap, or where a blob is missing.
    """
    states = {state.hash(): state}
    for each in (kept for kept in log.rounds() if kept >= number):
        entry = log.entry(each)
        if entry is None:
            return
        decision = decide(plan.rules, entry.facts)
        if decision.parent is None:
            yield Replayed(decision)
            continue
        base = states.get(decision.parent)
        if base is None:
            return
        blobs = load_blobs(log, decision.contributions)
        if blobs is None:
            states = {decision.parent: base}
            yield Replayed(decision)
            continue
        done = contributions_apply(plan, base, decision, blobs)
        assert done.state is not None
        assert done.hash is not None
        states = {decision.parent: base, done.hash: done.state}
        yield done


def load_blobs(log: Log, contributions: tuple[Contribution, ...]) -> dict[bytes, bytes] | None:
    """The blobs of a round by their hash; None unless all are there."""
    blobs = {}
    for each in contributions:
        blob = log.blob(each.blob_hash)
        if blob is None or len(blob) != each.blob_bytes:
            return None
        blobs[each.blob_hash] = blob
    return blobs


def rebuild(log: Log, plan: Plan, digest: bytes) -> State | None:
    """The state with this hash, if it or one before it, and the blobs between, are kept."""
    for number, kept in reversed(log.states()):
        state = log.state(number, kept, plan.shapes)
        if state is None:
            continue
        if kept == digest:
            return state
        for done in replay(log, plan, number=number, state=state):
            if done.hash == digest:
                return done.state
    return None


def verify(log: Log, plan: Plan) -> Report:
    """Decide each logged round again, make each state again that can be, and compare."""
    problems: list[str] = []
    hashes = _replayed_hashes(log, plan, problems)
    reports = []
    known: set[bytes] = set()
    before = None
    for number in log.rounds():
        entry = log.entry(number)
        if entry is None:
            problems.append(f"round {number}: the file is damaged")
            known = set()
            continue
        if entry.facts.round != number:
            problems.append(f"round {number}: the file is that of round {entry.facts.round}")
            continue
        decision = decide(plan.rules, entry.facts)
        made = entry.made
        if before != number - 1:
            known = set()  # what happened in between is not known
        before = number
        if decision.parent is not None:
            if known and decision.parent not in known:
                problems.append(f"round {number}: its parent is neither of the states before it")
            known = {decision.parent} | ({made} if made else set())
            if not made:
                known = set()  # this peer did not make the state, so it cannot tell the next
        again = hashes.get(number)
        if again and made and again != made:
            problems.append(
                f"round {number}: its state has hash {again.hex()[:16]}, logged was "
                f"{made.hex()[:16]}"
            )
        reports.append(RoundReport(decision, made, verified=again is not None and again == made))
    return Report(tuple(reports), tuple(problems))


def _replayed_hashes(log: Log, plan: Plan, problems: list[str]) -> dict[int, bytes]:
    hashes: dict[int, bytes] = {}
    for number, digest in log.states():
        if number in hashes:
            continue  # made on the way from the state before
        state = log.state(number, digest, plan.shapes)
        if state is None:
            problems.append(f"round {number}: the state {digest.hex()[:16]} is damaged")
            continue
        for done in replay(log, plan, number=number, state=state):
            if done.hash is not None:
                hashes[done.decision.round] = done.hash
    return hashes
