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
    """The replicas of one cell, their optimizer and exchange, at a step.

    The replicas train on `device`; the exchange works on the CPU, as it does in a miner.
    """

    def __init__(self, cell: Cell, text: Text, *, device: str = "cpu"):
        self.cell, self.text, self.device = cell, text, device
        self.at = 0
        self.seconds = 0.0
        self.curve: list[tuple[int, float]] = []
        # Data-parallel training is one model with everybody's rows.
        self.models = cell.replicas if cell.method not in ("alone", "data_parallel") else 1
        start = initial_weights(cell.shape, replicas=self.models, seed=cell.seed)
        self.weights = {name: weight.to(device) for name, weight in start.items()}
        self.inner = Inner(
            cell.optimizer, cell.momentum, weight_decay=cell.weight_decay,
            embedding_rate=cell.embedding_rate,
        )  # fmt: skip
        self.exchange: Exchange = make_exchange(cell, start)
        self.cuts = {step: number for number, step in enumerate(cell.cuts())}
        self.rows = text.evaluation(cell.length).to(device)
        self.drift: Weights = {}
        self.drifted = 0

    def step(self) -> None:
        cell = self.cell
        peers = 1 if cell.method == "alone" else cell.replicas
        batch = self.text.batch(
            seed=cell.seed, step=self.at, peers=peers, rows=cell.rows, length=cell.length
        )
        batch = batch.view(self.models, -1, batch.shape[-1]).to(self.device)
        leaves = {name: weight.requires_grad_() for name, weight in self.weights.items()}
        found = torch.autograd.grad(loss(leaves, batch, cell.shape), list(leaves.values()))
        for weight in self.weights.values():
            weight.requires_grad_(requires_grad=False)
        gradients = _clipped(dict(zip(leaves, found, strict=True)))
        self.inner.step(self.weights, gradients, rate=cell.learning_rate(self.at))
        self._drift()
        self.at += 1
        last = self.at == cell.steps
        if cell.delay and self.at - cell.delay in self.cuts:
            self._settle()
        if self.at in self.cuts:
            self._settle()  # a delay ends with the round, at the latest
            self._drift_back()
            self._to_exchange()
            self.exchange.cut(self.cuts[self.at], last=last)
            self._from_exchange()
            if last or not cell.delay:
                self._settle()
        if last or self.at % max(1, -(-cell.steps // 4)) == 0:
            self.curve.append((self.at, round(self._evaluate(), 5)))

    def _evaluate(self) -> float:
        self._to_exchange()
        return evaluate(self._here(self.exchange.result()), self.rows, self.cell.shape)

    def _here(self, tensors: Weights) -> Weights:
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    def _settle(self) -> None:
        cell = self.cell
        self._to_exchange()
        found = self.exchange.settle()
        if found is None:
            return
        self._from_exchange()
        move = self._here(found)
        for name, step in move.items():
            if self.inner.uses_muon(name) and cell.share:
                _turn(self.inner.first[name], step, cell.share)
            elif not self.inner.uses_muon(name) and cell.share_tables:
                root = self.inner.second[name].sqrt()  # from Adam's steps back to gradients
                _turn(self.inner.first[name], step * root, cell.share_tables)
        if cell.ahead:
            self.drift = {name: step.mul(cell.ahead / cell.every) for name, step in move.items()}
            self.drifted = 0

    def _to_exchange(self) -> None:
        if self.device != "cpu":
            for name, weight in self.exchange.weights.items():
                weight.copy_(self.weights[name])

    def _from_exchange(self) -> None:
        if self.device != "cpu":
            for name, weight in self.exchange.weights.items():
                self.weights[name].copy_(weight)

    def _drift(self) -> None:
        for name, step in self.drift.items():
            self.weights[name].sub_(step)
        self.drifted += 1

    def _drift_back(self) -> None:
        for name, step in self.drift.items():
            self.weights[name].add_(step, alpha=self.drifted)
        self.drift, self.drifted = {}, 0

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
            "drift": self.drift, "drifted": self.drifted,
        }  # fmt: skip
        half = path.with_suffix(".half")
        torch.save(state, half)
        half.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint; one of other settings or other text is ignored."""
        if not path.exists():
            return
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state["settings"] != self.cell.settings() or state["text"] != self.text.hash:
            return
        self.at, self.seconds = state["at"], state["seconds"]
        self.curve = [tuple(each) for each in state["curve"]]
        for name, weight in self.weights.items():
            weight.copy_(state["weights"][name])
        self.inner.steps = state["steps"]
        self.inner.first = self._here(state["first"])
        self.inner.second = self._here(state["second"])
        self.drift, self.drifted = self._here(state["drift"]), state["drifted"]
        self.exchange.load_state_dict(state["exchange"])


def run_cell(cell: Cell, text: Text, *, folder: Path, device: str = "cpu") -> dict[str, Any]:
    """Run a cell to its end; what it has done is in `folder` while it runs."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{cell.name}.pt"
    simulation = Simulation(cell, text, device=device)
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
