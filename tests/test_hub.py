"""A model and a dataset by hub name, through huggingface_hub itself, from a server of our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hub_server import serving
from tiny import save_tiny

from hiveminer.training.model import load_model, weights_hash
from programs import Program

LOAD = """
import json
from hiveminer.config.run import Run
from hiveminer.training.task import load_task
from hiveminer.training.model import weights_hash
run = Run.model_validate({
    "model": {"name": "tiny/llama", "sequence_length": 32}, "data": {"name": "tiny/notes"},
})
task = load_task(run)
print(json.dumps({
    "weights": weights_hash(task.model), "rows": task.dataset.texts(range(len(task.dataset))),
}), flush=True)
"""


@pytest.mark.timeout(240)
def test_a_model_and_a_dataset_come_from_the_hub_by_name(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    (tmp_path / "notes").mkdir()
    rows = [f"note {n}: buy {n} apples" for n in range(40)]
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    (tmp_path / "notes" / "train.jsonl").write_text(lines)
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    folders = {"models/tiny/llama": tmp_path / "model", "datasets/tiny/notes": tmp_path / "notes"}
    with serving(folders) as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        # A fresh interpreter: huggingface_hub reads its environment when it is imported.
        with Program([str(script)], folder=tmp_path / "load", env=env, fresh=True) as program:
            words = program.says('"weights"', seconds=200)
        answer = json.loads(next(x for x in words.splitlines() if x.startswith("{")))
        assert answer["rows"] == rows
        assert answer["weights"] == weights_hash(load_model(str(tmp_path / "model")))
        asked = "\n".join(hub.requests)
        assert "/tiny/llama/resolve/" in asked
        assert "/datasets/tiny/notes/resolve/" in asked
