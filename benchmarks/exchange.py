"""What a round of strategy sparseloco costs, with real processes: `scripts/bench exchange`.

Four miners and a validator on loopback train a Llama of 25 million parameters at 64 of 4,096
through rounds of 60 seconds on the embedded network; afterwards the miners average the same
model once with Hivemind, in Float16. Linux only.

- `bytes_ratio_fp32`: one copy of the model in fp32 over what a miner sends for each blob that it
  serves. All that leaves it over TCP in a round counts, the DHT's messages too.
- `bytes_per_round`: the same for a whole round, in which every blob is fetched by four peers.
- `exchange_s`: fetching the blobs of a round; `settle_s`: from the last mark's finality to the
  new state in the local weights; medians over peers and rounds.
- `pause_s`: what the rounds take of the training thread at once, as a median over all copies and
  moves; `pause_longest_s`: the longest, on a machine whose cores all peers share.
- `train_ratio`: tokens per CPU-second of the training thread over a plain loop's of the same
  process, before and after; the median of the miners.
- `seconds_ratio`, `bytes_ratio`: Hivemind's averaging over ours, in seconds and bytes of a miner.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from benchmarks._processes import started
from benchmarks.machine import RESULTS, describe, write

MINERS = 4
AIMS = {"bytes_ratio_fp32": 190, "pause_s": 0.1, "train_ratio": 0.97}
START_SECONDS = 180.0
ROUND_SECONDS = 60.0


class Worker:
    """One peer's process, its lines as they come."""

    def __init__(self, process: subprocess.Popen[str], log: Path):
        self.process, self.log = process, log
        self._lines: Queue[str] = Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)

    def says(self, key: str, *, seconds: float) -> Any:
        """The next line's value; it must have this key."""
        try:
            return json.loads(self._lines.get(timeout=seconds))[key]
        except Empty:
            raise SystemExit(f"no {key} in {seconds:.0f} s; see {self.log}") from None

    def tell(self, **fields: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(fields) + "\n")
        self.process.stdin.flush()


def measure(workers: Sequence[Worker], *, rounds: int) -> dict[str, Any]:
    addresses, hotkeys = [], []
    for each in workers:
        found = each.says("peer", seconds=START_SECONDS)
        addresses.append(found["address"])
        hotkeys.append(found["hotkey"])
    for each in workers:
        each.tell(addresses=addresses, hotkeys=hotkeys)
    seconds = START_SECONDS + (rounds + 4) * ROUND_SECONDS
    figures = [each.says("figures", seconds=seconds) for each in workers]
    miners = workers[1:]
    miners[0].tell(initial_peers=[], size=len(miners))
    first = miners[0].says("first", seconds=60)
    for each in (*miners[1:], workers[0]):
        each.tell(initial_peers=first, size=len(miners))
    averaged = [each.says("averaging", seconds=240) for each in miners]
    return summary(figures[1:], averaged) | {"validator": figures[0], "miners": figures[1:]}


def summary(miners: list[dict[str, Any]], averaged: list[dict[str, Any]]) -> dict[str, Any]:
    def median(name: str, among: list[dict[str, Any]] = miners) -> float:
        return round(statistics.median(float(each[name]) for each in among), 4)

    pauses = [seconds for each in miners for seconds in each["pauses_s"]]
    bytes_per_blob = [each["bytes_per_round"] / each["blobs_per_round"] for each in miners]
    averaging = {"seconds": median("seconds", averaged), "bytes": median("bytes", averaged)}
    return {
        "bytes_ratio_fp32": round(miners[0]["model_bytes"] / statistics.median(bytes_per_blob), 2),
        "bytes_per_round": median("bytes_per_round"),
        "blobs_per_round": median("blobs_per_round"),
        "exchange_s": median("exchange_s"),
        "settle_s": median("settle_s"),
        "pause_s": round(statistics.median(pauses), 4),
        "pause_longest_s": max(pauses),
        "train_ratio": median("train_ratio"),
        "seconds_ratio": round(averaging["seconds"] / median("exchange_s"), 2),
        "bytes_ratio": round(averaging["bytes"] / median("bytes_per_round"), 2),
        "hivemind": averaging | {"peers": min(each["peers"] for each in averaged)},
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench exchange", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "exchange.json")
    options = parser.parse_args(argv)
    machine = describe()
    with tempfile.TemporaryDirectory(prefix="bench-exchange-") as folder, ExitStack() as stack:
        workers = []
        for uid in range(MINERS + 1):
            log = Path(folder) / f"peer-{uid}.log"
            words = ("-m", "benchmarks._exchange", folder, uid, options.rounds)
            stderr = stack.enter_context(log.open("w"))
            workers.append(Worker(stack.enter_context(started(*words, stderr=stderr)), log))
        try:
            result = measure(workers, rounds=options.rounds)
        except BaseException:
            for each in workers:
                print(f"{each.log}:\n{each.log.read_text()[-2000:]}", file=sys.stderr)
            raise
    result = {"benchmark": "exchange", "machine": machine, "aims": AIMS} | result
    write(options.out, result)
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
