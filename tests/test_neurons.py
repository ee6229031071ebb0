"""Whole miners and a whole validator in this process, over real sockets, without Hivemind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from in_process import Hub
from small_neurons import Recorded, miner_settings, quiet, settings_in, small_run

from hiveminer.config.settings import ValidatorSettings
from hiveminer.miner import Miner
from hiveminer.validator import Validator
from programs import wait_for


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
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)


def test_two_miners_and_a_validator_from_the_answer_to_the_weight(tmp_path: Path) -> None:
    hub, metrics = Hub(epoch_samples=32), Recorded()
    run = small_run(tmp_path)
    options = {"neuron": {"path": tmp_path / "state", "run": run}}
    work = {"rows": 16, "batch_size": 2, "sample_rate": 1.0, "weights_seconds": 1.0}
    before = time.process_time()
    with (
        quiet(),
        Miner(miner_settings(tmp_path, **options), strategy=hub.strategy) as one,
        Miner(miner_settings(tmp_path, **options), strategy=hub.strategy) as two,
        Validator(
            settings_in(tmp_path, ValidatorSettings, validator=work, **options),
            metrics=metrics,
            observer=hub.observer,
        ) as validator,
    ):
        with serving(one, two, validator):
            wait_for(lambda: len(metrics.of("evidence")) >= 4, seconds=60)
            wait_for(
                lambda: any(len(line["weights"]) == 2 for line in metrics.of("weights")),
                seconds=60,
            )
        scores = {line["hotkey"]: line["score"] for line in metrics.of("evidence")}
        assert scores.keys() == {one.neuron.hotkey, two.neuron.hotkey}
        assert max(scores.values()) == 1.0, metrics.of("evidence")
        assert hub.epoch >= 1
        assert one.progress.trained.requests > 0
        assert metrics.of("held_out")
        chain = validator.neuron.chain
        weights = chain.metagraph()
        assert weights.by_hotkey(one.neuron.hotkey) is not None
        strategies: list[Any] = [one.swarm, two.swarm]
    assert time.process_time() - before < 5
    assert all(each.closed and each.interrupted and each.syncs for each in strategies)
    assert not psutil.Process().children(recursive=True)
