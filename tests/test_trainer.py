"""The training step against the same sums made by hand, a row at a time and without padding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from steps import (
    ROWS,
    TOKENS,
    Kept,
    Watched,
    assert_close,
    by_hand,
    gradients,
    ids,
    same,
    trainer,
    weights,
)
from tiny import ARCHITECTURES, tiny_model
from torch import Tensor

from hiveminer.errors import TrainingError
from hiveminer.training.trainer import LocalStep


@pytest.mark.parametrize("batch_size", [1, 4, 1024])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_the_rows_one_by_one(
    architecture: str, batch_size: int
) -> None:
    model = tiny_model(architecture)
    loss = by_hand(model, [ids(row) for row in ROWS])
    expected = gradients(model)
    model.zero_grad(set_to_none=True)

    one = trainer(model)
    result = one.train(ROWS, batch_size=batch_size, gradient_accumulation_steps=9)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.losses == [result.loss]
    assert one.optimizer.batch_sizes == [len(ROWS)]
    assert_close(one.optimizer.gradients[0], expected)
    assert (result.steps, result.samples, result.tokens) == (1, len(ROWS), TOKENS)
    assert (result.discarded, result.finished) == (0, True)


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [4, 0, 3, 1, 2], [2]])
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (2, 1), (2, 2), (3, 1), (8, 4)])
def test_every_row_is_trained_once_in_the_groups_of_the_order_given(
    order: list[int], batch_size: int, accumulation: int
) -> None:
    all_rows = [f"{n} {n + 1} {n + 2} 1" for n in range(3, 8)]
    texts = [all_rows[number] for number in order]
    model = Watched(tiny_model("llama"))
    one = trainer(model)
    result = one.train(texts, batch_size=batch_size, gradient_accumulation_steps=accumulation)
    size = batch_size * accumulation
    groups = [texts[start : start + size] for start in range(0, len(texts), size)]
    assert one.optimizer.batch_sizes == [len(group) for group in groups]
    seen = iter(model.seen)
    for group in groups:
        fed = sorted(next(seen) for _ in group)
        assert fed == sorted(ids(row) for row in group)
    assert next(seen, None) is None, "a row was trained that nobody gave"
    assert (result.steps, result.samples) == (len(groups), len(texts))
    assert len(result.losses) == len(groups)


def test_the_last_partial_group_is_a_step_with_the_mean_of_its_own() -> None:
    model = tiny_model("gpt2")
    one = trainer(model, optimizer=Kept(model, learning_rate=0.0))
    result = one.train(ROWS, batch_size=2, gradient_accumulation_steps=2)
    assert one.optimizer.batch_sizes == [4, 4, 1]
    assert gradients(model) == {}, "gradients were left behind"
    groups = [ROWS[:4], ROWS[4:8], ROWS[8:]]
    for group, loss, gradient in zip(groups, result.losses, one.optimizer.gradients, strict=True):
        assert loss == pytest.approx(by_hand(model, [ids(row) for row in group]), rel=1e-5)
        assert_close(gradient, gradients(model))
    # The mean over tokens, which is not the mean over steps: the groups differ in length.
    assert result.loss == pytest.approx(by_hand(model, [ids(row) for row in ROWS]), rel=1e-5)
    assert result.loss != pytest.approx(sum(result.losses) / 3, rel=1e-3)


def test_training_learns() -> None:
    model = tiny_model("llama")
    one = trainer(model, optimizer=LocalStep(torch.optim.AdamW(model.parameters(), lr=0.01)))
    losses = [one.train(ROWS, batch_size=16).loss for _ in range(20)]
    assert losses[0] is not None
    assert losses[-1] is not None
    assert losses[-1] < 0.5 * losses[0]


def test_gradients_are_clipped_once_a_group() -> None:
    norms = []
    for limit in (0.0, 0.01):
        model = tiny_model("llama")
        one = trainer(model, max_grad_norm=limit)
        one.train(ROWS, batch_size=3, gradient_accumulation_steps=3)
        squares = [value.square().sum() for value in one.optimizer.gradients[0].values()]
        norms.append(float(torch.stack(squares).sum().sqrt()))
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


class Memory:
    """An allocator that refuses a micro-batch of more than so many numbers."""

    def __init__(self, *, rows: int = 10**6, cells: int = 10**6, error: Any = None):
        self.rows = rows
        self.cells = cells
        self.error = error or torch.OutOfMemoryError
        self.refused = 0

    def __call__(self, input_ids: Tensor) -> None:
        if input_ids.shape[0] > self.rows or input_ids.numel() > self.cells:
            self.refused += 1
            raise self.error("out of memory")


@pytest.mark.parametrize(
    ("memory", "left"),
    [
        (Memory(rows=1), 1),
        (Memory(rows=2), 2),
        (Memory(rows=3), 3),
        # The short rows fit, and the long ones do not: what was added up is thrown away.
        (Memory(cells=24), 3),
        (Memory(cells=13), 1),
        (Memory(rows=2, error=MemoryError), 2),
    ],
)
def test_out_of_memory_halves_the_micro_batch_and_changes_nothing(
    memory: Memory, left: int, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [row for row in ROWS if len(ids(row)) > 1] + ["9 8 7 6", "4 5 6 7 8 9 10 11 12 13 14"]
    runs = []
    for before in (lambda _: None, memory):
        model = Watched(tiny_model("llama"), before)
        one = trainer(model, optimizer=Kept(model), max_grad_norm=1.0)
        result = one.train(texts, batch_size=8)
        runs.append((result, weights(model), one.optimizer.gradients))
    (whole, expected, expected_gradients), (result, got, got_gradients) = runs
    tried = memory.refused
    assert tried >= 1
    assert one.max_micro_batch_size == left
    assert f"the micro-batch size is {left}" in caplog.text
    assert result.losses == pytest.approx(whole.losses, rel=1e-5)
    assert (result.steps, result.samples, result.tokens) == (
        whole.steps, whole.samples, whole.tokens,
    )  # fmt: skip
    assert_close(got, expected)
    for one_step, other in zip(got_gradients, expected_gradients, strict=True):
        assert_close(one_step, other)
    one.train(texts, batch_size=8)
    assert memory.refused == tried, "what fits is remembered"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_row_that_does_not_fit_is_a_training_error(error: type[Exception]) -> None:
    memory = Memory(rows=0, error=error)
    model = Watched(tiny_model("gpt2"), memory)
    before = weights(model)
    one = trainer(model)
    with pytest.raises(TrainingError, match="a single row does not fit"):
        one.train(["5 6 7"] * 4, batch_size=4)
    assert same(weights(model), before)
    assert gradients(model) == {}
    assert one.optimizer.batch_sizes == []
    memory.rows = 4
    assert one.train(["5 6 7"] * 4, batch_size=4).steps == 1, "the miner goes on"


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    memory = Memory(rows=0, error=RuntimeError)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(Watched(tiny_model("gpt2"), memory)).train(["5 6 7"], batch_size=4)
    assert memory.refused == 1


@pytest.mark.parametrize("texts", [[""], ["", ""], ["5"], ["5", "", "1"]])
def test_rows_without_a_target_are_a_training_error(texts: list[str]) -> None:
    model = tiny_model("gpt2")
    one = trainer(model)
    with pytest.raises(TrainingError, match="no token to learn from"):
        one.train(texts, batch_size=2)
    assert one.optimizer.batch_sizes == []


def test_a_group_without_a_target_is_read_and_has_no_step_and_no_loss() -> None:
    texts = ["5 6", "7", "", "8", "9 10 11"]
    one = trainer(tiny_model("gpt2"))
    assert len(one.evaluate(texts, batch_size=1).losses) == 2
    result = one.train(texts, batch_size=1)
    assert one.optimizer.batch_sizes == [1, 1]
    assert (result.steps, result.samples, result.tokens) == (2, 5, 7)
    assert len(result.losses) == 2


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_training_error(factor: float) -> None:
    model = Watched(tiny_model("gpt2"))
    one = trainer(model)
    after_first: dict[str, Tensor] = {}

    def spoil(rows: int, loss: float) -> None:
        after_first.update(weights(model))
        model.factor = factor

    with pytest.raises(TrainingError, match="the loss is not finite"):
        one.train(ROWS, batch_size=3, on_step=spoil)
    assert same(weights(model), after_first)
    assert gradients(model) == {}
    assert one.optimizer.batch_sizes == [3]
    model.factor = 1.0
    assert one.train(ROWS, batch_size=3).finished, "the miner goes on"


def test_a_gradient_that_is_not_finite_is_a_training_error() -> None:
    model = tiny_model("llama")
    hook = model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    before = weights(model)
    one = trainer(model, max_grad_norm=1.0)
    with pytest.raises(TrainingError, match="the gradient is not finite"):
        one.train(ROWS, batch_size=16)
    hook.remove()
    assert same(weights(model), before)
    assert one.optimizer.batch_sizes == []
