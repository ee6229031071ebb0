"""The strategies by their names in `run.toml`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from hiveminer.config.run import Run
from hiveminer.errors import OperatorError
from hiveminer.strategies.base import Context, Observer, ObserverFactory, Strategy, StrategyFactory
from hiveminer.strategies.hivemind.observer import open_hivemind_observer
from hiveminer.strategies.hivemind.state import weights_by_name
from hiveminer.strategies.hivemind.strategy import open_hivemind

WEIGHTS: dict[str, Callable[[nn.Module, Mapping[str, Tensor]], dict[str, Tensor]]] = {
    "hivemind": weights_by_name,
}
"""What finds the model's weights, by name, among a checkpoint's tensors."""

STRATEGIES: dict[str, tuple[StrategyFactory, ObserverFactory]] = {
    "hivemind": (open_hivemind, open_hivemind_observer),
}


def open_strategy(context: Context) -> Strategy:
    """The strategy that the run names, for a miner."""
    return _factories(context)[0](context)


def open_observer(context: Context) -> Observer:
    """The observer of the strategy that the run names, for a validator."""
    return _factories(context)[1](context)


def _factories(context: Context) -> tuple[StrategyFactory, ObserverFactory]:
    name = context.task.run.strategy
    if name not in STRATEGIES:
        raise OperatorError(
            f"strategy {name!r} is not available in this version yet: set strategy = 'hivemind' "
            "in run.toml"
        )
    return STRATEGIES[name]


def checkpoint_weights(
    run: Run, model: nn.Module, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The model's weights, by name, in a checkpoint of this run. Raises ValueError."""
    return WEIGHTS[run.strategy](model, tensors)
