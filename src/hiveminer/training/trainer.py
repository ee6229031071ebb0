"""Rows to a TrainResult. Knows no network: what `step` does is the optimizer's affair.

One optimizer step learns from a group of `batch_size * gradient_accumulation_steps` rows
(the last group may hold fewer). Its loss is the mean over all real tokens of the group,
whatever way the group is cut into micro-batches: each micro-batch adds its sum of token
losses over the group's token count. So the device's memory decides the micro-batch, and
the result does not change.

Within a group, rows of like length run together, cut where padding would cost more than
another pass (`micro_batches`). Padding stands on the right, where a causal model's real
tokens never look, so no attention mask is needed, and attention takes its fastest way.
While a group trains, a thread encodes and collates the next.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hiveminer.errors import TrainingError

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of a place that predicts nothing: a row's last token, and padding."""

CPU_TOKENS = 2048
"""Tokens of a micro-batch on a CPU, unless one row is longer. More are no faster there, and a
system that hands out more memory than it has kills a program instead of refusing."""

CPU_PASS_TOKENS = 32
PASS_TOKENS = 4096
"""What another pass through the model costs, in tokens of padding: on a CPU, and on a device
that is fed by one."""

NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""How PyTorch words a lack of memory where it raises a plain RuntimeError."""


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


class Batch(NamedTuple):
    """Rows to run together, each [rows, longest]: tokens, and the token to predict at each."""

    input_ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Group:
    """The rows of an optimizer step, cut into batches of `micro_rows` rows at most."""

    rows: EncodedRows
    micro_rows: int
    batches: list[Batch]


class _Late(Exception):
    """The deadline came in the middle of a group."""


class Trainer:
    """Trains one model, one request at a time.

    model: a causal language model: `model(input_ids=).logits` is [rows, length,
        vocabulary], and no token's logits depend on a later token.
    encode: texts to padded token tensors; called in a thread of its own, one call at a time.
    optimizer: the Step that applies gradients.
    device: where the model is.
    max_grad_norm: gradients are clipped to this norm; 0 for never.
    max_rows: the largest micro-batch to try; halved for good when memory runs out.
    bfloat16: compute in it where PyTorch's autocast does; the weights and the loss stay
        in their own precision. None: on CUDA devices that have it.
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
        bfloat16: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.model = model
        self.encode = encode
        self.optimizer = optimizer
        self.device = device or torch.device("cpu")
        self.max_grad_norm = max_grad_norm
        self.max_rows = max_rows
        self.bfloat16 = has_bfloat16(self.device) if bfloat16 is None else bfloat16
        self.checkpointing = False
        """Activations are computed again in the backward pass: one row alone did not fit."""
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
        one so far), or when `stopped()`; a group that proves too long is given up between
        two of its batches, and counts in nothing. `on_step(rows, loss)` is told of each
        step.

        Raises TrainingError when no row holds a token to predict, or the loss is not a
        finite number; then the weights have not been touched by that group.
        """
        deadline = self.clock() + timeout_seconds

        def late() -> bool:
            return stopped() or self.clock() > deadline

        result = TrainResult()
        loss_sum = 0.0
        targets = 0
        slowest = 0.0
        group_rows = batch_size * gradient_accumulation_steps
        with contextlib.closing(self._groups(texts, group_rows, micro_rows=batch_size)) as groups:
            for group in groups:
                began = self.clock()
                if stopped() or began + slowest > deadline:
                    result.finished = False
                    break
                rows = group.rows
                if not rows.targets:  # rows of one token: read, and nothing to learn from them
                    result.samples += len(rows)
                    result.tokens += rows.real_tokens
                    continue
                try:
                    group_loss, kept = self._learn(group, late)
                except _Late:
                    self.optimizer.zero_grad()
                    result.finished = False
                    break
                if kept:
                    result.steps += 1
                    result.samples += len(rows)
                    result.tokens += rows.real_tokens
                    result.losses.append(group_loss)
                    loss_sum += group_loss * rows.targets
                    targets += rows.targets
                else:
                    result.discarded += len(rows)
                if on_step is not None:
                    on_step(len(rows), group_loss)
                slowest = max(slowest, self.clock() - began)
        if result.finished and not result.steps and not result.discarded:
            raise TrainingError("the rows hold no token to learn from")
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
        sums: list[Tensor] = []
        counts: list[int] = []
        result = TrainResult()
        was_training = self.model.training
        self.model.eval()
        groups = self._groups(texts, group_rows or batch_size, micro_rows=batch_size)
        try:
            with contextlib.closing(groups), torch.no_grad():
                for group in groups:
                    result.samples += len(group.rows)
                    result.tokens += group.rows.real_tokens
                    if group.rows.targets:
                        sums.append(self._loss_sum(group, learn=False))
                        counts.append(group.rows.targets)
        finally:
            self.model.train(was_training)
        if sums:
            totals = torch.stack(sums).tolist()
            result.losses = [total / n for total, n in zip(totals, counts, strict=True)]
            result.loss = sum(totals) / sum(counts)
        return result

    def encode_rows(self, texts: Sequence[str]) -> EncodedRows:
        """Tokens of each row, padding taken off by the attention mask."""
        encoded = self.encode(texts)
        lengths = encoded["attention_mask"].sum(dim=1).tolist()
        return EncodedRows(
            [ids[:length] for ids, length in zip(encoded["input_ids"], lengths, strict=True)]
        )

    def _groups(
        self, texts: Sequence[str], group_rows: int, *, micro_rows: int
    ) -> Generator[Group, None, None]:
        """The groups in order; a thread, which ends with this generator, makes the next one."""

        def make(start: int) -> Group:
            rows = self.encode_rows(texts[start : start + group_rows])
            return self._cut(rows, min(micro_rows, self.max_rows))

        pool = ThreadPoolExecutor(1, thread_name_prefix="encode")
        try:
            following = pool.submit(make, 0) if texts else None
            for start in range(group_rows, len(texts) + group_rows, group_rows):
                assert following is not None
                group = following.result()
                following = pool.submit(make, start) if start < len(texts) else None
                yield group
        finally:
            pool.shutdown(cancel_futures=True)

    def _cut(self, rows: EncodedRows, micro_rows: int) -> Group:
        on_cpu = self.device.type == "cpu"
        parts = micro_batches(
            rows,
            micro_rows,
            max_tokens=CPU_TOKENS if on_cpu else None,
            pass_tokens=CPU_PASS_TOKENS if on_cpu else PASS_TOKENS,
        )
        batches = [collate(part) for part in parts]
        if self.device.type == "cuda":  # only pinned memory is copied beside the work
            batches = [Batch(*(tensor.pin_memory() for tensor in batch)) for batch in batches]
        return Group(rows, micro_rows, batches)

    def _learn(self, group: Group, late: Callable[[], bool]) -> tuple[float, bool]:
        """One optimizer step: the group's mean loss, and whether the step was kept.

        Raises _Late between two batches once `late()`.
        """
        numbers = [self._loss_sum(group, learn=True, late=late) / group.rows.targets]
        if self.max_grad_norm:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
            numbers.append(norm.to(numbers[0].device))
        # The only place in a step where the device is waited for.
        loss, *norms = torch.stack(numbers).tolist()
        problem = None if math.isfinite(loss) else "the loss is not a finite number"
        if problem is None and not all(map(math.isfinite, norms)):
            problem = "the gradient is not finite"
        if problem is not None:
            self.optimizer.zero_grad()
            raise TrainingError(f"{problem}; the step was not taken")
        kept = self.optimizer.step(batch_size=len(group.rows))
        self.optimizer.zero_grad()
        return loss, kept

    def _loss_sum(
        self, group: Group, *, learn: bool, late: Callable[[], bool] = lambda: False
    ) -> Tensor:
        """Sum of the group's token losses, a scalar on the device; `learn`: with the gradients
        of their mean. Takes less at a time while memory runs out."""
        while True:
            if group.micro_rows > self.max_rows:  # found out after this group was made
                group = self._cut(group.rows, self.max_rows)
            if learn:
                self.optimizer.zero_grad()
            try:
                return self._pass(group, learn=learn, late=late)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Out of the except clause, which holds on to the tensors of the failed pass.
            if learn:
                self.optimizer.zero_grad()
            self._take_less(group)

    def _pass(self, group: Group, *, learn: bool, late: Callable[[], bool]) -> Tensor:
        sums: list[Tensor] = []
        for batch in group.batches:
            if sums and late():
                raise _Late
            with self._autocast():
                logits = self.model(
                    input_ids=batch.input_ids.to(self.device, non_blocking=True)
                ).logits
            # The labels are shifted, not the logits: those are large, and a slice is a copy.
            loss_sum = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(),
                batch.labels.to(self.device, non_blocking=True).flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )
            if learn:
                torch.autograd.backward(loss_sum / group.rows.targets)
            sums.append(loss_sum.detach())
        return torch.stack(sums).sum()

    def _take_less(self, group: Group) -> None:
        """Halve the micro-batch for good; at one row, give up speed for memory, once."""
        largest = max(len(batch.input_ids) for batch in group.batches)
        if largest > 1:
            self.max_rows = (largest + 1) // 2
            logger.warning("out of memory: training %d rows at a time from now on", self.max_rows)
        elif not self.checkpointing and getattr(
            self.model, "supports_gradient_checkpointing", False
        ):
            self.checkpointing = True
            model: Any = self.model
            # Renamed within the versions of transformers that we take.
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
            logger.warning("out of memory: computing activations twice from now on, to keep fewer")
        else:
            raise TrainingError("one row alone does not fit the device's memory")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not self.bfloat16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def has_bfloat16(device: torch.device) -> bool:
    """Whether to compute in bfloat16 there. A CPU stays with float32, also where it has the
    instructions, so that losses there are those of a replay to float32's rounding."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device, or this machine, had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def collate(rows: EncodedRows) -> Batch:
    """Rows padded on the right to the longest of them.

    A label is the row's next token; where there is none it is IGNORED, by place and not by
    token: a row's own end-of-sequence token counts, also where padding is the same token.
    """
    longest = max(1, max(len(row) for row in rows.tokens))
    shape = (len(rows), longest)
    input_ids = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    for number, row in enumerate(rows.tokens):
        input_ids[number, : len(row)] = row
        labels[number, : max(0, len(row) - 1)] = row[1:]
    return Batch(input_ids, labels)


