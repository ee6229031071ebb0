"""Tests of a miner's progress: when a checkpoint is written, and what a restart resumes."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hiveminer.errors import SwarmError
from hiveminer.strategies.checkpointer import Progress, read_trained
from hiveminer.training.checkpoint import Checkpoints
from hiveminer.training.trainer import TrainResult
from programs import wait_for


class SmallSwarm:
    """A swarm of one number."""

    def __init__(self) -> None:
        self.epoch, self.rows = 0, 0
        self.fails: Exception | None = None

    def state_dict(self, *, timeout_seconds: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self.fails is not None:
            raise self.fails
        return {"x": torch.tensor(float(self.rows))}, {"epoch": self.epoch, "rows": self.rows}

    def load_state_dict(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        if "x" not in tensors:
            raise ValueError("it does not fit the model: x")
        self.epoch, self.rows = facts["epoch"], int(tensors["x"])


def a_miner(folder: Path, *, run_id: str = "r-1-2-3") -> SimpleNamespace:
    """A progress, its swarm, and its clock: `at` is the time."""
    made = SimpleNamespace(swarm=SmallSwarm(), kept=Checkpoints(folder), at=1000.0)
    made.progress = Progress(
        made.swarm, made.kept, run_id=run_id, every_seconds=60, clock=lambda: made.at
    )

    def train(rows: int, *, epoch: bool = False) -> None:
        made.swarm.rows += rows
        if epoch:
            made.swarm.epoch, made.swarm.rows = made.swarm.epoch + 1, 0
            made.progress.epoch_began()
        made.progress.step(rows)

    def finish() -> None:
        made.progress.keep_last()
        made.progress.close()

    made.train, made.finish = train, finish
    return made


def settled(made: SimpleNamespace) -> str | None:
    """The newest checkpoint, once nothing is being written."""
    wait_for(lambda: not made.kept.writing, seconds=60)
    name: str | None = made.kept.newest
    return name


def test_a_checkpoint_is_due_when_an_epoch_begins_and_in_a_long_one(tmp_path: Path) -> None:
    made = a_miner(tmp_path)
    made.train(8, epoch=True)
    assert settled(made) is None  # the last one (the start) is not long enough ago
    made.at += 60
    made.train(8)
    assert settled(made) == "checkpoint-000001"  # the epoch had begun
    made.at += 599
    made.train(8)
    assert settled(made) == "checkpoint-000001"  # in the middle of an epoch
    made.at += 1
    made.train(8)
    assert settled(made) == "checkpoint-000002"  # which is a long one
    made.at += 6000
    made.progress.keep_if_due()
    made.progress.epoch_began()
    made.progress.keep_if_due()
    assert settled(made) == "checkpoint-000002"  # there is nothing new
    made.progress.keep_last()
    assert settled(made) == "checkpoint-000003"


def test_counts_are_taken_up_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made = a_miner(tmp_path)
    made.progress.request()
    for _ in range(3):
        made.train(8)
    # One of the three steps was thrown away, as only the answer says.
    made.progress.answered(TrainResult(samples=16, tokens=500, discarded=8))
    made.progress.request()
    made.train(8)
    made.finish()
    words = "epoch 0 with 32 rows of it, 24 rows in all"
    assert f"kept {words}, in checkpoint-000001" in caplog.messages

    again = a_miner(tmp_path)
    assert again.progress.resume()
    assert f"resumed {words}, from checkpoint-000001" in caplog.messages
    assert again.swarm.rows == 32
    trained = again.progress.trained
    assert (trained.requests, trained.rows, trained.tokens) == (1, 24, 500)
    again.finish()
    assert again.kept.newest is None  # nothing was trained: there is nothing to keep

    other = a_miner(tmp_path, run_id="r-9-2-3")
    assert not other.progress.resume()
    assert other.swarm.rows == 0


def test_a_state_that_does_not_fit_starts_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts = {"run_id": "r-1-2-3", "swarm": {"epoch": 1, "rows": 0}}
    trained = {"requests": 1, "rows": 2, "tokens": 3}
    for said in ({}, {"trained": trained}, {"trained": trained | {"rows": -1}}):
        Checkpoints(tmp_path).save(None, facts | said)
        made = a_miner(tmp_path)
        assert not made.progress.resume()
        assert made.progress.trained.rows == 0
    assert [line.partition(": ")[2].partition(";")[0] for line in caplog.messages] == [
        "it does not say what was trained",
        "it does not fit the model: x",
        "its counts are out of bounds",
    ]
    assert read_trained({"trained": trained}).tokens == 3


@pytest.mark.parametrize("error", [SwarmError("a step hangs"), RuntimeError("can't allocate")])
def test_a_snapshot_that_fails_does_not_stop_the_training(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    made = a_miner(tmp_path)
    made.swarm.fails = error
    made.at += 60
    made.train(8, epoch=True)
    made.train(8)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"no checkpoint was taken: {error}")
    made.swarm.fails = None
    made.at += 60
    made.train(8)
    assert settled(made) == "checkpoint-000001"


def test_the_last_snapshot_is_not_waited_for_for_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A process of hivemind's that was killed may hold the lock of the buffers."""
    made = a_miner(tmp_path)
    made.progress.last_seconds = 0.2
    made.train(8)
    released = threading.Event()

    def hang(**_: object) -> tuple[dict[str, Tensor], dict[str, Any]]:
        released.wait(30)
        return {}, {"epoch": 0, "rows": 0}

    made.swarm.state_dict = hang
    made.finish()
    (taking,) = (each for each in threading.enumerate() if each.name == "last-snapshot")
    released.set()
    taking.join(30)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("no checkpoint was taken at the end")
