"""Recomputes logged states and checks all hashes offline, and compares the log with the chain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from hiveminer.errors import ChainError
from hiveminer.strategies.sparseloco.apply import Applied, CountedBlob, State, apply_blobs
from hiveminer.strategies.sparseloco.codec import Header
from hiveminer.strategies.sparseloco.log import Log
from hiveminer.strategies.sparseloco.onchain import SubnetRounds, read_marks, read_records
from hiveminer.strategies.sparseloco.plan import Plan
from hiveminer.strategies.sparseloco.rounds import Decision, decide
from hiveminer.strategies.sparseloco.schedule import Schedule


@dataclass(frozen=True)
class RoundReport:
    """One round of the log, for people.

    made: hash of the state that this peer computed. left_out: (uid, why) for each record that
    does not count, and each blob that turned out to be malformed. verified: whether the state
    was recomputed, and has the hash that was logged.
    """

    decision: Decision
    made: bytes | None
    left_out: tuple[tuple[int, str], ...] = ()
    verified: bool = False

    @property
    def bytes(self) -> int:
        """Total size of the blobs that count."""
        return sum(each.blob_bytes for each in self.decision.contributions)


@dataclass(frozen=True)
class Report:
    """The result of `summarize` or `verify`; problems are one line each."""

    rounds: tuple[RoundReport, ...]
    problems: tuple[str, ...]

    @property
    def verified(self) -> bool:
        """Whether all hashes match, and at least one state was recomputed."""
        return not self.problems and any(each.verified for each in self.rounds)


def apply_logged(log: Log, plan: Plan, decision: Decision, state: State) -> Applied | None:
    """Apply a round's blobs to its parent state; None unless all are in the log."""
    assert decision.parent is not None
    counted = []
    for each in decision.contributions:
        blob = log.blob(each.blob_hash)
        if blob is None or len(blob) != each.blob_bytes:
            return None
        header = Header(each.hotkey, plan.rules.run, decision.round, decision.parent)
        counted.append(CountedBlob(each.uid, header, blob))
    return apply_blobs(state, counted, step=plan.step, compression=plan.compression)


def replay(
    log: Log, plan: Plan, *, number: int, state: State
) -> Iterator[tuple[Decision, Applied | None]]:
    """Replay the logged rounds from round `number` on, whose parent is `state`. Nothing is applied
    in an empty round, or if a blob is missing.

    Ends at the first round whose parent was not computed: after a gap or a missing blob, or at a
    damaged file.
    """
    states = {state.hash(): state}
    for each in (kept for kept in log.rounds() if kept >= number):
        try:
            decision = decide(plan.rules, log.read(each).facts)
        except (FileNotFoundError, ValueError):
            return
        if decision.parent is None:
            yield decision, None
            continue
        base = states.get(decision.parent)
        if base is None:
            return
        applied = apply_logged(log, plan, decision, base)
        states = {decision.parent: base}
        if applied is not None:
            states[applied.state.hash()] = applied.state
        yield decision, applied


def rebuild(log: Log, plan: Plan, digest: bytes) -> State | None:
    """The state with this hash, if the log has it, or an earlier one and all blobs since."""
    for number, kept in reversed(log.states()):
        state = log.state(number, kept, plan.shapes)
        if state is None:
            continue
        if kept == digest:
            return state
        for _, applied in replay(log, plan, number=number, state=state):
            if applied is not None and applied.state.hash() == digest:
                return applied.state
    return None


def summarize(log: Log, plan: Plan) -> Report:
    """Decide each logged round again, and check nothing else."""
    problems: list[str] = []
    rounds = []
    for number in log.rounds():
        try:
            entry = log.read(number)
            decision = decide(plan.rules, entry.facts)
        except FileNotFoundError:
            continue  # removed by a running peer
        except ValueError as error:
            problems.append(f"round {number}: {error}")
            continue
        rounds.append(RoundReport(decision, entry.made, decision.left_out))
    return Report(tuple(rounds), tuple(problems))


