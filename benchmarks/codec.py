"""What an update costs: bytes, and the seconds of one core: `scripts/bench codec`.

The update is that of a Llama of 25 million parameters: for each tensor heavy-tailed values whose
scale differs from row to row (Student's t with four degrees of freedom times a log-normal scale),
which is harder to place levels in than a real update and takes as many bytes.

- `bytes_ratio_fp32`: float32 bytes of the tensors that are sent sparse over those of a blob of
  these alone; `bytes_ratio_blob`: of the whole model over those of the whole blob.
- `bits_per_index_bound`: log2 C(4096, 64) / 64; `bits_per_value`: of the blob, indices, levels
  and header included.
- `encode_s`, `decode_apply_s` (eight blobs through `apply_blobs`: decode, norms, clip, average,
  step) and `hash_s` (`State.hash`): the best of `--rounds` by CPU seconds of one
  thread, since others may be at work on the machine; `*_wall_s`: the best by the clock.
- `peak_memory_mb`: resident memory while encoding and while decoding and applying, beyond what
  the process held before: model, update and blobs.
- `dense_*`: the same for every value at 2 bits.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import RESULTS, describe, write
from hiveminer.strategies.sparseloco.apply import CountedBlob, OuterStep, State, apply_blobs
from hiveminer.strategies.sparseloco.codec import Compression, Header, encode

BLOBS = 8
SPARSE = Compression(64 / 4096, 2)
DENSE = Compression(1.0, 2)
AIMS = {
    "bytes_ratio_fp32": 200,
    "bytes_ratio_blob": 190,
    "encode_s": 0.5,
    "decode_apply_s": 1.5,
    "dense_bytes_ratio": 15,
}


def model_shapes() -> dict[str, torch.Size]:
    """The trained parameters of a Llama of 25 million, the embedding tied to the head."""
    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1536, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return {name: value.shape for name, value in model.named_parameters()}


def draw_update(shapes: Mapping[str, torch.Size], *, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    heavy = torch.distributions.StudentT(4.0)
    update = {}
    for name, shape in shapes.items():
        rows = torch.exp(0.5 * torch.randn(shape[0], *([1] * (len(shape) - 1))))
        update[name] = 3e-4 * rows * heavy.sample(shape)
    return update


def header(author: int) -> Header:
    return Header(hotkey=bytes([author]) * 32, run=bytes(8), round=1, parent=bytes(32))


def best(work: Callable[[], Any], *, rounds: int) -> tuple[float, float]:
    """CPU seconds and seconds, each the least of all rounds."""
    taken = []
    for _ in range(rounds):
        gc.collect()
        began = time.thread_time(), time.perf_counter()
        work()
        taken.append((time.thread_time() - began[0], time.perf_counter() - began[1]))
    return min(cpu for cpu, _ in taken), min(wall for _, wall in taken)


def peak_memory(work: Callable[[], Any]) -> float:
    """MB of resident memory beyond what there was before, sampled every 2 ms."""
    process = psutil.Process()
    gc.collect()
    before = highest = process.memory_info().rss
    done = threading.Event()

    def sample() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, process.memory_info().rss)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        work()
    finally:
        done.set()
        sampler.join()
    return (highest - before) / 2**20


def measure(
    shapes: Mapping[str, torch.Size], compression: Compression, rounds: int
) -> dict[str, Any]:
    update = draw_update(shapes, seed=0)
    blobs = [encode(update, header=header(0), compression=compression)]
    for author in range(1, BLOBS):
        other = draw_update(shapes, seed=author)
        blobs.append(encode(other, header=header(author), compression=compression))
        del other
    weights = {name: torch.full(shape, 0.02) for name, shape in shapes.items()}
    state = State(weights, dict.fromkeys(weights, 0.0))
    counted = [CountedBlob(uid, header(uid), blob) for uid, blob in enumerate(blobs)]
    large = {name: value for name, value in update.items() if value.numel() >= compression.chunk}

    def encode_once() -> bytes:
        return encode(update, header=header(0), compression=compression)

    def apply_once() -> None:
        applied = apply_blobs(state, counted, step=OuterStep(), compression=compression)
        assert not applied.left_out, applied.left_out

    memory = {"encode": peak_memory(encode_once), "decode_apply": peak_memory(apply_once)}
    encode_s, encode_wall = best(encode_once, rounds=rounds)
    apply_s, apply_wall = best(apply_once, rounds=rounds)
    hash_s, hash_wall = best(lambda: replace(state).hash(), rounds=rounds)
    values = {name: value.numel() for name, value in update.items()}
    kept = sum(compression.kept_of_tensor(value.numel()) for value in large.values())
    sparse_bytes = len(encode(large, header=header(0), compression=compression))
    return {
        "blob_bytes": len(blobs[0]),
        "bytes_ratio_fp32": round(4 * sum(values[name] for name in large) / sparse_bytes, 2),
        "bytes_ratio_blob": round(4 * sum(values.values()) / len(blobs[0]), 2),
        "bits_per_value": round(8 * sparse_bytes / kept, 3),
        "encode_s": round(encode_s, 3),
        "encode_wall_s": round(encode_wall, 3),
        "decode_apply_s": round(apply_s, 3),
        "decode_apply_wall_s": round(apply_wall, 3),
        "hash_s": round(hash_s, 3),
        "hash_wall_s": round(hash_wall, 3),
        "peak_memory_mb": {name: round(peak, 1) for name, peak in memory.items()},
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench codec", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "codec.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    machine = describe()
    shapes = model_shapes()
    sparse = measure(shapes, SPARSE, options.rounds)
    dense = measure(shapes, DENSE, options.rounds)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    result = {
        "benchmark": "codec",
        "machine": machine,
        "threads": 1,
        "rounds": options.rounds,
        "parameters": parameters,
        "model_mb": round(4 * parameters / 2**20, 1),
        "blobs": BLOBS,
        "compression": "64 of 4096, 2 bits",
        "aims": AIMS,
        "bits_per_index_bound": round(math.log2(math.comb(4096, 64)) / 64, 3),
        **sparse,
        **{f"dense_{name}": value for name, value in dense.items() if name != "bytes_ratio_fp32"},
        "dense_bytes_ratio": dense["bytes_ratio_blob"],
    }
    write(options.out, result)
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
