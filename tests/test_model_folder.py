"""A trained model as a folder: written whole or not at all, and loaded by transformers alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from steps import same, weights
from tiny import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hiveminer.config.run import Run, load_run
from hiveminer.errors import OperatorError
from hiveminer.training.evaluation import evaluate
from hiveminer.training.model import builtin_model, builtin_tokenizer, load_model, load_tokenizer
from hiveminer.training.model_folder import Origin, read_facts, save_model, set_weights

ALONE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

def loaded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("def main", add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    text = tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0])
    return float(loss), text, str(model.dtype)

print(json.dumps([loaded(folder) for folder in sys.argv[1:]]))
others = [name for name in sys.modules if name.startswith(("hiveminer", "hivemind", "bittensor"))]
sys.exit(" ".join(others) or 0)
"""


def shaken(model: PreTrainedModel, seed: int = 3) -> PreTrainedModel:
    """The model with other weights, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model


def origin(run: Run | None = None) -> Origin:
    return Origin(
        run=run or Run(), run_id="embedded-a-b-c", epoch=7, source="a test", rows=12_345,
        tokens=678, held_out_loss=2.5, held_out_rows=32,
    )  # fmt: skip


def test_transformers_alone_loads_the_folder_and_gets_the_same_loss(tmp_path: Path) -> None:
    model, tokenizer = shaken(builtin_model()), builtin_tokenizer()
    ids = tokenizer("def main", add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=ids).loss)
    folders = {dtype: tmp_path / dtype for dtype in ("float32", "bfloat16", "float16")}
    for dtype, folder in folders.items():
        save_model(folder, model=model, tokenizer=tokenizer, origin=origin(), dtype=dtype)
    words = [sys.executable, "-c", ALONE, *map(str, folders.values())]
    result = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    told = json.loads(result.stdout.splitlines()[-1])
    for dtype, (loss, text, loaded_as) in zip(folders, told, strict=True):
        assert loss == pytest.approx(expected, abs=1e-4 if dtype == "float32" else 0.05)
        assert text.startswith("def main")
        assert loaded_as == f"torch.{dtype}"


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_a_folder_of_another_architecture_is_written_and_read_again(
    tmp_path: Path, architecture: str
) -> None:
    save_tiny(architecture, tmp_path / "start")
    name = str(tmp_path / "start")
    model, tokenizer = shaken(load_model(name)), load_tokenizer(name)
    save_model(tmp_path / "out", model=model, tokenizer=tokenizer, origin=origin())
    again = load_model(str(tmp_path / "out"))
    assert same(weights(again), weights(model))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.use_cache
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(tokenizer)


def test_the_card_says_where_the_model_comes_from(tmp_path: Path) -> None:
    start = tmp_path / "start"
    save_tiny("llama", start)
    (start / "README.md").write_text('---\nlicense: "apache-2.0"\n---\n# Tiny\n')
    run = Run.model_validate({"name": "notes", "model": {"name": str(start)}})
    model, tokenizer = load_model(str(start)), load_tokenizer(str(start))
    save_model(tmp_path / "out", model=model, tokenizer=tokenizer, origin=origin(run))
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("license: apache-2.0", "embedded-a-b-c", "12,345", "2.5000 nats per", "# notes"):
        assert part in card, card
    facts = read_facts(tmp_path / "out")
    assert (facts["epoch"], facts["rows"], facts["license"]) == (7, 12_345, "apache-2.0")
    assert facts["weights_sha256"] in card
    assert load_run(tmp_path / "out" / "run.toml") == run


def test_what_is_there_already_is_left_as_it_is(tmp_path: Path) -> None:
    model, tokenizer = builtin_model(), builtin_tokenizer()
    (tmp_path / "out").mkdir()
    with pytest.raises(OperatorError, match="exists already"):
        save_model(tmp_path / "out", model=model, tokenizer=tokenizer, origin=origin())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OperatorError, match="cannot be written"):
        save_model(tmp_path / "file" / "out", model=model, tokenizer=tokenizer, origin=origin())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]
    assert (tmp_path / "file").read_text() == "mine"


def test_replacing_leaves_one_folder(tmp_path: Path) -> None:
    model, tokenizer = builtin_model(), builtin_tokenizer()
    for _ in range(2):
        save_model(
            tmp_path / "out", model=shaken(model), tokenizer=tokenizer, origin=origin(),
            replace=True,
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    again = load_model(str(tmp_path / "out"))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_weights_that_do_not_fit_change_nothing() -> None:
    model = builtin_model()
    good = {name: value + 1 for name, value in weights(model).items()}
    before = weights(model)
    name = next(iter(good))
    less = {key: value for key, value in good.items() if key != name}
    for bad in (good | {"other": torch.ones(1)}, good | {name: torch.ones(3)}, less):
        with pytest.raises(ValueError, match="do not fit"):
            set_weights(model, bad)
    assert same(weights(model), before)


def test_an_evaluation_counts_what_it_predicts() -> None:
    model, tokenizer = builtin_model(), builtin_tokenizer()
    texts = ["ab", "für", "x" * 700]
    result = evaluate(model, tokenizer, texts, sequence_length=512)
    assert result is not None
    # One token per byte, and one at the end of each row; the first is given.
    assert result.tokens == 2 + 4 + 511
    assert result.bytes == 1 + 3 + 510
    assert result.loss == pytest.approx(5.55, abs=0.2)  # an untrained model: log(258)
    alone = [evaluate(model, tokenizer, [text], sequence_length=512) for text in texts]
    total = sum(each.loss * each.tokens for each in alone if each is not None)
    assert result.loss == pytest.approx(total / result.tokens, abs=1e-5)
    expected = result.loss * result.tokens / 0.693147 / result.bytes
    assert result.bits_per_byte == pytest.approx(expected, rel=1e-4)
    assert evaluate(model, tokenizer, [""], sequence_length=512) is None
