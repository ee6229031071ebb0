"""What may be averaged: not NaN, not infinity, not a thousandfold; all that honest peers send."""

from __future__ import annotations

import math

import pytest
import torch

from hiveminer.strategies.hivemind.bounds import Bounds

BOUNDS = Bounds(most_rows=256.0, learning_rate=3e-3)


@pytest.fixture
def ours() -> torch.Tensor:
    return 0.02 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 4095])
def test_one_number_that_is_not_finite_is_seen(
    ours: torch.Tensor, poison: float, where: int
) -> None:
    theirs = ours.clone()
    theirs.view(-1)[where] = poison
    assert BOUNDS.problem_with(theirs, ours) == "it holds numbers that are not finite"


def test_a_thousandfold_norm_is_seen(ours: torch.Tensor) -> None:
    assert "its norm is" in (BOUNDS.problem_with(1000 * ours, ours) or "")
    assert BOUNDS.problem_with(3e38 * torch.ones(64, 64), ours) is not None


def test_what_honest_peers_send_is_not(ours: torch.Tensor) -> None:
    assert BOUNDS.problem_with(ours.half().float(), ours) is None
    assert BOUNDS.problem_with(1.5 * ours, ours) is None
    assert BOUNDS.problem_with(torch.zeros(64, 64), ours) is None
    nothing = torch.zeros(64)  # a bias that another peer has already moved
    assert BOUNDS.problem_with(torch.full((64,), 20 * BOUNDS.learning_rate), nothing) is None


def test_another_shape_is_seen_even_if_it_would_broadcast(ours: torch.Tensor) -> None:
    assert BOUNDS.problem_with(torch.ones(1), ours) is not None
    assert BOUNDS.problem_with(ours.view(-1), ours) is not None


def test_nobody_counts_for_more_than_an_epoch() -> None:
    for weight in (math.nan, math.inf, -1.0, 256.5, 1e300):
        assert BOUNDS.problem_with_weight(weight) is not None, weight
    for weight in (0.0, 1e-3, 85.0, 256.0):
        assert BOUNDS.problem_with_weight(weight) is None, weight


def test_a_model_that_ran_away_is_told_from_one_that_learnt(ours: torch.Tensor) -> None:
    start = [ours, torch.zeros(64)]
    assert not BOUNDS.ran_away([2 * ours, torch.full((64,), 0.1)], start)
    assert BOUNDS.ran_away([ours, torch.full((64,), math.nan)], start)
    assert BOUNDS.ran_away([1000 * ours, torch.zeros(64)], start)
