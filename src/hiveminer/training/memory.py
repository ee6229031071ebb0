"""How much memory training takes, told before it is taken.

What is counted is the least: one row at a time, its activations computed twice. Whoever
has not even that is refused at start; how many rows at a time fit beyond it, the trainer
finds out by trying. docs/memory.md holds what was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from hiveminer.errors import OperatorError

FLOAT32, BFLOAT16 = 4, 2

AVERAGING = 5 * FLOAT32
"""Bytes a parameter: the averager's copy of the weights, one more while a round runs, and the
weights and moments of the start, which its forked process keeps when ours move on (20;
`scripts/bench swarm_memory` measured 21)."""

SNAPSHOT = 4 * FLOAT32
"""Bytes a parameter: the copy of weights, epoch's start and moments that a checkpoint is
written from, while that takes."""

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryNeeded:
    """Bytes that a miner's training takes at least.

    parameters: how many numbers the model has.
    weights, gradients: the model's, in its own precision.
    moments: AdamW's two, of the same.
    casts: bfloat16 copies of the weights that autocast keeps through a pass.
    averaging: what hivemind's processes take, always in the machine's own memory.
    snapshot: what a checkpoint takes there while it is written.
    activations: of one row of the run's sequence length, as they are kept when memory asks
        for it: each layer's input, and the logits with their gradient.
    """

    parameters: int
    weights: int
    gradients: int
    moments: int
    casts: int
    averaging: int
    snapshot: int
    activations: int

    @property
    def training(self) -> int:
        """Bytes where the model trains: the device's memory."""
        return self.weights + self.gradients + self.moments + self.casts + self.activations

    @property
    def host(self) -> int:
        """Bytes of the machine's own memory, wherever the model trains."""
        return self.averaging + self.snapshot


def memory_needed(
    model: nn.Module, *, sequence_length: int, bfloat16: bool = False
) -> MemoryNeeded:
    """What it takes to train the model; one on the `meta` device will do."""
    trained = [value for value in model.parameters() if value.requires_grad]
    weights = sum(value.numel() * value.element_size() for value in model.parameters())
    gradients = sum(value.numel() * value.element_size() for value in trained)
    config = getattr(model, "config", None)
    width = getattr(config, "hidden_size", 0) * getattr(config, "num_hidden_layers", 0)
    vocabulary = getattr(config, "vocab_size", 0)
    return MemoryNeeded(
        parameters=sum(value.numel() for value in model.parameters()),
        weights=weights,
        gradients=gradients,
        moments=2 * gradients,
        casts=BFLOAT16 * sum(value.numel() for value in trained) if bfloat16 else 0,
        averaging=AVERAGING * sum(value.numel() for value in trained),
        snapshot=SNAPSHOT * sum(value.numel() for value in trained),
        activations=sequence_length * (width + 2 * vocabulary) * FLOAT32,
    )


def memory_left(device: torch.device) -> int:
    """Bytes that can still be had on the device; of a CPU and of MPS, the machine's own."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _container_left())


def check_machine(
    needed: MemoryNeeded,
    device: str | None,
    *,
    left: Callable[[torch.device], int] = memory_left,
) -> None:
    """Refuse a model for which this machine has not the memory, before hivemind starts.

    The model is loaded already. `device` is what the operator asked for: where it is the
    CPU, training is counted too. Touches no other device.
    """
    cpu = device == "cpu" or (device is None and not _has_accelerator())
    if cpu:
        wanted = needed.host + needed.training - needed.weights
    else:  # weights and moments have moved away by the first checkpoint
        wanted = max(needed.averaging + needed.moments, needed.host - needed.weights)
    _refuse(needed, wanted, left(torch.device("cpu")), where="this machine")


def check_device(
    needed: MemoryNeeded,
    device: torch.device,
    *,
    left: Callable[[torch.device], int] = memory_left,
) -> None:
    """Refuse a model that cannot train on the device; before the model moves there.

    Other devices than CUDA's share the machine's memory, and hold weights and moments already.
    """
    if device.type == "cuda":
        _refuse(needed, needed.training, left(device), where=str(device))
    else:
        wanted = needed.gradients + needed.activations + needed.snapshot
        _refuse(needed, wanted, left(device), where="this machine")


def _refuse(needed: MemoryNeeded, wanted: int, left: int, *, where: str) -> None:
    if wanted > left:
        raise OperatorError(
            f"the model's {needed.parameters / 1e6:,.1f}M parameters need at least "
            f"{_gigabytes(wanted)} more memory to train, and {where} has {_gigabytes(left)} left: "
            "free some, or join a run with a smaller model"
        )


def _has_accelerator() -> bool:
    """Whether the best device is not the CPU; asked so that no CUDA context comes of it."""
    compiled = torch.version.cuda is not None or torch.version.hip is not None
    return compiled or torch.backends.mps.is_available()


def _container_left() -> int:
    """What a container's own limit leaves (cgroup v2); psutil sees the whole machine."""
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return 1 << 62
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        cache = (CGROUP / "memory.stat").read_text(encoding="ascii").split("\n")
        files = sum(int(line.split()[1]) for line in cache if line.startswith("inactive_file "))
        return max(0, int(limit) - used + files)
    except (OSError, ValueError):
        return 1 << 62


def _gigabytes(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB"
