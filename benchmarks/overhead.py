"""What the swarm costs: two miners against two plain PyTorch loops, same model and rows.

Three things are measured, in one run, each with two processes of one torch thread at once:

- `plain`: a bare loop (`_loop.py`), no swarm, no network; before and after the miners.
- `miner`: two `hiveminer miner` processes in one swarm, fed with signed requests, two at
  each, and everything that belongs to it: queue, signatures, averaging.
- `seed`: the bare loop around the stock optimizer with the 2024 miner's settings.

`ratio` is miner tokens/s over plain tokens/s, `ratio_2024` the seed's over plain.
The result stands in benchmarks/results/overhead.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._processes import started
from benchmarks.machine import RESULTS, aim, describe, write
from hiveminer.chain import embedded_wallet, join_embedded, open_chain
from hiveminer.protocol import IsAlive, Train
from hiveminer.rpc.dendrite import Dendrite, Endpoint, endpoints_of, probe

AIM = 0.95
BATCH = 8
ROWS = 64
EPOCH_SAMPLES = 1024
START_SECONDS = 120.0


def loops(kind: str, *, seconds: float) -> list[float]:
    """Tokens a second of two bare loops at once."""
    with contextlib.ExitStack() as stack:
        processes = []
        peers: list[str] = []
        for me in (0, 1):
            words = ("-m", "benchmarks._loop", kind, me, seconds, *peers)
            process = stack.enter_context(started(*words, stderr=subprocess.DEVNULL))
            if kind == "seed":
                peers = [_line(process, "peer")]
            processes.append(process)
        for process in processes:
            _line(process, "ready")
        for process in processes:
            assert process.stdin is not None
            print(file=process.stdin, flush=True)
        rates = []
        for process in processes:
            tokens, took = _line(process, "tokens").split()
            rates.append(int(tokens) / float(took))
        return rates


def _line(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        head, _, rest = line.strip().partition(" ")
        if head == word:
            return rest
    raise SystemExit(f"a process ended before it said {word!r}")


def miners(*, seconds: float) -> dict[str, Any]:
    """Two miners of one swarm, fed by signed requests."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        run = folder / "run.toml"
        run.write_text(f"[swarm]\nepoch_samples = {EPOCH_SAMPLES}\n")
        log = stack.enter_context((folder / "log").open("w"))
        flags = [
            *("--subtensor.path", str(folder / "network"), "--neuron.path", str(folder / "state")),
            *("--neuron.run", str(run), "--axon.port", "0", "--dht.port", "0"),
        ]
        for _ in (0, 1):
            words = ("-m", "hiveminer", "miner", *flags)
            stack.enter_context(started(*words, stdout=log, stderr=log))
        wallet = stack.enter_context(embedded_wallet(folder / "network", prefix="feeder")).wallet
        chain = stack.enter_context(
            open_chain(
                network="embedded", netuid=1, wallet=wallet, path=folder / "network/chain.sqlite"
            )
        )
        join_embedded(chain, stake_tao=10_000)
        rate, answers = asyncio.run(_feed_all(chain, wallet, seconds=seconds))
        lines = [
            json.loads(line)
            for path in (folder / "state").glob("*/*/*/metrics.jsonl")
            for line in path.read_text().splitlines()
        ]
        rounds = [line for line in lines if line["kind"] == "epoch" and line["group_size"] == 2]
        return {
            "rates": rate,
            "answers": answers,
            "rounds": len({line["epoch"] for line in rounds}),
            "round_seconds": [line["seconds"] for line in rounds],
        }


