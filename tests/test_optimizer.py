"""The inner optimizers: which parameter goes where, and one object for both."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from steps import same, weights
from tiny import tiny_model
from torch import nn
from transformers import PreTrainedModel

from hiveminer.config.run import OptimizerSection
from hiveminer.training.optimizer import build_scheduler, hidden_matrices, inner_optimizer

MUON = OptimizerSection(name="muon", learning_rate=0.01)


def names(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    wanted = {id(each) for each in parameters}
    return {name for name, value in model.named_parameters() if id(value) in wanted}


def set_gradients(model: nn.Module, *, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=random)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_muon_gets_the_matrices_between_the_embeddings_and_the_output(architecture: str) -> None:
    model = tiny_model(architecture)
    chosen = names(model, hidden_matrices(model))
    inside = ".h." if architecture == "gpt2" else ".layers."
    layers = {
        name for name, value in model.named_parameters() if value.dim() == 2 and inside in name
    }
    assert chosen == layers
    assert len(chosen) >= 8


def test_an_output_layer_of_its_own_stays_with_adamw() -> None:
    model = tiny_model("llama")
    assert isinstance(model.lm_head, nn.Linear)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert "lm_head.weight" in dict(model.named_parameters())
    assert "lm_head.weight" not in names(model, hidden_matrices(model))


def test_a_frozen_matrix_is_not_trained() -> None:
    model = tiny_model("llama")
    frozen = hidden_matrices(model)[0]
    frozen.requires_grad_(False)
    before = frozen.detach().clone()
    optimizer = inner_optimizer(model, MUON)
    set_gradients(model, seed=1)
    optimizer.step()
    assert torch.equal(frozen, before)


def test_each_parameter_takes_the_step_of_its_own_optimizer() -> None:
    model, reference = tiny_model("llama"), tiny_model("llama")
    section = MUON.model_copy(update={"momentum": 0.9, "embedding_rate": 2.0})
    optimizer = inner_optimizer(model, section)
    hidden = hidden_matrices(reference)
    inside = {id(each) for each in hidden}
    rest = [each for each in reference.parameters() if id(each) not in inside]
    groups = [
        {"params": [each for each in rest if each.dim() > 1], "weight_decay": 0.1},
        {"params": [each for each in rest if each.dim() < 2], "weight_decay": 0.0},
    ]
    parts = [
        torch.optim.Muon(
            hidden, lr=0.01, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(groups, lr=0.02, betas=MUON.betas, eps=MUON.eps, fused=True),
    ]
    for seed in range(3):
        set_gradients(model, seed=seed)
        set_gradients(reference, seed=seed)
        optimizer.step()
        for part in parts:
            part.step()
    assert same(weights(model), weights(reference))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_restarted_optimizer_goes_on_with_the_same_steps(name: str) -> None:
    section = OptimizerSection(name=name)  # type: ignore[arg-type]
    model = tiny_model("llama")
    optimizer = inner_optimizer(model, section)
    set_gradients(model, seed=1)
    optimizer.step()
    other = copy.deepcopy(model)
    restarted = inner_optimizer(other, section)
    restarted.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (2, 3):
        set_gradients(model, seed=seed)
        set_gradients(other, seed=seed)
        optimizer.step()
        restarted.step()
    assert same(weights(model), weights(other))
    assert len(optimizer.state) == len(list(model.parameters()))


def test_the_schedule_sets_the_rate_of_both() -> None:
    section = OptimizerSection(
        name="muon", learning_rate=0.01, schedule="linear", warmup_epochs=2, total_epochs=6
    )
    model = tiny_model("llama")
    optimizer = inner_optimizer(model, section)
    scheduler = build_scheduler(optimizer, section)
    assert [group["lr"] for group in optimizer.param_groups] == [0.001] * 3

    def moved(model: PreTrainedModel) -> float:
        before = weights(model)
        set_gradients(model, seed=1)
        optimizer.step()
        matrix = next(iter(names(model, hidden_matrices(model))))
        return float((weights(model)[matrix] - before[matrix]).norm())

    slow = moved(model)
    for _ in range(2):
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01] * 3
    # The inner optimizers see it too, also after a state dict was loaded.
    assert math.isclose(moved(model) / slow, 10, rel_tol=0.2)
    optimizer.load_state_dict(optimizer.state_dict())
    for _ in range(4):
        scheduler.step()
    assert math.isclose(moved(model) / slow, 1, rel_tol=0.2)
