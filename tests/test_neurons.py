"""Whole miners and a whole validator in this process, over real sockets, without Hivemind."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import runpy
import string
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from dishonest import KINDS
from in_process import Hub, InProcessStrategy
from small_neurons import (
    Recorded,
    miner_settings,
    settings_in,
    small_run,
    small_validator,
)

from hiveminer.config.settings import ValidatorSettings
from hiveminer.errors import OperatorError, SwarmError, TrainingError
from hiveminer.miner import Miner
from hiveminer.protocol import Train
from hiveminer.strategies.base import Context
from hiveminer.training.data import Rows
from hiveminer.validation.feed import Answered
from hiveminer.validation.judge import Judge, credited
from hiveminer.validator import Validator
from programs import ROOT, wait_for


@contextmanager
def serving(*neurons: Miner | Validator) -> Iterator[None]:
    """The neurons at work, each in a thread."""
    threads = [threading.Thread(target=each.run) for each in neurons]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for each in neurons:
            each.neuron.stopping.set()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)


@contextmanager
def pair(
    folder: Path, hub: Hub, metrics: Recorded, **work: Any
) -> Iterator[tuple[Miner, Validator]]:
    """A miner and a validator of a small run."""
    options = {"neuron": {"run": small_run(folder)}}
    settings = settings_in(folder, ValidatorSettings, validator=work, **options)
    with (
        Miner(miner_settings(folder, **options), strategy=hub.strategy) as miner,
        Validator(settings, metrics=metrics, observer=hub.observer) as validator,
    ):
        yield miner, validator


def test_a_miner_and_a_validator_from_the_answer_to_the_weight(tmp_path: Path) -> None:
    hub, metrics = Hub(epoch_samples=32), Recorded()
    work = {"rows": 16, "batch_size": 2, "sample_rate": 1.0, "weights_seconds": 1.0}
    before = time.process_time()
    children = set(psutil.Process().children(recursive=True))
    with pair(tmp_path, hub, metrics, **work) as (miner, validator):
        with serving(miner, validator):
            wait_for(lambda: any(line["weights"] for line in metrics.of("weights")), seconds=60)
        assert {line["hotkey"] for line in metrics.of("evidence")} == {miner.neuron.hotkey}
        assert max(line["score"] for line in metrics.of("evidence")) == 1.0
        assert hub.epoch >= 1
        assert miner.progress.trained.requests > 0
        assert metrics.of("held_out")
        assert validator.neuron.chain.metagraph().by_hotkey(miner.neuron.hotkey) is not None
        strategy: Any = miner.swarm
    assert time.process_time() - before < 5
    assert strategy.closed
    assert strategy.interrupted
    assert strategy.syncs
    assert set(psutil.Process().children(recursive=True)) <= children


def test_the_idle_and_the_lying_earn_under_a_fifth_of_the_honest(tmp_path: Path) -> None:
    hub, metrics = Hub(epoch_samples=80), Recorded()
    options = {"neuron": {"run": small_run(tmp_path)}}
    draw = random.Random(5)  # rows of few and of many letters, which can be told apart
    letters = (draw.sample(string.ascii_lowercase, draw.choice([1, 2, 20])) for _ in range(400))
    rows = ["".join(draw.choices(some, k=60)) for some in letters]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    work = {"rows": 20, "batch_size": 2, "sample_rate": 1.0}
    settings = settings_in(tmp_path, ValidatorSettings, validator=work, **options)
    with contextlib.ExitStack() as parts:
        miners = {
            name: parts.enter_context(
                kind(
                    miner_settings(tmp_path, **options),
                    board=tmp_path / "board.json",
                    strategy=hub.strategy,
                )
            )
            for name, kind in KINDS.items()
        }
        validator = parts.enter_context(Validator(settings, metrics=metrics, observer=hub.observer))
        keys = {name: miner.neuron.hotkey for name, miner in miners.items()}

        def told_apart() -> bool:
            # The honest one is paid in full for rows that tell nothing; the others have to be
            # seen, and a first replay has nothing to compare their learning with.
            lines = metrics.of("evidence")
            seen = Counter(
                x["hotkey"] for x in lines if x["judged"] or x["hotkey"] == keys["honest"]
            )
            earned = validator.table.weights()
            most = max(earned.get(keys[name], 0.0) for name in set(keys) - {"honest"})
            enough = all(seen[key] >= 2 for key in keys.values())
            return enough and most < 0.2 * earned.get(keys["honest"], 0.0)

        with serving(*miners.values(), validator):
            wait_for(told_apart, seconds=120)


def test_both_run_where_an_event_loop_runs_already(tmp_path: Path) -> None:
    """As in a notebook, whose cells are run by a loop."""
    metrics = Recorded()

    def stop_after(neuron: Miner | Validator, ready: Callable[[], object]) -> None:
        try:
            wait_for(ready, seconds=60)
        finally:
            neuron.neuron.stopping.set()

    async def cell() -> None:
        with pair(tmp_path, Hub(), metrics) as (miner, validator):
            works = (miner, lambda: miner.axon), (validator, lambda: metrics.of("held_out"))
            for neuron, ready in works:
                threading.Thread(target=stop_after, args=(neuron, ready)).start()
                neuron.run()
        assert miner.axon is not None

    asyncio.run(cell())
    assert metrics.of("held_out")


def test_a_strategy_that_cannot_start_leaves_the_hotkey_free(tmp_path: Path) -> None:
    options = {"neuron": {"run": small_run(tmp_path)}}
    settings = miner_settings(tmp_path, wallet={"hotkey": "mine"}, **options)

    def broken(_: Context) -> InProcessStrategy:
        raise OperatorError("no such place")

    class Unmovable(InProcessStrategy):
        def move_to(self, device: torch.device) -> None:
            raise SwarmError("the device is gone")

    hub, built = Hub(), []

    def unmovable(context: Context) -> Unmovable:
        built.append(Unmovable(hub, context))
        return built[-1]

    with pytest.raises(OperatorError, match="no such place"):
        Miner(settings, strategy=broken)
    with pytest.raises(SwarmError, match="the device is gone"):
        Miner(settings, strategy=unmovable)
    assert built[0].closed
    with Miner(settings, strategy=hub.strategy) as miner:
        assert miner.swarm.epoch == 0
    assert miner.swarm.closed  # type: ignore[attr-defined]


def test_a_row_that_cannot_be_read_costs_its_answer_and_never_the_validator(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Recorded()
    with small_validator(tmp_path, metrics=metrics) as validator:
        broken = BrokenRows(validator.dataset)
        task = dataclasses.replace(validator.task, dataset=broken)
        request = Train(
            request_id="r",
            run_id=str(task.run_id),
            data_hash=task.dataset.hash,
            dataset_indices=list(range(8)),
            batch_size=1,
        )
        answer = request.model_copy(update={"samples": 8, "tokens": 99, "epoch": 0})
        answered = Answered("5F", request, answer, seconds=1.0)
        with pytest.raises(TrainingError, match="rows 0 to 7 cannot be read"):
            credited(answered, task)
        validator.task = task
        asyncio.run(validator._evaluate(validator.states[0]))
        assert "no held-out loss: rows" in caplog.text
        judge = Judge(validator.replayer, task=task, stopped=lambda: False)
        answer.losses, answer.epoch_steps = [3.0] * 8, 8
        with pytest.raises(TrainingError):
            judge.judge(answered, validator.states[0])


def test_the_examples_random_place_is_anywhere(tmp_path: Path) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "validator.py"))["StrictValidator"]
    with small_validator(tmp_path, cls=example, validator={"rows": 8}) as validator:
        rows = validator.training_rows
        dealt = [validator.assign("5F") for _ in range(2000)]
        assert all(block == list(range(block[0], block[0] + 8)) for block in dealt)
        assert all(block[0] >= rows.start and block[-1] < rows.stop for block in dealt)
        assert {block[0] for block in dealt} > {rows.start, rows.stop - 8}
        middle = sum(block[0] >= len(rows) // 2 - 4 for block in dealt)
        assert 800 < middle < 1200
    with small_validator(tmp_path, cls=example, validator={"rows": 4096}) as validator:
        assert validator.assign("5F") == list(validator.training_rows)


class BrokenRows:
    """Data whose rows cannot be decoded any more."""

    def __init__(self, rows: Rows):
        self.hash = rows.hash
        self._count = len(rows)

    def __len__(self) -> int:
        return self._count

    def texts(self, indices: Sequence[int]) -> list[str]:
        return [b"caf\xe9".decode("utf-8") for _ in indices]
