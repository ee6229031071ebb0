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
    *sweep(AT_160, rate=(0.02, 0.03), share=(0.0,)),
    *sweep(AT_160, SHARE, rate=(0.02,), share=(0.3, 0.6)),
    *sweep(AT_160, SHARE, rate=(0.03,), share=(0.3,)),
    *sweep(AT_160, SHARE, rate=(0.02,), share=(0.3,), keep=(0.9,)),
]
SEARCH_500 = [
    AT_500,
    *sweep(AT_500, rate=(0.012, 0.02, 0.03), share=(0.0, 0.3, 0.6)),
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
# The second half of the search. The first said: a momentum of 0.95 is too long for 850 steps,
# for everybody; `share`, `ahead` and `share_tables` do harm; sparser embeddings do, too.
SHORTER = "a shorter mean of gradients"
TABLES = "the embeddings denser, the matrices sparser"
LATE = "short rounds while the rate is high, long ones later"
OTHER_H = "other rounds at as many bytes"


def rounds(base: Cell, every: int, kept: int, bits: int = 2, **changes: Any) -> Cell:
    """The base with other rounds; 4096 kept of 4096 is dense."""
    name = f"h{every}-{kept}" if kept < 4096 else f"h{every}-{bits}bit"
    changed = replace(
        base, every=every, density=kept / 4096, bits=bits, momentum=0.9, late_every=0,
        why=OTHER_H, **changes,
    )  # fmt: skip
    return replace(changed, name=f"{name}-m0.9-lr{changed.rate}")


DP_MUON_9 = vary(DP_MUON, "lr0.03-m0.9", SHORTER, rate=0.03, momentum=0.9)
BASELINES_9 = [
    *sweep(DP_MUON, SHORTER, momentum=(0.8, 0.9), rate=(0.02, 0.04)),
    *sweep(DP_MUON, SHORTER, momentum=(0.8,), rate=(0.03,)),
    vary(DP_MUON_9, "wd0.03", "less weight decay", weight_decay=0.03),
    vary(DP_MUON_9, "tables2", "a larger rate for the embeddings", embedding_rate=2.0),
    vary(DP_MUON_9, "tables0.5", "a smaller rate for the embeddings", embedding_rate=0.5),
    vary(DP_ADAMW, "lr0.015-wd0.03", "less weight decay", rate=0.015, weight_decay=0.03),
]
ALONE_9 = [
    vary(alone(steps, rate), f"m{momentum}", SHORTER, momentum=momentum)
    for momentum, rate, lengths in (
        (0.9, 0.012, (850, 1700, 2550, 3400)),
        (0.9, 0.02, (850, 1700, 2550, 3400)),
        (0.8, 0.012, (850, 1700)),
    )
    for steps in lengths
]

AT_40_9 = vary(AT_40, "m0.9", SHORTER, momentum=0.9)
SEARCH_40_9 = [
    AT_40_9,
    *sweep(AT_40_9, SHORTER, rate=(0.03, 0.04)),
    *sweep(AT_40, SHORTER, momentum=(0.8,), rate=(0.02, 0.03, 0.04)),
    *sweep(AT_40_9, "how much of what was not sent stays", keep=(0.9,)),
    vary(AT_40_9, "late8", LATE, every=4, late_every=8, late_from=0.6),
    vary(AT_40_9, "late16", LATE, every=3, late_every=16, late_from=0.5),
    vary(AT_40_9, "wd0.03", "less weight decay", weight_decay=0.03),
    vary(AT_40_9, "tables2", "a larger rate for the embeddings", embedding_rate=2.0),
    vary(AT_40_9, "tables0.5", "a smaller rate for the embeddings", embedding_rate=0.5),
    rounds(AT_40, 3, 4096, 1),
    rounds(AT_40, 3, 4096, 1, rate=0.03),
    rounds(AT_40, 8, 4096, 3),
]
AT_500_9 = vary(AT_500, "m0.9", SHORTER, momentum=0.9)
SEARCH_500_9 = [
    AT_500_9,
    *sweep(AT_500_9, SHORTER, rate=(0.008, 0.02)),
    *sweep(AT_500, SHORTER, momentum=(0.8,), rate=(0.012, 0.02)),
    *sweep(AT_500_9, "how much of what was not sent stays", keep=(0.8, 0.95)),
    *sweep(AT_500_9, "how the sum is divided", power=(0.5, 1.0)),
    vary(AT_500_9, "late8", LATE, every=4, late_every=8, late_from=0.6),
    vary(AT_500_9, "tables150", TABLES, embedding_density=150 / 4096, density=48 / 4096),
    vary(AT_500_9, "tables300", TABLES, embedding_density=300 / 4096, density=31 / 4096),
    *(rounds(AT_500, 10, 140, rate=rate) for rate in (0.008, 0.012, 0.02)),
    rounds(replace(AT_500, keep=0.8), 20, 320, rate=0.012),
    rounds(AT_500, 32, 4096, 1),
]
AT_100_9 = vary(AT_100, "m0.9", SHORTER, momentum=0.9)
SEARCH_100_9 = [
    AT_100_9,
    *sweep(AT_100_9, SHORTER, rate=(0.02, 0.03)),
    *sweep(AT_100, SHORTER, momentum=(0.8,), rate=(0.02, 0.03)),
    vary(AT_100_9, "late8", LATE, rate=0.02, every=4, late_every=8, late_from=0.6),
    vary(AT_100_9, "tables4096", TABLES, rate=0.02, embedding_density=1.0, density=336 / 4096),
    *sweep(AT_100_9, "how the sum is divided", rate=(0.02,), power=(0.5,)),
    *(rounds(AT_100, 8, 960, rate=rate) for rate in (0.012, 0.02)),
    *(rounds(AT_100, 7, 4096, 1, rate=rate) for rate in (0.012, 0.02)),
]
AT_160_9 = vary(AT_160, "m0.9", SHORTER, momentum=0.9)
SEARCH_160_9 = [
    AT_160_9,
    *sweep(AT_160, SHORTER, momentum=(0.8,), rate=(0.02,)),
    *sweep(AT_160_9, "how the sum is divided", power=(0.25, 0.75)),
    *sweep(AT_160_9, "how much of what was not sent stays", keep=(0.9,)),
    *(rounds(AT_160, 10, 4096, 1, rate=rate) for rate in (0.012, 0.02)),
]
AT_250_9 = vary(AT_250, "m0.9", SHORTER, momentum=0.9)
SEARCH_250_9 = [
    AT_250_9,
    *sweep(AT_250_9, SHORTER, rate=(0.02,)),
    *sweep(AT_250, SHORTER, momentum=(0.8,), rate=(0.016,)),
    *sweep(AT_250_9, "how the sum is divided", power=(0.5,)),
    vary(AT_250_9, "tables512", TABLES, embedding_density=512 / 4096, density=103 / 4096),
    *(rounds(AT_250, 10, 360, rate=rate) for rate in (0.012, 0.02)),
    rounds(AT_250, 16, 4096, 1),
]
AT_1000_9 = vary(AT_1000, "m0.9", SHORTER, momentum=0.9)
SEARCH_1000_9 = [
    AT_1000_9,
    *sweep(AT_1000_9, "how much of what was not sent stays", keep=(0.85,)),
    *sweep(AT_1000_9, SHORTER, rate=(0.008,)),
    rounds(AT_1000, 20, 150),
]

EXACT_MEAN = replace(AT_40_9, bits=EXACT, keep=1.0, late_every=0)
ONE_FACTOR = [
    cell
    for base in (
        replace(EXACT_MEAN, name="only-local", why="local steps alone: float32, every fifth step"),
        replace(EXACT_MEAN, name="only-own-muon", every=1,
                why="each peer's own Muon step, averaged every step"),
        replace(EXACT_MEAN, name="only-sparse", every=1, density=64 / 4096, keep=0.9,
                why="sparsity alone: float32, every step, 64 of 4096"),
        replace(AT_40_9, name="only-bits", every=1, bits=2, late_every=0,
                why="bits alone: dense, 2 bits, every step"),
        replace(EXACT_MEAN, name="only-delay", every=1, delay=1,
                why="delay alone: float32, every step, applied one step late"),
    )
    for cell in (base, *sweep(base, base.why, rate=(0.03,)))
]  # fmt: skip

MUON_9 = Cell("", "diloco", MUON, momentum=0.9)
RIVALS = [
    replace(MUON_9, name="float16-h5", method="float16", every=5,
            why="Float16 averaging every fifth step"),
    *(replace(MUON_9, name=f"float16-h60-lr{rate}", method="float16", every=60, rate=rate,
              why="Float16 averaging every 60 steps") for rate in (0.01, 0.02)),
    *(Cell(f"diloco-h30-outer{momentum}-lr{rate}", "diloco", rate, optimizer="adamw", every=30,
           bits=EXACT, outer_rate=0.7, outer_momentum=momentum, why="dense DiLoCo")
      for momentum in (0.9, 0.6) for rate in (ADAMW, 0.012)),
    *(replace(MUON_9, name=f"muloco-h30-{bits}bit-lr{rate}", rate=rate, every=30, bits=bits,
              keep=0.9, outer_rate=0.7, outer_momentum=0.6,
              why="MuLoCo: Muon inside, Nesterov outside, few bits")
      for bits, rate in ((4, 0.01), (4, 0.02), (2, 0.01), (2, 0.02))),
]  # fmt: skip

EIGHT = {"replicas": 8, "rows": 4}
WIDE = {"rows": 32, "steps": 213}
SHORT = {"length": 64, "rows": 16}
ELSEWHERE = [
    vary(DP_MUON_9, "eight", "eight peers, the same rows per step of all", **EIGHT),
    vary(AT_500_9, "eight", "eight peers", **EIGHT),
    vary(DP_MUON_9, "rows32", "four times the rows per step, a quarter of the steps", **WIDE),
    vary(AT_500_9, "rows32", "larger batches: are rounds cheaper then?", **WIDE),
    vary(AT_40_9, "rows32-h106", "two rounds of 106 steps with larger batches",
         every=106, late_every=0, **WIDE),
    vary(DP_MUON_9, "length64", "shorter rows, as many tokens", **SHORT),
    vary(AT_500_9, "length64", "shorter rows", **SHORT),
    vary(AT_40_9, "h106", "rounds of 106 steps, dense, 2 bits", every=106, late_every=0),
    vary(DP_MUON_9, "long", "three times as long", steps=2550),
    vary(AT_500_9, "long", "three times as long", steps=2550),
]  # fmt: skip

LARGE = {"size": "1M", "rows": 32, "steps": 1260}
"""Larger batches too: 1,260 steps of 32 rows are 20 tokens for each parameter."""


def large(cell: Cell) -> Cell:
    return vary(cell, "1M", f"{cell.name} at 1M, with larger batches", **LARGE)


# The best of each number of bytes, repeated with two more seeds and at 1M.
FINALISTS = [
    *sweep(DP_MUON, SHORTER, momentum=(0.8,), rate=(0.04,)),
    *sweep(DP_ADAMW, rate=(0.015,)),
    rounds(AT_40, 3, 4096, 1, rate=0.03),
    *sweep(AT_100, SHORTER, momentum=(0.8,), rate=(0.03,)),
    *sweep(AT_160_9, power=(0.75,)),
    *sweep(AT_250, SHORTER, momentum=(0.8,), rate=(0.016,)),
    *sweep(AT_500_9, SHORTER, rate=(0.02,)),
    *sweep(AT_1000_9, keep=(0.85,)),
]
AT_1M = [large(cell) for cell in FINALISTS]

# The third part: what helped at one number of bytes, together and at the others.
TOGETHER = "what helped alone, together"
AT_40_LATE = replace(
    rounds(AT_40, 2, 4096, 1, rate=0.03), name="h2-1bit-late4", late_every=4, late_from=0.58,
    why=LATE,
)  # fmt: skip
TABLES_2 = "a larger rate for the embeddings"
AT_500_10 = replace(rounds(AT_500, 10, 150, rate=0.02), name="h10-150")
AT_160_10 = vary(AT_160_9, "lr0.02-keep0.9-a0.75", TOGETHER, rate=0.02, keep=0.9, power=0.75)
AT_250_10 = rounds(AT_250, 10, 360, rate=0.02)
BEST = [
    vary(AT_40_LATE, "tables2", TABLES_2, embedding_rate=2.0),
    vary(AT_160_10, "tables2", TABLES_2, embedding_rate=2.0),
    vary(AT_500_10, "tables2", TABLES_2, embedding_rate=2.0),
]
THIRD = [
    AT_40_LATE,
    *BEST,
    vary(AT_500_9, "lr0.02-keep0.95-tables2", TOGETHER, rate=0.02, keep=0.95, embedding_rate=2.0),
    vary(AT_250_10, "tables2", TABLES_2, embedding_rate=2.0),
    vary(FINALISTS[0], "tables2", TABLES_2, embedding_rate=2.0),
]
AGAIN = [
    *(cell for base in [*FINALISTS, *BEST] for cell in seeds(base, 1, 2)),
    *(cell for base in sweep(DP_ADAMW, rate=(0.01,)) for cell in seeds(base, 1, 2)),
]

CELLS = [
    *BASELINES, *BASELINES_9, *SEARCH_40, *SEARCH_40_9, *SEARCH_500, *SEARCH_500_9,
    *SEARCH_100, *SEARCH_100_9, *SEARCH_160, *SEARCH_160_9, *SEARCH_250_9, *SEARCH_1000_9,
    *ALONE_9, *ONE_FACTOR, *RIVALS, *ELSEWHERE, *THIRD, *AGAIN, *AT_1M,
]  # fmt: skip
