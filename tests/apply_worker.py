"""Applies rounds of blobs and prints the states' hashes: the process of `test_apply.py`.

    apply_worker.py FOLDER THREADS...

Imports only torch and what is tested. Each thread count is used in turn, with the blobs in
another order of arrival each time.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hiveminer.strategies.sparseloco.apply import (
    Applied,
    CountedBlob,
    OuterStep,
    State,
    apply_blobs,
)
from hiveminer.strategies.sparseloco.codec import Compression, Header, encode

SHAPES = {"layer.bias": (20,), "layer.weight": (450, 400), "embedding": (3, 3000)}
"""One tensor is raw, and one so large that torch splits it between four threads."""

PEERS = 5
STEP = OuterStep(rate=0.65, contributor_power=0.75)
COMPRESSIONS = [Compression(1 / 64, 2), Compression(1 / 4, 3), Compression(1.0, 2)]
"""Of each round."""


def integers(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Values that are the same bits everywhere, of all kinds of mantissas."""
    drawn = np.random.default_rng(seed).integers(-(2**23), 2**23, shape).astype(np.float32)
    return torch.from_numpy(drawn * np.float32(2.0**-26))


def first_state() -> State:
    return State(
        {name: integers(seed, shape) for seed, (name, shape) in enumerate(SHAPES.items())},
        dict.fromkeys(SHAPES, 0.0),
    )


def header(number: int, uid: int) -> Header:
    return Header(bytes([uid] * 32), bytes(8), number, bytes(32))


def write_blobs(folder: Path) -> None:
    """Peers differ in size, so that some are clipped."""
    for number, compression in enumerate(COMPRESSIONS):
        for uid in range(PEERS):
            seed = 100 * number + uid
            update = {
                name: integers(1000 * index + seed, shape).mul(2.0 ** -(uid % 3))
                for index, (name, shape) in enumerate(SHAPES.items(), 1)
            }
            blob = encode(update, header=header(number, uid), compression=compression)
            (folder / f"{number}-{uid}").write_bytes(blob)


def read_blobs(folder: Path, number: int, uids: list[int]) -> list[CountedBlob]:
    return [
        CountedBlob(uid, header(number, uid), (folder / f"{number}-{uid}").read_bytes())
        for uid in uids
    ]


def apply_round(state: State, blobs: list[CountedBlob], *, number: int) -> Applied:
    return apply_blobs(state, blobs, step=STEP, compression=COMPRESSIONS[number])


def hashes(folder: Path, *, seed: int) -> list[str]:
    """The states' hashes after each round; `seed` decides in which order blobs arrive."""
    state, found = first_state(), []
    for number in range(len(COMPRESSIONS)):
        uids = random.Random(seed + number).sample(range(PEERS), PEERS)
        applied = apply_round(state, read_blobs(folder, number, uids), number=number)
        assert not applied.left_out, applied.left_out
        state = applied.state
        found.append(state.hash().hex())
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    found = []
    for threads in map(int, sys.argv[2:]):
        torch.set_num_threads(threads)
        assert torch.get_num_threads() == threads
        found.append(hashes(folder, seed=threads))
    capability = torch.backends.cpu.get_cpu_capability().lower()
    print(json.dumps({"capability": capability, "hashes": found}))


if __name__ == "__main__":
    main()