def micro_batches(
    rows: EncodedRows, micro_rows: int, *, max_tokens: int | None = None, pass_tokens: int = 0
) -> list[EncodedRows]:
    """Cut rows into micro-batches of like length, the longest first.

    Of all ways to cut the rows in order of length, the one that computes the fewest tokens,
    with padding, when each micro-batch costs `pass_tokens` more. None holds more than
    `micro_rows` rows, nor, unless it is one row, more than `max_tokens` tokens. Rows
    without a token to predict are left out.
    """
    by_length = sorted((row for row in rows.tokens if len(row) > 1), key=len, reverse=True)
    count = len(by_length)
    cost = [0.0] * (count + 1)  # of the rows from here on, cut in the best way
    cut = [count] * (count + 1)  # where the micro-batch that begins here ends
    for start in range(count - 1, -1, -1):
        longest = len(by_length[start])
        most = micro_rows if max_tokens is None else min(micro_rows, max_tokens // longest)
        ends = range(start + 1, min(count, start + max(1, most)) + 1)
        # Between equals, the larger.
        cut[start] = min(ends, key=lambda end: (longest * (end - start) + cost[end], -end))
        cost[start] = longest * (cut[start] - start) + cost[cut[start]] + pass_tokens
    parts = []
    start = 0
    while start < count:
        parts.append(EncodedRows(by_length[start : cut[start]]))
        start = cut[start]
    return parts
