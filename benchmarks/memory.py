"""Bytes a parameter, by precision: `scripts/bench memory`.

Each figure comes from a process of its own that trains a GPT-2 shape on rows of eight
tokens, so that activations hardly count, and is the growth of its resident memory over
that before the model was made, by the number of parameters: `weights` once it is made,
`step` after two steps (weights, gradients, AdamW's moments), `peak` the highest meanwhile.
Two sizes, so that what does not grow with the model shows. The averager's copies, which
live in processes of hivemind's, are not in it. `counted` is what
`hiveminer.training.memory` counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from typing import Any

import psutil
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.machine import RESULTS, describe, write
from hiveminer.config.run import Run
from hiveminer.training.memory import memory_needed
from hiveminer.training.optimizer import build_optimizer
from hiveminer.training.trainer import LocalStep, Trainer

WIDTHS = (512, 1024)
PRECISIONS = ("float32", "bfloat16")


def child(width: int, precision: str) -> dict[str, float]:
    torch.set_num_threads(1)
    tiny = GPT2Config(vocab_size=258, n_positions=64, n_embd=64, n_layer=1, n_head=1)
    train(GPT2LMHeadModel(tiny), precision)  # what PyTorch itself takes at the first step
    before = psutil.Process().memory_info().rss
    heads = width // 64
    config = GPT2Config(vocab_size=258, n_positions=64, n_embd=width, n_layer=8, n_head=heads)
    model = GPT2LMHeadModel(config)
    count = sum(value.numel() for value in model.parameters())
    weights = psutil.Process().memory_info().rss - before
    optimizer = train(model, precision)
    step = psutil.Process().memory_info().rss - before
    assert optimizer.state
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before
    needed = memory_needed(model, sequence_length=8, bfloat16=precision == "bfloat16")
    return {
        "parameters": count,
        "weights": round(weights / count, 2),
        "step": round(step / count, 2),
        "peak": round(peak / count, 2),
        "counted": round((needed.training - needed.activations) / count, 2),
    }


def train(model: GPT2LMHeadModel, precision: str) -> torch.optim.Optimizer:
    """Two steps; the last gradients stay, as they are there while a step is taken."""
    optimizer = build_optimizer(model.parameters(), Run().optimizer)

    class Keep(LocalStep):
        def zero_grad(self) -> None: ...

    def encode(texts: Any) -> dict[str, torch.Tensor]:
        ids = torch.arange(8).repeat(len(texts), 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    bfloat16 = precision == "bfloat16"
    trainer = Trainer(model, encode=encode, optimizer=Keep(optimizer), bfloat16=bfloat16)
    trainer.train(["", ""], batch_size=1)
    return optimizer


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench memory", description=__doc__)
    parser.add_argument("--child", nargs=2, metavar=("WIDTH", "PRECISION"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(int(args.child[0]), args.child[1])))
        return
    figures = []
    for precision in PRECISIONS:
        for width in WIDTHS:
            words = [sys.executable, "-m", "benchmarks.memory", "--child", str(width), precision]
            answer = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            figures.append({"precision": precision, **json.loads(answer.splitlines()[-1])})
            print(figures[-1], flush=True)
    write(RESULTS / "memory.json", {**describe(), "device": "cpu", "bytes_per_parameter": figures})


if __name__ == "__main__":
    main()
