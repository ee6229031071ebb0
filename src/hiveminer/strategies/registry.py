"""The strategies by their names in `run.toml`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from hiveminer.config.run import Run
from hiveminer.strategies.base import Context, Observer, ObserverFactory, Strategy, StrategyFactory
from hiveminer.strategies.hivemind.observer import open_hivemind_observer
from hiveminer.strategies.hivemind.state import weights_by_name
from hiveminer.strategies.hivemind.strategy import open_hivemind
from hiveminer.strategies.sparseloco.checkpoint import exported_weights
from hiveminer.strategies.sparseloco.opening import open_sparseloco, open_sparseloco_observer

WeightsFinder = Callable[[nn.Module, Mapping[str, Tensor]], dict[str, Tensor]]
"""Finds the model's weights, by name, among a checkpoint's tensors. Raises ValueError."""

STRATEGIES: dict[str, tuple[StrategyFactory, ObserverFactory, WeightsFinder]] = {
    "hivemind": (open_hivemind, open_hivemind_observer, weights_by_name),
    "sparseloco": (open_sparseloco, open_sparseloco_observer, exported_weights),
}


def open_strategy(context: Context) -> Strategy:
    """The strategy that the run names, for a miner."""
    return STRATEGIES[context.task.run.strategy][0](context)


def open_observer(context: Context) -> Observer:
    """The observer of the strategy that the run names, for a validator."""
    return STRATEGIES[context.task.run.strategy][1](context)


def checkpoint_weights(
    run: Run, model: nn.Module, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The model's weights, by name, in a checkpoint of this run. Raises ValueError."""
    return STRATEGIES[run.strategy][2](model, tensors)
