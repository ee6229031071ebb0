"""Tests of a lean step: batches of similar length, encoding ahead, and memory."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from steps import (
    Kept,
    assert_close,
    by_hand,
    gradients,
)
from tiny import ARCHITECTURES, tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers.activations import NewGELUActivation

from hiveminer.errors import TrainingError
from hiveminer.training.model import builtin_model, encode, ready_to_train
from hiveminer.training.trainer import (
    Trainer,
    is_out_of_memory,
    micro_batches,
)

LONGEST = 40
WAIT_SECONDS = 20.0


def text(words: int, *, seed: int = 0) -> str:
    draw = random.Random(1000 * seed + words)
    return " ".join(f"w{draw.randrange(2, 32)}" for _ in range(words))


# The tokenizer ends each row with a token: none of them is empty, one has only that one, one
# is exactly the longest, two are cut.
WORDS = [0, 1, 2, 5, 9, 14, 22, 23, 31, 38, LONGEST - 1, LONGEST, 2 * LONGEST]
TEXTS = [text(count) for count in WORDS]
LENGTHS = [min(count + 1, LONGEST) for count in WORDS]

TOKENIZER = tiny_tokenizer(pad_token="<end>")


def tensors(texts: Sequence[str]) -> dict[str, Tensor]:
    encoded = encode(TOKENIZER, texts, max_length=LONGEST)
    return {key: encoded[key] for key in ("input_ids", "attention_mask")}


def without_end(texts: Sequence[str]) -> dict[str, Tensor]:
    """As `tensors`, but a row without words has no token at all."""
    encoded = tensors(texts)
    encoded["attention_mask"][[not words for words in texts]] = 0
    return encoded


def row_by_row(model: nn.Module, encoded: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Mean loss over all tokens predicted and its gradients, each row alone and unpadded."""
    masks = encoded["attention_mask"].bool()
    rows = [ids[mask].tolist() for ids, mask in zip(encoded["input_ids"], masks, strict=True)]
    loss, found = by_hand(model, rows), gradients(model)
    model.zero_grad(set_to_none=True)
    return loss, found


