"""`hiveminer run new` writes a run.toml that works, and `run check` says what is unwise."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from hiveminer.cli import main
from hiveminer.config.run import Run, load_run
from hiveminer.config.run_file import to_toml
from hiveminer.errors import OperatorError
from hiveminer.training.data import load_rows
from hiveminer.training.model import builtin_model, weights_hash
from hiveminer.training.optimizer import usual_learning_rate
from hiveminer.training.task import load_task

TEXT = "".join(f"This is line {n} of a text about nothing much at all.\n" for n in range(4000))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "my text.txt"
    path.write_text(TEXT)
    return path


def check(folder: Path, table: dict[str, Any]) -> int:
    """The exit code of `run check` for this run."""
    path = folder / "run.toml"
    path.write_text(to_toml(Run.model_validate(table)))
    return main(["run", "check", str(path)])


def test_a_new_run_has_the_hash_of_the_data_and_checks_out(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run.toml"
    assert main(["run", "new", "--out", str(out), "--data", str(text_file)]) == 0
    run = load_run(out)
    assert run.data.hash == load_rows(run.data).hash
    assert run.model.hash == weights_hash(builtin_model())
    assert "# Tokens to which a row is truncated." in out.read_text()
    capsys.readouterr()
    assert main(["run", "check", str(out)]) == 0
    assert "no problems found" in capsys.readouterr().out
    assert main(["run", "new", "--out", str(out), "--data", str(text_file)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimizer": {"learning_rate": 0.5}}, "unwise: optimizer.learning_rate 0.5 is high"),
        ({"optimizer": {"learning_rate": 1e-9}}, "unwise: optimizer.learning_rate 1e-09 is low"),
        ({"swarm": {"epoch_samples": 8}}, "unwise: swarm.epoch_samples 8 is less than the 64"),
        ({"limits": {"rows": 8}}, "unwise: limits.rows 8 is less than the 64 rows"),
        ({"data": {"rows": 9, "revision": "1"}}, "unwise: data.rows changes nothing here"),
        ({"data": {"held_out": 0.0}}, "unwise: data.held_out 0"),
        ({}, "unwise: data.hash is empty"),
    ],
)
def test_what_is_unwise_is_named(
    tmp_path: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    said: str,
) -> None:
    table = {"data": {"name": str(text_file)} | change.pop("data", {})} | change
    assert check(tmp_path, table) == 0
    assert said in capsys.readouterr().out


def test_what_is_wrong_is_named_and_is_an_error(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny("llama", tmp_path / "tiny")
    weights = load_file(tmp_path / "tiny" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "tiny" / "model.safetensors", metadata={"format": "pt"})
    for table, said in (
        ({"data": {"name": str(tmp_path / "none.txt")}}, "none.txt"),
        ({"data": {"name": str(text_file), "hash": "0" * 64}}, "its hash is"),
        ({"data": {"name": str(text_file)}, "model": {"name": str(tmp_path)}}, "config.json"),
        ({"model": {"sequence_length": 4096}}, "is 4096, the model's longest is 512; lower it"),
        ({"model": {"name": "/no/model\n\x1b[31m"}}, r"model /no/model \x1b[31m: no such folder"),
        (
            {"model": {"name": str(tmp_path / "tiny"), "sequence_length": 32}},
            "tiny: its weights lack lm_head.weight",
        ),
    ):
        table.setdefault("data", {"name": str(text_file)})
        assert check(tmp_path, table) == 1
        lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("wrong: ")]
        assert len(lines) == 1, lines
        assert said in lines[0]
    path = tmp_path / "run.toml"
    path.write_text("[optimizer]\nlearning_rate = 'high'\n")
    assert main(["run", "check", str(path)]) == 2
    assert "optimizer.learning_rate" in capsys.readouterr().err


def test_a_models_size_is_read_without_its_weights(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny("llama", tmp_path / "tiny")
    for weights in (tmp_path / "tiny").glob("*.safetensors"):
        weights.write_bytes(b"")
    table = {"data": {"name": str(text_file)}, "model": {"name": str(tmp_path / "tiny")}}
    check(tmp_path, table)
    assert "model.sequence_length is 512, the model's longest is 64" in capsys.readouterr().out


def test_the_text_of_a_run_reads_back_as_the_run() -> None:
    name = 'a "quoted" \\ name\twith ü and \U0001f600.txt'
    run = Run.model_validate({"name": "x", "data": {"name": name}, "optimizer": {"eps": 1e-30}})
    for text in (to_toml(run), to_toml(run, comments=True)):
        assert Run.model_validate(tomllib.loads(text)) == run
        assert "[sparseloco]" not in text
    assert "[sparseloco]" in to_toml(Run.model_validate({"strategy": "sparseloco"}))


def test_the_usual_learning_rate_falls_with_size() -> None:
    rates = [usual_learning_rate(10**power) for power in range(5, 13)]
    assert rates == sorted(rates, reverse=True)
    assert usual_learning_rate(10**6) == pytest.approx(1.3e-3, rel=0.05)
    assert rates[-1] == 1e-4


def test_a_model_with_other_weights_is_refused(tmp_path: Path, text_file: Path) -> None:
    save_tiny("llama", tmp_path / "tiny")
    table: dict[str, Any] = {
        "data": {"name": str(text_file)},
        "model": {"name": str(tmp_path / "tiny"), "sequence_length": 32},
    }
    good = load_task(Run.model_validate(table))
    table["model"]["hash"] = weights_hash(good.model)
    again = load_task(Run.model_validate(table))
    assert again.run_id != good.run_id  # a key that is set is part of what is agreed on
    table["model"]["hash"] = "0" * 64
    with pytest.raises(OperatorError, match="the hash of its weights is"):
        load_task(Run.model_validate(table))
    with pytest.raises(ValidationError):
        Run.model_validate(table | {"model": {"hash": "short"}})
