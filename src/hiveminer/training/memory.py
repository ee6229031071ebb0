"""Estimates the memory that training needs, before it is allocated.

The minimum is counted: one row at a time, with activations recomputed. A model that does not fit
even so is refused at start; the micro-batch size is then found by trial. docs/memory.md has the
measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import nn

from hiveminer.errors import OperatorError

FLOAT32, BFLOAT16 = 4, 2

AVERAGING = 5 * FLOAT32
"""Bytes per parameter: the averager's copy of the weights, another during a round, and the forked
process's copy of the initial weights and optimizer state (`scripts/bench swarm_memory` measured
21)."""

SNAPSHOT = 4 * FLOAT32
"""Bytes per parameter, while a checkpoint is written: copies of the weights, of those that the
epoch began with, and of the optimizer state."""

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryNeeded:
    """Bytes that a miner's training needs at least.

    parameters: their number.
    optimizer_state: AdamW's two moments.
    casts: bfloat16 copies of the weights that autocast keeps during a pass.
    averaging, snapshot: of Hivemind's processes and of checkpoints, always in host memory.
    activations: of one row, recomputed: each layer's input, and the logits with their gradient.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer_state: int
    casts: int
    averaging: int
    snapshot: int
    activations: int

    @property
    def training(self) -> int:
        """Bytes of device memory."""
        return self.weights + self.gradients + self.optimizer_state + self.casts + self.activations

    @property
    def host(self) -> int:
        """Bytes of host memory, whatever the device."""
        return self.averaging + self.snapshot


def memory_needed(
    model: nn.Module, *, sequence_length: int, bfloat16: bool = False
) -> MemoryNeeded:
    """The memory that training the model needs; it may be on the `meta` device."""
    trained = [value for value in model.parameters() if value.requires_grad]
    numbers = sum(value.numel() for value in trained)
    gradients = sum(value.nbytes for value in trained)
    config = getattr(model, "config", None)
    width = getattr(config, "hidden_size", 0) * getattr(config, "num_hidden_layers", 0)
    vocabulary = getattr(config, "vocab_size", 0)
    return MemoryNeeded(
        parameters=sum(value.numel() for value in model.parameters()),
        weights=sum(value.nbytes for value in model.parameters()),
        gradients=gradients,
        optimizer_state=2 * gradients,
        casts=BFLOAT16 * numbers if bfloat16 else 0,
        averaging=AVERAGING * numbers,
        snapshot=SNAPSHOT * numbers,
        activations=sequence_length * (width + 2 * vocabulary) * FLOAT32,
    )


def memory_left(device: torch.device, *, cgroup: Path = CGROUP) -> int:
    """Bytes available on the device; for a CPU and MPS, of host memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _container_left(cgroup))


def check_machine(needed: MemoryNeeded, device: str | None, *, left: int) -> None:
    """Refuse a loaded model that does not fit in the bytes left of this machine's memory, before
    Hivemind starts.

    device: as configured; on the CPU, training is counted too. No device is initialized.
    """
    compiled = torch.version.cuda is not None or torch.version.hip is not None
    accelerator = compiled or torch.backends.mps.is_available()  # creates no CUDA context
    if device == "cpu" or (device is None and not accelerator):
        wanted = needed.host + needed.training - needed.weights
    else:  # weights and optimizer state have moved by the first checkpoint
        wanted = max(needed.averaging + needed.optimizer_state, needed.host - needed.weights)
    _refuse(needed, wanted, left, where="this machine")


def check_device(needed: MemoryNeeded, device: torch.device, *, left: int) -> None:
    """Refuse a model that cannot train in the bytes left on the device, before it is moved there.

    Devices other than CUDA share host memory, which holds weights and optimizer state already.
    """
    if device.type == "cuda":
        _refuse(needed, needed.training, left, where=str(device))
    else:
        wanted = needed.gradients + needed.activations + needed.snapshot
        _refuse(needed, wanted, left, where="this machine")


def _refuse(needed: MemoryNeeded, wanted: int, left: int, *, where: str) -> None:
    if wanted > left:
        raise OperatorError(
            f"the model's {needed.parameters / 1e6:,.1f}M parameters need at least "
            f"{_gigabytes(wanted)} more memory to train, and {where} has {_gigabytes(left)} left: "
            "free some, or join a run with a smaller model"
        )


def _container_left(cgroup: Path) -> int:
    """Bytes left of a container's limit (cgroup v2); psutil sees the whole machine."""
    try:
        limit = (cgroup / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return 1 << 62
        used = int((cgroup / "memory.current").read_text(encoding="ascii"))
        cache = (cgroup / "memory.stat").read_text(encoding="ascii").split("\n")
        files = sum(int(line.split()[1]) for line in cache if line.startswith("inactive_file "))
        return max(0, int(limit) - used + files)
    except (OSError, ValueError):
        return 1 << 62


def _gigabytes(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB"
