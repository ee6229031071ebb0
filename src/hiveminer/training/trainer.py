"""Trains one request's rows with any optimizer (`Step`).

One optimizer step trains a global batch of `batch_size * gradient_accumulation_steps` rows (the
last one may hold fewer). Its loss is the mean over all real tokens of the global batch, however
that is split into micro-batches, so the micro-batch size depends on the device's memory alone
and does not change the result.

Rows of similar length run together (`micro_batches`). Padding is on the right, where a causal
model's real tokens never attend, so no attention mask is needed and attention uses its fastest
kernel. While one global batch trains, a thread encodes and collates the next.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hiveminer.errors import TrainingError

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label where nothing is predicted: at a row's last token, and at padding."""

CPU_TOKENS = 2048
"""Tokens of a micro-batch on a CPU, unless one row is longer. More are no faster, and a system
that overcommits memory would kill the program."""

CPU_PASS_TOKENS = 32
PASS_TOKENS = 4096
"""What another pass through the model costs, in tokens of padding: on a CPU, and on an
accelerator."""

NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "MPS backend out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Messages of the plain RuntimeErrors that PyTorch raises when memory runs out."""


class Step(Protocol):
    """What a trainer needs of an optimizer."""

    def step(self, *, batch_size: int) -> bool:
        """Apply the gradients of `batch_size` rows; False if they were discarded."""

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
    """The result of one request.

    loss: mean over the real tokens predicted, in nats per token; None if nothing was trained.
    losses: the same per optimizer step, each with the weights before that step.
    steps, samples, tokens: optimizer steps taken, rows and real tokens in them.
    discarded: rows whose step was discarded; they count in nothing else.
    finished: False if the deadline stopped it.
    targets: real tokens predicted.
    """

    loss: float | None = None
    losses: list[float] = field(default_factory=list)
    steps: int = 0
    samples: int = 0
    tokens: int = 0
    discarded: int = 0
    finished: bool = True
    targets: int = 0

    def add(self, batch: GlobalBatch, loss: float | None = None) -> None:
        """Count a global batch of this mean loss; None if it has no token to predict."""
        self.samples += len(batch.rows)
        self.tokens += sum(map(len, batch.rows))
        if loss is not None:
            self.losses.append(loss)
            nats = (self.loss or 0.0) * self.targets + loss * batch.targets
            self.targets += batch.targets
            self.loss = nats / self.targets


Encode = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Texts to `input_ids` and `attention_mask`, each [rows, longest]."""

EncodedRows = list[Tensor]
"""Token ids of rows, without padding: one int64 tensor per row."""


class MicroBatch(NamedTuple):
    """Rows to run together, each [rows, longest]: token ids, and the token to predict at each."""

    input_ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of one optimizer step, cut into micro-batches of `micro_batch_size` at most."""

    rows: EncodedRows
    micro_batch_size: int
    micro_batches: list[MicroBatch]

    @property
    def targets(self) -> int:
        """Tokens that are predicted: all of a row but its first."""
        return sum(max(0, len(row) - 1) for row in self.rows)


class _Late(Exception):
    """The deadline passed in the middle of a global batch."""


