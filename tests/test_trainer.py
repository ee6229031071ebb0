"""The training step against the same sums made by hand, a row at a time and without padding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, END, VOCABULARY, tiny_model, tiny_tokenizer
from torch import Tensor, nn

from hiveminer.errors import TrainingError
from hiveminer.training.model import encode
from hiveminer.training.trainer import (
    IGNORED,
    EncodedRows,
    LocalStep,
    Trainer,
    TrainResult,
    collate,
    micro_batches,
)

LONGEST = 12

# Lengths that differ, an end of its own in the middle of a row and at its end (END is the
# padding as well), a row twice, rows of one token and of none.
ROWS = [
    "5 9 3 4 1",
    "7 1",
    "2 3 4 5 6 7 8 9 10 11 12 1",
    "6",
    "1 1 1",
    "",
    "30 31 2 17 1 4 9",
    "8 20 1",
    "7 1",
]
TARGETS = 4 + 1 + 11 + 0 + 2 + 0 + 6 + 2 + 1
TOKENS = 5 + 2 + 12 + 1 + 3 + 0 + 7 + 3 + 2


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ids(text: str) -> list[int]:
    return [int(number) for number in text.split()][:LONGEST]


def encode_numbers(texts: Sequence[str]) -> dict[str, Tensor]:
    """Texts of token numbers, padded on the right with the end of a row."""
    rows = [ids(text) for text in texts]
    longest = max(map(len, rows))
    pads = [longest - len(row) for row in rows]
    return {
        "input_ids": torch.tensor(
            [row + [END] * pad for row, pad in zip(rows, pads, strict=True)], dtype=torch.long
        ),
        "attention_mask": torch.tensor(
            [[1] * len(row) + [0] * pad for row, pad in zip(rows, pads, strict=True)],
            dtype=torch.long,
        ),
    }


class Kept(LocalStep):
    """Plain SGD that writes down what it was given."""

    def __init__(self, model: nn.Module, *, learning_rate: float = 0.1):
        super().__init__(torch.optim.SGD(model.parameters(), lr=learning_rate))
        self.model = model
        self.batch_sizes: list[int] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.refuse: set[int] = set()
        """Numbers of the steps that are thrown away."""

    def step(self, *, batch_size: int) -> bool:
        self.batch_sizes.append(batch_size)
        self.gradients.append(gradients(self.model))
        if len(self.batch_sizes) - 1 in self.refuse:
            return False
        return super().step(batch_size=batch_size)


class Watched(nn.Module):
    """A model that tells what it is fed, and does what a test wants before it answers."""

    def __init__(self, model: nn.Module, before: Callable[[Tensor], None] = lambda _: None):
        super().__init__()
        self.model = model
        self.before = before
        self.seen: list[list[int]] = []
        self.factor = 1.0

    def forward(self, *, input_ids: Tensor) -> Any:
        self.before(input_ids)
        self.seen.extend(row[row != 0].tolist() for row in input_ids)  # 0 is no row's token
        answer = self.model(input_ids=input_ids)
        answer.logits = answer.logits * self.factor
        return answer


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.grad.clone()
        for name, value in model.named_parameters()
        if value.grad is not None
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6, msg=name)


def by_hand(model: nn.Module, rows: Sequence[list[int]]) -> float:
    """Mean over the tokens predicted, each row alone; gradients are left in the model."""
    model.zero_grad(set_to_none=True)
    total = torch.zeros(())
    count = 0
    for row in rows:
        if len(row) < 2:
            continue
        logits = model(input_ids=torch.tensor([row])).logits[0]
        for place in range(len(row) - 1):
            total = total - torch.log_softmax(logits[place], dim=0)[row[place + 1]]
            count += 1
    (total / count).backward()
    return total.item() / count


def trainer(model: nn.Module, **options: Any) -> Trainer:
    options = {"encode": encode_numbers, "optimizer": Kept(model), "max_grad_norm": 0.0} | options
    return Trainer(model, **options)


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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_one_token_of_the_longest_and_beyond_through_a_real_tokenizer(
    architecture: str,
) -> None:
    tokenizer = tiny_tokenizer(pad_token="<end>")  # also the end of each row
    words = [f"w{2 + n % 29}" for n in range(20)]
    texts = [" ".join(words[:count]) for count in (0, 3, 7, 8, 20)]
    lengths = [1, 4, 8, 8, 8]
    expected = [[int(word[1:]) for word in words[: n - 1]] + [END] for n in lengths]
    model = tiny_model(architecture)
    loss = by_hand(model, expected)
    hand = gradients(model)
    one = trainer(model, encode=lambda texts: encode(tokenizer, texts, max_length=8))
    result = one.train(texts, batch_size=5)
    assert result.tokens == sum(lengths)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert_close(one.optimizer.gradients[0], hand)


def test_padding_is_masked_by_place_and_not_by_token() -> None:
    rows = EncodedRows([torch.tensor([5, END, 6, END]), torch.tensor([END]), torch.tensor([2, 3])])
    batch = collate(rows)
    x = IGNORED
    assert batch.labels.tolist() == [[END, 6, END, x], [x, x, x, x], [3, x, x, x]]
    assert batch.input_ids.tolist() == [[5, END, 6, END], [END, 0, 0, 0], [2, 3, 0, 0]]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_micro_batches_hold_every_row_with_a_target_once_in_order_of_length(size: int) -> None:
    rows = EncodedRows([torch.tensor(ids(row), dtype=torch.long) for row in ROWS])
    parts = [[row.tolist() for row in part.tokens] for part in micro_batches(rows, size)]
    flat = [row for part in parts for row in part]
    assert sorted(flat) == sorted(ids(row) for row in ROWS if len(ids(row)) > 1)
    assert [len(row) for row in flat] == sorted((len(row) for row in flat), reverse=True)
    assert all(1 <= len(part) <= size for part in parts)


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
    groups = [ROWS[:4], ROWS[4:8], ROWS[8:]]
    for group, loss, gradient in zip(groups, result.losses, one.optimizer.gradients, strict=True):
        assert loss == pytest.approx(by_hand(model, [ids(row) for row in group]), rel=1e-5)
        assert_close(gradient, gradients(model))
    # The mean over tokens, which is not the mean over steps: the groups differ in length.
    assert result.loss == pytest.approx(by_hand(model, [ids(row) for row in ROWS]), rel=1e-5)
    assert result.loss != pytest.approx(sum(result.losses) / 3, rel=1e-3)


def test_a_single_batch_and_a_single_row_work() -> None:
    for texts in (ROWS[:3], ROWS[:1]):
        model = tiny_model("gpt2")
        before = weights(model)
        result = trainer(model).train(texts, batch_size=8)
        assert (result.steps, result.samples) == (1, len(texts))
        assert not same(weights(model), before)


def test_gradients_do_not_run_over_into_the_next_group() -> None:
    model = tiny_model("llama")
    one = trainer(model, optimizer=Kept(model, learning_rate=0.0))
    one.train([ROWS[0], ROWS[0], ROWS[0]], batch_size=1)
    first, second, third = one.optimizer.gradients
    assert same(first, second)
    assert same(first, third)
    assert gradients(model) == {}, "gradients were left behind"


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


def trained(architecture: str, **options: Any) -> tuple[TrainResult, dict[str, Tensor]]:
    model = tiny_model(architecture)
    one = trainer(model, **options, optimizer=Kept(model), max_grad_norm=1.0)
    result = one.train(ROWS, batch_size=6)
    return result, weights(model)


@pytest.mark.parametrize("max_micro_batch_size", [1, 2, 5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_micro_batch_changes_nothing(architecture: str, max_micro_batch_size: int) -> None:
    whole, expected = trained(architecture)
    result, got = trained(architecture, max_micro_batch_size=max_micro_batch_size)
    assert result.losses == pytest.approx(whole.losses, rel=1e-5)
    assert (result.steps, result.samples, result.tokens) == (2, len(ROWS), TOKENS)
    assert_close(got, expected)


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
    assert memory.refused >= 1
    assert one.max_micro_batch_size == left
    assert f"the micro-batch size is {left}" in caplog.text
    assert result.losses == pytest.approx(whole.losses, rel=1e-5)
    assert (result.steps, result.samples, result.tokens) == (
        whole.steps, whole.samples, whole.tokens,
    )  # fmt: skip
    assert_close(got, expected)
    for one_step, other in zip(got_gradients, expected_gradients, strict=True):
        assert_close(one_step, other)


def test_what_fits_is_remembered() -> None:
    memory = Memory(rows=2)
    model = Watched(tiny_model("gpt2"), memory)
    one = trainer(model)
    one.train(["5 6 7"] * 32, batch_size=16)
    assert memory.refused == 3, "16, 8 and 4 rows were tried, in the first group only"
    one.train(["5 6 7"] * 32, batch_size=16)
    assert memory.refused == 3
    assert one.max_micro_batch_size == 2


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


def test_a_group_without_a_target_is_read_and_no_step() -> None:
    model = tiny_model("gpt2")
    one = trainer(model)
    result = one.train(["5 6", "7", "8", "9 10 11"], batch_size=1)
    assert one.optimizer.batch_sizes == [1, 1]
    assert (result.steps, result.samples, result.tokens) == (2, 4, 7)
    assert len(result.losses) == 2


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_training_error(factor: float) -> None:
    model = Watched(tiny_model("gpt2"))
    one = trainer(model)
    after_first: dict[str, Tensor] = {}

    def spoil(rows: int, loss: float) -> None:
        after_first.update(weights(model))
        model.factor = factor

    with pytest.raises(TrainingError, match="the loss is not a finite number"):
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


def test_stopped_is_asked_before_each_group() -> None:
    asked = iter([False, False, True])
    model = Watched(tiny_model("gpt2"))
    result = trainer(model).train(["5 6 7"] * 8, batch_size=2, stopped=lambda: next(asked))
    assert (result.steps, result.samples, result.finished) == (2, 4, False)
    assert len(model.seen) == 4


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


def test_measuring_goes_by_the_batch_without_groups() -> None:
    one = trainer(tiny_model("gpt2"))
    assert len(one.evaluate(ROWS, batch_size=4).losses) == 3
    assert one.evaluate(["5", ""], batch_size=4).loss is None


def test_measuring_leaves_a_model_that_evaluates_as_it_was() -> None:
    model = tiny_model("gpt2").eval()
    trainer(model).evaluate(ROWS, batch_size=4)
    assert not model.training


def test_a_group_without_a_target_has_no_loss_in_either_curve() -> None:
    texts = ["5 6 7", "", "9", "10 11 12"]
    one = trainer(tiny_model("gpt2"))
    assert len(one.evaluate(texts, batch_size=1).losses) == 2
    assert len(one.train(texts, batch_size=1).losses) == 2


def test_a_loss_far_from_uniform_is_seen() -> None:
    """The tiny models are no uniform guess, else a wrong mask would hardly show."""
    loss = by_hand(tiny_model("llama"), [ids(row) for row in ROWS])
    assert abs(loss - math.log(VOCABULARY)) > 0.05


def test_a_long_group_is_given_up_at_a_batch_s_edge() -> None:
    """With gradient accumulation, a step is long: the deadline does not wait for its end."""
    seconds = itertools.count()  # each look at the clock is a second later
    model = tiny_model("gpt2")
    before = [value.clone() for value in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(
        model,
        encode=encode_numbers,
        optimizer=LocalStep(optimizer),
        clock=lambda: float(next(seconds)),
    )
    result = trainer.train(
        ["5 9 3 4 1"] * 32, batch_size=1, gradient_accumulation_steps=32, timeout_seconds=5.0
    )
    assert (result.finished, result.steps, result.samples, result.tokens) == (False, 0, 0, 0)
    assert next(seconds) < 20
    assert all(map(torch.equal, before, model.parameters()))
    assert all(value.grad is None for value in model.parameters())