@pytest.mark.parametrize("rows_first", ["tensors", "without_end"])
@pytest.mark.parametrize(("max_tokens", "pass_tokens"), [(2048, 32), (60, 4), (10**9, 10**9)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_the_rows_alone_however_they_are_cut(
    architecture: str, max_tokens: int, pass_tokens: int, rows_first: str
) -> None:
    encoder = tensors if rows_first == "tensors" else without_end
    texts = random.Random(5).sample(TEXTS, len(TEXTS))
    model = tiny_model(architecture)
    loss, expected = row_by_row(model, encoder(texts))
    optimizer = Kept(model)
    one = Trainer(
        model, encode=encoder, optimizer=optimizer, max_grad_norm=0.0,
        cpu_tokens=max_tokens, cpu_pass_tokens=pass_tokens,
    )  # fmt: skip
    result = one.train(texts, batch_size=64)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.tokens == sum(LENGTHS) - (encoder is without_end)
    assert_close(optimizer.gradients[0], expected)


def of_lengths(lengths: Sequence[int]) -> list[Tensor]:
    return [torch.zeros(length, dtype=torch.long) for length in lengths]


def cost(parts: Sequence[Sequence[int]], pass_tokens: int) -> int:
    return sum(max(part) * len(part) + pass_tokens for part in parts)


def every_cut(lengths: Sequence[int]) -> Iterator[list[Sequence[int]]]:
    for marks in itertools.product([False, True], repeat=len(lengths) - 1):
        ends = [n + 1 for n, mark in enumerate(marks) if mark]
        yield [lengths[a:b] for a, b in zip([0, *ends], [*ends, len(lengths)], strict=True)]


@pytest.mark.parametrize("seed", range(8))
def test_rows_are_cut_in_the_cheapest_way(seed: int) -> None:
    draw = random.Random(seed)
    lengths = sorted((draw.randrange(2, 60) for _ in range(9)), reverse=True)
    for micro_batch_size, max_tokens, pass_tokens in [(9, 10**9, 8), (3, 10**9, 30), (9, 100, 0)]:
        allowed = [
            parts
            for parts in every_cut(lengths)
            if all(
                len(part) == 1
                or (len(part) <= micro_batch_size and max(part) * len(part) <= max_tokens)
                for part in parts
            )
        ]
        rows = of_lengths(draw.sample(lengths, 9))
        cut = micro_batches(rows, micro_batch_size, max_tokens=max_tokens, pass_tokens=pass_tokens)
        parts = [[len(row) for row in part] for part in cut]
        assert [length for part in parts for length in part] == lengths
        assert parts in [[list(part) for part in other] for other in allowed]
        assert cost(parts, pass_tokens) == min(cost(other, pass_tokens) for other in allowed)


def test_what_costs_nothing_is_not_cut() -> None:
    assert [len(part) for part in micro_batches(of_lengths([7] * 9), 9)] == [9]
    assert [len(part) for part in micro_batches(of_lengths([7, 1, 0]), 9)] == [1]
    assert micro_batches(of_lengths([1, 0]), 9) == []


def test_a_cpu_is_never_asked_for_more_than_it_would_gain_by() -> None:
    seen = []
    model = tiny_model("gpt2")
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    one = Trainer(model, encode=tensors, optimizer=Kept(model), cpu_tokens=100)
    one.train([text(20, seed=n) for n in range(10)], batch_size=1024)
    hook.remove()
    assert seen == [(4, 21), (4, 21), (2, 21)]


# --- the thread that encodes ahead --------------------------------------------------------------


def threads() -> set[threading.Thread]:
    return set(threading.enumerate())


def test_the_next_group_is_encoded_while_one_trains() -> None:
    encoded: list[int] = []
    second = threading.Event()

    def encoder(texts: Sequence[str]) -> dict[str, Tensor]:
        encoded.append(len(texts))
        if len(encoded) == 2:
            second.set()
        return tensors(texts)

    model = tiny_model("gpt2")
    model.register_forward_pre_hook(lambda *_: in_time.append(second.wait(WAIT_SECONDS)))
    in_time: list[bool] = []
    one = Trainer(model, encode=encoder, optimizer=Kept(model))
    result = one.train([text(5, seed=n) for n in range(7)], batch_size=3)
    assert all(in_time)
    assert encoded == [3, 3, 1]
    assert (result.steps, result.samples) == (3, 7)


def fails(texts: Sequence[str]) -> dict[str, Tensor]:
    if text(5, seed=4) in texts:
        raise ZeroDivisionError
    return tensors(texts)


def no_more(rows: int, loss: float) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, None),
        ({"stopped": iter([False, True]).__next__}, None),
        ({"timeout_seconds": -1.0}, None),
        ({"on_step": no_more}, KeyboardInterrupt),
        ({"encode": fails}, ZeroDivisionError),
        ({"texts": ["", ""]}, TrainingError),
    ],
    ids=["to the end", "stopped", "too late", "interrupted", "encode fails", "no targets"],
)
def test_no_thread_outlives_a_request(
    options: dict[str, Any], error: type[BaseException] | None
) -> None:
    before = threads()
    model = tiny_model("llama")
    one = Trainer(model, encode=options.pop("encode", tensors), optimizer=Kept(model))
    texts = options.pop("texts", [text(5, seed=n) for n in range(8)])
    if error is None:
        one.train(texts, batch_size=2, **options)
        one.evaluate(texts, batch_size=2)
    else:
        with pytest.raises(error):
            one.train(texts, batch_size=2, **options)
    assert threads() == before
    assert gradients(model) == {}
    assert one.train(TEXTS, batch_size=4).finished, "the miner goes on"


