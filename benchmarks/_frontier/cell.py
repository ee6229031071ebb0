"""What one cell of the frontier is: a contender with all of its settings, and its bytes' unit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

from benchmarks._frontier.model import Shape

SIZES = {
    "tiny": Shape(width=16, layers=1, heads=1, length=16),
    "0.2M": Shape(width=64, layers=3, heads=2, length=128),
    "1M": Shape(width=128, layers=5, heads=4, length=128),
}
EXACT = 32
"""`bits` that mean float32: nothing is encoded, and bytes are computed."""


@dataclass(frozen=True)
class Cell:
    """One run of the simulation.

    method: `alone` (one replica), `data_parallel`, `float16` (averaging of weights every
        `every` steps), `diloco` (dense update, outer Nesterov; with few bits and Muon inside
        this is MuLoCo) or `sparseloco` (the project's codec, update and apply).
    rate: the inner optimizer's peak learning rate.
    every: H, inner steps per round. late_every: H after `late_from` of the steps, if not 0.
    keep: rho, the share of the compression error that stays to be sent later; with `diloco`
        the decay of its error feedback.
    power: a, `contributor_power`.
    delay: inner steps from a cut to its settling.
    last_bits: the last round is dense with so many bits, if not 0.
    embedding_density: density of the two embedding tables, if not 0.
    share: how far each settled round turns the matrices' momentum towards the move that all
        peers made together; needs no bytes.
    share_tables: the same for the embeddings' first moment.
    ahead: the local weights drift by this share of the last common move while a round runs,
        as a guess of what the others learn in it; taken back before the cut.
    why: what the cell is for, or what was hoped from its one change.
    """

    name: str
    method: str
    rate: float
    optimizer: str = "muon"
    every: int = 5
    density: float = 1.0
    bits: int = 2
    keep: float = 0.95
    power: float = 0.75
    outer_rate: float = 1.0
    outer_momentum: float = 0.0
    delay: int = 0
    late_every: int = 0
    late_from: float = 0.5
    last_bits: int = 0
    embedding_density: float = 0.0
    share: float = 0.0
    share_tables: float = 0.0
    ahead: float = 0.0
    momentum: float = 0.95
    weight_decay: float = 0.1
    embedding_rate: float = 1.0
    warmup: float = 0.05
    floor: float = 0.0
    size: str = "0.2M"
    replicas: int = 4
    rows: int = 8
    length: int = 128
    steps: int = 850
    seed: int = 0
    why: str = ""

    @property
    def shape(self) -> Shape:
        shape = SIZES[self.size]
        return Shape(shape.width, shape.layers, shape.heads, self.length)

    @property
    def peers(self) -> int:
        """Peers that exchange something."""
        return 1 if self.method == "alone" else self.replicas

    def learning_rate(self, step: int) -> float:
        """Linear warmup, then a cosine to `floor` of the peak."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.rate * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return self.rate * (self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2)

    def cuts(self) -> list[int]:
        """Steps after which a round is cut; the last step is always one."""
        return list(self._cuts())

    def _cuts(self) -> Iterator[int]:
        step = 0
        while step < self.steps:
            late = self.late_every and step >= self.late_from * self.steps
            step = min(self.steps, step + (self.late_every if late else self.every))
            yield step

    def settings(self) -> dict[str, Any]:
        """Everything that decides the numbers, without name and reason."""
        values = asdict(self)
        return {key: values[key] for key in values if key not in ("name", "why")}

    def changed(self) -> dict[str, Any]:
        """The settings that differ from their defaults, for tables."""
        defaults = {each.name: each.default for each in fields(self)}
        return {key: value for key, value in self.settings().items() if value != defaults[key]}


def ring_bytes(cell: Cell, *, bytes_per_value: float) -> float:
    """What leaves a peer's interface in one ring all-reduce of all parameters."""
    peers = cell.peers
    return 2 * (peers - 1) / peers * bytes_per_value * cell.shape.parameters


def data_parallel_bytes(cell: Cell) -> float:
    """What leaves a peer in data-parallel training of this cell's steps, in float32."""
    return cell.steps * ring_bytes(cell, bytes_per_value=4)
