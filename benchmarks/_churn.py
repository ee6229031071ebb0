"""A miner of the churn benchmark: `python -m benchmarks._churn KIND INDEX LIFE FOLDER PORT`.

KIND `ours` is what `miner.py` builds, without a chain and an axon: `Identity`, `Peer`,
`HivemindStrategy`, `Progress` with its checkpoints, and `Trainer`; each batch is a request.
KIND `stock` is the same trainer around `hivemind.Optimizer` with its defaults.

A batch takes PACE_SECONDS of wall time, from the end of the step before: it is computed, and
the rest is slept, before the optimizer's step is called. So four miners fit two cores, and
what the swarm costs comes on top of the pace as it would on top of computing.

It writes FOLDER/INDEX.LIFE.jsonl, a line for each thing that happened, with `time.time()`;
FOLDER/INDEX.address, where others find it; and after each averaging in a group the weights,
FOLDER/weights.EPOCH.SIZE.INDEX.npy. A line on its standard input ends it; so does its end.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import torch
from bittensor.keyfiles import Keypair
from torch import nn

from benchmarks._processes import cpu_seconds, family_of
from hiveminer.config.run import Run
from hiveminer.config.settings import NeuronSettings
from hiveminer.strategies.base import RoundResult
from hiveminer.strategies.checkpointer import Progress
from hiveminer.strategies.hivemind.strategy import HivemindStrategy
from hiveminer.swarm.identity import Identity
from hiveminer.swarm.membership import Membership
from hiveminer.swarm.peer import Peer
from hiveminer.training.checkpoint import Checkpoints, of_run
from hiveminer.training.data import builtin_rows
from hiveminer.training.model import builtin_model, builtin_tokenizer, encode
from hiveminer.training.optimizer import build_optimizer, parameter_groups
from hiveminer.training.trainer import Trainer, TrainResult

MINERS = 4
ROWS = 8
SEQUENCE = 64
PACE_SECONDS = 1.0
EPOCH_SECONDS = 12
EPOCH_ROWS = int(MINERS * ROWS * EPOCH_SECONDS / PACE_SECONDS)

CHECKPOINT_SECONDS = float(NeuronSettings().checkpoint_seconds)
"""The default of a miner."""

RUN = Run.model_validate(
    {
        "name": "churn",
        "model": {"sequence_length": SEQUENCE},
        "swarm": {"epoch_samples": EPOCH_ROWS},
    }
)
RUN_ID = "churn-a-b-c"


class Log:
    """Lines of JSON, each written whole: this process is killed at any moment."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)
        self.number = 0
        """The step that is under way, or the last one."""

    def tell(self, event: str, **facts: Any) -> None:
        line = {"event": event, "time": time.time(), "number": self.number} | facts
        os.write(self._file, (json.dumps(line) + "\n").encode())


class Optimizer(Protocol):
    """What differs between the kinds."""

    @property
    def epoch(self) -> int: ...
    def step(self, *, batch_size: int) -> bool: ...
    def zero_grad(self) -> None: ...
    def request(self) -> None: ...
    def answered(self, result: TrainResult) -> None: ...
    def interrupt(self) -> None: ...
    def close(self) -> None: ...


class Paced:
    """A `trainer.Step` that lets no batch be faster than the pace."""

    def __init__(self, optimizer: Optimizer, *, stopping: threading.Event):
        self.optimizer = optimizer
        self.stopping = stopping
        self.due = time.monotonic() + PACE_SECONDS

    def step(self, *, batch_size: int) -> bool:
        if self.stopping.wait(max(0.0, self.due - time.monotonic())):
            return False
        kept = self.optimizer.step(batch_size=batch_size)
        self.due = time.monotonic() + PACE_SECONDS
        return kept

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


class Weights:
    """Writes a model's weights after an averaging, as one float32 vector."""

    def __init__(self, model: nn.Module, *, folder: Path, index: int):
        self.model, self.folder, self.index = model, folder, index

    def keep(self, *, epoch: int, size: int) -> None:
        vector = torch.nn.utils.parameters_to_vector(self.model.parameters()).detach().numpy()
        draft = self.folder / f".{self.index}.npy"
        np.save(draft, vector)
        draft.rename(self.folder / f"weights.{epoch}.{size}.{self.index}.npy")

    def mark(self) -> torch.Tensor:
        """A few of them, to see whether they were replaced."""
        return next(self.model.parameters()).detach().flatten()[:512].clone()


