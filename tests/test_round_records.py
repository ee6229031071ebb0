"""Sparseloco's commitments byte by byte, and its schedule."""

from __future__ import annotations

import hashlib
import random

import pytest

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
from hiveminer.strategies.sparseloco.schedule import (
    EMBEDDED_LATENCY,
    Schedule,
    schedule_problems,
)

RUN = bytes(range(8))
PARENT = hashlib.sha256(b"parent").digest()
SCHEDULE = Schedule(round_blocks=50, mark_blocks=10, cut_blocks=4)

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


def test_a_record_and_a_mark_are_golden_bytes() -> None:
    assert RECORD.encode().hex() == RECORD_HEX
    assert decode_record(bytes.fromhex(RECORD_HEX)) == RECORD
    assert MARK.encode().hex() == MARK_HEX
    assert decode_mark(bytes.fromhex(MARK_HEX)) == MARK


def test_a_witness_is_golden_and_depends_on_the_hotkey_and_every_blob() -> None:
    blobs = {9: b"two", 3: b"one"}
    assert witness(b"\x05" * 32, blobs) == MARK.witness
    assert witness(b"\x06" * 32, blobs) != MARK.witness
    assert witness(b"\x05" * 32, {9: b"two"}) != MARK.witness
    assert witness(b"\x05" * 32, {3: b"two", 9: b"one"}) != MARK.witness


def test_a_run_is_named_by_the_hash_of_its_id() -> None:
    assert run_prefix("embedded-1-2-3").hex() == "41d32699651a4be1"


def test_bytes_of_the_right_length_and_kind_mean_one_thing_and_others_nothing() -> None:
    rng = random.Random(1)
    for _ in range(500):
        junk = rng.randbytes(rng.choice([0, 1, 80, 82, 92, 94, 128]))
        assert decode_record(junk) is None
        assert decode_mark(junk) is None
        record = b"\x11" + rng.randbytes(80)
        mark = b"\x21" + rng.randbytes(92)
        for decoded, raw in ((decode_record(record), record), (decode_mark(mark), mark)):
            assert decoded is not None
            assert decoded.encode() == raw


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
    decided = [SCHEDULE.newest_final_round(block) for block in (49, 50, 99, 100)]
    assert decided == [-1, 0, 0, 1]


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
    roomy = schedule_problems(Schedule(blocks, 5, 3), tempo=360, roles=roles, space_bytes=6200)
    assert not any("space" in line for line in roomy)
