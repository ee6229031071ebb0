"""One miner as a process, and what a validator may send it: good, bad, twice, too late."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from talk import Talk, caller, talking

from hiveminer.chain import join_embedded
from programs import ROOT, Network

RUN = """
oldest_version = "0.1.0"
[model]
sequence_length = 128
[limits]
rows = 600
batch_size = 64
timeout_seconds = 120.0
"""


async def _refusals(talk: Talk) -> None:
    name, run, schema, data = talk.alive.run_id.split("-")
    wanted: list[tuple[dict[str, Any], int, str]] = [
        ({"run_id": f"{name}-000000000000-{schema}-{data}"}, 409, "run.toml differs"),
        ({"run_id": f"{name}-{run}-00000000-{data}"}, 409, "model schema differs"),
        ({"run_id": "nonsense"}, 409, "is none of ours"),
        ({"data_hash": "0" * 64}, 409, "data hash differs"),
        ({"version": "0.0.9"}, 409, "version 0.0.9 is older"),
        ({"version": "new"}, 409, "version new is older"),
        ({"dataset_indices": list(range(601))}, 422, "more than this run's 600 rows"),
        ({"dataset_indices": [1, 1]}, 422, "a row is given twice"),
        ({"dataset_indices": [10**7]}, 422, "row 10000000, and the data has"),
        ({"batch_size": 65}, 422, "more than this run's 64"),
        ({"timeout_seconds": 121.0}, 422, "more than this run's 120"),
    ]
    for changes, status, words in wanted:
        told = await talk.refusal(**changes)
        assert told[0] == status, (changes, told)
        assert words in told[1], (changes, told)
    assert (await talk.is_alive()).completion


async def _work(talk: Talk) -> None:
    answer = await talk.ask(dataset_indices=[40, 7, 23], batch_size=2)
    assert (answer.samples, answer.steps, len(answer.losses)) == (3, 2, 2)
    assert answer.loss is not None
    assert 3 < answer.loss < 7
    assert 3 < answer.tokens <= 3 * 128

    again = talk.request(dataset_indices=[50, 51], request_id="twice")
    first, second = await asyncio.gather(
        *(talk.dendrite.call(talk.endpoint, again, timeout_seconds=60) for _ in range(2))
    )
    later = await talk.dendrite.call(talk.endpoint, again, timeout_seconds=60)
    assert first == second == later  # trained once: a second time would have another loss

    # IsAlive is answered while it trains, and a deadline ends the training at a batch's edge.
    training = asyncio.create_task(
        talk.ask(dataset_indices=list(range(100, 700)), batch_size=4, timeout_seconds=1.5)
    )
    answers = 0
    while not training.done():
        await talk.is_alive()
        answers += 1
        await asyncio.sleep(0.02)  # a hotkey may ask 200 times a second
    late = await training
    assert answers >= 2
    assert late.loss is not None
    assert 0 < late.samples < 600
    assert late.samples == 4 * late.steps


@pytest.mark.timeout(180)
def test_what_a_validator_may_send_a_miner(tmp_path: Path) -> None:
    with Network(tmp_path, run=RUN) as network:
        program = network.start("miner-0", "--logging.format", "json")
        program.says("serving on", seconds=90)
        with caller(tmp_path / "network") as chain:
            join_embedded(chain, stake_tao=10_000)

            async def all_of_it() -> None:
                async with talking(chain, program) as talk:
                    assert talk.alive.completion
                    await _refusals(talk)
                    assert not network.numbers("train")  # nothing of all that was trained
                    await _work(talk)

            asyncio.run(all_of_it())
        trained = network.numbers("train")
        assert [line["request_id"] for line in trained].count("twice") == 1
        assert program.interrupt(seconds=60) == 0
        assert "Traceback" not in program.words, program.words
    lines = [json.loads(line) for line in program.words.splitlines()]
    assert {line["neuron"] for line in lines} == {"miner-0"}
    events = [line["event"] for line in lines if "event" in line]
    assert events == ["embedded_chain", "batch_meaning"]


@pytest.mark.parametrize("name", ["miner.py", pytest.param("validator.py", marks=pytest.mark.slow)])
def test_an_example_tells_its_flags(name: str) -> None:
    words = [sys.executable, str(ROOT / "examples" / name), "--help"]
    told = subprocess.run(words, capture_output=True, text=True, timeout=150, check=True).stdout
    assert "--subtensor.network" in told