def verify(log: Log, plan: Plan, *, on_file: Callable[[], object] = lambda: None) -> Report:
    """Decide each logged round again, recompute states where possible, and compare.

    on_file: called after each blob and each state on disk. The log may be written meanwhile.
    """
    report = summarize(log, plan)
    problems = [*report.problems, *_parent_problems(report.rounds)]
    for digest in log.blobs():
        if log.blob(digest) is None and digest in log.blobs():
            problems.append(f"blob {digest.hex()[:16]}: the file is damaged")
        on_file()
    replayed: dict[int, tuple[Decision, Applied | None]] = {}
    for number, digest in log.states():
        problems += _replay_from(log, plan, number, digest, replayed)
        on_file()
    rounds = []
    for each in report.rounds:
        number, made = each.decision.round, each.made
        _, applied = replayed.get(number, (None, None))
        again = applied.state.hash() if applied else None
        if again and made and again != made:
            problems.append(
                f"round {number}: its state has hash {again.hex()[:16]}, and "
                f"{made.hex()[:16]} was logged"
            )
        left_out = tuple(sorted({*each.left_out, *(applied.left_out.items() if applied else ())}))
        is_verified = again is not None and again == made
        rounds.append(replace(each, left_out=left_out, verified=is_verified))
    return Report(tuple(rounds), tuple(problems))


def _parent_problems(reports: Iterable[RoundReport]) -> Iterator[str]:
    """Rounds whose parent is neither of the two states of the round before."""
    known: set[bytes] = set()
    before = None
    for each in reports:
        number, parent, made = each.decision.round, each.decision.parent, each.made
        if before != number - 1:
            known = set()  # rounds are missing in between
        before = number
        if parent is None:
            continue
        if known and parent not in known:
            yield f"round {number}: its parent is neither of the states before it"
        # A peer that did not compute the state cannot know the next one.
        known = {parent, made} if made else set()


def _replay_from(
    log: Log,
    plan: Plan,
    number: int,
    digest: bytes,
    replayed: dict[int, tuple[Decision, Applied | None]],
) -> Iterator[str]:
    """Load the parent state of a round, and add the rounds since to `replayed`; the problems."""

    def is_kept() -> bool:
        """A running peer may have removed the state and the blobs after it."""
        return (number, digest) in log.states()

    state = log.state(number, digest, plan.shapes)
    if state is None:
        if is_kept():
            yield f"state {digest.hex()[:16]} of round {number}: the file is damaged"
        return
    if number in replayed:
        if replayed[number][0].parent not in (digest, None):
            yield f"round {number}: the state on disk is not its parent"
        return
    for decision, applied in replay(log, plan, number=number, state=state):
        replayed[decision.round] = decision, applied
        if applied is not None:
            continue
        on_disk = log.blobs()
        missing = [each.uid for each in decision.contributions if each.blob_hash not in on_disk]
        entry = log.entry(decision.round) if missing else None
        if entry is not None and entry.made and is_kept():
            yield f"round {decision.round}: the blobs of uids {missing} are missing"


def disagreement(log: Log, plan: Plan) -> str:
    """The problem, if the chain has named a state that this peer does not accept: one that it did
    not hold when it last computed one. Empty otherwise."""
    refused: Decision | None = None
    after = None
    for number in reversed(log.rounds()):
        try:
            entry = log.read(number)
            decision = decide(plan.rules, entry.facts)
        except (FileNotFoundError, ValueError):
            break
        if after is not None and after != number + 1:
            break  # rounds are missing in between
        after = number
        if decision.parent is None:
            continue
        if entry.made is None:
            refused = decision
            continue
        if refused is None or refused.parent in (decision.parent, entry.made):
            break
        return does_not_follow(refused)
    return ""


def does_not_follow(decision: Decision) -> str:
    """The message for a parent that cannot be computed from the log."""
    assert decision.parent is not None
    return (
        f"round {decision.round}: the chain names state {decision.parent.hex()[:16]}, which does "
        "not follow from the log: nothing is committed until it names one that does"
    )


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
    """Read the three blocks of each logged round from the chain again, as far back as the node
    keeps them, and compare."""
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