async def _feed_all(chain: Any, wallet: Any, *, seconds: float) -> tuple[list[float], int]:
    async with Dendrite(wallet) as dendrite:
        endpoints = await _find_two(chain, dendrite)
        alive = [await dendrite.call(each, IsAlive(), timeout_seconds=10) for each in endpoints]
        # One request each, so that both have begun before the clock starts.
        await asyncio.gather(
            *(_ask(dendrite, e, a, at=0) for e, a in zip(endpoints, alive, strict=True))
        )
        began = time.monotonic()
        results = await asyncio.gather(
            *(
                _feed(dendrite, endpoint, answer, first=4000 * me, until=began + seconds)
                for me, (endpoint, answer) in enumerate(zip(endpoints, alive, strict=True))
            )
        )
    return [tokens / took for tokens, took, _ in results], sum(count for *_, count in results)


async def _find_two(chain: Any, dendrite: Dendrite) -> list[Endpoint]:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        endpoints = endpoints_of(chain.metagraph())
        answers = await probe(dendrite.wallet, endpoints)
        if len(endpoints) == 2 and all(isinstance(each, IsAlive) for each in answers.values()):
            await asyncio.sleep(5)  # they look at the chain once a second, and meet
            return endpoints
        await asyncio.sleep(0.5)
    raise SystemExit("the miners did not start")


async def _feed(
    dendrite: Dendrite, endpoint: Endpoint, alive: IsAlive, *, first: int, until: float
) -> tuple[int, float, int]:
    """(tokens, seconds, answers) of one miner with two requests at it, until the time is up."""
    began, last, tokens, answers, at = time.monotonic(), time.monotonic(), 0, 0, first

    async def one() -> None:
        nonlocal last, tokens, answers, at
        while time.monotonic() < until:
            at += ROWS
            answer = await _ask(dendrite, endpoint, alive, at=at)
            now = time.monotonic()
            if now <= until:
                tokens, last, answers = tokens + answer.tokens, now, answers + 1

    await asyncio.gather(one(), one())
    return tokens, last - began, answers


async def _ask(dendrite: Dendrite, endpoint: Endpoint, alive: IsAlive, *, at: int) -> Train:
    request = Train(
        request_id=uuid.uuid4().hex,
        run_id=alive.run_id,
        data_hash=alive.data_hash,
        dataset_indices=[index % 24000 for index in range(at, at + ROWS)],
        batch_size=BATCH,
        timeout_seconds=300.0,
    )
    return await dendrite.call(endpoint, request, timeout_seconds=600)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench overhead", description=__doc__)
    parser.add_argument("--seconds", type=float, default=90.0, help="of each miner measurement")
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead.json")
    options = parser.parse_args(argv)
    result: dict[str, Any] = {"benchmark": "overhead", "machine": describe()}

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    say(f"plain PyTorch, two loops, {options.seconds / 2:.0f} s ...")
    before = loops("plain", seconds=options.seconds / 2)
    say(f"  {before}; two miners in a swarm, {options.seconds:.0f} s ...")
    swarm = miners(seconds=options.seconds)
    say(f"  {swarm['rates']}; plain PyTorch again ...")
    after = loops("plain", seconds=options.seconds / 2)
    say(f"  {after}; the 2024 miner's settings, {options.seconds:.0f} s ...")
    seed = loops("seed", seconds=options.seconds)
    say(f"  {seed}")

    plain = (sum(before) + sum(after)) / 2
    ratio = sum(swarm["rates"]) / plain
    result |= {
        "ratio": round(ratio, 3),
        "ratio_2024": round(sum(seed) / plain, 3),
        "aims": {"ratio": aim(round(ratio, 3), least=AIM)},
        "plain_tokens_per_second": {"before": before, "after": after},
        "miner_tokens_per_second": swarm["rates"],
        "seed_tokens_per_second": seed,
        "averaging_rounds": swarm["rounds"],
        "averaging_round_seconds": swarm["round_seconds"],
        "epoch_samples": EPOCH_SAMPLES,
        "batch_size": BATCH,
        "seconds": options.seconds,
    }
    write(options.out, result)
    print(json.dumps({key: result[key] for key in ("ratio", "ratio_2024", "averaging_rounds")}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
