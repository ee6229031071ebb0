"""How fast the miner's own trainer is, against three other ways: `scripts/bench step`.

Tokens of real text (the built-in rows, about 450 tokens each) a second, with one model, one
optimizer and one thread, in turn, round after round, so that all see the same machine:

- `trainer`: `hiveminer.training.trainer.Trainer` from text, the encoding within the clock.
- `packed` (b): a bare loop over sequences of 512 tokens without padding, made beforehand:
  forward, backward, clip, AdamW.
- `padded` (a): the seed's way: every row padded to 512, attention mask, the loss read at
  each step.
- `hf_trainer` (c): `transformers.Trainer`, rows padded to the longest of their batch, encoded
  beforehand; between its first step's start and its last one's end.

`ratio` (to b), `ratio_padded` (to a) and `ratio_hf_trainer` (to c) are medians over the rounds
of the trainer's tokens/s over the other's, the lower of the two sizes. `ratio_best*` are each
way's best rounds, `ratio_cpu*` the medians by the process's CPU seconds: other programs on the
machine disturb these less.
`computed` is tokens computed, padding included, over real ones. `peak_memory_mb` is the
resident memory of a process that trains one such request.

On a GPU (`--device cuda`): `mfu`, the share of the device's peak in bfloat16 that the
model's arithmetic takes, of GPT-2 124M and of a Llama of 1.1B, by PaLM's formula: tokens/s x
(6 N + 12 layers width length) / peak, N the parameters but for those that are only looked up.

`--profile` leaves a trace for chrome://tracing or Perfetto, and a table, in
benchmarks/profile/.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)
from transformers import Trainer as TransformersTrainer

from benchmarks.machine import RESULTS, describe, write
from hiveminer.config.run import Run
from hiveminer.training.data import builtin_rows
from hiveminer.training.model import (
    builtin_model,
    builtin_tokenizer,
    encode,
    ready_to_train,
)
from hiveminer.training.optimizer import build_optimizer
from hiveminer.training.trainer import IGNORED, LocalStep, Trainer

LENGTH = 512
BATCH = 4
AIMS = {"ratio": 0.97, "mfu": 0.5}
ROUNDS = {"1M": 12, "10M": 8}
ROWS = {"1M": 8, "10M": 4}
NORM = Run().optimizer.max_grad_norm
PROFILE = RESULTS.parent / "profile"
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Operations a second in bfloat16, dense, by a word of the device's name, from data sheets."""

Seconds = tuple[float, float]
"""By the clock, and of this process's CPUs."""


def make_model(size: str) -> PreTrainedModel:
    if size == "1M":
        return builtin_model()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=258, n_positions=LENGTH, n_embd=384, n_layer=6, n_head=6, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    return ready_to_train(GPT2LMHeadModel(config))


