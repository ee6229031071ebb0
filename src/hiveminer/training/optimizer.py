"""The inner optimizer and its learning rate, for a peer's steps between averaging rounds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hiveminer.config.run import OptimizerSection


def build_optimizer(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], section: OptimizerSection
) -> torch.optim.AdamW:
    """The run's AdamW, with decay only on matrices (vectors are norms and biases)."""
    groups: list[Any] = list(parameters)
    if groups and isinstance(groups[0], Tensor):
        groups = parameter_groups(groups, weight_decay=section.weight_decay)
    return torch.optim.AdamW(
        groups, lr=section.learning_rate, betas=section.betas, eps=section.eps, fused=True
    )


def inner_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    """The run's optimizer, for all trainable parameters of a model."""
    if section.name == "muon":
        return MuonAndAdamW(model, section)
    return build_optimizer(trainable_parameters(model), section)


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices inside a model, AdamW for the rest, as one optimizer.

    Muon orthogonalizes a matrix's step, which suits hidden layers and neither embeddings nor
    the output layer. Its learning rate is scaled by 0.2 sqrt(max(rows, columns))
    (`match_rms_adamw`, arXiv:2502.16982): steps are then about as large as AdamW's, one
    learning rate and weight decay serve both, and it does not matter whether a layer stores
    its matrix as [out, in] or, like GPT-2's, as [in, out].

    The parameter groups and the state are shared with the two inner optimizers, so learning
    rate schedulers and state dicts work as for any other optimizer.
    """

    def __init__(self, model: nn.Module, section: OptimizerSection):
        hidden = hidden_matrices(model)
        inside = {id(matrix) for matrix in hidden}
        rest = [each for each in trainable_parameters(model) if id(each) not in inside]
        # An optimizer needs parameters; a model may lack those of one kind.
        self._inner: list[torch.optim.Optimizer] = []
        if hidden:
            self._inner.append(
                torch.optim.Muon(
                    hidden,
                    lr=section.learning_rate,
                    weight_decay=section.weight_decay,
                    momentum=section.momentum,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if rest:
            rate = section.learning_rate * section.embedding_rate
            others = section.model_copy(update={"learning_rate": rate})
            self._inner.append(build_optimizer(rest, others))
        super().__init__([group for inner in self._inner for group in inner.param_groups], {})
        self._share()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both."""
        for inner in self._inner:
            inner.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for inner in self._inner:
            inner.param_groups = [next(groups) for _ in inner.param_groups]
            inner.state = self.state


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trained matrices of a model, without its embeddings and its output layer."""
    outside = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    if isinstance(model, PreTrainedModel):
        output: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        outside |= {id(each) for each in output.parameters()} if output is not None else set()
    return [
        each for each in trainable_parameters(model) if each.dim() == 2 and id(each) not in outside
    ]


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A model's trainable parameters, tied ones once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def parameter_groups(
    parameters: Iterable[nn.Parameter], *, weight_decay: float
) -> list[dict[str, Any]]:
    parameters = list(parameters)
    groups: list[dict[str, Any]] = [
        {"params": [each for each in parameters if each.dim() > 1], "weight_decay": weight_decay},
        {"params": [each for each in parameters if each.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_scheduler(
    optimizer: torch.optim.Optimizer, section: OptimizerSection
) -> torch.optim.lr_scheduler.LRScheduler:
    """The run's learning rate by epoch: hivemind steps it when the swarm's epoch does."""
    # A peer that loads the swarm's state steps the scheduler before its first optimizer step.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: rate_factor(epoch, section))


def rate_factor(epoch: int, section: OptimizerSection) -> float:
    """The share of the full learning rate at an epoch, between a tenth and one."""
    low = 0.1
    if epoch < section.warmup_epochs:
        return low + (1 - low) * epoch / section.warmup_epochs
    if section.schedule == "constant":
        return 1.0
    span = max(1, section.total_epochs - section.warmup_epochs)
    done = min(1.0, (epoch - section.warmup_epochs) / span)
    left = 1 - done if section.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return low + (1 - low) * left


def usual_learning_rate(parameters: int) -> float:
    """The rate for training a transformer of this size from scratch with Adam (Kaplan et al. 2020,
    Scaling Laws for Neural Language Models, equation D.1); not below 1e-4, where the fit ends."""
    return max(1e-4, 0.003239 - 0.0001395 * math.log(parameters))
