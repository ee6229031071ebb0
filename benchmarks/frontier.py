"""Loss against bytes, for equal tokens: `scripts/bench frontier`.

N replicas of a byte-level transformer in one process train on the standard library's source.
Each cell (`benchmarks/_frontier/grid.py`) is one contender with its settings; `sparseloco` cells
go through the project's own codec, update and apply, and their bytes are the lengths of real
blobs. Cells that have ended are in `--out`; a cell under way is saved in `--state` every 20
seconds, and goes on from there when the command is given again. Cells are run in the grid's
order; those whose settings are unchanged are not run again. Each cell says what it ran on; on a
GPU the exchange still works on the CPU, as in a miner.

- `loss`: of the common weights on rows that nobody trained on, nats per byte.
- `loss_ratio`, `loss_ratio_muon`: over the best data-parallel AdamW, or Muon, of the same seed,
  size, peers, rows and length.
- `bytes_ratio`: float32 bytes that data-parallel training sends (a ring all-reduce of
  2 (N - 1) / N tensors per step) over what the cell sends: a ring for what is averaged in full,
  N - 1 copies of each blob for the rest. Each peer receives as much as it sends.
- `speedup`: the steps that one replica alone needs for the same loss, interpolated between its
  runs in the logarithm of the steps, over the steps that the swarm took; at most N.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks._frontier.cell import Cell
from benchmarks._frontier.grid import CELLS
from benchmarks._frontier.model import Text
from benchmarks._frontier.report import AIMS, plot, points, summary, table
from benchmarks._frontier.simulate import run_cell
from benchmarks.machine import RESULTS, describe, write
from hiveminer.training.data import builtin_rows

STATE = Path(__file__).resolve().parent / "frontier-state"


def load_done(path: Path) -> dict[str, dict[str, Any]]:
    """The cells of a result by name."""
    if not path.exists():
        return {}
    done = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return {cell["name"]: cell for cell in done}


def is_done(cell: Cell, done: dict[str, dict[str, Any]], *, text: str = "") -> bool:
    """Whether a cell has ended with these settings, and on this text if one is given."""
    ended = done.get(cell.name)
    if ended is None or ended["settings"] != cell.settings():
        return False
    return text in ("", ended["text"])


def write_result(
    path: Path, done: dict[str, dict[str, Any]], machine: dict[str, Any],
    cells: Sequence[Cell] = CELLS,
) -> None:  # fmt: skip
    """Cells in the grid's order, points, and the picture beside it."""
    ended = [{**done[cell.name], "why": cell.why} for cell in cells if is_done(cell, done)]
    found = points(ended)
    result = {
        "benchmark": "frontier",
        "machine": machine,
        "threads": 1,
        "aims": AIMS,
        "required": summary(found),
        "frontier": found,
        "cells_to_run": [cell.name for cell in cells if not is_done(cell, done)],
        "cells": ended,
    }
    write(path, result)
    plot(found, path.with_suffix(".png"))


def run_one(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Run a cell, in a process of its own if there are several jobs."""
    torch.set_num_threads(1)
    text = Text(builtin_rows(options.text))
    gpu = options.device.startswith("cuda")
    return {
        "name": cell.name,
        "text": text.hash,
        **run_cell(cell, text, folder=options.state, device=options.device),
        "settings": cell.settings(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "ran_on": torch.cuda.get_device_name() if gpu else describe()["cpu"],
        "torch": torch.__version__,
    }


def run_all(cells: Sequence[Cell], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run the cells, `--jobs` at a time; results in the order in which they end."""
    if options.jobs == 1:
        yield from (run_one(cell, options) for cell in cells)
        return
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawned) as pool:
        running = {pool.submit(run_one, cell, options): cell for cell in cells}
        for future in as_completed(running):
            if error := future.exception():  # the others go on
                print(f"{running[future].name} failed: {error!r}", file=sys.stderr, flush=True)
            else:
                yield future.result()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench frontier", description=__doc__)
    parser.add_argument("--only", metavar="CELL", nargs="+", help="these cells, by name")
    parser.add_argument("--report", action="store_true", help="run nothing: points and picture")
    parser.add_argument("--again", action="store_true", help="run cells that have ended, too")
    parser.add_argument("--jobs", type=int, default=1, help="cells at once, one core each")
    parser.add_argument("--device", default="cpu", help="where the replicas train, e.g. cuda")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="another Python's library")
    parser.add_argument("--state", type=Path, default=STATE, help="cells under way")
    parser.add_argument("--out", type=Path, default=RESULTS / "frontier.json")
    options = parser.parse_args(argv)
    names = [cell.name for cell in CELLS]
    for name in options.only or ():
        if name not in names:
            parser.error(f"there is no cell {name}; there are: {', '.join(names)}")
    done = load_done(options.out)
    if options.report:
        machine = json.loads(options.out.read_text(encoding="utf-8"))["machine"]
        write_result(options.out, done, machine)
        print(table(json.loads(options.out.read_text(encoding="utf-8"))["frontier"]))
        return 0
    machine, text = describe(), Text(builtin_rows(options.text))
    wanted = [
        cell
        for cell in CELLS
        if cell.name in (options.only or names)
        and (options.again or not is_done(cell, done, text=text.hash))
    ]
    for count, ended in enumerate(run_all(wanted, options), start=1):
        done = load_done(options.out)
        done[ended["name"]] = ended
        write_result(options.out, done, machine)
        shown = {key: ended[key] for key in ("loss", "bytes_ratio", "seconds")}
        print(f"{count}/{len(wanted)} {ended['name']}: {json.dumps(shown)}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
