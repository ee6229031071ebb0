"""Repeats a miner's steps from the global state, on a copy of the model, and returns the curves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import nn

from hiveminer.strategies.base import GlobalState
from hiveminer.training.task import Task
from hiveminer.training.trainer import Step, Trainer


@dataclass(frozen=True)
class Curves:
    """Loss per optimizer step, in nats per token: with the steps taken, and without."""

    trained: tuple[float, ...]
    untrained: tuple[float, ...]


@dataclass(eq=False)
class Replayer:
    """Replays on its own copy of the task's model, one call at a time.

    step_from: a miner's optimizer for a state.
    """

    task: Task
    _: KW_ONLY
    step_from: Callable[[nn.Module, GlobalState], Step]
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable

    def __post_init__(self) -> None:
        self.model = copy.deepcopy(self.task.model)
        nn.Module.to(self.model, self.device)

    def curves(
        self,
        state: GlobalState,
        texts: Sequence[str],
        *,
        batch_size: int,
        gradient_accumulation_steps: int = 1,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Curves | None:
        """Train the rows from the state, and evaluate them without; None when stopped. Raises
        TrainingError."""
        trainer = self._at(state)
        global_batch_size = batch_size * gradient_accumulation_steps
        untrained = trainer.evaluate(
            texts, batch_size=batch_size, global_batch_size=global_batch_size
        )
        if stopped():
            return None
        trained = trainer.train(
            texts,
            batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            stopped=stopped,
        )
        if not trained.finished:
            return None
        return Curves(tuple(trained.losses), tuple(untrained.losses))

    def loss(
        self, state: GlobalState, texts: Sequence[str], *, batch_size: int = 8
    ) -> float | None:
        """Mean loss of the rows with the state's weights, in nats per token."""
        return self._at(state).evaluate(texts, batch_size=batch_size).loss

    def _at(self, state: GlobalState) -> Trainer:
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                value.copy_(state.weights[name])
        return Trainer(
            self.model,
            encode=self.task.encode,
            optimizer=self.step_from(self.model, state),
            device=self.device,
            max_grad_norm=self.task.run.optimizer.max_grad_norm,
        )