@dataclass(eq=False)
class Trainer:
    """Trains one model, one request at a time.

    model: a causal language model; `model(input_ids=).logits` is [rows, length, vocabulary].
    encode: texts to padded tensors; called in a background thread, one call at a time.
    device: of the model.
    max_grad_norm: gradients are clipped to this norm; 0 for never.
    bfloat16: use PyTorch's autocast; the weights and the loss keep their precision. None: on
        CUDA devices that support it.
    cpu_tokens, cpu_pass_tokens: see CPU_TOKENS and CPU_PASS_TOKENS.
    """

    model: nn.Module
    _: KW_ONLY
    encode: Encode
    optimizer: Step
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    max_grad_norm: float = 1.0
    bfloat16: bool | None = None
    cpu_tokens: int = CPU_TOKENS
    cpu_pass_tokens: int = CPU_PASS_TOKENS
    clock: Callable[[], float] = time.monotonic
    max_micro_batch_size: int = field(default=1024, init=False)
    """Halved for good when memory runs out."""
    checkpointing: bool = field(default=False, init=False)
    """Activations are recomputed in the backward pass: a single row did not fit without."""

    def __post_init__(self) -> None:
        if self.bfloat16 is None:
            self.bfloat16 = has_bfloat16(self.device)

    def train(
        self,
        texts: Sequence[str],
        *,
        batch_size: int,
        gradient_accumulation_steps: int = 1,
        timeout_seconds: float = math.inf,
        on_step: Callable[[int, float], None] = lambda _rows, _loss: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> TrainResult:
        """Train the rows in this order, each once.

        Stops when `stopped()`, or before a global batch that would outlast `timeout_seconds`,
        judged by the slowest one so far. One that takes too long is abandoned between two
        micro-batches. `on_step(rows, loss)` is called after each step.

        Raises TrainingError when no row has a token to predict, or the loss is not finite; then
        that global batch has not changed the weights.
        """
        deadline = self.clock() + timeout_seconds

        def late() -> bool:
            return stopped() or self.clock() > deadline

        result = TrainResult()
        slowest = 0.0
        batches = self._global_batches(
            texts, batch_size * gradient_accumulation_steps, micro_batch_size=batch_size
        )
        with contextlib.closing(batches):
            for batch in batches:
                began = self.clock()
                if stopped() or began + slowest > deadline:
                    result.finished = False
                    break
                if not batch.targets:  # rows of one token: nothing to learn from them
                    result.add(batch)
                    continue
                try:
                    step_loss, kept = self._learn(batch, late)
                except _Late:
                    self.optimizer.zero_grad()
                    result.finished = False
                    break
                if kept:
                    result.steps += 1
                    result.add(batch, step_loss)
                else:
                    result.discarded += len(batch.rows)
                on_step(len(batch.rows), step_loss)
                slowest = max(slowest, self.clock() - began)
        if result.finished and not result.steps and not result.discarded:
            raise TrainingError("the rows hold no token to learn from")
        return result

    def evaluate(
        self, texts: Sequence[str], *, batch_size: int, global_batch_size: int | None = None
    ) -> TrainResult:
        """The loss of the rows with the current weights.

        `losses` has one number per `global_batch_size` rows (default: `batch_size`) with a token
        to predict, as in `train`.
        """
        result = TrainResult()
        was_training = self.model.training
        self.model.eval()
        batches = self._global_batches(
            texts, global_batch_size or batch_size, micro_batch_size=batch_size
        )
        try:
            with contextlib.closing(batches), torch.no_grad():
                for batch in batches:
                    if batch.targets:
                        result.add(batch, self._loss_sum(batch, learn=False).item() / batch.targets)
                    else:
                        result.add(batch)
        finally:
            self.model.train(was_training)
        return result

    def encode_rows(self, texts: Sequence[str]) -> EncodedRows:
        """Token ids of each row, without the padding that the attention mask shows."""
        encoded = self.encode(texts)
        lengths = encoded["attention_mask"].sum(dim=1).tolist()
        return [ids[:length] for ids, length in zip(encoded["input_ids"], lengths, strict=True)]

    def _global_batches(
        self, texts: Sequence[str], global_batch_size: int, *, micro_batch_size: int
    ) -> Generator[GlobalBatch, None, None]:
        """The global batches in order; a thread prepares the next, and ends with the generator."""

        def make(start: int) -> GlobalBatch:
            rows = self.encode_rows(texts[start : start + global_batch_size])
            return self._cut(rows, min(micro_batch_size, self.max_micro_batch_size))

        pool = ThreadPoolExecutor(1, thread_name_prefix="encode")
        try:
            prepared: deque[Future[GlobalBatch]] = deque()
            for start in range(0, len(texts), global_batch_size):
                prepared.append(pool.submit(make, start))
                if start:
                    yield prepared.popleft().result()
            for last in prepared:
                yield last.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _cut(self, rows: EncodedRows, micro_batch_size: int) -> GlobalBatch:
        on_cpu = self.device.type == "cpu"
        cut = micro_batches(
            rows,
            micro_batch_size,
            max_tokens=self.cpu_tokens if on_cpu else sys.maxsize,
            pass_tokens=self.cpu_pass_tokens if on_cpu else PASS_TOKENS,
        )
        parts = [collate(part) for part in cut]
        if self.device.type == "cuda":  # only pinned memory is copied asynchronously
            parts = [MicroBatch(*(tensor.pin_memory() for tensor in part)) for part in parts]
        return GlobalBatch(rows, micro_batch_size, parts)

    def _learn(self, batch: GlobalBatch, late: Callable[[], bool]) -> tuple[float, bool]:
        """One optimizer step: its mean loss, and whether the step was kept.

        Raises _Late between two micro-batches once `late()`.
        """
        numbers = [self._loss_sum(batch, learn=True, late=late) / batch.targets]
        if self.max_grad_norm:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
            numbers.append(norm.to(numbers[0].device))
        # The only synchronization with the device in a step.
        loss, *norms = torch.stack(numbers).tolist()
        if not all(map(math.isfinite, (loss, *norms))):
            self.optimizer.zero_grad()
            what = "gradient" if math.isfinite(loss) else "loss"
            raise TrainingError(f"the {what} is not finite; the step was not taken")
        kept = self.optimizer.step(batch_size=len(batch.rows))
        self.optimizer.zero_grad()
        return loss, kept

    def _loss_sum(
        self, batch: GlobalBatch, *, learn: bool, late: Callable[[], bool] = lambda: False
    ) -> Tensor:
        """Sum of the token losses, a scalar on the device, and with `learn` the gradients of their
        mean. Reduces the micro-batch size while memory runs out."""
        while True:
            if batch.micro_batch_size > self.max_micro_batch_size:  # found after this was prepared
                batch = self._cut(batch.rows, self.max_micro_batch_size)
            if learn:
                self.optimizer.zero_grad()
            try:
                return self._pass(batch, learn=learn, late=late)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of the except clause, which keeps the failed pass's tensors alive.
            if learn:
                self.optimizer.zero_grad()
            self._take_less(batch)

    def _pass(self, batch: GlobalBatch, *, learn: bool, late: Callable[[], bool]) -> Tensor:
        sums: list[Tensor] = []
        for micro in batch.micro_batches:
            if sums and late():
                raise _Late
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bool(self.bfloat16)):
                ids = micro.input_ids.to(self.device, non_blocking=True)
                logits = self.model(input_ids=ids).logits
            # The labels are shifted, not the logits: those are large, and a slice is a copy.
            loss_sum = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(),
                micro.labels.to(self.device, non_blocking=True).flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )
            if learn:
                torch.autograd.backward(loss_sum / batch.targets)
            sums.append(loss_sum.detach())
        return torch.stack(sums).sum()

    def _take_less(self, batch: GlobalBatch) -> None:
        """Halve the micro-batch size for good; at one row, recompute activations."""
        model: Any = self.model
        largest = max(len(micro.input_ids) for micro in batch.micro_batches)
        if largest > 1:
            self.max_micro_batch_size = (largest + 1) // 2
            logger.warning(
                "out of memory: the micro-batch size is %d from now on", self.max_micro_batch_size
            )
        elif not self.checkpointing and getattr(model, "supports_gradient_checkpointing", False):
            self.checkpointing = True
            # Renamed within the supported versions of transformers.
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
            logger.warning("out of memory: activations are recomputed from now on, to keep fewer")
        else:
            raise TrainingError("a single row does not fit into the device's memory")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def has_bfloat16(device: torch.device) -> bool:
    """Whether to compute in bfloat16 on the device. CPUs always use float32, so that their losses
    agree with a replay's."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means that the device or this machine ran out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def collate(rows: EncodedRows) -> MicroBatch:
    """Rows padded on the right to the longest of them.

    A label is the row's next token; where there is none it is IGNORED, by position and not by
    token: a row's own end-of-sequence token counts even if padding is the same token.
    """
    labels = pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=IGNORED)
    return MicroBatch(
        pad_sequence(rows, batch_first=True), nn.functional.pad(labels, (0, 1), value=IGNORED)
    )


def micro_batches(
    rows: EncodedRows, micro_batch_size: int, *, max_tokens: int = sys.maxsize, pass_tokens: int = 0
) -> list[EncodedRows]:
    """Cut rows into micro-batches of similar length, the longest first.

    Of all cuts of the rows in order of length, the one with the fewest tokens, padding included,
    if each micro-batch costs `pass_tokens` more. None has more than `micro_batch_size` rows or,
    unless it is a single row, more than `max_tokens` tokens. Rows without a token to predict are
    left out.
    """
    by_length = sorted((row for row in rows if len(row) > 1), key=len, reverse=True)
    count = len(by_length)
    cost = [0.0] * (count + 1)  # of the rows from here on, cut in the best way
    cut = [count] * (count + 1)  # where the micro-batch that begins here ends
    for start in range(count - 1, -1, -1):
        longest = len(by_length[start])
        most = max(1, min(micro_batch_size, max_tokens // longest))
        ends = range(start + 1, min(count, start + most) + 1)
        # Between equals, the larger.
        cut[start] = min(ends, key=lambda end: (longest * (end - start) + cost[end], -end))
        cost[start] = longest * (cut[start] - start) + cost[cut[start]] + pass_tokens
    parts = []
    start = 0
    while start < count:
        parts.append(by_length[start : cut[start]])
        start = cut[start]
    return parts
