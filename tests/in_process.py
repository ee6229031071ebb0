"""A strategy within one process: the models of several miners, averaged directly.

Each peer publishes what it has trained after each step. Once all together have trained
`epoch_samples` rows, the mean of what was published is the new global state, which each peer
takes over at its next step.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from torch import Tensor, nn

from hiveminer.strategies.base import (
    Context,
    GlobalState,
    Observer,
    RoundResult,
    Strategy,
    local_step,
)
from hiveminer.training.optimizer import build_optimizer
from hiveminer.training.trainer import Step


class Hub:
    """What the peers of a run have in common; its methods make strategies and observers."""

    def __init__(self, *, epoch_samples: int = 16):
        self.epoch_samples = epoch_samples
        self.lock = threading.Lock()
        self.rows = 0
        self.group_size = 0
        self.state: GlobalState | None = None
        self.published: dict[InProcessStrategy, GlobalState] = {}

    def strategy(self, context: Context) -> InProcessStrategy:
        return InProcessStrategy(self, context)

    def observer(self, context: Context) -> InProcessObserver:
        return InProcessObserver(self, context)

    def publish(self, peer: InProcessStrategy, state: GlobalState, rows: int) -> None:
        with self.lock:
            self.published[peer] = state
            self.rows += rows
            if self.rows >= self.epoch_samples:
                states = list(self.published.values())
                self.group_size, self.rows = len(states), 0
                self.state = _mean(states, epoch=self.epoch + 1)

    @property
    def epoch(self) -> int:
        return self.state.epoch if self.state is not None else 0


class InProcessStrategy(Strategy):
    def __init__(self, hub: Hub, context: Context):
        self.hub = hub
        self.context = context
        self.model = context.task.model
        self.closed = self.interrupted = False
        self.syncs = 0
        self._epoch = 0
        section = context.task.run.optimizer
        self.optimizer = build_optimizer(self.model.parameters(), section)

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def peers(self) -> int:
        return max(1, len(self.hub.published))

    def step(self, *, batch_size: int) -> bool:
        self.optimizer.step()
        self.hub.publish(self, self._copy(), batch_size)
        self.catch_up()
        return True

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(
        self, *, timeout_seconds: float = 60.0
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self._copy().weights, {"epoch": self._epoch, "rows": self.hub.rows}

    def load_state_dict(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        weights = dict(self.model.named_parameters())
        if tensors.keys() != weights.keys():
            raise ValueError("it does not fit the model")
        with torch.no_grad():
            for name, value in weights.items():
                value.copy_(tensors[name])
        self._epoch = metadata["epoch"]

    def move_to(self, device: torch.device) -> None:
        self.model.to(device)

    def join(self) -> None:
        self.catch_up()

    def sync(self) -> None:
        self.syncs += 1

    def idle(self) -> None:
        self.catch_up()

    def catch_up(self) -> bool:
        with self.hub.lock:
            state, size = self.hub.state, self.hub.group_size
        if state is not None and state.epoch > self._epoch:
            self.load_state_dict(state.weights, {"epoch": state.epoch})
            self.optimizer.load_state_dict(copy.deepcopy(state.optimizer))
            self.context.on_round(RoundResult(epoch=state.epoch, group_size=size, seconds=0.0))
        return True

    def recover(self) -> bool:
        return True

    def check(self) -> None: ...

    def interrupt(self) -> None:
        self.interrupted = True

    def close(self) -> None:
        self.closed = True
        with self.hub.lock:
            self.hub.published.pop(self, None)

    def _copy(self) -> GlobalState:
        return GlobalState(
            self._epoch, _weights(self.model), copy.deepcopy(self.optimizer.state_dict())
        )


class InProcessObserver(Observer):
    def __init__(self, hub: Hub, context: Context):
        self.hub = hub
        self.section = context.task.run.optimizer
        self.closed = False
        model = context.task.model
        optimizer = build_optimizer(model.parameters(), self.section).state_dict()
        self._initial = GlobalState(0, _weights(model), optimizer)

    @property
    def epoch(self) -> int:
        return self.hub.epoch

    @property
    def peers(self) -> int:
        return len(self.hub.published)

    def initial_state(self) -> GlobalState:
        return self._initial

    def fetch(self, *, timeout_seconds: float = 30.0) -> GlobalState | None:
        return self.hub.state

    def local_step(self, model: nn.Module, state: GlobalState) -> Step:
        return local_step(model, state, section=self.section)

    def sync(self, *, working: int) -> None: ...

    def check(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def _mean(states: list[GlobalState], *, epoch: int) -> GlobalState:
    """The mean of the weights, with the first one's optimizer."""
    weights = {
        name: torch.stack([state.weights[name] for state in states]).mean(0)
        for name in states[0].weights
    }
    return GlobalState(epoch, weights, states[0].optimizer)
