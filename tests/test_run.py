"""The run file: what its hash sees, and what a bad one is told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from hiveminer.config.run import LimitsSection, Run, RunId, is_local, load_run
from hiveminer.errors import OperatorError

BASE: dict[str, Any] = {
    "optimizer": {"schedule": "linear", "total_epochs": 10},
    "data": {"name": "owner/data", "rows": 10},
}

OTHER_VALUES: dict[str, Any] = {
    "name": "other",
    "oldest_version": "0.0.9",
    "model.name": "owner/model",
    "model.revision": "main",
    "model.hash": "0" * 64,
    "model.sequence_length": 256,
    "data.name": "owner/other",
    "data.hash": "00",
    "data.column": "body",
    "data.config": "en",
    "data.split": "test",
    "data.revision": "main",
    "data.streaming": True,
    "data.rows": 11,
    "data.shard_rows": 10,
    "data.held_out": 0.02,
    "optimizer.learning_rate": 1e-3,
    "optimizer.momentum": 0.9,
    "optimizer.embedding_rate": 2.0,
    "optimizer.betas": [0.9, 0.99],
    "optimizer.eps": 1e-7,
    "optimizer.weight_decay": 0.0,
    "optimizer.max_grad_norm": 0.5,
    "optimizer.schedule": "cosine",
    "optimizer.warmup_epochs": 1,
    "optimizer.total_epochs": 11,
    "swarm.epoch_samples": 128,
    "swarm.matchmaking_seconds": 4.0,
    "swarm.averaging_timeout_seconds": 31.0,
    "swarm.compression": "none",
    "limits.rows": 512,
    "limits.batch_size": 128,
    "limits.timeout_seconds": 60.0,
}

SPARSELOCO: dict[str, Any] = {
    "round_blocks": 60,
    "mark_blocks": 12,
    "cut_blocks": 5,
    "quorum": 0.6,
    "density": 1.0,
    "bits": 3,
    "rho": 0.8,
    "outer_rate": 0.5,
    "contributor_power": 0,
    "max_contributors": 8,
}

ONLY_VALUE = {"strategy", "optimizer.name"}
"""Keys that know one value so far: the strategy, and the optimizer that works with it."""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: Path, words: str) -> None:
    with pytest.raises(OperatorError) as caught:
        load_run(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert words in line
    assert "\n" not in line


def keys(section: type[BaseModel], prefix: str = "") -> set[str]:
    found = set()
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= keys(field.annotation, f"{prefix}{name}.")
        else:
            found.add(prefix + name)
    return found


def with_values(said: dict[str, Any], values: dict[str, Any]) -> Run:
    place = {name: dict(part) for name, part in said.items()}
    for key, value in values.items():
        section, _, last = key.rpartition(".")
        (place.setdefault(section, {}) if section else place)[last] = value
    return Run.model_validate(place)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        (
            'name = "a"\n[optimizer]\nlearning_rate = 0.001\nbetas = [0.8, 0.9]\n',
            '# ours\noptimizer = { betas = [0.8,\n 0.90 ], learning_rate = 1e-3 }\nname="a" # so\n',
        ),
        ("", '[model]\nname = "builtin"\nsequence_length = 512\n[limits]\n'),
        ("", '[optimizer]\nname = "adamw"\n'),
        ("[swarm]\nmatchmaking_seconds = 4\n", "[swarm]\nmatchmaking_seconds = 4.0\n"),
        ('name = "notepad"\n', '\ufeffname = "notepad"\r\n'),
    ],
)
def test_hash_does_not_see_how_values_are_written(tmp_path: Path, text: str, same: str) -> None:
    run = load_run(write(tmp_path, text))
    assert run.hash == load_run(write(tmp_path, same)).hash
    assert (run == load_run(None)) == (not text)


def test_every_key_has_another_value_in_this_file() -> None:
    sparseloco = {f"sparseloco.{key}" for key in SPARSELOCO}
    assert keys(Run) == set(OTHER_VALUES) | ONLY_VALUE | sparseloco


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_hash_changes_with_every_key(key: str) -> None:
    assert with_values(BASE, {key: OTHER_VALUES[key]}).hash != Run.model_validate(BASE).hash


@pytest.mark.parametrize("key", SPARSELOCO)
def test_hash_sees_a_key_of_sparseloco_with_that_strategy_only(key: str) -> None:
    section = {key: SPARSELOCO[key]}
    assert Run.model_validate({"sparseloco": section}).hash == Run().hash
    with_default = Run.model_validate({"strategy": "sparseloco"}).hash
    changed = Run.model_validate({"strategy": "sparseloco", "sparseloco": section})
    assert changed.hash != with_default != Run().hash


@pytest.mark.parametrize(
    ("values", "golden"),
    [
        ({}, "b4845b34560f3855aadea4a0e0ccba92542ad66eaed799bb087098006210a76d"),
        (
            OTHER_VALUES | {"data.name": "./rows.jsonl"},
            "20f6c72d8dde2aec464e58f4556a24bb33f176d2774ef24a75674ba534a9d2d5",
        ),
        (
            {
                "strategy": "sparseloco",
                "optimizer.name": "muon",
                **{f"sparseloco.{key}": value for key, value in SPARSELOCO.items()},
            },
            "508558e46d99c0538d3c01ffe666f10f33c079f82d8b03f0442616e2fe5fef71",
        ),
    ],
)
def test_hash_of_a_run_does_not_change_with_the_version_of_this_package(
    values: dict[str, Any], golden: str
) -> None:
    assert with_values({}, values).hash == golden


def test_a_key_that_is_added_later_leaves_the_hash_of_existing_runs_unchanged() -> None:
    class LaterLimits(LimitsSection):
        new: int = 1

    class Later(Run):
        limits: LaterLimits = LaterLimits()

    assert Later().hash == Run().hash
    assert Later.model_validate({"limits": {"new": 2}}).hash != Run().hash


def test_hash_does_not_see_where_local_data_and_models_lie(tmp_path: Path) -> None:
    def run(data: str, model: str) -> str:
        return Run.model_validate({"data": {"name": data}, "model": {"name": model}}).hash

    (tmp_path / "here").mkdir()
    hashes = {
        run(str(tmp_path / "here"), "~/models/a"),
        run("/elsewhere/rows.jsonl", "./b"),
        run("../rows.jsonl", "/srv/model"),
    }
    assert len(hashes) == 1
    assert run("owner/data", "./b") not in hashes
    assert run("builtin", "./b") not in hashes
    assert run("./rows.jsonl", "builtin") not in hashes


def test_builtin_is_never_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "builtin").mkdir()
    (tmp_path / "mine").mkdir()
    assert not is_local("builtin")
    assert is_local("mine")
    assert not is_local("openai-community/gpt2")
    assert not is_local("a" * 5000)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("colour = 1", "colour"),
        ("[colours]\nred = 1", "colours"),
        ("[model]\nname = 3", "model.name"),
        ('[model]\nsequence_length = "512"', "model.sequence_length"),
        ("[model]\nsequence_length = 1", "model.sequence_length"),
        ("[model]\nsequence_length = 511.5", "model.sequence_length"),
        ("[data]\nrows = true", "data.rows"),
        ("[data]\nrows = -1", "data.rows"),
        ('[data]\nstreaming = "yes"', "data.streaming"),
        ("[data]\nheld_out = 1.0", "data.held_out"),
        ("[optimizer]\nlearning_rate = 0", "optimizer.learning_rate"),
        ("[optimizer]\nlearning_rate = nan", "optimizer.learning_rate"),
        ("[optimizer]\nlearning_rate = inf", "optimizer.learning_rate"),
        ('[optimizer]\nlearning_rate = "fast"', "optimizer.learning_rate"),
        ("[optimizer]\nbetas = [0.9]", "optimizer.betas"),
        ("[optimizer]\nbetas = [0.9, 1.0]", "optimizer.betas.1"),
        ('[optimizer]\nname = "sgd"', "optimizer.name"),
        ('[optimizer]\nschedule = "steep"', "optimizer.schedule"),
        ('[optimizer]\nschedule = "cosine"', "optimizer.total_epochs"),
        ("[data]\nstreaming = true", "data.rows"),
        ("[swarm]\nepoch_samples = 0", "swarm.epoch_samples"),
        ('[swarm]\ncompression = "zip"', "swarm.compression"),
        ("[limits]\nbatch_size = 1_000_000", "limits.batch_size"),
        ("[limits]\nrows = 0", "limits.rows"),
        ("[limits]\ntimeout_seconds = true", "limits.timeout_seconds"),
        ('name = "With-Dash"', "name"),
        ('strategy = "alone"', "strategy"),
        ('oldest_version = "1.0"', "oldest_version"),
        ("data = 'a.txt'", "data: must be a section"),
        ("[data]\nnam = 'a.txt'", "data.nam: there is no such key"),
        ('[optimizer]\nname = "muon"', "'muon' does not work with strategy 'hivemind'"),
        ("[swarm]\nmatchmaking_seconds = 91", "swarm.matchmaking_seconds"),
        ("[sparseloco]\nround_blocks = 201", "sparseloco.round_blocks"),
        ("[sparseloco]\nmark_blocks = 46", "together must be below round_blocks"),
        ("[sparseloco]\nquorum = 0.4", "sparseloco.quorum"),
        ("[sparseloco]\ndensity = 0", "sparseloco.density"),
        ("[sparseloco]\nbits = 5", "sparseloco.bits"),
        ("[sparseloco]\ncontributor_power = 0.6", "sparseloco.contributor_power"),
        ('strategy = "sparseloco"\n[optimizer]\nwarmup_epochs = 2', "warmup_epochs 0"),
    ],
)
def test_a_bad_key_is_told_in_one_line(tmp_path: Path, text: str, key: str) -> None:
    path = write(tmp_path, text)
    refused(path, key)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"name = ", "not TOML"),
        (b'name = "a"\nname = "b"', "not TOML"),
        (b"{}", "not TOML"),
        ('name = "a"'.encode("utf-16"), "not UTF-8 (byte 0xff); save it as UTF-8"),
    ],
)
def test_what_is_no_toml_is_told_in_one_line(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    refused(path, reason)


def test_a_missing_file_and_a_folder_are_told_in_one_line(tmp_path: Path) -> None:
    refused(tmp_path / "absent.toml", "no such file; --neuron.run")
    os.mkfifo(tmp_path / "pipe.toml")
    for path in (tmp_path, tmp_path / "pipe.toml"):
        refused(path, "cannot be read: not a regular file")


def run_id(**changed: str) -> RunId:
    parts = {"name": "ours", "run": "a" * 12, "schema": "b" * 8, "data": "c" * 8}
    return RunId(**(parts | changed))


def test_run_id_carries_name_and_three_hashes() -> None:
    run = Run(name="small")
    made = RunId.of(run, schema_hash="0123456789", data_hash="9876543210")
    assert str(made) == f"small-{run.hash[:12]}-01234567-98765432"
    assert made.difference(str(made)) is None


@pytest.mark.parametrize(
    ("part", "told"),
    [("name", "run"), ("run", "run.toml"), ("schema", "model schema"), ("data", "data")],
)
def test_difference_names_the_part(part: str, told: str) -> None:
    theirs = run_id(**{part: "d"})
    said = run_id().difference(str(theirs))
    assert said is not None
    assert said.startswith(f"{told} differs: d there, ")
    assert str(theirs) in said
    assert str(run_id()) in said


@pytest.mark.parametrize("other", ["", "ours", "a-b-c", "a-b-c-d-e"])
def test_difference_from_something_that_is_no_run_id(other: str) -> None:
    assert "none of ours" in (run_id().difference(other) or "")


@pytest.mark.parametrize(
    ("version", "accepted"),
    [
        ("0.2.0", True),
        ("0.2.1", True),
        ("0.10.0", True),
        ("1.0.0", True),
        ("0.1.9", False),
        ("0.1.99", False),
        ("", False),
        ("0.2", False),
        ("0.2.0.0", False),
        ("0.2.0rc1", False),
        ("new", False),
    ],
)
def test_versions_compare_as_numbers(version: str, accepted: bool) -> None:
    assert Run(oldest_version="0.2.0").accepts_version(version) is accepted


@pytest.mark.parametrize("part", ["model", "data"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "must not be empty"),
        ("  ", "must not be empty"),
        ("~nobody-has-this-name/x.txt", "there is no home folder for ~"),
        ("a\\u0000b", "must not contain a null character"),
    ],
)
def test_a_name_that_names_nothing_is_one_line(
    tmp_path: Path, part: str, name: str, words: str
) -> None:
    refused(write(tmp_path, f'[{part}]\nname = "{name}"\n'), f"{part}.name: {words}")
