"""AdamW and its learning rate, as the run wants them: what a peer does between averagings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hiveminer.config.run import OptimizerSection


def build_optimizer(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], section: OptimizerSection
) -> torch.optim.AdamW:
    """AdamW as the run wants it; decay only on matrices (vectors are norms and biases)."""
    groups: list[Any] = list(parameters)
    if groups and isinstance(groups[0], Tensor):
        groups = parameter_groups(groups, weight_decay=section.weight_decay)
    return torch.optim.AdamW(
        groups, lr=section.learning_rate, betas=section.betas, eps=section.eps, fused=True
    )


def parameter_groups(
    parameters: Iterable[nn.Parameter], *, weight_decay: float
) -> list[dict[str, Any]]:
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.dim() > 1 else vectors).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_scheduler(
    optimizer: torch.optim.Optimizer, section: OptimizerSection
) -> torch.optim.lr_scheduler.LRScheduler:
    """The run's learning rate by epoch: hivemind steps it when the swarm's epoch does."""
    # A peer that loads the swarm's state catches up with its rate before its first step.
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
