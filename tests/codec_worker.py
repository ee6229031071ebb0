"""Decodes a blob with one to four threads and prints what must be equal everywhere."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

from hiveminer.strategies.sparseloco.codec import decode

SHAPES = {
    "dense": torch.Size([300]),
    "raw": torch.Size([7]),
    "sparse": torch.Size([300, 2000]),
}


def digest(blob: bytes) -> str:
    update = decode(blob, shapes=SHAPES)
    found = hashlib.sha256()
    for name in update.names:
        total = torch.full(SHAPES[name], 0.1)
        for factor in (0.3, 1 / 3, -0.7):
            update.add_to(name, total, factor=factor)
        counts = torch.zeros(SHAPES[name], dtype=torch.int32)
        update.count_into(name, counts)
        for tensor in (total, update.dense(name), counts):
            found.update(tensor.numpy().tobytes())
        found.update(update.squared_norm(name).hex().encode())
    return found.hexdigest()


def main(path: str) -> None:
    blob = Path(path).read_bytes()
    digests = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        digests.append(digest(blob))
    capability = torch.backends.cpu.get_cpu_capability().lower()
    print(json.dumps({"capability": capability, "digests": digests}))


if __name__ == "__main__":
    main(sys.argv[1])