class Bench:
    """One model and its optimizer, and the four ways to train rows with them."""

    def __init__(self, model: PreTrainedModel, texts: Sequence[str]):
        self.model = model
        self.texts = texts
        self.tokenizer = builtin_tokenizer()
        self.optimizer = build_optimizer(model.parameters(), Run().optimizer)
        self.trainer = Trainer(model, encode=self.encode, optimizer=LocalStep(self.optimizer))
        self.rows = self.trainer.encode_rows(texts)
        self.tokens = sum(map(len, self.rows))
        stream = torch.cat([*self.rows, *self.rows])  # twice, so that its batches are full as well
        blocks = min(len(texts), len(stream) // LENGTH)
        self.packed = stream[: blocks * LENGTH].reshape(-1, LENGTH)
        self.ways: dict[str, Callable[[], tuple[int, Seconds]]] = {
            "trainer": self.run_trainer,
            "packed": self.run_packed,
            "padded": self.run_padded,
            "hf_trainer": self.run_hf_trainer,
        }

    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        encoded = encode(self.tokenizer, texts, max_length=LENGTH)
        return {key: encoded[key] for key in ("input_ids", "attention_mask")}

    @property
    def computed(self) -> float:
        """Tokens that the trainer computes over real ones."""
        total = 0
        for start in range(0, len(self.rows), BATCH):
            batch = self.trainer._cut(self.rows[start : start + BATCH], BATCH)
            total += sum(micro.input_ids.numel() for micro in batch.micro_batches)
        return total / self.tokens

    def run_trainer(self) -> tuple[int, Seconds]:
        clock = Clock()
        result = self.trainer.train(self.texts, batch_size=BATCH)
        return result.tokens, clock.seconds

    def run_packed(self) -> tuple[int, Seconds]:
        clock = Clock()
        for start in range(0, len(self.packed), BATCH):
            ids = self.packed[start : start + BATCH]
            self.model(input_ids=ids, labels=ids).loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self.packed.numel(), clock.seconds

    def run_padded(self) -> tuple[int, Seconds]:
        clock = Clock()
        options: dict[str, Any] = {"padding": "max_length", "max_length": LENGTH}
        logged = 0.0
        for start in range(0, len(self.texts), BATCH):
            batch = self.tokenizer(
                list(self.texts[start : start + BATCH]),
                truncation=True, return_tensors="pt", **options,
            )  # fmt: skip
            ids, mask = batch["input_ids"], batch["attention_mask"]
            loss = self.model(input_ids=ids, attention_mask=mask, labels=ids).loss
            loss.backward()
            logged += loss.item()
            nn.utils.clip_grad_norm_(self.model.parameters(), NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self.tokens, clock.seconds

    def run_hf_trainer(self) -> tuple[int, Seconds]:
        timer = _Timer()
        with tempfile.TemporaryDirectory(prefix="hiveminer-bench-") as folder:
            trainer = TransformersTrainer(
                model=self.model,
                args=TrainingArguments(
                    output_dir=folder,
                    per_device_train_batch_size=BATCH,
                    num_train_epochs=1,
                    max_grad_norm=NORM,
                    use_cpu=True,
                    report_to=[],
                    disable_tqdm=True,
                    save_strategy="no",
                    logging_strategy="no",
                ),
                train_dataset=[{"input_ids": row} for row in self.rows],
                data_collator=_collate,
                optimizers=(
                    self.optimizer,
                    torch.optim.lr_scheduler.ConstantLR(self.optimizer, 1.0),
                ),
                callbacks=[timer],
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return self.tokens, timer.seconds


class Clock:
    def __init__(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    @property
    def seconds(self) -> Seconds:
        return time.perf_counter() - self.began[0], time.process_time() - self.began[1]


class _Timer(TrainerCallback):
    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock = Clock()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = self.clock.seconds


def _collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What transformers' own collators make: the model shifts the labels itself."""
    tokens = [row["input_ids"] for row in rows]
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(tokens, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in tokens], batch_first=True),
        "labels": pad(tokens, batch_first=True, padding_value=IGNORED),
    }


def draw(count: int, *, seed: int = 1) -> list[str]:
    rows = builtin_rows()
    return rows.texts(random.Random(seed).sample(range(len(rows)), count))


def compare(size: str, *, rounds: int, rows: int) -> dict[str, Any]:
    """All ways in turn, in another order each round; medians over the rounds."""
    bench = Bench(make_model(size), draw(rows))
    short = Bench(bench.model, bench.texts[:BATCH])
    short.optimizer = bench.optimizer
    for way in short.ways.values():  # what is done once: kernels, optimizer state, imports
        way()
    speeds: dict[str, list[Seconds]] = {name: [] for name in bench.ways}
    for number in range(rounds):
        names = list(bench.ways)
        for name in names[number % 4 :] + names[: number % 4]:
            tokens, (wall, cpu) = bench.ways[name]()
            speeds[name].append((tokens / wall, tokens / cpu))
    result: dict[str, Any] = {"parameters": bench.model.num_parameters()}
    for name, found in speeds.items():
        result[f"tokens_per_second_{name}"] = round(statistics.median(s for s, _ in found), 1)
    for key, other in RATIOS.items():
        pairs = list(zip(speeds["trainer"], speeds[other], strict=True))
        for kind, name in enumerate((key, key.replace("ratio", "ratio_cpu"))):
            ratios = [one[kind] / two[kind] for one, two in pairs]
            result[name] = round(statistics.median(ratios), 3)
            result[f"{name}_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
        best = [max(wall for wall, _ in speeds[name]) for name in ("trainer", other)]
        result[key.replace("ratio", "ratio_best")] = round(best[0] / best[1], 3)
    result |= {"computed": round(bench.computed, 3), "rounds": rounds, "rows": rows}
    result["peak_memory_mb"] = _peak(size)
    return result


RATIOS = {"ratio": "packed", "ratio_padded": "padded", "ratio_hf_trainer": "hf_trainer"}


def _peak(size: str) -> float:
    """Of a process of its own: the highest mark of this one is that of all it has done."""
    words = [sys.executable, "-m", "benchmarks.step", "--peak", size]
    answer = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return float(answer.split()[-1])


def peak(size: str) -> float:
    Bench(make_model(size), draw(2 * BATCH)).run_trainer()
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def gpu_models() -> dict[str, tuple[PreTrainedModel, int, int]]:
    """Name: the model, the tokens of a row, and the rows of a batch."""
    plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    gpt2 = GPT2LMHeadModel(GPT2Config(**plain))
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
            num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048,
        )
    )  # fmt: skip
    return {"gpt2_124M": (gpt2, 1024, 64), "llama_1.1B": (llama, 2048, 16)}


def mfu(
    model: PreTrainedModel, device: torch.device, *, length: int, rows: int, steps: int = 20
) -> dict[str, Any]:
    """Train full rows with the trainer, five steps to warm up; tokens/s and what they cost."""
    ready_to_train(model)
    nn.Module.to(model, device)
    vocabulary = model.config.vocab_size

    def tokens(texts: Sequence[str]) -> dict[str, Tensor]:
        ids = torch.randint(0, vocabulary, (len(texts), length))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    optimizer = LocalStep(build_optimizer(model.parameters(), Run().optimizer))
    trainer = Trainer(model, encode=tokens, optimizer=optimizer, device=device)
    trainer.train([""] * rows * min(5, steps), batch_size=rows)
    began = time.perf_counter()
    result = trainer.train([""] * rows * steps, batch_size=rows)  # each step waits for its loss
    speed = result.tokens / (time.perf_counter() - began)
    operations = speed * operations_a_token(model, length)
    top = next((p for word, p in PEAKS.items() if word in device_name(device)), None)
    return {
        "tokens_per_second": round(speed),
        "tflops": round(operations / 1e12, 3),
        "mfu": round(operations / top, 4) if top else None,
        "bfloat16": trainer.bfloat16,
        "micro_batch_size": min(rows, trainer.max_micro_batch_size),
        "length": length,
    }


def operations_a_token(model: PreTrainedModel, length: int) -> float:
    """6 N + 12 layers width length: forward and backward, attention counted in full."""
    looked_up = {id(model.get_output_embeddings().weight)}
    count = sum(
        value.numel()
        for name, value in model.named_parameters()
        if id(value) in looked_up or not re.search(r"wte|wpe|embed_tokens", name)
    )
    config = model.config
    return 6.0 * count + 12.0 * config.num_hidden_layers * config.hidden_size * length


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def profile(size: str) -> None:
    bench = Bench(make_model(size), draw(2 * BATCH))
    bench.run_trainer()
    with torch.profiler.profile(record_shapes=True) as found:
        bench.run_trainer()
    PROFILE.mkdir(exist_ok=True)
    found.export_chrome_trace(str(PROFILE / f"step-{size}.json.gz"))
    table = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)
    (PROFILE / f"step-{size}.txt").write_text(table, encoding="utf-8")
    print(table)
    print(f"trace: {PROFILE / f'step-{size}.json.gz'}")


