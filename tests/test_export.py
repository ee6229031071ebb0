"""The model comes out: from a running miner, a killed one, a validator and the swarm itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hiveminer.commands.evaluate import held_out_texts
from hiveminer.config.run import load_run
from hiveminer.training.data import load_rows
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

pytestmark = pytest.mark.timeout(420)

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


def hiveminer(network: Network, name: str, *words: str, code: int = 0) -> str:
    """Run a command of the program on this network, which ends with this code; what it said."""
    command = ["-m", "hiveminer", *words, *network.flags]
    with Program(command, folder=network.folder / name) as program:
        assert program.process.wait(240) == code, program.words
        return program.words


def loss_of(model: PreTrainedModel, texts: list[str]) -> float:
    result = evaluate(model, builtin_tokenizer(), texts, sequence_length=128)
    assert result is not None
    return result.loss


def check_learned(folder: Path) -> None:
    """The folder holds a model that is far better than the untrained one, and can write."""
    run = load_run(folder / "run.toml")
    texts = held_out_texts(run, load_rows(run.data), rows=ROWS)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert loss_of(model, texts) < loss_of(builtin_model(), texts) - 1.0
    ids = tokenizer("import ", add_special_tokens=False, return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    assert read_facts(folder)["run_id"].startswith("export-")


def test_from_miners_that_run_and_on_from_there(network: Network) -> None:
    checkpoints = network.folder / "state"
    wait_for(lambda: list(checkpoints.glob("*/*/*/checkpoints/checkpoint-*")), seconds=60)
    out = network.folder / "running"
    hiveminer(network, "e1", "export", "--out", str(out))
    check_learned(out)
    assert read_facts(out)["rows"] > 0

    words = hiveminer(network, "e2", "export", "--out", str(out), code=2)
    assert "exists already" in words
    words = hiveminer(network, "g", "generate", "import ", "--tokens", "8", "--seed", "1")
    assert "import " in words
    flags = ["--json", "--rows", str(ROWS), "--model", str(out)]
    words = hiveminer(network, "ev", "evaluate", *flags)
    result = json.loads(next(line for line in words.splitlines() if line.startswith("{")))
    assert result["trained"]["loss"] < result["start"]["loss"] - 1
    assert result["trained"]["bits_per_byte"] < result["start"]["bits_per_byte"]
    assert all(miner.process.poll() is None for miner in network.programs[1:])


def test_from_the_swarm_by_a_key_that_does_not_train(network: Network) -> None:
    out = network.folder / "swarm"
    flags = ["--out", str(out), "--source", "swarm", "--dtype", "bfloat16"]
    hiveminer(network, "e3", "export", *flags)
    check_learned(out)
    assert "swarm" in (out / "README.md").read_text()


def test_from_a_killed_miners_checkpoint_and_not_from_a_torn_one(network: Network) -> None:
    """Ends the network's programs."""
    for program in network.programs:
        program.end()
    out = network.folder / "killed"
    hiveminer(network, "e4", "export", "--out", str(out))
    check_learned(out)
    for path in (network.folder / "state").glob("*/*/*/checkpoints/*/state.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])
    flags = ["--out", str(network.folder / "torn")]
    words = hiveminer(network, "e5", "export", *flags, code=2)
    assert len(words.strip().splitlines()) == 1, words
    assert "1000 bytes instead of" in words
    assert not (network.folder / "torn").exists()


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
