"""The demo: the run that it makes of somebody's text, model and run.toml; and one as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from hiveminer.commands.demo_model import keep_model, prompt_of
from hiveminer.commands.demo_run import demo_run
from hiveminer.config.run import Run, load_run
from hiveminer.config.run_file import to_toml
from hiveminer.config.settings import DemoSettings
from hiveminer.errors import OperatorError
from hiveminer.strategies.sparseloco.schedule import EMBEDDED_LATENCY, Schedule, schedule_problems
from hiveminer.training.data import load_rows, split_held_out
from hiveminer.training.evaluation import evaluate
from hiveminer.validation.models import name_of
from programs import Program


def notes(folder: Path, count: int) -> Path:
    """A folder of Markdown notes, each long enough for a row of its own, and a picture."""
    folder.mkdir()
    for number in range(count):
        text = f"# Note {number}\n\n" + f"Remember the beans of bed {number}. " * 14 + "\n"
        (folder / f"note {number:03d}.md").write_text(text)
    (folder / "photo.png").write_bytes(b"\x89PNG")
    return folder


def settings(**values: Any) -> DemoSettings:
    return DemoSettings(**{key: str(value) for key, value in values.items()})


def test_without_flags_the_demo_trains_the_built_in_run() -> None:
    assert demo_run(DemoSettings()).run == Run()


def test_the_strategy_is_a_flag_and_its_rounds_fit_the_embedded_network(tmp_path: Path) -> None:
    assert demo_run(DemoSettings(strategy="hivemind")).run == Run()
    made = demo_run(DemoSettings(strategy="sparseloco"))
    assert made.has_rounds
    assert made.run.sparseloco.density == 1
    schedule = Schedule.of(made.run.sparseloco)
    assert schedule_problems(schedule, tempo=360, roles=1, latency=EMBEDDED_LATENCY) == []
    own = tmp_path / "run.toml"
    own.write_text('strategy = "sparseloco"\n[sparseloco]\nround_blocks = 40\n')
    made = demo_run(settings(run=own, data=notes(tmp_path / "notes", 8)))
    assert (made.run.strategy, made.run.sparseloco.round_blocks) == ("sparseloco", 40)


@pytest.mark.parametrize(("count", "requested", "held_out"), [(4, 3, 1), (40, 32, 8), (900, 64, 9)])
def test_small_data_still_has_rows_to_measure_on(
    tmp_path: Path, count: int, requested: int, held_out: int
) -> None:
    made = demo_run(settings(data=notes(tmp_path / "notes", count)))
    rows = load_rows(made.run.data)
    train, measured = split_held_out(len(rows), made.run.data.held_out)
    assert (len(rows), len(measured), made.request_rows) == (count, held_out, requested)
    assert len(train) + len(measured) == count


def test_a_note_called_test_is_a_note(tmp_path: Path) -> None:
    folder = notes(tmp_path / "notes", 8)
    (folder / "note 003.md").rename(folder / "test ideas.md")
    made = demo_run(settings(data=folder))
    assert len(load_rows(made.run.data)) == 8


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_little_text_is_one_line(tmp_path: Path, count: int) -> None:
    with pytest.raises(OperatorError) as error:
        demo_run(settings(data=notes(tmp_path / "notes", count)))
    assert "\n" not in str(error.value)
    assert "notes" in str(error.value)


def test_a_model_gets_a_length_and_a_rate_that_fit_it(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    given = {"data": notes(tmp_path / "notes", 20), "model": tmp_path / "model"}
    run = demo_run(settings(**given)).run
    assert run.model.sequence_length == 64
    assert 1e-4 < run.optimizer.learning_rate < 5e-4  # a tenth of what is usual from scratch
    own = tmp_path / "run.toml"
    own.write_text(to_toml(Run.model_validate({"optimizer": {"learning_rate": 0.0123}})))
    run = demo_run(settings(**given, run=own)).run
    assert run.optimizer.learning_rate == 0.0123


def test_a_run_of_ones_own_is_taken_as_it_is(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "tiny")
    table = {
        "name": "mine", "limits": {"rows": 16}, "data": {"name": str(notes(tmp_path / "n", 200))},
        "model": {"name": str(tmp_path / "tiny"), "sequence_length": 64},
    }  # fmt: skip
    own = tmp_path / "run.toml"
    own.write_text(to_toml(Run.model_validate(table)))
    made = demo_run(settings(run=own))
    assert made.run.model.sequence_length == 64
    assert made.request_rows == 16


def test_the_model_that_was_measured_last_is_left(tmp_path: Path) -> None:
    state = tmp_path / "state"
    for epoch in (3, 4):
        folder = state / "embedded" / "1" / "5Hot" / "models" / name_of(epoch)
        folder.mkdir(parents=True)
        (folder / "epoch").write_text(str(epoch))
    lines = [{"kind": "held_out", "epoch": epoch, "loss": 2.0} for epoch in (0, 3)]
    assert keep_model(state, lines, tmp_path / "model")
    assert (tmp_path / "model" / "epoch").read_text() == "3"
    assert not keep_model(state, lines, tmp_path / "model2")
    assert not keep_model(state, [], tmp_path / "model2")


def test_a_prompt_is_the_beginning_of_a_row_that_goes_on() -> None:
    assert prompt_of(["", "short", "word " * 40]) == "word " * 11 + "word"
    assert prompt_of(["  a short note "]) == "a short note"
    assert prompt_of([]) == "The"


@pytest.mark.timeout(300)
def test_a_demo_on_notes_ends_clean_with_the_model_that_was_measured(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(
        'name = "notes"\n[model]\nsequence_length = 128\n'
        "[swarm]\nepoch_samples = 96\nmatchmaking_seconds = 1.0\n"
    )
    out = tmp_path / "out with a space"
    words = ["-m", "hiveminer", "demo", "--miners", "2", "--seconds", "10", "--out", str(out)]
    words += ["--data", str(notes(tmp_path / "notes", 120)), "--run", str(own)]
    with Program(words, folder=tmp_path / "demo") as demo:
        assert demo.process.wait(240) == 0, demo.words
        assert "What the model wrote" in demo.words
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
    assert summary["sample"].keys() == {"prompt", "before", "after"}
    assert summary["sample"]["before"] != summary["sample"]["after"]

    run = load_run(out / "run.toml")
    rows = load_rows(run.data)
    _, held_out = split_held_out(len(rows), run.data.held_out)
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    result = evaluate(model, tokenizer, rows.texts(list(held_out)[:32]), sequence_length=128)
    assert result is not None
    assert result.loss == pytest.approx(summary["held_out_loss_last"], abs=1e-3)
