"""A replay of real training on a tiny model, and what honest and idle answers earn by it."""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer
from torch import nn
from transformers import PreTrainedModel

from hiveminer.config.run import Run
from hiveminer.errors import TrainingError
from hiveminer.strategies.base import GlobalState, local_step
from hiveminer.training.model import weights_hash
from hiveminer.training.optimizer import build_optimizer, parameter_groups
from hiveminer.training.task import Task
from hiveminer.training.trainer import LocalStep, Trainer
from hiveminer.validation.curves import Evidence, score
from hiveminer.validation.judge import States
from hiveminer.validation.replay import Curves, Replayer

RUN = Run()
BATCH = 2
STEPS = 8


def texts(seed: int, *, rows: int = BATCH * STEPS) -> list[str]:
    """Rows over a few words each, which is what makes one harder than another."""
    draw = random.Random(seed)
    made = []
    for _ in range(rows):
        words = [f"w{draw.randrange(2, 32)}" for _ in range(draw.randrange(1, 8))]
        made.append(" ".join(draw.choice(words) for _ in range(draw.randrange(8, 24))))
    return made


def task_of(model: PreTrainedModel) -> Task:
    """As much of a task as a replay needs."""
    unused: Any = None
    return Task(RUN, unused, model, tiny_tokenizer(pad_token="<end>"), unused, beyond=0.0)


def replayer_of(model: PreTrainedModel) -> Replayer:
    step_from = functools.partial(local_step, section=RUN.optimizer)
    return Replayer(task_of(model), step_from=step_from)


def adamw(model: nn.Module) -> torch.optim.AdamW:
    section = RUN.optimizer
    groups = parameter_groups(model.parameters(), weight_decay=section.weight_decay)
    return build_optimizer(groups, section)


class Miner:
    """A model that trains by itself, as a miner does between two averagings."""

    def __init__(self, model: PreTrainedModel, optimizer: dict[str, Any] | None = None):
        self.model = copy.deepcopy(model)
        self.optimizer = adamw(self.model)
        if optimizer is not None:
            self.optimizer.load_state_dict(copy.deepcopy(optimizer))
        encode = task_of(self.model).encode
        self.trainer = Trainer(self.model, encode=encode, optimizer=LocalStep(self.optimizer))

    def train(self, rows: Sequence[str], **options: Any) -> tuple[float, ...]:
        return tuple(self.trainer.train(rows, batch_size=BATCH, **options).losses)

    def forward(self, rows: Sequence[str]) -> tuple[float, ...]:
        return tuple(self.trainer.evaluate(rows, batch_size=BATCH).losses)

    def state(self) -> GlobalState:
        return GlobalState(
            epoch=3,
            weights={n: value.detach().clone() for n, value in self.model.named_parameters()},
            optimizer=copy.deepcopy(self.optimizer.state_dict()),
        )


@pytest.fixture(scope="module")
def state() -> GlobalState:
    """The swarm's state after some epochs: moments and step counts are not empty."""
    swarm = Miner(tiny_model("llama"))
    for seed in range(100, 106):
        swarm.train(texts(seed))
    return swarm.state()


@pytest.fixture(scope="module")
def replayer() -> Replayer:
    return replayer_of(tiny_model("llama"))


def miner_at(state: GlobalState) -> Miner:
    model = tiny_model("llama")
    model.load_state_dict(state.weights, strict=False)
    return Miner(model, state.optimizer)


def curves(replayer: Replayer, state: GlobalState, rows: Sequence[str], **options: Any) -> Curves:
    found = replayer.curves(state, rows, batch_size=BATCH, **options)
    assert found is not None
    return found


def worth(answered: Sequence[float], found: Curves) -> float:
    return score(evidence(answered, found))


def evidence(answered: Sequence[float], found: Curves) -> Evidence:
    return Evidence(
        hotkey="5F",
        request_id="r",
        epoch=3,
        answered=tuple(answered),
        trained=found.trained,
        untrained=found.untrained,
        claimed_samples=BATCH * STEPS,
        given_samples=BATCH * STEPS,
        tokens=100,
    )