def measure_gpu(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"device": device_name(device)}
    for name, (model, length, rows) in gpu_models().items():
        found[name] = mfu(model, device, length=length, rows=rows)
        print(name, found[name], flush=True)
        del model
        torch.cuda.empty_cache()
    return found


NO_GPU = (
    "none here: not measured; `scripts/bench step --device cuda` measures it where there is one"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/bench step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="one round; writes no result")
    parser.add_argument("--profile", action="store_true", help="a trace and a table; no result")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--peak", choices=list(ROWS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        print(peak(args.peak))
    elif args.profile:
        for size in ROWS:
            profile(size)
    else:
        run(quick=args.quick, device=torch.device(args.device))


def run(*, quick: bool, device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"scripts/bench step: GPU: {NO_GPU}")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread, ours too
    result: dict[str, Any] = describe()
    result["versions"]["accelerate"] = importlib.metadata.version("accelerate")
    sizes = {}
    for size in ROWS:
        rounds, rows = (1, BATCH) if quick else (ROUNDS[size], ROWS[size])
        sizes[size] = compare(size, rounds=rounds, rows=rows)
        print(size, json.dumps(sizes[size], indent=2), flush=True)
    keys = [key for key in sizes["1M"] if key.startswith("ratio") and not key.endswith("_range")]
    result |= {key: min(figures[key] for figures in sizes.values()) for key in keys}
    result["peak_memory_mb"] = {size: figures["peak_memory_mb"] for size, figures in sizes.items()}
    result |= {"aims": AIMS, "sizes": sizes, "threads": 1, "load_after": os.getloadavg()[0]}
    result["gpu"] = measure_gpu(device) if device.type == "cuda" else NO_GPU
    print(json.dumps({key: result[key] for key in keys}))
    if not quick:
        write(RESULTS / "step.json", result)


if __name__ == "__main__":
    main()
