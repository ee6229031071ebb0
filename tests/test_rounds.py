"""Sparseloco's rounds, case by case: bytes, deadlines, who counts, and what a peer does."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from fractions import Fraction

import pytest

from hiveminer.strategies.sparseloco import rounds
from hiveminer.strategies.sparseloco.records import (
    Mark,
    Record,
    decode_mark,
    decode_record,
    pack_uids,
    run_prefix,
    unpack_uids,
    witness,
)
from hiveminer.strategies.sparseloco.rounds import (
    Apply,
    Block,
    Contribution,
    Decision,
    Empty,
    Facts,
    Neuron,
    OwnBlob,
    Position,
    Repair,
    Rules,
    Transfer,
    VoidAndApply,
)
from hiveminer.strategies.sparseloco.schedule import (
    EMBEDDED_LATENCY,
    Schedule,
    schedule_problems,
)

RUN = bytes(range(8))
PARENT = hashlib.sha256(b"parent").digest()
OTHER = hashlib.sha256(b"other").digest()
NEWER = hashlib.sha256(b"newer").digest()
SCHEDULE = Schedule(round_blocks=50, mark_blocks=10, cut_blocks=4)
RULES = Rules(RUN, SCHEDULE, max_blob_bytes=1000)
ROUND = 7

# --- bytes ------------------------------------------------------------------------------

RECORD = Record(RUN, 7, PARENT, 20, hashlib.sha256(b"blob" * 5).digest())
RECORD_HEX = (
    "11"
    "0001020304050607"
    "07000000"
    "e47125968b3b71049fbc4802d1e40a71ea1359decfabacf70b34588037d4ff0c"
    "14000000"
    "4ddcb69ee2523e7466cadb7fc02b60a8b075f005fee094457f4d3ef963fca391"
)
MARK = Mark(
    RUN, 7, PARENT, frozenset({0, 1, 7, 8, 255}), bytes.fromhex("7ba7c1c68af1197830908670973cbb84")
)
MARK_HEX = (
    "21"
    "0001020304050607"
    "07000000"
    "e47125968b3b71049fbc4802d1e40a71ea1359decfabacf70b34588037d4ff0c"
    "8301000000000000000000000000000000000000000000000000000000000080"
    "7ba7c1c68af1197830908670973cbb84"
)


def test_a_record_has_81_golden_bytes() -> None:
    assert RECORD.encode().hex() == RECORD_HEX
    assert len(RECORD.encode()) == 81
    assert decode_record(bytes.fromhex(RECORD_HEX)) == RECORD


def test_a_mark_has_93_golden_bytes() -> None:
    assert MARK.encode().hex() == MARK_HEX
    assert len(MARK.encode()) == 93
    assert decode_mark(bytes.fromhex(MARK_HEX)) == MARK


def test_a_witness_is_golden_and_depends_on_the_hotkey_and_every_blob() -> None:
    blobs = {9: b"two", 3: b"one"}
    assert witness(b"\x05" * 32, blobs) == MARK.witness
    assert witness(b"\x06" * 32, blobs) != MARK.witness
    assert witness(b"\x05" * 32, {9: b"two"}) != MARK.witness
    assert witness(b"\x05" * 32, {3: b"two", 9: b"one"}) != MARK.witness


def test_a_run_is_named_by_the_hash_of_its_id() -> None:
    assert run_prefix("embedded-1-2-3").hex() == "41d32699651a4be1"


def test_every_string_of_the_right_length_and_kind_means_one_thing() -> None:
    rng = random.Random(1)
    for _ in range(500):
        record = b"\x11" + rng.randbytes(80)
        mark = b"\x21" + rng.randbytes(92)
        decoded_record, decoded_mark = decode_record(record), decode_mark(mark)
        assert decoded_record is not None
        assert decoded_mark is not None
        assert decoded_record.encode() == record
        assert decoded_mark.encode() == mark


@pytest.mark.parametrize("raw", [None, "text", 5, b"", b"\x11", b"\x21", b"/ip4/1.2.3.4/tcp/1", []])
def test_what_is_neither_decodes_to_none(raw: object) -> None:
    assert decode_record(raw) is None
    assert decode_mark(raw) is None


def test_a_changed_length_or_kind_decodes_to_none() -> None:
    record, mark = RECORD.encode(), MARK.encode()
    for wrong in (record[:-1], record + b"\0", b"\x12" + record[1:], b"\x21" + record[1:], mark):
        assert decode_record(wrong) is None
    for wrong in (mark[:-1], mark + b"\0", b"\x22" + mark[1:], b"\x11" + mark[1:], record):
        assert decode_mark(wrong) is None


def test_random_bytes_never_raise() -> None:
    rng = random.Random(2)
    for _ in range(5000):
        raw = rng.randbytes(rng.choice([0, 1, 80, 81, 82, 92, 93, 94, 128]))
        decode_record(raw)
        decode_mark(raw)


@pytest.mark.parametrize(
    "change",
    [
        {"run": b"short"},
        {"round": -1},
        {"round": 2**32},
        {"parent": b""},
        {"blob_bytes": 2**32},
        {"blob_bytes": -1},
        {"blob_hash": bytes(31)},
    ],
)
def test_a_record_that_does_not_fit_is_refused(change: dict[str, bytes | int]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(RECORD, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"uids": frozenset({256})},
        {"uids": frozenset({-1})},
        {"state": bytes(33)},
        {"witness": b""},
        {"round": 2**32},
    ],
)
def test_a_mark_that_does_not_fit_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(MARK, **change)


@pytest.mark.parametrize("uids", [(), (0,), (255,), (0, 255), tuple(range(256))])
def test_a_mask_keeps_every_uid(uids: tuple[int, ...]) -> None:
    assert unpack_uids(pack_uids(uids)) == set(uids)


# --- the schedule -----------------------------------------------------------------------


def test_deadlines_of_the_real_chain() -> None:
    first = SCHEDULE.first_block(3)
    assert first == 150
    assert SCHEDULE.cut_block(3) - first == 36
    assert SCHEDULE.records_block(3) - first == 40
    assert SCHEDULE.marks_block(3) - first == 50
    assert [SCHEDULE.round_at(block) for block in (149, 150, 199, 200)] == [2, 3, 3, 4]


def test_a_round_is_decided_once_its_marks_are_final() -> None:
    assert SCHEDULE.newest_final_round(49) == -1
    assert SCHEDULE.newest_final_round(50) == 0
    assert SCHEDULE.newest_final_round(99) == 0
    assert SCHEDULE.newest_final_round(100) == 1


def test_both_published_schedules_work() -> None:
    assert schedule_problems(SCHEDULE, tempo=360, roles=2) == []
    embedded = Schedule(15, mark_blocks=7, cut_blocks=2)
    assert (embedded.cut_block(0), embedded.records_block(0)) == (6, 8)
    assert schedule_problems(embedded, tempo=360, roles=1, latency=EMBEDDED_LATENCY) == []


@pytest.mark.parametrize(
    ("schedule", "tempo", "roles", "problem"),
    [
        (Schedule(23, 10, 3), 360, 2, "at least 24 with 2"),
        (Schedule(50, 10, 4), 1600, 1, "at least 52 with 1"),
        (Schedule(50, 10, 4), 0, 1, "tempo is 0"),
        (Schedule(17, 9, 3), 360, 1, "17 blocks pass"),
        (Schedule(201, 10, 4), 360, 1, "at most 200"),
        (Schedule(50, 10, 2), 360, 1, "cut_blocks 2"),
        (Schedule(50, 8, 4), 360, 1, "mark_blocks 8"),
        (Schedule(50, 40, 6), 360, 1, "4 blocks into the round"),
    ],
)
def test_what_is_wrong_with_a_schedule_is_one_line_each(
    schedule: Schedule, tempo: int, roles: int, problem: str
) -> None:
    lines = schedule_problems(schedule, tempo=tempo, roles=roles)
    assert sum(problem in line for line in lines) == 1
    assert not any("\n" in line for line in lines)


@pytest.mark.parametrize(
    ("blocks", "roles", "fits"), [(11, 1, False), (12, 1, True), (23, 2, False), (24, 2, True)]
)
def test_the_space_for_commitments_bounds_the_round(blocks: int, roles: int, fits: bool) -> None:
    lines = schedule_problems(Schedule(blocks, 5, 3), tempo=360, roles=roles)
    assert any("space" in line for line in lines) == (not fits)


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


def test_one_percent_of_the_stake_alone_decides_nothing() -> None:
    decision = rounds.decide(RULES, facts(validators(99, 1) + miners(7), {101: mark({7}, OTHER)}))
    assert decision == Decision(ROUND, None, reason="too little stake marked")


def test_two_equal_validators_with_different_parents_decide_nothing() -> None:
    for states in ((PARENT, OTHER), (OTHER, PARENT)):
        marks = {100 + i: mark({1}, state) for i, state in enumerate(states)}
        decision = rounds.decide(RULES, facts(validators(1, 1) + miners(1), marks))
        assert decision.parent is None
        assert decision.reason == "no state was named by more than half"


def test_two_equal_validators_one_bit_apart_count_what_both_mark() -> None:
    marks = {100: mark({1, 2}), 101: mark({2})}
    decision = rounds.decide(RULES, facts(validators(1, 1) + miners(1, 2), marks))
    assert decision.parent == PARENT
    assert counted(decision) == [2]
    assert decision.left_out == ((1, "not marked by more than half"),)


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


def test_stake_is_compared_to_the_last_rao() -> None:
    half = 10**17
    marks = {100: mark({1}), 101: mark(set(), OTHER)}
    for more, parent in ((1, PARENT), (0, None), (-1, OTHER)):
        found = facts(validators(half + more, half) + miners(1), marks)
        assert rounds.decide(RULES, found).parent == parent


def test_no_stake_counts_as_one_rao() -> None:
    alone = rounds.decide(RULES, facts(validators(0) + miners(1), {100: mark({1})}))
    assert counted(alone) == [1]
    marks = {100: mark({1}), 101: mark({1}), 102: mark(set(), OTHER)}
    three = rounds.decide(RULES, facts(validators(0, 0, 1) + miners(1), marks))
    assert (three.parent, counted(three)) == (PARENT, [1])


def test_nobody_permitted_or_nobody_there_is_an_empty_round() -> None:
    assert rounds.decide(RULES, facts(miners(1), {})).parent is None
    assert rounds.decide(RULES, facts([], {})).parent is None


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


def test_a_uid_bit_with_another_parent_is_no_vote_for_the_blob() -> None:
    # 60% name the parent, of which 40 mark the blob; the 40 others mark it with another.
    marks = {100: mark({1}), 101: mark(set()), 102: mark({1}, OTHER)}
    decision = rounds.decide(RULES, facts(validators(40, 20, 40) + miners(1), marks))
    assert decision.parent == PARENT
    assert counted(decision) == []


def test_more_than_half_is_of_all_that_marked_not_of_those_behind_the_parent() -> None:
    # 31 of the 60 behind the parent, but not of the 100 that marked.
    marks = {100: mark({1}), 101: mark(set()), 102: mark(set(), OTHER)}
    decision = rounds.decide(RULES, facts(validators(31, 29, 40) + miners(1), marks))
    assert (decision.parent, counted(decision)) == (PARENT, [])


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


@pytest.mark.parametrize(
    "changes", [{"round": ROUND - 1}, {"round": ROUND + 1}, {"run": b"another."}]
)
def test_a_mark_of_something_else_is_nothing(changes: dict[str, object]) -> None:
    found = facts(validators(1) + miners(1), {100: mark({1}, **changes)})
    assert rounds.decide(RULES, found).parent is None


def test_what_stands_at_the_deadline_counts_and_what_was_overwritten_does_not() -> None:
    # A mark overwrote uid 1's record before D; uid 2's second record replaced the first.
    second = record(2, blob_hash=bytes(32))
    found = facts(validators(1) + miners(1, 2), {100: mark({1, 2})}, {1: mark({1}), 2: second})
    decision = rounds.decide(RULES, found)
    assert [(blob.uid, blob.blob_hash) for blob in decision.contributions] == [(2, bytes(32))]


def test_one_hotkey_may_mine_and_validate() -> None:
    neurons = validators(1)
    decision = rounds.decide(RULES, facts(neurons, {100: mark({100})}, {100: record(100)}))
    assert counted(decision) == [100]


def test_uids_0_and_255_count_and_a_uid_beyond_the_mask_cannot() -> None:
    neurons = validators(1) + miners(255, 0, 256)
    decision = rounds.decide(RULES, facts(neurons, {100: mark({0, 255})}))
    assert counted(decision) == [0, 255]


def ranked(count: int) -> list[Neuron]:
    """Miners whose incentive falls with their uid."""
    return [replace(miner, incentive=1000 - miner.uid) for miner in miners(*range(count))]


def by_lot(neurons: list[Neuron]) -> list[int]:
    lots = {hashlib.sha256(b"records" + neuron.hotkey).digest(): neuron.uid for neuron in neurons}
    return [lots[lot] for lot in sorted(lots)]


def test_four_fifths_of_the_places_go_by_incentive_and_the_rest_by_lot() -> None:
    neurons = ranked(12)
    rules = replace(RULES, max_contributors=5)
    decision = rounds.decide(rules, facts(validators(1) + neurons, {100: mark(set(range(12)))}))
    lucky = by_lot(neurons[4:])[0]
    assert counted(decision) == [0, 1, 2, 3, lucky]
    assert {why for _, why in decision.left_out} == {"more contributors than places"}
    assert len(decision.left_out) == 7


def test_equal_incentives_are_settled_by_lot() -> None:
    neurons = miners(*range(10))
    rules = replace(RULES, max_contributors=3)
    decision = rounds.decide(rules, facts(validators(1) + neurons, {100: mark(set(range(10)))}))
    assert counted(decision) == sorted(by_lot(neurons)[:3])


def test_a_single_place_goes_by_lot() -> None:
    places = rounds.first_places(ranked(6), places=1, records_hash=b"records")
    assert [neuron.uid for neuron in places] == by_lot(ranked(6))[:1]


def test_places_are_given_to_those_whom_the_marks_count() -> None:
    rules = replace(RULES, max_contributors=5)
    found = facts(validators(1) + ranked(12), {100: mark(set(range(6, 12)))})
    decision = rounds.decide(rules, found)
    assert counted(decision)[:4] == [6, 7, 8, 9]
    assert len(counted(decision)) == 5


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
        raw = rng.choice([rng.randbytes(rng.randint(0, 128)), RECORD.encode(), bytes(93)])
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
    assert action == Apply(PARENT, BLOBS)
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
    assert action == Apply(NEWER, ())
    assert (position.confirmed, position.newest, position.own_blobs) == (NEWER, NEWER, ())


def test_an_empty_round_moves_and_drops_nothing_but_the_cut() -> None:
    before = after_round()
    position = rounds.cut_blob(before, ROUND + 1, bytes(32))
    position, action = rounds.settle(position, decision(ROUND + 1, None))
    assert action == Empty()
    assert position == replace(before, round=ROUND + 1)


def test_a_void_round_gives_the_blob_back() -> None:
    position, action = rounds.settle(after_round(), decision(ROUND + 1, PARENT, blobs=False))
    assert action == VoidAndApply(PARENT, (), returned=FORGOTTEN)
    assert (position.confirmed, position.newest, position.held) == (PARENT, PARENT, PARENT)
    assert position.own_blobs == ()


def test_a_void_round_gives_nothing_back_to_whom_never_made_its_state() -> None:
    position, action = rounds.settle(after_round(made=False), decision(ROUND + 1, PARENT))
    assert action == VoidAndApply(PARENT, BLOBS, returned=None)
    assert position.base == PARENT
    assert position.own_blobs == ()


def test_without_a_blob_a_peer_commits_on_the_confirmed_state_and_repairs_later() -> None:
    position = after_round(made=False)
    assert position.base == PARENT
    assert position.missing_blobs == BLOBS
    position, action = rounds.settle(position, decision(ROUND + 1, NEWER, blobs=False))
    assert action == Repair(NEWER, ())
    assert position.base is None
    assert position.missing_state == NEWER
    position, transfer = rounds.take_state(position)
    assert transfer == Transfer(off=(MINE,))
    assert (position.base, position.newest, position.own_blobs) == (NEWER, NEWER, ())


def test_a_state_that_differs_is_repaired_and_said_to_differ() -> None:
    position, action = rounds.settle(after_round(), decision(ROUND + 1, OTHER))
    assert action == Repair(OTHER, BLOBS, differs=True)
    assert position.base is None
    assert position.missing_blobs == ()
    position, transfer = rounds.take_state(position)
    assert transfer == Transfer()
    assert position.missing_blobs == BLOBS


def test_a_joiner_takes_the_named_state_and_applies_that_rounds_blobs() -> None:
    position, action = rounds.settle(Position(ME), decision(40, PARENT))
    assert action == Repair(PARENT, BLOBS)
    position, transfer = rounds.take_state(position)
    assert transfer == Transfer()
    position, transfer = rounds.make_newest(position, NEWER)
    assert transfer == Transfer()
    assert (position.round, position.base) == (40, NEWER)


def test_after_a_restart_without_states_the_blob_goes_back_until_its_state_is_made_again() -> None:
    position = rounds.restart(after_round(), states=[NEWER])
    assert position.base is None
    position, transfer = rounds.take_state(position)
    assert transfer == Transfer(back=(FORGOTTEN,))
    position, transfer = rounds.make_newest(position, NEWER)
    assert transfer == Transfer(off=(FORGOTTEN,))
    assert position == after_round()


def test_a_restart_that_finds_its_states_goes_on() -> None:
    assert rounds.restart(after_round(), states=[PARENT, NEWER, OTHER]) == after_round()


def test_a_void_round_gives_the_blob_back_after_a_restart_too() -> None:
    position = rounds.restart(after_round(), states=[])
    position, action = rounds.settle(position, decision(ROUND + 1, PARENT, blobs=False))
    assert action == Repair(PARENT, (), returned=FORGOTTEN)
    position, transfer = rounds.take_state(position)
    assert transfer == Transfer()
    assert position.base == PARENT


def test_a_round_whose_blobs_cancel_out_is_not_void_when_its_state_is_named_again() -> None:
    position, _ = rounds.make_newest(after_round(made=False), PARENT)
    for known in (position, rounds.restart(position, states=[])):
        settled, action = rounds.settle(known, decision(ROUND + 1, PARENT, blobs=False))
        assert getattr(action, "returned", None) is None
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


def test_a_round_may_confirm_the_state_without_counting_anybody() -> None:
    position, action = rounds.settle(before_round(), decision(ROUND, PARENT, blobs=False))
    assert action == Apply(PARENT, ())
    assert position.base == position.newest == PARENT
    assert position.missing_blobs == ()