def test_a_stop_in_the_middle_reads_one_group_further_and_no_more() -> None:
    encoded: list[str] = []

    def encoder(texts: Sequence[str]) -> dict[str, Tensor]:
        encoded.extend(texts)
        return tensors(texts)

    texts = [text(5, seed=n) for n in range(40)]
    asked = iter([False, False, True])
    model = tiny_model("gpt2")
    one = Trainer(model, encode=encoder, optimizer=Kept(model))
    result = one.train(texts, batch_size=2, stopped=lambda: next(asked))
    assert (result.steps, result.samples, result.finished) == (2, 4, False)
    assert texts[:6] == encoded[:6]
    assert len(encoded) <= 8


# --- precision and memory -----------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_is_near_and_leaves_weights_and_gradients_in_float32(architecture: str) -> None:
    losses = []
    for bfloat16 in (False, True):
        model = tiny_model(architecture)
        optimizer = Kept(model)
        one = Trainer(model, encode=tensors, optimizer=optimizer, bfloat16=bfloat16)
        losses.append(one.train(TEXTS, batch_size=4).loss)
        assert {value.dtype for value in model.parameters()} == {torch.float32}
        assert {value.dtype for value in optimizer.gradients[0].values()} == {torch.float32}
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_cpu_computes_in_float32() -> None:
    assert not Trainer(nn.Linear(1, 1), encode=tensors, optimizer=Kept(nn.Linear(1, 1))).bfloat16


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_row_that_does_not_fit_is_tried_with_fewer_activations(
    architecture: str, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(model: Any, *_: object) -> None:
        if not any(getattr(part, "gradient_checkpointing", False) for part in model.modules()):
            raise torch.OutOfMemoryError

    found = []
    for allocator in (None, refuse):
        model = tiny_model(architecture)
        optimizer = Kept(model)
        if allocator is not None:
            model.register_forward_pre_hook(allocator)
        one = Trainer(model, encode=tensors, optimizer=optimizer)
        found.append((one.train(TEXTS, batch_size=4), optimizer.gradients))
        assert one.checkpointing == (allocator is not None)
    assert "activations are recomputed" in caplog.text
    assert found[1][0].losses == pytest.approx(found[0][0].losses, rel=1e-5)
    for whole, spared in zip(found[0][1], found[1][1], strict=True):
        assert_close(whole, spared)


def test_a_real_refusal_of_this_machines_allocator_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))


def test_measuring_takes_less_at_a_time_too() -> None:
    def refuse(_: object, args: object, kwargs: dict[str, Tensor]) -> None:
        if len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError

    model = tiny_model("gpt2")
    one = Trainer(model, encode=tensors, optimizer=Kept(model))
    texts = [text(9, seed=n) for n in range(8)]
    expected = one.evaluate(texts, batch_size=8)
    model.register_forward_pre_hook(refuse, with_kwargs=True)
    assert one.evaluate(texts, batch_size=8).loss == pytest.approx(expected.loss, rel=1e-6)
    assert one.max_micro_batch_size == 2


# --- the model ----------------------------------------------------------------------------------


def test_what_is_made_ready_computes_the_same() -> None:
    model = tiny_model("gpt2")
    loss, expected = row_by_row(model, tensors(TEXTS))
    assert any(isinstance(module, NewGELUActivation) for module in model.modules())
    state = model.state_dict().keys()
    ready_to_train(model)
    assert not any(isinstance(module, NewGELUActivation) for module in model.modules())
    assert model.state_dict().keys() == state
    faster, found = row_by_row(model, tensors(TEXTS))
    assert faster == pytest.approx(loss, rel=1e-6)
    assert_close(found, expected)
    assert model(input_ids=torch.tensor([[2, 3]])).past_key_values is None


def test_the_builtin_model_comes_ready() -> None:
    model = builtin_model()
    assert not any(isinstance(module, NewGELUActivation) for module in model.modules())
    assert not model.config.use_cache


IMPORT = """
import torch
def touched(*args, **kwargs):
    raise AssertionError("CUDA was touched")
torch.cuda._lazy_init = touched
import hiveminer.cli, hiveminer.miner, hiveminer.validator
assert not torch.cuda.is_initialized()
"""


@pytest.mark.slow
def test_importing_touches_no_cuda() -> None:
    subprocess.run([sys.executable, "-c", IMPORT], check=True, timeout=120)
