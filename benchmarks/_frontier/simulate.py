"""One cell from its start, or from where it was stopped, to its numbers."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks._frontier.cell import Cell, data_parallel_bytes, ring_bytes
from benchmarks._frontier.exchange import Exchange, make_exchange
from benchmarks._frontier.model import Inner, Text, Weights, evaluate, initial_weights, loss

SAVE_SECONDS = 20.0
"""Between two checkpoints of a cell: what a kill costs, at most, beside one step."""


class Simulation:
    """The replicas of one cell, their optimizer and exchange, at a step."""

    def __init__(self, cell: Cell, text: Text):
        self.cell, self.text = cell, text
        self.at = 0
        self.seconds = 0.0
        self.curve: list[tuple[int, float]] = []
        # Data-parallel training is one model with everybody's rows.
        self.models = cell.replicas if cell.method not in ("alone", "data_parallel") else 1
        self.weights = initial_weights(cell.shape, replicas=self.models, seed=cell.seed)
        self.inner = Inner(
            cell.optimizer, cell.momentum, weight_decay=cell.weight_decay,
            embedding_rate=cell.embedding_rate,
        )  # fmt: skip
        self.exchange: Exchange = make_exchange(cell, self.weights)
        self.cuts = {step: number for number, step in enumerate(cell.cuts())}
        self.rows = text.evaluation(cell.length)

    def step(self) -> None:
        cell = self.cell
        peers = 1 if cell.method == "alone" else cell.replicas
        batch = self.text.batch(
            seed=cell.seed, step=self.at, peers=peers, rows=cell.rows, length=cell.length
        )
        batch = batch.view(self.models, -1, batch.shape[-1])
        leaves = {name: weight.requires_grad_() for name, weight in self.weights.items()}
        found = torch.autograd.grad(loss(leaves, batch, cell.shape), list(leaves.values()))
        for weight in self.weights.values():
            weight.requires_grad_(requires_grad=False)
        gradients = _clipped(dict(zip(leaves, found, strict=True)))
        self.inner.step(self.weights, gradients, rate=cell.learning_rate(self.at))
        self.at += 1
        last = self.at == cell.steps
        if cell.delay and self.at - cell.delay in self.cuts:
            self._settle()
        if self.at in self.cuts:
            self._settle()  # a delay ends with the round, at the latest
            self.exchange.cut(self.cuts[self.at], last=last)
            if last or not cell.delay:
                self._settle()
        if last or self.at % max(1, -(-cell.steps // 4)) == 0:
            here = evaluate(self.exchange.result(), self.rows, cell.shape)
            self.curve.append((self.at, round(here, 5)))

    def _settle(self) -> None:
        move = self.exchange.settle()
        if move is None or not self.cell.share:
            return
        for name, step in move.items():
            if self.inner.uses_muon(name):
                _turn(self.inner.first[name], step, self.cell.share)

    def numbers(self) -> dict[str, Any]:
        """The cell's result once it has ended."""
        cell, exchange = self.cell, self.exchange
        if cell.method == "data_parallel":
            exchange.sent = cell.replicas * cell.steps * ring_bytes(cell, bytes_per_value=4)
        sent = exchange.sent / cell.replicas
        return {
            "loss": self.curve[-1][1] if math.isfinite(self.curve[-1][1]) else None,
            "curve": self.curve,
            "parameters": cell.shape.parameters,
            "tokens": cell.steps * cell.peers * cell.rows * cell.length,
            "rounds": len(self.cuts) if cell.peers > 1 else 0,
            "bytes_sent_per_peer": round(sent),
            "bytes_received_per_peer": round(sent),
            "bytes_of_own_blobs": round(exchange.blobs / cell.replicas),
            "bytes_ratio": round(data_parallel_bytes(cell) / sent, 2) if sent else None,
            "seconds": round(self.seconds, 1),
        }

    def save(self, path: Path) -> None:
        state = {
            "settings": self.cell.settings(), "at": self.at, "seconds": self.seconds,
            "curve": self.curve, "weights": self.weights, "steps": self.inner.steps,
            "first": self.inner.first, "second": self.inner.second,
            "exchange": self.exchange.state_dict(), "text": self.text.hash,
        }  # fmt: skip
        half = path.with_suffix(".half")
        torch.save(state, half)
        half.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint; one of other settings or other text is ignored."""
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        if state["settings"] != self.cell.settings() or state["text"] != self.text.hash:
            return
        self.at, self.seconds = state["at"], state["seconds"]
        self.curve = [tuple(each) for each in state["curve"]]
        for name, weight in self.weights.items():
            weight.copy_(state["weights"][name])
        self.inner.steps = state["steps"]
        self.inner.first, self.inner.second = state["first"], state["second"]
        self.exchange.load_state_dict(state["exchange"])


def run_cell(cell: Cell, text: Text, *, folder: Path) -> dict[str, Any]:
    """Run a cell to its end; what it has done is in `folder` while it runs."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{cell.name}.pt"
    simulation = Simulation(cell, text)
    simulation.load(path)
    saved = time.monotonic()
    while simulation.at < cell.steps:
        began = time.process_time()
        simulation.step()
        simulation.seconds += time.process_time() - began
        if time.monotonic() - saved > SAVE_SECONDS:
            simulation.save(path)
            saved = time.monotonic()
    numbers = simulation.numbers()
    path.unlink(missing_ok=True)
    return numbers


def _clipped(gradients: Weights, *, norm: float = 1.0) -> Weights:
    """Each replica's gradients, to a global norm of at most 1, as the trainer does."""
    squares = torch.stack([each.flatten(1).square().sum(1) for each in gradients.values()])
    factor = (norm / squares.sum(0).sqrt().add(1e-6)).clamp_max(1.0)
    return {
        name: each * factor.view(-1, *[1] * (each.dim() - 1)) for name, each in gradients.items()
    }


@torch.no_grad()
def _turn(momentum: torch.Tensor, step: torch.Tensor, share: float) -> None:
    """Turn the momentum of each replica and matrix, at its own length, to the common step."""
    length = step.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    own = momentum.norm(dim=(-2, -1), keepdim=True)
    momentum.mul_(1 - share).add_(share * own * (step / length))
