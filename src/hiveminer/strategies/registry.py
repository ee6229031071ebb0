"""The strategies by their names in `run.toml`."""

from __future__ import annotations

from hiveminer.strategies.base import Context, Observer, ObserverFactory, Strategy, StrategyFactory
from hiveminer.strategies.hivemind.observer import open_hivemind_observer
from hiveminer.strategies.hivemind.strategy import open_hivemind

STRATEGIES: dict[str, tuple[StrategyFactory, ObserverFactory]] = {
    "hivemind": (open_hivemind, open_hivemind_observer),
}


def open_strategy(context: Context) -> Strategy:
    """The strategy that the run names, for a miner."""
    return STRATEGIES[context.task.run.strategy][0](context)


def open_observer(context: Context) -> Observer:
    """The observer of the strategy that the run names, for a validator."""
    return STRATEGIES[context.task.run.strategy][1](context)
