"""Sketches tell the same weights from others, and a majority of peers from a liar."""

from __future__ import annotations

import math

import pytest
import torch

from hiveminer.strategies.hivemind.sketch import (
    NUMBERS,
    TOLERANCE,
    agree,
    contradiction,
    read_vouch,
    sketch_of,
)

EXPECTED = [-36878.0, -263734.0, -476974.0]


def weights(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(300, 70), (70,), (1,), (70, 300)]
    return [0.05 * torch.randn(shape, generator=generator) for shape in shapes]


def test_the_distance_of_sketches_is_that_of_the_weights() -> None:
    first, second = weights(1), weights(2)
    distance = math.sqrt(
        sum(float(((a - b) ** 2).sum()) for a, b in zip(first, second, strict=True))
    )
    seen = math.dist(sketch_of(first), sketch_of(second)) / math.sqrt(NUMBERS)
    assert 0.5 * distance < seen < 1.5 * distance


def test_what_averaging_leaves_is_the_same_and_an_epoch_of_training_is_not() -> None:
    ours = weights()
    assert agree(sketch_of(ours), sketch_of([tensor.half() for tensor in ours]))
    moved = [tensor + 0.05 * TOLERANCE * 0.2 * torch.randn_like(tensor) for tensor in ours]
    assert agree(sketch_of(ours), sketch_of(moved))
    assert not agree(sketch_of(ours), sketch_of([tensor * (1 + 3 * TOLERANCE) for tensor in ours]))
    assert not agree(sketch_of(ours), sketch_of(weights(1)))


def test_the_order_and_the_place_of_weights_count() -> None:
    ours = weights()
    assert not agree(sketch_of(ours), sketch_of([ours[3], *ours[1:3], ours[0]]))
    rolled = [tensor.roll(1, dims=0) for tensor in ours]
    assert not agree(sketch_of(ours), sketch_of(rolled))
    huge = [torch.arange(3 * 4096, dtype=torch.float32)]
    swapped = [huge[0].view(3, 4096).flip(0)]
    assert not agree(sketch_of(huge), sketch_of(swapped))


def test_a_sketch_is_the_same_on_every_machine() -> None:
    numbers = sketch_of([torch.arange(10_000, dtype=torch.float32)])
    assert numbers[:3] == pytest.approx(EXPECTED, abs=64)  # float32 sums of millions


GOOD, BAD, WORSE = (sketch_of(weights(seed)) for seed in (0, 9, 10))


@pytest.mark.parametrize(
    ("epoch", "seen", "vouches", "refused"),
    [
        (4, GOOD, [], False),  # nobody else is there
        (4, GOOD, [(4, GOOD), (4, GOOD)], False),
        (4, BAD, [(4, GOOD)], True),  # one word against another: none is taken
        (4, BAD, [(4, GOOD), (4, GOOD)], True),
        (4, GOOD, [(4, BAD), (4, WORSE)], True),  # a round that failed for all
        (4, GOOD, [(4, BAD), (4, GOOD), (4, WORSE)], False),
        (4, GOOD, [(4, BAD), (4, BAD), (4, WORSE)], True),
        (4, BAD, [(4, GOOD), (4, GOOD), (4, BAD)], False),  # two against two
        (4, BAD, [(4, GOOD)] * 3 + [(4, BAD)], True),
        (4, GOOD, [(3, BAD), (5, BAD)], True),  # an epoch apart: nobody vouches for it
        (4, GOOD, [(5, BAD), (5, BAD)], True),  # nobody is there any more
        (4, GOOD, [(5, BAD), (4, GOOD)], False),
        (4, GOOD, [(0, BAD), (0, BAD)], False),  # others join the same lone peer
        (40, GOOD, [(35, BAD), (30, WORSE)], False),  # each comes back from its own checkpoint
        (7, BAD, [(5, GOOD), (5, GOOD)], True),  # ahead of all others, who are together
        (10**9, BAD, [(4, GOOD), (4, GOOD)], True),
        (0, BAD, [(40, GOOD), (41, GOOD)], True),
    ],
)
def test_the_majority_decides(
    epoch: int, seen: list[float], vouches: list[tuple[int, list[float]]], refused: bool
) -> None:
    assert (contradiction(epoch, seen, vouches) is not None) is refused


@pytest.mark.parametrize(
    "said",
    [
        None, 1, [], [1], [1, 2], [1, [0.0] * (NUMBERS - 1)], [1.5, [0.0] * NUMBERS],
        [1, [math.nan] * NUMBERS], [1, [math.inf] + [0.0] * (NUMBERS - 1)],
        [-1, [0.0] * NUMBERS], [2**60, [0.0] * NUMBERS], [True, [0.0] * NUMBERS],
        [1, ["x"] * NUMBERS], [1, [0.0] * NUMBERS, 2], {"epoch": 1},
    ],
)  # fmt: skip
def test_what_is_no_vouch_is_not_read(said: object) -> None:
    assert read_vouch(said) is None
    assert read_vouch([3, [0.5] * NUMBERS]) == (3, [0.5] * NUMBERS)