def watch_loads(averager: Any, weights: Weights, log: Log) -> None:
    """Say of each download of a state whether it replaced the weights."""
    load = averager.load_state_from_peers

    def watched(*args: Any, **kwargs: Any) -> Any:
        before, began = weights.mark(), time.time()
        loaded = load(*args, **kwargs)
        changed = not torch.equal(before, weights.mark())
        log.tell("load", began=began, changed=changed, epoch=averager.local_epoch)
        return loaded

    averager.load_state_from_peers = watched


class Ours:
    """What a miner builds of the swarm: an identity, a peer, checkpoints, the optimizer."""

    def __init__(
        self, model: nn.Module, *, index: int, folder: Path, port: int, weights: Weights, log: Log
    ):
        self._log, self._weights = log, weights
        self._progress: Progress | None = None
        key = hotkey(index)
        self.peer = Peer(
            port=port,
            identity=Identity(key, run_id=RUN_ID, key_path=folder / f"{index}.key"),
            admitted=[hotkey(number).ss58_address for number in range(MINERS)],
        )
        publish(folder, index, self.peer.address)
        membership = Membership(self.peer)
        self.swarm = HivemindStrategy(
            model, membership=membership, run=RUN, run_id=RUN_ID, on_round=self._on_round
        )
        watch_loads(self.swarm.optimizer.state_averager, weights, log)
        checkpoints = Checkpoints(folder / f"{index}.checkpoints")
        found = checkpoints.load(of_run(RUN_ID))
        self._progress = Progress(
            self.swarm, checkpoints, run_id=RUN_ID, every_seconds=CHECKPOINT_SECONDS
        )
        if self._progress.resume() and found is not None:
            log.tell("resume", epoch=self.swarm.epoch, written_at=found.metadata["written_at"])
        self._discovery, self._folder = membership.discovery, folder
        self._discovery.meet(addresses(folder))
        threading.Thread(target=self._keep_meeting, daemon=True).start()

    @property
    def epoch(self) -> int:
        return self.swarm.epoch

    def step(self, *, batch_size: int) -> bool:
        return self.swarm.step(batch_size=batch_size)

    def zero_grad(self) -> None:
        self.swarm.zero_grad()

    def request(self) -> None:
        assert self._progress is not None
        self.swarm.catch_up()
        self._progress.request()

    def answered(self, result: TrainResult) -> None:
        assert self._progress is not None
        self._progress.answered(result)

    def interrupt(self) -> None:
        self.swarm.interrupt()

    def close(self) -> None:
        assert self._progress is not None
        self._progress.keep_last()
        self.swarm.close()
        self._progress.close()

    def _on_round(self, ended: RoundResult) -> None:
        if self._progress is not None:
            self._progress.epoch_began()
        number = self._log.number
        self._log.tell("round", epoch=ended.epoch, size=ended.group_size, through=number)
        if ended.group_size > 1:
            self._weights.keep(epoch=ended.epoch, size=ended.group_size)

    def _keep_meeting(self) -> None:
        """As a miner does with the addresses on the chain."""
        while True:
            time.sleep(1.0)
            self._discovery.meet(addresses(self._folder))


def hotkey(index: int) -> Any:
    """A throwaway one, the same for each life of a miner."""
    return Keypair.create_from_uri(f"//churn-{index}")


