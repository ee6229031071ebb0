"""The cells of the frontier, in the order in which they are run.

What is compared is tuned first: each contender's learning rate has a grid of its own. A cell
that changes one thing is made from its base by `vary`, and says what was hoped from the change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from benchmarks._frontier.cell import EXACT, Cell

MUON, ADAMW = 0.02, 0.006
"""Learning rates in the middle of the two grids."""


def vary(base: Cell, suffix: str, why: str, **changes: Any) -> Cell:
    """The base with one change, under a name that says so."""
    return replace(base, name=f"{base.name}-{suffix}", why=why, **changes)


def rates(base: Cell, grid: Iterable[float]) -> Iterator[Cell]:
    """The base at other learning rates."""
    for rate in grid:
        yield vary(base, f"lr{rate}", f"{base.name} at learning rate {rate}", rate=rate)


def seeds(base: Cell, *numbers: int) -> Iterator[Cell]:
    """The base from other starts and on other rows."""
    for seed in numbers:
        yield vary(base, f"seed{seed}", f"{base.name} with seed {seed}", seed=seed)


DP_MUON = Cell("dp-muon", "data_parallel", MUON, every=1, why="data-parallel Muon")
DP_ADAMW = replace(
    DP_MUON, name="dp-adamw", rate=ADAMW, optimizer="adamw", why="data-parallel AdamW"
)
ALONE = Cell("alone", "alone", 0.012, why="one replica: a quarter of the tokens")


def alone(steps: int, rate: float) -> Cell:
    why = f"one replica for {steps} steps, for `speedup`"
    return replace(ALONE, name=f"alone-{steps}-lr{rate}", steps=steps, rate=rate, why=why)


# One point per number of bytes, to vary from. 170 rounds of dense 2-bit blobs are 39.8 times
# fewer bytes; longer rounds in the last fifth bring it above 40.
AT_40 = Cell(
    "h5-2bit", "sparseloco", MUON, every=5, bits=2, keep=0.95, late_every=6, late_from=0.8,
    why="40 times: every fifth step, dense, 2 bits; every sixth in the last fifth",
)  # fmt: skip
AT_100 = Cell(
    "h5-495", "sparseloco", 0.012, every=5, density=495 / 4096, keep=0.9, power=0.25,
    why="100 times: 495 of 4096, 2 bits",
)  # fmt: skip
AT_250 = Cell(
    "h5-144", "sparseloco", 0.012, every=5, density=144 / 4096, keep=0.9, power=0.75,
    why="250 times: 144 of 4096, 2 bits",
)  # fmt: skip
AT_500 = Cell(
    "h5-61", "sparseloco", 0.012, every=5, density=61 / 4096, keep=0.9, power=0.75,
    why="500 times: 61 of 4096, 2 bits",
)  # fmt: skip
AT_1000 = Cell(
    "h10-61", "sparseloco", 0.012, every=10, density=61 / 4096, keep=0.7, power=1.0,
    why="1,000 times: every tenth step, 61 of 4096, 2 bits",
)  # fmt: skip
AT_160 = replace(
    AT_250, name="h5-256", density=256 / 4096, keep=0.8, power=0.5, rate=0.016,
    why="150 times: 256 of 4096, 2 bits",
)  # fmt: skip

FIRST = [
    DP_MUON,
    vary(AT_40, "share0.3", "the others' steps in the momentum: less noise, no bytes", share=0.3),
    AT_500,
    DP_ADAMW,
    AT_40,
    AT_100,
    AT_250,
]

BASELINES = [
    alone(850, 0.012),
    alone(1700, 0.012),
    *rates(DP_MUON, (0.03, 0.014)),
    *rates(DP_ADAMW, (0.01, 0.003, 0.015)),
    alone(2550, 0.012),
    alone(3400, 0.012),
]

SEARCH = [
    vary(AT_500, "share0.3", "the same where few values are sent", share=0.3),
    vary(AT_500, "last2", "a dense last round: nothing stays unsent", last_bits=2),
    AT_160,
    replace(
        AT_40,
        name="h3-1bit",
        every=3,
        bits=1,
        late_every=0,
        why="shorter rounds for fewer bits, at as many bytes",
    ),
    replace(
        AT_100,
        name="h7-1bit",
        every=7,
        density=1.0,
        bits=1,
        keep=0.9,
        why="dense with one bit instead of sparse with two",
    ),
    AT_1000,
    *rates(AT_40, (0.03,)),
    *rates(AT_500, (0.02,)),
    vary(AT_40, "momentum0.98", "a longer mean against a single peer's noise", momentum=0.98),
    vary(
        AT_500,
        "late10",
        "longer rounds as the rate falls, more values in each",
        every=4,
        late_every=8,
        late_from=0.6,
    ),
    vary(
        AT_500,
        "tables-16",
        "the embeddings sparser, the matrices denser",
        embedding_density=16 / 4096,
        density=67 / 4096,
    ),
]

EXACT_MEAN = replace(AT_40, bits=EXACT, keep=1.0, late_every=0)
ONE_FACTOR = [
    replace(EXACT_MEAN, name="only-local", why="local steps alone: float32, every fifth step"),
    replace(EXACT_MEAN, name="only-own-muon", every=1,
            why="each peer's own Muon step, averaged every step"),
    replace(EXACT_MEAN, name="only-sparse", every=1, density=64 / 4096, keep=0.9, rate=0.012,
            why="sparsity alone: float32, every step, 64 of 4096"),
    replace(AT_40, name="only-bits", every=1, bits=2, late_every=0,
            why="bits alone: dense, 2 bits, every step"),
    replace(EXACT_MEAN, name="only-delay", every=1, delay=1,
            why="delay alone: float32, every step, applied one step late"),
]  # fmt: skip

RIVALS = [
    Cell("float16-h5", "float16", MUON, every=5, why="Float16 averaging every fifth step"),
    Cell("float16-h60", "float16", 0.012, every=60, why="Float16 averaging every 60 steps"),
    Cell("diloco-h30", "diloco", ADAMW, optimizer="adamw", every=30, bits=EXACT,
         outer_rate=0.7, outer_momentum=0.9, why="dense DiLoCo as published"),
    Cell("diloco-h30-m0.6", "diloco", ADAMW, optimizer="adamw", every=30, bits=EXACT,
         outer_rate=0.7, outer_momentum=0.6, why="dense DiLoCo, less outer momentum"),
    Cell("muloco-h30-4bit", "diloco", MUON, every=30, bits=4, keep=0.9, outer_rate=0.7,
         outer_momentum=0.6, why="MuLoCo: Muon inside, Nesterov outside, 4 bits"),
    Cell("muloco-h30-2bit", "diloco", MUON, every=30, bits=2, keep=0.9, outer_rate=0.7,
         outer_momentum=0.6, why="MuLoCo with 2 bits"),
]  # fmt: skip

EIGHT = {"replicas": 8, "rows": 4}
WIDE = {"rows": 32, "steps": 213}
SHORT = {"length": 64, "rows": 16}
ELSEWHERE = [
    vary(DP_MUON, "eight", "eight peers, the same rows per step of all", **EIGHT),
    vary(AT_500, "eight", "eight peers", **EIGHT),
    vary(DP_MUON, "rows32", "four times the rows per step, a quarter of the steps", **WIDE),
    vary(AT_500, "rows32", "larger batches: are rounds cheaper then?", **WIDE),
    vary(AT_40, "rows32-h106", "two rounds of 106 steps with larger batches",
         every=106, late_every=0, **WIDE),
    vary(DP_MUON, "length64", "shorter rows, as many tokens", **SHORT),
    vary(AT_500, "length64", "shorter rows", **SHORT),
    vary(AT_40, "h106", "rounds of 106 steps, dense, 2 bits", every=106, late_every=0),
    vary(DP_MUON, "long", "three times as long", steps=2550),
    vary(AT_500, "long", "three times as long", steps=2550),
]  # fmt: skip

MORE_SEEDS = [
    cell for base in (DP_MUON, AT_40, AT_100, AT_250, AT_500) for cell in seeds(base, 1, 2)
]

LARGE = {"size": "1M", "steps": 5040}
AT_1M = [
    replace(cell, name=f"{cell.name}-1M", rate=cell.rate / 2, why=f"{cell.name} at 1M", **LARGE)
    for cell in (DP_MUON, DP_ADAMW, AT_40, AT_100, AT_250, AT_500, AT_1000, RIVALS[-1])
]

CELLS = [*FIRST, *BASELINES, *SEARCH, *ONE_FACTOR, *RIVALS, *ELSEWHERE, *MORE_SEEDS, *AT_1M]
