"""The cells of the frontier, in the order in which they are run.

What is compared is tuned first: each contender's learning rate has a grid of its own. A cell
that changes one thing is made from its base by `vary`, and says what was hoped from the change.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from benchmarks._frontier.cell import EXACT, Cell

MUON, ADAMW = 0.02, 0.006
"""Learning rates in the middle of the two grids."""


def vary(base: Cell, suffix: str, why: str, **changes: Any) -> Cell:
    """The base with one change, under a name that says so."""
    return replace(base, name=f"{base.name}-{suffix}", why=why, **changes)


SHORT_NAMES = {
    "rate": "lr", "keep": "keep", "power": "a", "momentum": "m", "outer_rate": "outer",
    "share": "share", "share_tables": "tables", "ahead": "ahead", "seed": "seed",
}  # fmt: skip


def sweep(base: Cell, why: str = "", **grid: Iterable[Any]) -> Iterator[Cell]:
    """The base with all combinations of other settings; what differs is in the name."""
    for values in product(*grid.values()):
        changes = dict(zip(grid, values, strict=True))
        changed = {key: value for key, value in changes.items() if getattr(base, key) != value}
        suffix = "-".join(f"{SHORT_NAMES.get(key, key)}{value}" for key, value in changed.items())
        if changed:
            yield vary(base, suffix, why or f"{base.name}, tuned", **changed)


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

BASELINES = [
    DP_MUON,
    DP_ADAMW,
    *sweep(DP_MUON, rate=(0.014, 0.03, 0.04, 0.05)),
    *sweep(DP_ADAMW, rate=(0.003, 0.01, 0.015, 0.02)),
    *sweep(DP_MUON, rate=(0.03,), momentum=(0.9, 0.98)),
    *(alone(steps, rate) for steps in (850, 1700, 2550, 3400) for rate in (0.012, 0.02, 0.03)),
]

SHARE = "the others' steps in the momentum: less noise, no bytes"
SEARCH_40 = [
    AT_40,
    *sweep(AT_40, SHARE, rate=(0.02, 0.03, 0.04, 0.05), share=(0.0, 0.3, 0.6)),
    *(
        cell
        for base in sweep(AT_40, rate=(0.03, 0.04), share=(0.3,))
        for cell in (
            *sweep(base, "a shorter or longer mean of gradients", momentum=(0.9, 0.98)),
            *sweep(base, "how much of what was not sent stays", keep=(0.9, 1.0)),
            *sweep(base, "a smaller or larger outer step", outer_rate=(0.8, 1.25)),
            *sweep(base, "a guess of what the others learn meanwhile", ahead=(0.3, 0.6)),
            *sweep(base, "the embeddings' moment shared, too", share_tables=(0.3, 0.6)),
        )
    ),
    *(
        cell
        for every, density, bits in ((1, 0.06, 1), (2, 0.12, 2), (3, 0.2, 2), (3, 1.0, 1))
        for cell in sweep(
            replace(
                AT_40, name=f"h{every}-{density}-{bits}bit", every=every, density=density,
                bits=bits, late_every=0, keep=0.9, power=0.25,
            ),
            "shorter rounds and fewer values, at as many bytes",
            rate=(0.02, 0.03), share=(0.3,),
        )
    ),
]  # fmt: skip
SEARCH_100 = [
    AT_100,
    *sweep(AT_100, rate=(0.012, 0.02, 0.03, 0.04), share=(0.0, 0.3, 0.6)),
    *sweep(AT_100, rate=(0.02, 0.03), share=(0.3, 0.6), keep=(0.95,)),
    *sweep(AT_100, rate=(0.02, 0.03), share=(0.3,), power=(0.0, 0.5)),
    *(
        cell
        for every, density, bits in ((3, 0.065, 2), (8, 0.24, 2), (7, 1.0, 1))
        for cell in sweep(
            replace(
                AT_100, name=f"h{every}-{density}-{bits}bit", every=every,
                density=density, bits=bits,
            ),
            "other rounds at as many bytes",
            rate=(0.02, 0.03), share=(0.3,),
        )
    ),
]  # fmt: skip
SEARCH_160 = [
    AT_160,
    *sweep(AT_160, rate=(0.02, 0.03), share=(0.0, 0.3, 0.6)),
    *sweep(AT_160, rate=(0.02, 0.03), share=(0.3, 0.6), keep=(0.9,)),
]
SEARCH_250 = [
    AT_250,
    *sweep(AT_250, rate=(0.012, 0.02, 0.03), share=(0.0, 0.3, 0.6)),
    *sweep(AT_250, rate=(0.012, 0.02, 0.03), share=(0.3, 0.6), power=(0.5,)),
]
SEARCH_500 = [
    AT_500,
    *sweep(AT_500, rate=(0.012, 0.02, 0.03), share=(0.0, 0.3, 0.6)),
    *sweep(AT_500, rate=(0.02,), share=(0.3, 0.6), power=(0.6, 0.9)),
    *sweep(AT_500, rate=(0.02,), share=(0.3, 0.6), keep=(0.8, 0.95)),
    *sweep(AT_500, "a guess of what the others learn meanwhile", rate=(0.02,), share=(0.3,),
           ahead=(0.3, 0.6)),
    *(
        cell
        for every, kept in ((3, 34), (10, 140), (20, 320))
        for cell in sweep(
            replace(AT_500, name=f"h{every}-{kept}", every=every, density=kept / 4096),
            "other rounds at as many bytes",
            rate=(0.02,), share=(0.3, 0.6),
        )
    ),
    vary(AT_500, "last2", "a dense last round: nothing stays unsent", last_bits=2),
    vary(AT_500, "late10", "longer rounds as the rate falls", every=4, late_every=8, late_from=0.6),
    vary(AT_500, "tables16", "the embeddings sparser, the matrices denser",
         embedding_density=16 / 4096, density=67 / 4096),
]  # fmt: skip
SEARCH_1000 = [AT_1000, *sweep(AT_1000, rate=(0.012, 0.02), share=(0.0, 0.3), keep=(0.7, 0.85))]

EXACT_MEAN = replace(AT_40, bits=EXACT, keep=1.0, late_every=0)
ONE_FACTOR = [
    cell
    for base in (
        replace(EXACT_MEAN, name="only-local", why="local steps alone: float32, every fifth step"),
        replace(EXACT_MEAN, name="only-own-muon", every=1,
                why="each peer's own Muon step, averaged every step"),
        replace(EXACT_MEAN, name="only-sparse", every=1, density=64 / 4096, keep=0.9,
                why="sparsity alone: float32, every step, 64 of 4096"),
        replace(AT_40, name="only-bits", every=1, bits=2, late_every=0,
                why="bits alone: dense, 2 bits, every step"),
        replace(EXACT_MEAN, name="only-delay", every=1, delay=1,
                why="delay alone: float32, every step, applied one step late"),
    )
    for cell in (base, *sweep(base, base.why, rate=(0.012, 0.03)))
]  # fmt: skip

RIVALS = [
    cell
    for base in (
        Cell("float16-h5", "float16", MUON, every=5, why="Float16 averaging every fifth step"),
        Cell("float16-h60", "float16", MUON, every=60, why="Float16 averaging every 60 steps"),
        Cell("diloco-h30", "diloco", ADAMW, optimizer="adamw", every=30, bits=EXACT,
             outer_rate=0.7, outer_momentum=0.9, why="dense DiLoCo as published"),
        Cell("diloco-h30-m0.6", "diloco", ADAMW, optimizer="adamw", every=30, bits=EXACT,
             outer_rate=0.7, outer_momentum=0.6, why="dense DiLoCo, less outer momentum"),
        Cell("muloco-h30-4bit", "diloco", MUON, every=30, bits=4, keep=0.9, outer_rate=0.7,
             outer_momentum=0.6, why="MuLoCo: Muon inside, Nesterov outside, 4 bits"),
        Cell("muloco-h30-2bit", "diloco", MUON, every=30, bits=2, keep=0.9, outer_rate=0.7,
             outer_momentum=0.6, why="MuLoCo with 2 bits"),
    )
    for cell in (base, *sweep(base, base.why, rate=(base.rate / 2, base.rate * 1.5)))
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

CELLS = [
    *BASELINES, *SEARCH_40, *SEARCH_500, *SEARCH_100, *SEARCH_160, *SEARCH_250, *SEARCH_1000,
    *ONE_FACTOR, *RIVALS, *ELSEWHERE, *MORE_SEEDS, *AT_1M,
]  # fmt: skip
