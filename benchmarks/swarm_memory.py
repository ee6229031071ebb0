"""What the swarm takes of memory beside training: bytes a parameter, over all its processes.

A lone peer of each model size takes two steps; counted is the growth of the proportional set
size of the process and of hivemind's, from just before the swarm is built. The slope between
the two sizes is the figure; gradients and AdamW (12 bytes in float32) are in it.
The result stands in benchmarks/results/swarm_memory.json. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from bittensor.keyfiles import Keypair
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.machine import RESULTS, describe, write
from hiveminer.config.run import Run
from hiveminer.strategies.hivemind.strategy import HivemindStrategy
from hiveminer.swarm.identity import Identity
from hiveminer.swarm.membership import Membership
from hiveminer.swarm.peer import Peer

WIDTHS = (768, 1024)
TRAINING = 12
RUN_ID = "memory-a-b-c"


def shared_out() -> int:
    """Bytes of this process and its children, shared pages counted in parts."""
    me = psutil.Process()
    return sum(each.memory_full_info().pss for each in [me, *me.children(recursive=True)])


def one(width: int, *, folder: Path) -> None:
    torch.set_num_threads(1)
    hotkey = Keypair.create_from_uri("//Alice")
    identity = Identity(hotkey, run_id=RUN_ID, key_path=folder / "peer.key")
    membership = Membership(Peer(identity=identity))
    config = GPT2Config(vocab_size=258, n_positions=512, n_embd=width, n_layer=6, n_head=4)
    model = GPT2LMHeadModel(config)
    parameters = sum(value.numel() for value in model.parameters())
    before = shared_out()
    swarm = HivemindStrategy(model, membership=membership, run=Run(), run_id=RUN_ID)
    row = torch.randint(0, 255, (1, 32))
    for _ in range(2):
        torch.autograd.backward(model(input_ids=row, labels=row).loss)
        swarm.step(batch_size=1)
        swarm.zero_grad()
    print(json.dumps({"parameters": parameters, "bytes": shared_out() - before}), flush=True)
    swarm.close()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench swarm_memory", description=__doc__)
    parser.add_argument("--width", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "swarm_memory.json")
    options = parser.parse_args(argv)
    if options.width:
        with tempfile.TemporaryDirectory() as folder:
            one(options.width, folder=Path(folder))
        return 0
    sizes = []
    for width in WIDTHS:
        words = [sys.executable, "-m", "benchmarks.swarm_memory", "--width", str(width)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
        sizes.append(json.loads(done.stdout.splitlines()[-1]))
    small, large = sizes
    grown = (large["bytes"] - small["bytes"]) / (large["parameters"] - small["parameters"])
    result = {
        "benchmark": "swarm_memory",
        "machine": describe(),
        "sizes": sizes,
        "bytes_a_parameter": round(grown, 1),
        "of_the_swarm": round(grown - TRAINING, 1),
    }
    write(options.out, result)
    print(json.dumps({key: result[key] for key in ("bytes_a_parameter", "of_the_swarm")}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
