"""A demo on somebody's notes ends with a model that transformers alone can load and use."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from hiveminer.config.run import load_run
from hiveminer.training.data import load_rows, split_held_out
from programs import Program

RUN = """
name = "notes"
[model]
sequence_length = 128
[swarm]
epoch_samples = 96
matchmaking_seconds = 1.0
"""

ALONE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, rows = sys.argv[1], json.load(open(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
total, count = 0.0, 0
for row in rows:
    ids = tokenizer(row, truncation=True, max_length=128, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    count += ids.shape[1] - 1
ids = tokenizer("The ", add_special_tokens=False, return_tensors="pt").input_ids
text = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0])
print(json.dumps([total / count, text]))
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


@pytest.mark.timeout(420)
def test_a_demo_on_notes_leaves_the_model_that_was_measured(tmp_path: Path) -> None:
    write_notes(tmp_path / "notes")
    (tmp_path / "own.toml").write_text(RUN)
    out = tmp_path / "out"
    words = ["-m", "hiveminer", "demo", "--miners", "1", "--seconds", "30", "--out", str(out)]
    words += ["--data", str(tmp_path / "notes"), "--run", str(tmp_path / "own.toml")]
    with Program(words, folder=tmp_path / "demo") as demo:
        assert demo.process.wait(300) == 0, demo.words
        said = demo.words
    summary = json.loads((out / "summary.json").read_text())
    assert summary["held_out_loss_last"] < summary["held_out_loss_first"] - 1, summary
    assert {"prompt", "before", "after"} <= set(summary["sample"])
    assert summary["sample"]["before"] != summary["sample"]["after"]
    assert "What the model wrote" in said

    run = load_run(out / "run.toml")
    rows = load_rows(run.data)
    _, held_out = split_held_out(len(rows), run.data.held_out)
    (tmp_path / "rows.json").write_text(json.dumps(rows.texts(list(held_out)[:32])))
    command = [sys.executable, "-c", ALONE, str(out / "model"), str(tmp_path / "rows.json")]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=150, env=env, check=True
    )
    loss, text = json.loads(result.stdout.splitlines()[-1])
    assert loss == pytest.approx(summary["held_out_loss_last"], abs=1e-3)
    assert text.startswith("The ")