class Stock:
    """`hivemind.Optimizer` with its defaults: local updates, the run id, the epoch's rows."""

    def __init__(self, model: nn.Module, *, index: int, folder: Path, weights: Weights, log: Log):
        import hivemind

        self._log, self._weights = log, weights
        self._loads = 0
        self._through = 0
        self._rounds: list[Any] = []
        self._watch_rounds(hivemind.averaging.DecentralizedAverager)
        self.dht = hivemind.DHT(
            initial_peers=addresses(folder) or None, start=True, startup_timeout=30
        )
        publish(folder, index, str(self.dht.get_visible_maddrs()[0]))
        groups = parameter_groups(model.parameters(), weight_decay=RUN.optimizer.weight_decay)
        self.optimizer = hivemind.Optimizer(
            dht=self.dht,
            run_id=RUN_ID,
            target_batch_size=EPOCH_ROWS,
            optimizer=build_optimizer(groups, RUN.optimizer),
            use_local_updates=True,
        )
        self._watch(self.optimizer.state_averager)

    @property
    def epoch(self) -> int:
        return int(self.optimizer.local_epoch)

    def step(self, *, batch_size: int) -> bool:
        loads = self._loads
        self.optimizer.step(batch_size=batch_size)
        return self._loads == loads

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def request(self) -> None:
        """It loads the state within its first step."""

    def answered(self, result: TrainResult) -> None:
        """It keeps nothing."""

    def interrupt(self) -> None:
        for control in self._rounds:
            if not control.done():
                control.cancel()

    def close(self) -> None:
        self.optimizer.shutdown()
        self.dht.shutdown()

    def _watch_rounds(self, base: Any) -> None:
        """Remember each round's control, which knows the group at its end."""
        step, rounds = base.step, self._rounds

        def watched(averager: Any, *args: Any, **kwargs: Any) -> Any:
            control = step(averager, *args, **kwargs)
            rounds.append(control)
            return control

        base.step = watched

    def _watch(self, averager: Any) -> None:
        """Look on where weights enter a round, where its result is applied, and at loads."""
        enter, apply = (
            averager._load_local_tensors_into_averager_,
            averager._apply_averaging_results_,
        )
        optimizer, load = self.optimizer, self.optimizer.load_state_from_peers

        def entered() -> None:
            self._through = self._log.number
            enter()

        def applied() -> None:
            apply()
            done = [control for control in self._rounds if control.done()]
            size = max((group_size(control) for control in done), default=1)
            self._rounds[:] = [control for control in self._rounds if not control.done()]
            self._log.tell("round", epoch=self.epoch, size=size, through=self._through)
            if size > 1:
                self._weights.keep(epoch=self.epoch, size=size)

        def loaded(**kwargs: Any) -> None:
            self._loads += 1
            load(**kwargs)

        averager._load_local_tensors_into_averager_ = entered
        averager._apply_averaging_results_ = applied
        optimizer.load_state_from_peers = loaded
        watch_loads(averager, self._weights, self._log)


def group_size(control: Any) -> int:
    """Peers in the group of a round that is done; 1 when it failed."""
    if control.cancelled() or control.exception() is not None:
        return 1
    return len(control.result() or ()) or 1


def publish(folder: Path, index: int, address: str) -> None:
    draft = folder / f".{index}.address"
    draft.write_text(address)
    draft.rename(folder / f"{index}.address")


def addresses(folder: Path) -> list[str]:
    found = []
    for path in sorted(folder.glob("[0-9].address")):
        try:
            found.append(path.read_text())
        except FileNotFoundError:  # its miner was killed in this moment
            continue
    return found


def end_with_standard_input(stop: Callable[[], None]) -> None:
    if not sys.stdin.readline():  # who started us is gone
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(1)
    stop()


def main(kind: str, index: int, life: int, folder: Path, port: int) -> None:
    log = Log(folder / f"{index}.{life}.jsonl")
    log.tell("start")
    torch.set_num_threads(1)
    model, tokenizer, rows = builtin_model(), builtin_tokenizer(), builtin_rows()
    weights = Weights(model, folder=folder, index=index)
    stopping = threading.Event()
    optimizer: Optimizer
    if kind == "ours":
        optimizer = Ours(model, index=index, folder=folder, port=port, weights=weights, log=log)
    else:
        optimizer = Stock(model, index=index, folder=folder, weights=weights, log=log)

    def stop() -> None:
        stopping.set()
        optimizer.interrupt()

    threading.Thread(target=end_with_standard_input, args=(stop,), daemon=True).start()
    trainer = Trainer(
        model,
        encode=lambda texts: dict(encode(tokenizer, texts, max_length=SEQUENCE)),
        optimizer=Paced(optimizer, stopping=stopping),
    )
    optimizer.request()
    log.tell("ready", epoch=optimizer.epoch, cpu_seconds=cpu_seconds(family_of(os.getpid())))
    at = 5000 * index + 1000 * life
    while not stopping.is_set():
        optimizer.request()
        log.number += 1
        began = time.time()
        batch = rows.texts([row % len(rows) for row in range(at, at + ROWS)])
        at += ROWS
        before = optimizer.epoch
        result = trainer.train(batch, batch_size=ROWS, stopped=stopping.is_set)
        if stopping.is_set():
            break
        optimizer.answered(result)
        log.tell(
            "step",
            began=began,
            epoch=before,
            kept=result.steps == 1,
            rows=result.samples,
            tokens=result.tokens,
        )
    optimizer.close()
    log.tell("end")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), int(sys.argv[5]))