@pytest.mark.parametrize(("seed", "rows", "accumulated"), [(0, 16, 1), (1, 16, 1), (5, 21, 2)])
def test_an_honest_answer_is_replayed_to_the_same_curve(
    replayer: Replayer, state: GlobalState, seed: int, rows: int, accumulated: int
) -> None:
    given = texts(seed, rows=rows)
    answered = miner_at(state).train(given, gradient_accumulation_steps=accumulated)
    found = curves(replayer, state, given, gradient_accumulation_steps=accumulated)
    assert len(answered) == len(found.untrained) == math.ceil(rows / (BATCH * accumulated))
    assert answered == pytest.approx(found.trained, rel=1e-5)
    assert worth(answered, found) == 1.0


def test_running_forward_only_is_worth_nothing_where_training_shows(
    replayer: Replayer, state: GlobalState
) -> None:
    judged = []
    for seed in range(4):
        rows = texts(seed)
        answered = miner_at(state).forward(rows)
        found = curves(replayer, state, rows)
        assert answered == pytest.approx(found.untrained, rel=1e-5)
        one = evidence(answered, found)
        judged += [score(one)] if one.tells else []
    assert judged == [0.0] * len(judged)
    assert len(judged) >= 2


def test_the_answer_to_other_rows_is_worth_nothing(replayer: Replayer, state: GlobalState) -> None:
    found = curves(replayer, state, texts(0))
    for seed in range(1, 4):
        assert worth(miner_at(state).train(texts(seed)), found) < 0.2


def test_moments_that_hold_the_rows_gradients_are_not_used(
    replayer: Replayer, state: GlobalState
) -> None:
    rows = texts(0)
    state = replace(state, donor="donor")
    miner = miner_at(state)
    answered = miner.train(rows)
    late = replace(state, epoch=4, optimizer=miner.state().optimizer)
    states = States(GlobalState(0, state.weights, adamw(miner.model).state_dict()))
    assert states.add(state, wanted=())
    assert states.add(late, wanted=())
    assert states.replayed(3, hotkey="donor") is None, "nothing is known of earlier moments"
    found = states.replayed(4, hotkey="donor")
    assert found is not None
    assert curves(replayer, found, rows).trained == pytest.approx(answered)
    assert sum(curves(replayer, late, rows).trained) < sum(answered) - 0.1
    assert states.replayed(4, hotkey="another") is late


def test_a_replay_leaves_the_state_and_the_model_as_they_were(state: GlobalState) -> None:
    before, model = copy.deepcopy(state), tiny_model("llama")
    hash_before = weights_hash(model)
    replayer = replayer_of(model)
    first = curves(replayer, state, texts(1))
    curves(replayer, state, texts(2))
    assert before.optimizer["state"], "the state has no moments, and proves nothing"
    torch.testing.assert_close(state.weights, before.weights, rtol=0, atol=0)
    moments, expected = state.optimizer["state"], before.optimizer["state"]
    torch.testing.assert_close(moments, expected, rtol=0, atol=0)
    assert weights_hash(model) == hash_before
    assert curves(replayer, state, texts(1)) == first, "a replay depends on those before it"


def test_the_moments_of_the_state_have_their_part(replayer: Replayer, state: GlobalState) -> None:
    fresh = GlobalState(state.epoch, state.weights, adamw(tiny_model("llama")).state_dict())
    with_moments = curves(replayer, state, texts(1))
    without = curves(replayer, fresh, texts(1))
    assert with_moments.untrained == without.untrained
    assert with_moments.trained[0] == without.trained[0]
    assert with_moments.trained[-1] != pytest.approx(without.trained[-1], rel=1e-4)


def test_a_replay_that_is_stopped_gives_nothing(replayer: Replayer, state: GlobalState) -> None:
    for answers in ([True], [False, False, True]):
        asked = iter(answers)
        found = replayer.curves(
            state, texts(1), batch_size=BATCH, stopped=lambda asked=asked: next(asked)
        )
        assert found is None


def test_rows_that_cannot_be_trained_on_are_a_training_error(
    replayer: Replayer, state: GlobalState
) -> None:
    with pytest.raises(TrainingError):
        replayer.curves(state, ["", ""], batch_size=BATCH)


def test_the_loss_under_a_state(replayer: Replayer, state: GlobalState) -> None:
    rows = texts(9)
    loss = replayer.loss(state, rows)
    assert loss == pytest.approx(miner_at(state).trainer.evaluate(rows, batch_size=3).loss)
    first = Miner(tiny_model("llama")).state()
    start = replayer.loss(first, rows)
    assert loss is not None
    assert start is not None
    assert loss < start, "the state that has learnt is no better than the start"
    assert replayer.loss(state, [""]) is None
