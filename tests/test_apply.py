"""The outer step: one hash on every processor, and what is clipped, averaged and left out."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from apply_worker import PEERS, apply_round, first_state, hashes, header, read_blobs, write_blobs
from torch import Tensor, nn

from hiveminer.strategies.sparseloco.apply import (
    Applied,
    CountedBlob,
    OuterStep,
    State,
    apply_blobs,
    clip_limit,
    next_clip_norm,
)
from hiveminer.strategies.sparseloco.codec import Compression, encode

WORKER = Path(__file__).with_name("apply_worker.py")
CAPABILITIES = ("default", "avx2", "avx512")
THREADS = {"OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "PASSIVE"}
"""Threads that outnumber the cores must not spin while they wait."""

DENSE = Compression(1.0, 4)
FLOAT32_MAX = float(torch.finfo(torch.float32).max)


@pytest.mark.timeout(600)  # seconds of work, in processes that may share a core
def test_one_hash_on_every_instruction_set_thread_count_and_order(tmp_path: Path) -> None:
    write_blobs(tmp_path)
    expected = hashes(tmp_path, seed=0)
    assert len(set(expected)) == len(expected)
    best = torch.backends.cpu.get_cpu_capability().lower()
    known = CAPABILITIES.index(best) if best in CAPABILITIES else 0
    for capability in CAPABILITIES[: known + 1]:
        run = subprocess.run(
            [sys.executable, str(WORKER), str(tmp_path), "1", "2", "3", "4"],
            env=os.environ | THREADS | {"ATEN_CPU_CAPABILITY": capability},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        answer = json.loads(run.stdout)
        assert answer["capability"] == capability
        assert answer["hashes"] == [expected] * 4, capability


def test_the_hash_depends_on_the_order_of_uids(tmp_path: Path) -> None:
    """The control: these blobs round differently in another order."""
    write_blobs(tmp_path)
    blobs = read_blobs(tmp_path, 0, list(range(PEERS)))
    turned = [replace(each, uid=PEERS - each.uid) for each in blobs]
    one, other = (apply_round(first_state(), each, number=0).state for each in (blobs, turned))
    assert one.hash() != other.hash()
    for name, weight in one.weights.items():
        torch.testing.assert_close(weight, other.weights[name], rtol=1e-5, atol=1e-7)


def blob(uid: int, **tensors: Tensor) -> CountedBlob:
    head = header(0, uid)
    return CountedBlob(uid, head, encode(tensors, header=head, compression=DENSE))


def applied_to(state: State, blobs: list[CountedBlob]) -> Applied:
    return apply_blobs(state, blobs, step=OuterStep(), compression=DENSE)


def apply_to(start: Tensor, *updates: list[float], last: float = 0.0, **step: float) -> Tensor:
    """One raw tensor `w` after the updates."""
    blobs = [blob(uid, w=torch.tensor(update)) for uid, update in enumerate(updates)]
    state = State({"w": start}, {"w": last})
    applied = apply_blobs(state, blobs, step=OuterStep(**step), compression=DENSE)
    return applied.state.weights["w"]


def test_the_worked_example() -> None:
    assert apply_to(torch.zeros(2), [3.0, 0.0]).tolist() == [-3.0, 0.0]


def test_the_average_is_over_contributors_or_over_all_or_between() -> None:
    updates = [[4.0, 0.0], [0.0, 4.0], [0.0, 4.0], [4.0, 4.0]]
    # Four blobs; the coordinates have 2 and 3 contributors. All norms are 4 but the last.
    last = 4.0 / math.sqrt(2)
    for power in (0.0, 0.25, 0.5, 0.75, 1.0):
        expected = [
            -0.65 * total / (count**power * 4 ** (1 - power))
            for total, count in ((4 + last, 2), (8 + last, 3))
        ]
        actual = apply_to(torch.zeros(2), *updates, rate=0.65, contributor_power=power)
        torch.testing.assert_close(actual, torch.tensor(expected))


def test_a_large_update_is_clipped_to_the_lower_median() -> None:
    start = torch.zeros(2)
    unit = [[1.0, 0.0], [0.0, 2.0]]
    # Norms 1, 2, 100, 200: the lower median is 2.
    moved = apply_to(start, *unit, [100.0, 0.0], [0.0, 200.0], contributor_power=0.0)
    torch.testing.assert_close(moved, torch.tensor([-(1 + 2) / 4, -(2 + 2) / 4]))


def test_no_majority_of_a_round_moves_a_tensor_by_more_than_twice_the_last() -> None:
    start = torch.zeros(2)
    moved = apply_to(start, [100.0, 0.0], [300.0, 0.0], [500.0, 0.0], last=2.0)
    torch.testing.assert_close(moved, torch.tensor([-4.0, 0.0]))


@pytest.mark.parametrize(
    ("norms", "last", "limit"),
    [
        ([3.0], 0.0, 3.0),
        ([3.0, 5.0], 0.0, 3.0),
        ([9.0, 5.0, 3.0], 0.0, 5.0),
        ([9.0, 5.0, 3.0], 2.0, 4.0),
        ([9.0, 5.0, 3.0], 100.0, 5.0),
        ([0.0, 0.0, 0.0, 7.0], 0.0, 7.0),
        ([0.0, 0.0], 7.0, 0.0),
    ],
)
def test_clip_limit(norms: list[float], last: float, limit: float) -> None:
    assert clip_limit(norms, last=last) == limit


def test_the_clip_norm_rises_and_falls_by_a_factor_of_two_at_most() -> None:
    assert next_clip_norm(3.0, last=0.0) == 3.0
    assert next_clip_norm(clip_limit([1e9], last=3.0), last=3.0) == 6.0
    assert next_clip_norm(clip_limit([1e-9], last=3.0), last=3.0) == 1.5
    assert next_clip_norm(0.0, last=0.0) == 0.0
    assert next_clip_norm(0.1, last=0.0) == float(torch.tensor(0.1))
    assert next_clip_norm(1e300, last=0.0) == FLOAT32_MAX


def two_rounds(*left_out: int, spoil: Mapping[int, bytes] | None = None) -> Applied:
    blobs = [blob(uid, w=torch.linspace(0, uid + 1, 40)) for uid in range(3) if uid not in left_out]
    blobs += [CountedBlob(uid, header(0, uid), data) for uid, data in (spoil or {}).items()]
    return applied_to(State({"w": torch.zeros(40)}, {"w": 0.0}), blobs)


def test_what_does_not_decode_is_left_out_by_everybody() -> None:
    whole = blob(1, w=torch.linspace(0, 2, 40)).blob
    without = two_rounds(1).state.hash()
    stolen = blob(2, w=torch.linspace(0, 3, 40)).blob
    for bad in (b"", whole[:-1], whole + b"\0", b"\0" + whole[1:], stolen):
        applied = two_rounds(1, spoil={1: bad})
        assert applied.state.hash() == without
        assert list(applied.left_out) == [1]
        assert "\n" not in applied.left_out[1]
    assert two_rounds(1, spoil={1: whole}).state.hash() == two_rounds().state.hash() != without


def test_a_blob_that_is_larger_than_the_run_allows_is_left_out() -> None:
    dense = blob(0, w=torch.linspace(1, 2, 5000))
    state = State({"w": torch.zeros(5000)}, {"w": 0.0})
    for density, left_out in ((1.0, []), (1 / 64, [0])):
        allowed = Compression(density, 4)
        applied = apply_blobs(state, [dense], step=OuterStep(), compression=allowed)
        assert list(applied.left_out) == left_out


def test_a_round_without_a_sound_blob_changes_nothing() -> None:
    state = first_state()
    assert applied_to(state, []).state.hash() == state.hash()
    assert applied_to(state, [CountedBlob(3, header(0, 3), b"")]).state.hash() == state.hash()


def test_applying_does_not_touch_the_state_before() -> None:
    state = State({"w": torch.ones(40)}, {"w": 0.0})
    moved = applied_to(state, [blob(0, w=torch.ones(40))]).state
    assert not torch.equal(moved.weights["w"], state.weights["w"])
    assert torch.equal(state.weights["w"], torch.ones(40))


def test_a_tensor_that_would_overflow_stays_as_it_is() -> None:
    huge = [FLOAT32_MAX, 1.0]
    assert apply_to(torch.tensor([-FLOAT32_MAX, 5.0]), huge).tolist() == [-FLOAT32_MAX, 5.0]


def test_the_hash_is_that_of_the_written_layout() -> None:
    """Golden: built here by hand from the description."""
    state = State({"b": torch.tensor([[1.0, -2.0]]), "a": torch.tensor(0.5)}, {"a": 0.0, "b": 1.5})
    layout = b"hiveminer state 1\n"
    layout += struct.pack("<I1sIf", 1, b"a", 0, 0.0)[:5] + struct.pack("<If", 0, 0.0)
    layout += hashlib.sha256(struct.pack("<f", 0.5)).digest()
    layout += struct.pack("<I", 1) + b"b" + struct.pack("<IQQf", 2, 1, 2, 1.5)[:4]
    layout += struct.pack("<QQf", 1, 2, 1.5)
    layout += hashlib.sha256(struct.pack("<ff", 1.0, -2.0)).digest()
    assert state.manifest == layout
    assert state.hash() == hashlib.sha256(layout).digest()


def test_the_hash_sees_every_part_and_no_layout_in_memory() -> None:
    values = torch.arange(6.0).view(2, 3)
    state = State({"w": values, "v": torch.ones(2)}, {"w": 1.0, "v": 1.0})
    same = State({"v": torch.ones(2), "w": values.t().contiguous().t()}, {"w": 1.0, "v": 1.0})
    assert not same.weights["w"].is_contiguous()
    assert same.hash() == state.hash()
    others = [
        State({"w": values, "u": torch.ones(2)}, {"w": 1.0, "u": 1.0}),
        State({"w": values.view(3, 2), "v": torch.ones(2)}, {"w": 1.0, "v": 1.0}),
        State({"w": values, "v": torch.tensor([1.0, 1.0 + 2**-23])}, {"w": 1.0, "v": 1.0}),
        State({"w": values, "v": torch.ones(2)}, {"w": 1.0, "v": 1.0 + 2**-23}),
    ]
    assert len({each.hash() for each in (state, *others)}) == 5


def test_the_state_of_a_model_holds_tied_weights_once_and_no_frozen_ones() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    state = State.of(model)
    assert set(state.weights) == {"0.weight", "2.weight"}
    with torch.no_grad():
        model[0].weight.zero_()
    assert state.weights["0.weight"].abs().sum() > 0
