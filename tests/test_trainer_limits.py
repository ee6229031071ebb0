"""Where training stops: deadlines, steps that are discarded, and evaluation without steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from steps import (
    ROWS,
    TOKENS,
    Kept,
    Watched,
    by_hand,
    encode_numbers,
    gradients,
    ids,
    same,
    trainer,
    weights,
)
from tiny import ARCHITECTURES, tiny_model
from torch import Tensor

from hiveminer.training.trainer import TrainResult


class Clock:
    """Stands still, but for what the model is made to take."""

    def __init__(self, seconds: Sequence[float]):
        self.now = 100.0
        self.seconds = list(seconds)

    def __call__(self) -> float:
        return self.now

    def spend(self, _: Tensor) -> None:
        self.now += self.seconds.pop(0)


@pytest.mark.parametrize(
    ("timeout_seconds", "seconds", "steps", "finished"),
    [
        (40.0, [10, 10, 10, 10], 4, True),
        (39.9, [10, 10, 10, 10], 3, False),
        (25.0, [10, 10, 10, 10], 2, False),
        (10.0, [10, 10, 10, 10], 1, False),
        (5.0, [10, 10, 10, 10], 1, False),  # the first is not known to be too slow
        (30.0, [2, 20, 1, 1], 2, False),
        (41.0, [20, 2, 2, 2], 2, False),  # judged by the slowest, not the last
        (45.0, [20, 2, 2, 2], 4, True),
        (math.inf, [10, 10, 10, 10], 4, True),
    ],
)
def test_the_deadline_stops_at_a_groups_edge_and_says_so(
    timeout_seconds: float, seconds: list[float], steps: int, finished: bool
) -> None:
    clock = Clock(seconds)
    model = Watched(tiny_model("gpt2"), clock.spend)
    one = trainer(model, clock=clock)
    texts = [f"{n} {n + 1} {n + 2}" for n in range(2, 9)]
    result = one.train(texts, batch_size=2, timeout_seconds=timeout_seconds)
    rows = min(7, 2 * steps)
    assert (result.steps, result.finished) == (steps, finished)
    assert (result.samples, result.tokens) == (rows, 3 * rows)
    assert len(result.losses) == steps
    assert sorted(model.seen) == [ids(text) for text in texts[:rows]]


def test_time_spent_on_encoding_counts() -> None:
    clock = Clock([1, 1])

    def slow(texts: Sequence[str]) -> dict[str, Tensor]:
        clock.now += 30
        return encode_numbers(texts)

    model = Watched(tiny_model("gpt2"), clock.spend)
    result = trainer(model, clock=clock, encode=slow).train(
        ROWS, batch_size=5, timeout_seconds=20.0
    )
    assert (result.steps, result.samples, result.finished) == (0, 0, False)
    assert result.loss is None
    assert result.losses == []
    assert model.seen == []


def test_a_step_that_is_thrown_away_is_reported_and_not_counted() -> None:
    model = tiny_model("llama")
    optimizer = Kept(model, learning_rate=0.0)
    optimizer.refuse = {1}
    told: list[tuple[int, float]] = []
    result = trainer(model, optimizer=optimizer).train(
        ROWS, batch_size=4, on_step=lambda rows, loss: told.append((rows, loss))
    )
    kept = [*ROWS[:4], *ROWS[8:]]
    assert optimizer.batch_sizes == [4, 4, 1]
    assert (result.steps, result.samples, result.discarded) == (2, 5, 4)
    assert result.tokens == sum(len(ids(row)) for row in kept)
    assert result.loss == pytest.approx(by_hand(model, [ids(row) for row in kept]), rel=1e-5)
    assert result.losses == [told[0][1], told[2][1]]
    assert [rows for rows, _ in told] == [4, 4, 1]
    assert result.finished


def test_all_steps_thrown_away_is_no_loss() -> None:
    model = tiny_model("llama")
    optimizer = Kept(model)
    optimizer.refuse = {0, 1, 2}
    result = trainer(model, optimizer=optimizer).train(ROWS, batch_size=4)
    assert result == TrainResult(discarded=len(ROWS))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_measuring_learns_nothing_and_sees_what_training_sees_first(architecture: str) -> None:
    model = tiny_model(architecture)
    before = weights(model)
    one = trainer(model)
    measured = one.evaluate(ROWS, batch_size=2, global_batch_size=4)
    assert same(weights(model), before)
    assert gradients(model) == {}
    assert one.optimizer.batch_sizes == []
    assert model.training
    assert measured.loss == pytest.approx(by_hand(model, [ids(row) for row in ROWS]), rel=1e-5)
    assert (measured.samples, measured.tokens, measured.steps) == (len(ROWS), TOKENS, 0)
    model.zero_grad(set_to_none=True)
    result = one.train(ROWS, batch_size=2, gradient_accumulation_steps=2)
    assert len(measured.losses) == len(result.losses) == 3
    assert measured.losses[0] == pytest.approx(result.losses[0], rel=1e-5)
    assert measured.losses[1] != pytest.approx(result.losses[1], rel=1e-5)


def test_measuring_goes_by_the_batch_and_leaves_the_model_as_it_was() -> None:
    model = tiny_model("gpt2").eval()
    one = trainer(model)
    assert len(one.evaluate(ROWS, batch_size=4).losses) == 3
    assert one.evaluate(["5", ""], batch_size=4).loss is None
    assert not model.training


def test_a_long_group_is_given_up_at_a_batch_s_edge() -> None:
    """With gradient accumulation, a step is long: the deadline does not wait for its end."""
    seconds = itertools.count()  # each look at the clock is a second later
    model = tiny_model("gpt2")
    before = weights(model)
    result = trainer(model, clock=lambda: float(next(seconds))).train(
        ["5 9 3 4 1"] * 32, batch_size=1, gradient_accumulation_steps=32, timeout_seconds=5.0
    )
    assert (result.finished, result.steps, result.samples, result.tokens) == (False, 0, 0, 0)
    assert next(seconds) < 20
    assert same(weights(model), before)
    assert gradients(model) == {}
