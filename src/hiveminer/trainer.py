"""Rows to a TrainResult. Knows no network: what `step` does is the optimizer's affair.

One optimizer step learns from a group of `batch_size * gradient_accumulation_steps` rows
(the last group may hold fewer). Its loss is the mean over all real tokens of the group,
whatever way the group is cut into micro-batches: each micro-batch adds its sum of token
losses over the group's token count. So the device's memory decides the micro-batch, and
the result does not change. Within a group, rows of like length run together, so that
hardly any padding is computed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from hiveminer.errors import TrainingError

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of a token that is not predicted: padding."""


class Step(Protocol):
    """What a trainer needs of an optimizer: `torch.optim` and the swarm's both have it."""

    def step(self, *, batch_size: int) -> bool:
        """Apply the gradients of `batch_size` rows; False when they were thrown away."""

    def zero_grad(self) -> None:
        """Drop the gradients."""


class LocalStep:
    """A plain `torch.optim` optimizer as a Step: no swarm."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer

    def step(self, *, batch_size: int) -> bool:
        self.optimizer.step()
        return True

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


@dataclass
class TrainResult:
    """What a request came to.

    loss: mean over the real tokens predicted, nats a token; None if nothing was trained.
    losses: the same by optimizer step, each with the weights before that step.
    steps, samples, tokens: optimizer steps taken, rows and real tokens in them.
    discarded: rows whose step was thrown away; they count in nothing else.
    finished: False when the deadline came first.
    """

    loss: float | None = None
    losses: list[float] = field(default_factory=list)
    steps: int = 0
    samples: int = 0
    tokens: int = 0
    discarded: int = 0
    finished: bool = True


@dataclass(frozen=True)
class EncodedRows:
    """Token numbers of rows, without padding: one int64 tensor a row."""

    tokens: list[Tensor]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def real_tokens(self) -> int:
        return sum(len(row) for row in self.tokens)

    @property
    def targets(self) -> int:
        """Tokens that are predicted: all of a row but its first."""
        return sum(max(0, len(row) - 1) for row in self.tokens)

    def slice(self, start: int, stop: int) -> EncodedRows:
        return EncodedRows(self.tokens[start:stop])


Encode = Callable[[Sequence[str]], dict[str, Tensor]]
"""Texts to `input_ids` and `attention_mask`, each [rows, longest]."""


class Trainer:
    """Trains one model, one request at a time.

    model: a causal language model: `model(input_ids=, attention_mask=).logits` is
        [rows, length, vocabulary].
    encode: texts to padded token tensors.
    optimizer: the Step that applies gradients.
    device: where the model is.
    max_grad_norm: gradients are clipped to this norm; 0 for never.
    max_rows: the largest micro-batch to try; halved for good when memory runs out.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        encode: Encode,
        optimizer: Step,
        device: torch.device | None = None,
        max_grad_norm: float = 1.0,
        max_rows: int = 1024,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.model = model
        self.encode = encode
        self.optimizer = optimizer
        self.device = device or torch.device("cpu")
        self.max_grad_norm = max_grad_norm
        self.max_rows = max_rows
        self.clock = clock

    def train(
        self,
        texts: Sequence[str],
        *,
        batch_size: int,
        gradient_accumulation_steps: int = 1,
        timeout_seconds: float = math.inf,
        on_step: Callable[[int, float], None] | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> TrainResult:
        """Train on the rows in the order given, each once.

        Stops before a group that would outlast `timeout_seconds` (judged by the slowest
        one so far), or when `stopped()`. `on_step(rows, loss)` is told of each step.

        Raises TrainingError when no row holds a token to predict, or the loss is not a
        finite number; then the weights have not been touched by that group.
        """
        deadline = self.clock() + timeout_seconds
        rows = self.encode_rows(texts)
        if not rows.targets:
            raise TrainingError("the rows hold no token to learn from")
        group_rows = batch_size * gradient_accumulation_steps
        result = TrainResult()
        loss_sum = 0.0
        targets = 0
        slowest = 0.0
        for start in range(0, len(rows), group_rows):
            began = self.clock()
            if stopped() or began + slowest > deadline:
                result.finished = False
                break
            group = rows.slice(start, start + group_rows)
            if not group.targets:  # rows of one token: read, and nothing to learn from them
                result.samples += len(group)
                result.tokens += group.real_tokens
                continue
            group_loss, kept = self._learn(group, micro_rows=min(batch_size, self.max_rows))
            if kept:
                result.steps += 1
                result.samples += len(group)
                result.tokens += group.real_tokens
                result.losses.append(group_loss)
                loss_sum += group_loss * group.targets
                targets += group.targets
            else:
                result.discarded += len(group)
            if on_step is not None:
                on_step(len(group), group_loss)
            slowest = max(slowest, self.clock() - began)
        if targets:
            result.loss = loss_sum / targets
        return result

    def measure(
        self, texts: Sequence[str], *, batch_size: int, group_rows: int | None = None
    ) -> TrainResult:
        """The loss of the rows with the weights as they are; nothing is learnt.

        `losses` holds one number for each `group_rows` rows (default: `batch_size`); a group
        with no token to predict has none, as in `train`.
        """
        rows = self.encode_rows(texts)
        group_rows = group_rows or batch_size
        result = TrainResult()
        loss_sum = 0.0
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                for start in range(0, len(rows), group_rows):
                    group = rows.slice(start, start + group_rows)
                    if not group.targets:
                        continue
                    total = sum(
                        float(self._loss_sum(part)) for part in micro_batches(group, batch_size)
                    )
                    result.losses.append(total / group.targets)
                    loss_sum += total
        finally:
            self.model.train(was_training)
        result.samples = len(rows)
        result.tokens = rows.real_tokens
        if rows.targets:
            result.loss = loss_sum / rows.targets
        return result

    def encode_rows(self, texts: Sequence[str]) -> EncodedRows:
        """Tokens of each row, padding taken off by the attention mask."""
        encoded = self.encode(texts)
        lengths = encoded["attention_mask"].sum(dim=1).tolist()
        return EncodedRows(
            [ids[:length] for ids, length in zip(encoded["input_ids"], lengths, strict=True)]
        )

    def _learn(self, group: EncodedRows, *, micro_rows: int) -> tuple[float, bool]:
        """One optimizer step: the group's mean loss, and whether the step was kept."""
        loss = self._backward(group, targets=group.targets, micro_rows=micro_rows)
        if not math.isfinite(loss):
            self.optimizer.zero_grad()
            raise TrainingError("the loss is not a finite number; the step was not taken")
        if self.max_grad_norm:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
            if not torch.isfinite(norm):
                self.optimizer.zero_grad()
                raise TrainingError("the gradient is not finite; the step was not taken")
        kept = self.optimizer.step(batch_size=len(group))
        self.optimizer.zero_grad()
        return loss, kept

    def _backward(self, group: EncodedRows, *, targets: int, micro_rows: int) -> float:
        """Gradients of the group's mean loss; halves the micro-batch while memory runs out."""
        while True:
            self.optimizer.zero_grad()
            try:
                sums = []
                for part in micro_batches(group, micro_rows):
                    loss_sum = self._loss_sum(part)
                    torch.autograd.backward(loss_sum / targets)
                    sums.append(loss_sum.detach())
                return float(torch.stack(sums).sum()) / targets
            except (torch.OutOfMemoryError, MemoryError) as error:
                if micro_rows == 1:
                    self.optimizer.zero_grad()
                    raise TrainingError("one row alone does not fit the device's memory") from error
            micro_rows = max(1, micro_rows // 2)
            self.max_rows = micro_rows
            logger.warning("out of memory: training %d rows at a time from now on", micro_rows)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _loss_sum(self, rows: EncodedRows) -> Tensor:
        """Sum of the token losses of the rows (a scalar on the device), padding masked out."""
        batch = collate(rows)
        input_ids = batch["input_ids"].to(self.device, non_blocking=True)
        attention_mask = batch["attention_mask"].to(self.device, non_blocking=True)
        labels = batch["labels"].to(self.device, non_blocking=True)
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels[:, 1:].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )


def collate(rows: EncodedRows) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each [rows, longest], padded on the right.

    Labels are the tokens themselves; padding is IGNORED, by place and not by token: a
    row's own end-of-sequence token counts, also where padding is the same token.
    """
    longest = max(1, max(len(row) for row in rows.tokens))
    shape = (len(rows), longest)
    input_ids = torch.zeros(shape, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    for number, row in enumerate(rows.tokens):
        input_ids[number, : len(row)] = row
        attention_mask[number, : len(row)] = 1
        labels[number, : len(row)] = row
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def micro_batches(group: EncodedRows, micro_rows: int) -> Iterator[EncodedRows]:
    """Cut a group into micro-batches of rows of like length; rows without a target are left out."""
    by_length = sorted((row for row in group.tokens if len(row) > 1), key=len)
    for start in range(0, len(by_length), micro_rows):
        yield EncodedRows(by_length[start : start + micro_rows])
