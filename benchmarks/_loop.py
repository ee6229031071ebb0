"""A bare training loop as a process: `python -m benchmarks._loop KIND ME SECONDS [PEERS]`.

KIND `plain` is PyTorch and nothing else: encode, pad to the longest, forward, backward,
clip, AdamW. KIND `seed` is the same loop around the stock `hivemind.Optimizer` as the
miner of 2024 set it up: local updates, Float16, matchmaking 15 s, averaging timeout 600 s.

It says `ready`, waits for a line on its standard input, trains for SECONDS and says how
many real tokens it trained, and in how long.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import torch
from torch import nn

from hiveminer.config.run import Run
from hiveminer.training.data import builtin_rows
from hiveminer.training.model import builtin_model, builtin_tokenizer
from hiveminer.training.optimizer import build_optimizer

BATCH = 8
SEED_EPOCH = 512
SETTINGS = Run().optimizer


def batches(me: int) -> Iterator[list[str]]:
    """This process's own rows, batch after batch."""
    rows, at = builtin_rows(), 4000 * me
    while True:
        yield rows.texts([index % len(rows) for index in range(at, at + BATCH)])
        at += BATCH


def seed_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, peers: list[str]) -> object:
    import hivemind
    from hivemind.compression import Float16Compression

    dht = hivemind.DHT(initial_peers=peers or None, start=True)
    print("peer", dht.get_visible_maddrs()[0], flush=True)
    return hivemind.Optimizer(
        dht=dht,
        run_id="seed",
        target_batch_size=SEED_EPOCH,
        batch_size_per_step=BATCH,
        optimizer=optimizer,
        use_local_updates=True,
        matchmaking_time=15.0,
        averaging_timeout=600.0,
        state_averaging_compression=Float16Compression(),
    )


def train(kind: str, me: int, seconds: float, peers: list[str]) -> None:
    torch.set_num_threads(1)
    model, tokenizer = builtin_model(), builtin_tokenizer()
    optimizer = build_optimizer(model.parameters(), SETTINGS)
    stepper = optimizer if kind == "plain" else seed_optimizer(model, optimizer, peers)
    feed = batches(me)

    def step() -> int:
        encoded = tokenizer(
            next(feed), truncation=True, max_length=512, padding=True, return_tensors="pt"
        )
        labels = encoded.input_ids.masked_fill(encoded.attention_mask == 0, -100)
        optimizer.zero_grad(set_to_none=True)
        model(**encoded, labels=labels).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.max_grad_norm)
        stepper.step()  # type: ignore[attr-defined]
        return int(encoded.attention_mask.sum())

    step()
    print("ready", flush=True)
    sys.stdin.readline()
    began, tokens = time.monotonic(), 0
    while time.monotonic() - began < seconds:
        tokens += step()
    print("tokens", tokens, time.monotonic() - began, flush=True)
    sys.stdin.readline()  # stay, so that the other is not left alone before its time


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
