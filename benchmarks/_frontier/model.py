"""A byte-level transformer as many replicas at once, its text and its inner optimizer.

Every tensor has the replicas as its first dimension, so that four replicas are one batched
model: on one core as fast a token as a single model with four times the rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from hiveminer.training.data import Rows, builtin_rows, split_held_out

BYTES = 256
HELD_OUT = 0.01
EVALUATION_TOKENS = 384 * 128

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """Pre-norm GPT with tied embedding, learned positions, and norms without parameters."""

    width: int
    layers: int
    heads: int
    length: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name; a matrix is [in, out], and those of all layers are one tensor."""
        width, layers = self.width, self.layers
        return {
            "bytes": (BYTES, width),
            "positions": (self.length, width),
            "layers.attention": (layers, width, 3 * width),
            "layers.attention_out": (layers, width, width),
            "layers.inner": (layers, width, 4 * width),
            "layers.inner_out": (layers, 4 * width, width),
        }

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors().values())


def initial_weights(shape: Shape, *, replicas: int, seed: int) -> Weights:
    """The same start for all replicas."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, size in shape.tensors().items():
        scale = 0.02 if name in ("bytes", "positions") else size[1] ** -0.5
        if name.endswith("_out"):
            scale /= (2 * shape.layers) ** 0.5
        one = torch.randn(size, generator=generator) * scale
        weights[name] = one.expand(replicas, *size).contiguous()
    return weights


def loss(weights: Weights, rows: Tensor, shape: Shape) -> Tensor:
    """Mean loss in nats per byte of each replica, summed over replicas.

    rows: bytes, int64[replicas, rows, length + 1].
    """
    replicas, count, _ = rows.shape
    inputs, targets = rows[..., :-1], rows[..., 1:]
    length, width = inputs.shape[2], shape.width
    table = weights["bytes"]
    offsets = torch.arange(replicas, device=table.device).mul_(BYTES)[:, None, None]
    hidden = F.embedding((inputs + offsets).reshape(-1), table.reshape(-1, width))
    hidden = hidden.view(replicas, count, length, width) + weights["positions"][:, None, :length]
    hidden = hidden.view(replicas, count * length, width)
    attention, attention_out, inner_in, inner_out = (
        weights[f"layers.{name}"].unbind(1)
        for name in ("attention", "attention_out", "inner", "inner_out")
    )
    for layer in range(shape.layers):
        part = torch.bmm(_norm(hidden), attention[layer])
        part = part.view(replicas * count, length, 3, shape.heads, width // shape.heads)
        query, key, value = part.permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        found = found.transpose(1, 2).reshape(replicas, count * length, width)
        hidden = hidden + torch.bmm(found, attention_out[layer])
        inner = torch.bmm(_norm(hidden), inner_in[layer])
        inner = F.gelu(inner, approximate="tanh")
        hidden = hidden + torch.bmm(inner, inner_out[layer])
    logits = torch.bmm(_norm(hidden), table.transpose(1, 2))
    return F.cross_entropy(logits.view(-1, BYTES), targets.reshape(-1)) * replicas


def _norm(hidden: Tensor) -> Tensor:
    return F.layer_norm(hidden, hidden.shape[-1:])


class Text:
    """The standard library's source, as the built-in run reads it; the last 1% is held out."""

    def __init__(
        self, rows: Rows | None = None, *, evaluation_tokens: int = EVALUATION_TOKENS
    ) -> None:
        self._evaluation_tokens = evaluation_tokens
        rows = rows or builtin_rows()
        self.hash = rows.hash
        train, held_out = split_held_out(len(rows), HELD_OUT)
        self._train = _as_bytes("".join(rows.texts(train)))
        self._held_out = _as_bytes("".join(rows.texts(held_out)))

    def batch(self, *, seed: int, step: int, peers: int, rows: int, length: int) -> Tensor:
        """Rows of a step, int64[peers, rows, length + 1]: the same for every contender."""
        generator = np.random.default_rng((seed, step))
        starts = generator.integers(0, len(self._train) - length - 1, (peers, rows))
        return self._rows(self._train, starts.reshape(-1), length).view(peers, rows, length + 1)

    def evaluation(self, length: int) -> Tensor:
        """Fixed rows that nobody trains on, evenly spread, int64[rows, length + 1]."""
        last = len(self._held_out) - length - 1
        starts = np.linspace(0, last, self._evaluation_tokens // length).astype(np.int64)
        return self._rows(self._held_out, starts, length)

    @staticmethod
    def _rows(text: np.ndarray, starts: np.ndarray, length: int) -> Tensor:
        return torch.from_numpy(text[starts[:, None] + np.arange(length + 1)].astype(np.int64))


def _as_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


@torch.no_grad()
def evaluate(weights: Weights, rows: Tensor, shape: Shape, *, at_once: int = 32) -> float:
    """Held-out loss of one model in nats per byte; weights without the replicas' dimension."""
    one = {name: weight[None] for name, weight in weights.items()}
    losses = [float(loss(one, part[None], shape)) * len(part) for part in rows.split(at_once)]
    return sum(losses) / len(rows)


@dataclass
class Inner:
    """AdamW, or Muon for the matrices inside and AdamW for the embeddings, per replica.

    The same rules as `hiveminer.training.optimizer`: Muon's step is scaled by
    0.2 sqrt(max(rows, columns)), so that one learning rate serves both.
    """

    name: str
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    embedding_rate: float = 1.0
    """Learning rate of the embeddings over that of the matrices, with Muon."""
    steps: int = 0
    first: Weights = field(default_factory=dict)
    second: Weights = field(default_factory=dict)

    def uses_muon(self, name: str) -> bool:
        return self.name == "muon" and name.startswith("layers.")

    @torch.no_grad()
    def step(self, weights: Weights, gradients: Weights, *, rate: float) -> None:
        self.steps += 1
        for name, gradient in gradients.items():
            if self.uses_muon(name):
                self._muon(name, weights[name], gradient, rate)
            else:
                scale = self.embedding_rate if self.name == "muon" else 1.0
                self._adam(name, weights[name], gradient, rate * scale)

    def _adam(self, name: str, weight: Tensor, gradient: Tensor, rate: float) -> None:
        if name not in self.first:
            self.first[name] = torch.zeros_like(weight)
            self.second[name] = torch.zeros_like(weight)
        first, second = self.first[name], self.second[name]
        first.lerp_(gradient, 1 - self.betas[0])
        second.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
        correction = 1 - self.betas[0] ** self.steps
        scale = (1 - self.betas[1] ** self.steps) ** 0.5
        weight.mul_(1 - rate * self.weight_decay)
        root = second.sqrt().div_(scale).add_(self.eps)
        weight.addcdiv_(first, root, value=-rate / correction)

    def _muon(self, name: str, weight: Tensor, gradient: Tensor, rate: float) -> None:
        momentum = self.first.setdefault(name, torch.zeros_like(weight))
        momentum.lerp_(gradient, 1 - self.momentum)
        step = gradient.lerp(momentum, self.momentum)
        move = orthogonalized(step.flatten(0, 1)).view_as(step)
        scale = 0.2 * max(weight.shape[-2:]) ** 0.5
        weight.mul_(1 - rate * self.weight_decay).sub_(move, alpha=rate * scale)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Five Newton-Schulz steps with `torch.optim.Muon`'s coefficients, batched, in float32."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    found = matrices.transpose(-2, -1) if tall else matrices
    found = found / found.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = torch.bmm(found, found.transpose(-2, -1))
        inner = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        found = torch.baddbmm(found, inner, found, beta=3.4445)
    return found.transpose(-2, -1) if tall else found
