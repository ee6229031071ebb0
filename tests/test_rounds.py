"""Sparseloco's rounds, case by case: bytes, deadlines, who counts, and what a peer does."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from fractions import Fraction

import pytest

from hiveminer.strategies.sparseloco import rounds
from hiveminer.strategies.sparseloco.records import Mark, Record
from hiveminer.strategies.sparseloco.rounds import (
    Action,
    Block,
    Contribution,
    Decision,
    Facts,
    Neuron,
    OwnBlob,
    Position,
    Rules,
    Transfer,
)
from hiveminer.strategies.sparseloco.schedule import Schedule

RUN = bytes(range(8))
PARENT = hashlib.sha256(b"parent").digest()
OTHER = hashlib.sha256(b"other").digest()
NEWER = hashlib.sha256(b"newer").digest()
SCHEDULE = Schedule(round_blocks=50, mark_blocks=10, cut_blocks=4)
RULES = Rules(RUN, SCHEDULE, max_blob_bytes=1000)
ROUND = 7


# --- who counts -------------------------------------------------------------------------


def hotkey(uid: int) -> bytes:
    return hashlib.sha256(b"hotkey %d" % uid).digest()


def validators(*stakes: int) -> list[Neuron]:
    """Uids from 100 on."""
    return [Neuron(100 + i, hotkey(100 + i), True, stake, 0) for i, stake in enumerate(stakes)]


def miners(*uids: int) -> list[Neuron]:
    return [Neuron(uid, hotkey(uid), False, 0, 0) for uid in uids]


def record(uid: int, **changes: object) -> bytes:
    made = Record(RUN, ROUND, PARENT, 10, hashlib.sha256(b"%d" % uid).digest())
    return replace(made, **changes).encode()  # type: ignore[arg-type]


def mark(uids: set[int], state: bytes = PARENT, **changes: object) -> bytes:
    made = Mark(RUN, ROUND, state, frozenset(uids), bytes(16))
    return replace(made, **changes).encode()  # type: ignore[arg-type]


def facts(
    neurons: list[Neuron], marks: dict[int, bytes], records: dict[int, bytes] | None = None
) -> Facts:
    """Facts of the round; marks and records by uid. Without records, every miner has one."""
    if records is None:
        records = {neuron.uid: record(neuron.uid) for neuron in neurons if not neuron.permit}
    return Facts(
        ROUND,
        Block(SCHEDULE.first_block(ROUND), b"first"),
        Block(SCHEDULE.records_block(ROUND), b"records"),
        Block(SCHEDULE.marks_block(ROUND), b"marks"),
        tuple(neurons),
        {hotkey(uid): raw for uid, raw in records.items()},
        {hotkey(uid): raw for uid, raw in marks.items()},
    )


def counted(decision: Decision) -> list[int]:
    return [blob.uid for blob in decision.contributions]


LITTLE, SPLIT = "too little stake marked", "no state was named by more than half"
HALF = 10**17


@pytest.mark.parametrize(
    ("stakes", "marks", "expected"),
    [
        ((99, 1), [None, mark({1}, OTHER)], LITTLE),
        ((1, 1), [mark({1}), mark({1}, OTHER)], SPLIT),
        ((1, 1), [mark({1}, OTHER), mark({1})], SPLIT),
        ((1, 1), [mark({1, 2}), mark({2})], (PARENT, [2])),
        # Stake is compared to the last rao.
        ((HALF + 1, HALF), [mark({1}), mark(set(), OTHER)], (PARENT, [1])),
        ((HALF, HALF), [mark({1}), mark(set(), OTHER)], SPLIT),
        ((HALF - 1, HALF), [mark({1}), mark(set(), OTHER)], (OTHER, [])),
        # No stake counts as one rao.
        ((0,), [mark({1})], (PARENT, [1])),
        ((0, 0, 1), [mark({1}), mark({1}), mark(set(), OTHER)], (PARENT, [1])),
        # A bit of a mark with another parent is no vote for the blob.
        ((40, 20, 40), [mark({1}), mark(set()), mark({1}, OTHER)], (PARENT, [])),
        # More than half is of all that marked, not of those behind the parent.
        ((31, 29, 40), [mark({1}), mark(set()), mark(set(), OTHER)], (PARENT, [])),
        # Marks of another round or run are none.
        ((1,), [mark({1}, round=ROUND - 1)], LITTLE),
        ((1,), [mark({1}, round=ROUND + 1)], LITTLE),
        ((1,), [mark({1}, run=b"another.")], LITTLE),
        ((), [], LITTLE),
    ],
)
def test_what_marks_decide(
    stakes: tuple[int, ...], marks: list[bytes | None], expected: str | tuple[bytes, list[int]]
) -> None:
    given = {100 + i: raw for i, raw in enumerate(marks) if raw}
    decision = rounds.decide(RULES, facts(validators(*stakes) + miners(1, 2), given))
    if isinstance(expected, str):
        assert decision == Decision(ROUND, None, reason=expected)
        return
    assert (decision.parent, counted(decision)) == expected
    left_out = {1, 2} - set(expected[1]) if expected[0] == PARENT else set()
    why = "not marked by more than half" if left_out else "based on another state"
    assert decision.left_out == tuple((uid, why) for uid in sorted(left_out or {1, 2}))


@pytest.mark.parametrize(
    ("quorum", "marking", "decided"),
    [("0.5", 1, False), ("0.5", 2, True), ("0.75", 2, False), ("0.75", 3, True), ("1", 3, False)],
)
def test_a_quorum_is_needed_and_reaching_it_is_enough(
    quorum: str, marking: int, decided: bool
) -> None:
    marks = {100 + i: mark({1}) for i in range(marking)}
    found = facts(validators(5, 5, 5, 5) + miners(1), marks)
    decision = rounds.decide(replace(RULES, quorum=Fraction(quorum)), found)
    assert (decision.parent is not None) == decided


def test_a_quorum_is_exact_where_floats_are_not() -> None:
    # 0.1 as a float is more than a tenth.
    found = facts(validators(10**17, 9 * 10**17) + miners(1), {100: mark({1})})
    assert rounds.decide(replace(RULES, quorum=Fraction("0.1")), found).parent == PARENT
    assert rounds.decide(replace(RULES, quorum=Fraction(0.1)), found).parent is None


def test_without_permit_at_the_first_block_a_mark_is_nothing() -> None:
    late = replace(validators(50)[0], permit=False, uid=150, hotkey=hotkey(150))
    neurons = [*validators(1), late, *miners(1)]
    decision = rounds.decide(RULES, facts(neurons, {100: mark({1}), 150: mark(set(), OTHER)}))
    assert (decision.parent, counted(decision)) == (PARENT, [1])
    assert rounds.decide(RULES, facts(neurons, {150: mark({1})})).parent is None


def test_who_registered_after_the_first_block_does_not_count() -> None:
    records = {1: record(1), 2: record(2)}
    found = facts(validators(1) + miners(1), {100: mark({1, 2})}, records)
    assert counted(rounds.decide(RULES, found)) == [1]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"parent": OTHER}, "based on another state"),
        ({"blob_bytes": 0}, "blob size out of bounds"),
        ({"blob_bytes": 1001}, "blob size out of bounds"),
        ({"round": ROUND - 1}, None),
        ({"round": ROUND + 1}, None),
        ({"run": b"another."}, None),
    ],
)
def test_a_record_of_something_else_does_not_count(
    changes: dict[str, object], why: str | None
) -> None:
    records = {1: record(1, **changes), 2: record(2, blob_bytes=1000)}
    found = facts(validators(1) + miners(1, 2), {100: mark({1, 2})}, records)
    decision = rounds.decide(RULES, found)
    assert counted(decision) == [2]
    assert decision.left_out == (((1, why),) if why else ())


def test_what_stands_at_the_deadline_counts_and_what_was_overwritten_does_not() -> None:
    # A mark overwrote uid 1's record before D; uid 2's second record replaced the first.
    second = record(2, blob_hash=bytes(32))
    found = facts(validators(1) + miners(1, 2), {100: mark({1, 2})}, {1: mark({1}), 2: second})
    decision = rounds.decide(RULES, found)
    assert [(blob.uid, blob.blob_hash) for blob in decision.contributions] == [(2, bytes(32))]


def test_uids_0_and_255_and_a_validators_count_and_one_beyond_the_mask_cannot() -> None:
    neurons = validators(1) + miners(255, 0, 256)
    records = {uid: record(uid) for uid in (0, 100, 255, 256)}
    decision = rounds.decide(RULES, facts(neurons, {100: mark({0, 100, 255})}, records))
    assert counted(decision) == [0, 100, 255]


def ranked(count: int) -> list[Neuron]:
    """Miners whose incentive falls with their uid."""
    return [replace(miner, incentive=1000 - miner.uid) for miner in miners(*range(count))]


def by_lot(neurons: list[Neuron]) -> list[int]:
    lots = {hashlib.sha256(b"records" + neuron.hotkey).digest(): neuron.uid for neuron in neurons}
    return [lots[lot] for lot in sorted(lots)]


@pytest.mark.parametrize(
    ("neurons", "places", "marked", "by_incentive"),
    [
        (ranked(12), 5, range(12), 4),
        (ranked(12), 5, range(6, 12), 4),
        (ranked(6), 1, range(6), 0),
        (miners(*range(10)), 3, range(10), 0),  # all incentives are equal
    ],
)
def test_four_fifths_of_the_places_go_by_incentive_and_the_rest_by_lot(
    neurons: list[Neuron], places: int, marked: range, by_incentive: int
) -> None:
    rules = replace(RULES, max_contributors=places)
    found = facts(validators(1) + neurons, {100: mark(set(marked))})
    decision = rounds.decide(rules, found)
    eligible = [neuron for neuron in neurons if neuron.uid in marked]
    lucky = by_lot(eligible[by_incentive:])[: places - by_incentive]
    assert counted(decision) == sorted([n.uid for n in eligible[:by_incentive]] + lucky)
    reasons = [why for uid, why in decision.left_out if uid in marked]
    assert reasons == ["more contributors than places"] * (len(eligible) - places)


def test_candidates_are_what_a_validator_may_mark() -> None:
    records = {1: record(1), 2: record(2, parent=OTHER), 3: record(3, blob_bytes=0), 4: b"junk"}
    found = facts(validators(1) + miners(1, 2, 3, 4, 5), {}, records)
    assert [n.uid for n in rounds.candidates(RULES, found, PARENT)] == [1]
    assert [n.uid for n in rounds.candidates(RULES, found, OTHER)] == [2]


def test_the_order_of_the_facts_does_not_matter() -> None:
    rng = random.Random(3)
    neurons = validators(5, 3, 1) + ranked(20)
    marks = {100: mark(set(range(0, 20, 2))), 101: mark(set(range(20))), 102: mark({1}, OTHER)}
    rules = replace(RULES, max_contributors=4)
    decision = rounds.decide(rules, facts(neurons, marks))
    for _ in range(20):
        rng.shuffle(neurons)
        items = list(marks.items())
        rng.shuffle(items)
        assert rounds.decide(rules, facts(neurons, dict(items))) == decision


def test_hostile_commitments_change_nothing() -> None:
    rng = random.Random(4)
    marks = {100: mark({1}), 101: b""}
    found = facts(validators(60, 40) + miners(1, 2), marks, {1: record(1), 2: b""})
    decision = rounds.decide(RULES, found)
    for _ in range(300):
        raw = rng.choice([rng.randbytes(rng.randint(0, 128)), record(2), bytes(93)])
        noisy = replace(
            found,
            marks={**found.marks, hotkey(101): raw, b"who": raw},
            records={**found.records, hotkey(2): raw, b"": raw},
        )
        again = rounds.decide(RULES, noisy)
        assert (again.parent, again.contributions) == (decision.parent, decision.contributions)


def test_facts_of_other_blocks_are_refused() -> None:
    good = facts(validators(1) + miners(1), {100: mark({1})})
    for name in ("first_block", "records_block", "marks_block"):
        block = getattr(good, name)
        late = replace(good, **{name: Block(block.number + 1, block.hash)})
        with pytest.raises(ValueError, match="decided at blocks"):
            rounds.decide(RULES, late)


def test_a_snapshot_with_a_uid_or_hotkey_twice_is_refused() -> None:
    one, two = miners(1, 2)
    for second in (replace(two, uid=1), replace(two, hotkey=one.hotkey)):
        with pytest.raises(ValueError, match="twice"):
            facts([one, second], {})


# --- what a peer does -------------------------------------------------------------------

ME = hotkey(1)
MINE = OwnBlob(ROUND, hashlib.sha256(b"1").digest())
FORGOTTEN = replace(MINE, forgotten=True)
BLOBS = tuple(Contribution(n, hotkey(n), 10, hashlib.sha256(b"%d" % n).digest()) for n in (1, 2))


def decision(number: int, parent: bytes | None, *, blobs: bool = True) -> Decision:
    return Decision(number, parent, BLOBS if blobs and parent else ())


def before_round() -> Position:
    return rounds.start(ME, PARENT, settled=ROUND - 1)


def after_round(*, made: bool = True) -> Position:
    """Own blob counted in the round, on PARENT; the newest state is NEWER."""
    position = rounds.cut_blob(before_round(), ROUND, MINE.blob_hash)
    position, action = rounds.settle(position, decision(ROUND, PARENT))
    assert action == Action()
    assert position.missing_blobs == BLOBS
    if not made:
        return position
    position, transfer = rounds.make_newest(position, NEWER)
    assert transfer == Transfer(off=(MINE,))
    return position


def test_a_counted_blob_is_taken_off_once_its_state_is_made() -> None:
    position = after_round()
    assert position.base == NEWER
    assert position.states_to_keep == {PARENT, NEWER}
    assert position.own_blobs == (FORGOTTEN,)
    position, action = rounds.settle(position, decision(ROUND + 1, NEWER, blobs=False))
    assert action == Action()
    assert (position.confirmed, position.newest, position.own_blobs) == (NEWER, NEWER, ())


def test_an_empty_round_moves_and_drops_nothing_but_the_cut() -> None:
    before = after_round()
    position = rounds.cut_blob(before, ROUND + 1, bytes(32))
    position, action = rounds.settle(position, decision(ROUND + 1, None))
    assert action == Action()
    assert position == replace(before, round=ROUND + 1)


@pytest.mark.parametrize(
    ("made", "restarted", "expected"),
    [
        (True, False, Action(returned=FORGOTTEN)),
        (False, False, Action()),
        (True, True, Action(returned=FORGOTTEN, repairs=True)),
    ],
)
def test_a_void_round_gives_the_blob_back_to_whom_made_its_state(
    made: bool, restarted: bool, expected: Action
) -> None:
    position = after_round(made=made)
    if restarted:
        position = rounds.restart(position, states=[])
    position, action = rounds.settle(position, decision(ROUND + 1, PARENT, blobs=False))
    assert action == expected
    if restarted:
        position, transfer = rounds.take_state(position)
        assert transfer == Transfer()
    assert (position.confirmed, position.newest, position.held) == (PARENT, PARENT, PARENT)
    assert position.own_blobs == ()


def test_without_a_blob_a_peer_commits_on_the_confirmed_state_and_repairs_later() -> None:
    position = after_round(made=False)
    assert position.base == PARENT
    assert position.missing_blobs == BLOBS
    position, action = rounds.settle(position, decision(ROUND + 1, NEWER, blobs=False))
    assert action == Action(repairs=True)
    assert position.base is None
    assert position.missing_state == NEWER
    position, transfer = rounds.take_state(position)
    assert transfer == Transfer(off=(MINE,))
    assert (position.base, position.newest, position.own_blobs) == (NEWER, NEWER, ())


def test_a_state_that_differs_is_repaired_and_said_to_differ() -> None:
    position, action = rounds.settle(after_round(), decision(ROUND + 1, OTHER))
    assert action == Action(repairs=True, differs=True)
    assert position.base is None
    assert position.missing_blobs == ()
    position, transfer = rounds.take_state(position)
    assert transfer == Transfer()
    assert position.missing_blobs == BLOBS


def test_a_joiner_takes_the_named_state_and_applies_that_rounds_blobs() -> None:
    position, action = rounds.settle(Position(ME), decision(40, PARENT))
    assert action == Action(repairs=True)
    position, transfer = rounds.take_state(position)
    assert transfer == Transfer()
    position, transfer = rounds.make_newest(position, NEWER)
    assert transfer == Transfer()
    assert (position.round, position.base) == (40, NEWER)


def test_after_a_restart_without_states_the_blob_goes_back_until_its_state_is_made_again() -> None:
    assert rounds.restart(after_round(), states=[PARENT, NEWER, OTHER]) == after_round()
    position = rounds.restart(after_round(), states=[NEWER])
    assert position.base is None
    position, transfer = rounds.take_state(position)
    assert transfer == Transfer(back=(FORGOTTEN,))
    position, transfer = rounds.make_newest(position, NEWER)
    assert transfer == Transfer(off=(FORGOTTEN,))
    assert position == after_round()


def test_a_round_whose_blobs_cancel_out_is_not_void_when_its_state_is_named_again() -> None:
    position, _ = rounds.make_newest(after_round(made=False), PARENT)
    for known in (position, rounds.restart(position, states=[])):
        settled, action = rounds.settle(known, decision(ROUND + 1, PARENT, blobs=False))
        assert action.returned is None
        assert settled.own_blobs == ()


def test_a_peer_that_was_away_still_owes_what_counted_meanwhile() -> None:
    position = rounds.restart(rounds.cut_blob(before_round(), ROUND, MINE.blob_hash), states=[])
    position, _ = rounds.settle(position, decision(ROUND, PARENT))
    position, _ = rounds.settle(position, decision(ROUND + 1, NEWER, blobs=False))
    position, _ = rounds.settle(position, decision(ROUND + 2, None))
    assert position.owed == (MINE,)
    position, transfer = rounds.take_state(position)
    assert transfer == Transfer(off=(MINE,))
    assert position.own_blobs == ()


def test_a_record_that_names_another_blob_is_not_ones_own() -> None:
    position = rounds.cut_blob(before_round(), ROUND, bytes(32))
    position, _ = rounds.settle(position, decision(ROUND, PARENT))
    assert position.own_blobs == ()


def test_one_cut_a_round_and_only_after_the_round_before_has_settled() -> None:
    position = rounds.cut_blob(before_round(), ROUND, MINE.blob_hash)
    with pytest.raises(ValueError, match="already has its blob"):
        rounds.cut_blob(position, ROUND, bytes(32))
    with pytest.raises(ValueError, match="newest settled one"):
        rounds.cut_blob(before_round(), ROUND + 1, bytes(32))
    lost = rounds.restart(after_round(), states=[])
    with pytest.raises(ValueError, match="state is missing"):
        rounds.cut_blob(lost, ROUND + 1, bytes(32))


@pytest.mark.parametrize("number", [ROUND - 1, ROUND, ROUND + 2])
def test_a_round_out_of_turn_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="cannot be settled after"):
        rounds.settle(after_round(), decision(number, None))


def test_nothing_is_made_or_taken_twice() -> None:
    with pytest.raises(ValueError, match="nothing to apply"):
        rounds.make_newest(after_round(), NEWER)
    with pytest.raises(ValueError, match="no state is missing"):
        rounds.take_state(after_round())
