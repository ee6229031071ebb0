"""The model comes out: from a running miner, a killed one, a validator and the swarm itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hiveminer.config.run import Run, load_run
from hiveminer.training.data import load_rows, split_held_out
from hiveminer.training.evaluation import evaluate
from hiveminer.training.model import builtin_model, builtin_tokenizer
from hiveminer.training.model_folder import read_facts
from programs import Network, Program, wait_for

RUN = """
name = "export"
[model]
sequence_length = 128
[swarm]
epoch_samples = 96
matchmaking_seconds = 1.0
"""

FLAGS = ["--neuron.checkpoint_seconds", "1"]
ROWS = 8


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """Two miners that have averaged, and now have nothing to train."""
    with Network(tmp_path_factory.mktemp("export"), run=RUN) as network:
        validator = network.start("validator", "--validator.rows", "16")
        for name in ("miner-0", "miner-1"):
            network.start(name, *FLAGS)
        network.wait_for_numbers(
            "held_out", lambda lines: any(line["epoch"] >= 1 for line in lines), seconds=240
        )
        assert validator.interrupt(seconds=60) == 0
        yield network


def hiveminer(network: Network, name: str, *words: str, seconds: float = 150) -> tuple[int, str]:
    """Run a command of the program on this network; its exit code and what it said."""
    command = ["-m", "hiveminer", *words, *network.flags]
    with Program(command, folder=network.folder / name) as program:
        code = program.process.wait(seconds)
        return code, program.words


def held_out(run: Run) -> list[str]:
    dataset = load_rows(run.data)
    return dataset.texts(list(split_held_out(len(dataset), run.data.held_out)[1])[:ROWS])


def loss_of(model: PreTrainedModel, texts: list[str]) -> float:
    result = evaluate(model, builtin_tokenizer(), texts, sequence_length=128)
    assert result is not None
    return result.loss


def check_learned(folder: Path) -> None:
    """The folder holds a model that is far better than the untrained one, and can write."""
    texts = held_out(load_run(folder / "run.toml"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert loss_of(model, texts) < loss_of(builtin_model(), texts) - 1.0
    ids = tokenizer("import ", add_special_tokens=False, return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    assert read_facts(folder)["run_id"].startswith("export-")


@pytest.mark.timeout(420)
def test_from_miners_that_run_and_on_from_there(network: Network) -> None:
    checkpoints = network.folder / "state"
    wait_for(lambda: list(checkpoints.glob("*/*/*/checkpoints/checkpoint-*")), seconds=60)
    out = network.folder / "running"
    code, words = hiveminer(network, "e1", "export", "--out", str(out))
    assert code == 0, words
    check_learned(out)
    assert read_facts(out)["rows"] > 0

    code, words = hiveminer(network, "e2", "export", "--out", str(out))
    assert (code, "exists already" in words) == (2, True), words
    code, words = hiveminer(network, "g", "generate", "import ", "--tokens", "8", "--seed", "1")
    assert code == 0, words
    assert "import " in words
    code, words = hiveminer(
        network, "ev", "evaluate", "--json", "--rows", str(ROWS), "--model", str(out)
    )
    assert code == 0, words
    result = json.loads(next(line for line in words.splitlines() if line.startswith("{")))
    assert result["trained"]["loss"] < result["start"]["loss"] - 1
    assert result["trained"]["bits_per_byte"] < result["start"]["bits_per_byte"]
    assert all(miner.process.poll() is None for miner in network.programs[1:])


@pytest.mark.timeout(420)
def test_from_the_swarm_by_a_key_that_does_not_train(network: Network) -> None:
    out = network.folder / "swarm"
    words = ["export", "--out", str(out), "--source", "swarm", "--dtype", "bfloat16"]
    code, words_said = hiveminer(network, "e3", *words, seconds=240)
    assert code == 0, words_said
    check_learned(out)
    assert "swarm" in (out / "README.md").read_text()


@pytest.mark.timeout(420)
def test_from_a_killed_miners_checkpoint_and_not_from_a_torn_one(network: Network) -> None:
    """Ends the network's programs."""
    for program in network.programs:
        program.end()
    out = network.folder / "killed"
    code, words = hiveminer(network, "e4", "export", "--out", str(out))
    assert code == 0, words
    check_learned(out)
    for path in (network.folder / "state").glob("*/*/*/checkpoints/*/state.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])
    code, words = hiveminer(network, "e5", "export", "--out", str(network.folder / "torn"))
    assert code == 2
    said = [line for line in words.splitlines() if line.strip()]
    assert len(said) == 1, words
    assert "1000 bytes instead of" in said[0]
    assert not (network.folder / "torn").exists()


@pytest.mark.timeout(420)
def test_a_validator_keeps_the_newest_and_the_best(network: Network) -> None:
    """Last, when no program writes and removes models any more."""
    for program in network.programs:
        program.end()
    lines = network.numbers("held_out")
    kept = sorted((network.folder / "state").glob("*/*/*/models/epoch-*"))
    # The newest, the best where that is another, and what a kill left to be removed.
    assert 1 <= len(kept) <= 3
    facts = [read_facts(path) for path in kept]
    best = min(line["loss"] for line in lines)
    assert min(each["held_out_loss"] for each in facts) <= best + 1e-6
    check_learned(kept[-1])
