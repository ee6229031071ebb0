"""A whole demo, on somebody's notes: its summary, its plot, its model, and its end."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hiveminer.config.run import load_run
from hiveminer.training.data import load_rows, split_held_out
from hiveminer.training.evaluation import evaluate
from programs import Program

RUN = """
name = "notes"
[model]
sequence_length = 128
[swarm]
epoch_samples = 96
matchmaking_seconds = 1.0
"""

WORDS = ["beans", "garden", "water", "plant", "seed", "sun", "rain", "soil", "rake", "leaf"]


def write_notes(folder: Path) -> None:
    """A folder of short Markdown notes, and a picture beside them."""
    folder.mkdir()
    chance = random.Random(5)
    for number in range(120):
        lines = [" ".join(chance.choices(WORDS, k=12)) + ".\n" for _ in range(10)]
        (folder / f"note {number:03d}.md").write_text(f"# Note {number}\n\n" + "".join(lines))
    (folder / "photo.png").write_bytes(b"\x89PNG")


@pytest.mark.timeout(300)
def test_a_demo_on_notes_ends_clean_with_the_model_that_was_measured(tmp_path: Path) -> None:
    write_notes(tmp_path / "notes")
    (tmp_path / "own.toml").write_text(RUN)
    out = tmp_path / "out with a space"
    words = ["-m", "hiveminer", "demo", "--miners", "2", "--seconds", "10", "--out", str(out)]
    words += ["--data", str(tmp_path / "notes"), "--run", str(tmp_path / "own.toml")]
    with Program(words, folder=tmp_path / "demo") as demo:
        assert demo.process.wait(240) == 0, demo.words
        said = demo.words
    summary = json.loads((out / "summary.json").read_text())
    assert summary["miners"] == 2
    assert summary["train_requests"] >= 2
    assert summary["tokens"] > 0
    assert summary["held_out_loss_first"] > 5
    assert summary["held_out_loss_last"] < summary["held_out_loss_first"] - 1, summary
    assert summary["is_alive_p99_ms"] >= summary["is_alive_p50_ms"] > 0
    assert summary["exit_clean"] is True
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    kinds = {json.loads(line)["kind"] for line in (out / "metrics.jsonl").read_text().splitlines()}
    assert {"answer", "train", "alive", "held_out"} <= kinds
    assert {"prompt", "before", "after"} <= set(summary["sample"])
    assert summary["sample"]["before"] != summary["sample"]["after"]
    assert "What the model wrote" in said

    run = load_run(out / "run.toml")
    rows = load_rows(run.data)
    _, held_out = split_held_out(len(rows), run.data.held_out)
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    result = evaluate(model, tokenizer, rows.texts(list(held_out)[:32]), sequence_length=128)
    assert result is not None
    assert result.loss == pytest.approx(summary["held_out_loss_last"], abs=1e-3)
