"""`hiveminer export`: the trained model as a folder that transformers loads anywhere."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hiveminer.commands.evaluate import evaluated, held_out_texts
from hiveminer.commands.models import Found, from_checkpoint, written_at
from hiveminer.config.run import Run, RunId, load_run
from hiveminer.config.settings import ExportSettings
from hiveminer.errors import SwarmError
from hiveminer.neuron import Neuron
from hiveminer.runtime.metrics import progress_bar
from hiveminer.strategies.base import Context, GlobalState, Observer
from hiveminer.strategies.registry import open_observer
from hiveminer.training.data import load_rows
from hiveminer.training.evaluation import HELD_OUT_ROWS
from hiveminer.training.model import schema_hash
from hiveminer.training.model_folder import Origin, check_absent, save_model, set_weights
from hiveminer.training.task import load_task

FETCH_SECONDS = 180.0
"""Limit for getting the state from the swarm."""


def main(settings: ExportSettings) -> int:
    """Write the folder; returns the exit code."""
    check_absent(settings.out)
    run = load_run(settings.neuron.run)
    if settings.source == "disk":
        found = from_checkpoint(settings, run)
        trained: dict[str, Any] = found.metadata.get("trained") or {}
        swarm: dict[str, Any] = found.metadata.get("swarm") or {}
        epoch = int(swarm.get("epoch", 0))
        written = time.gmtime(written_at(found.metadata))
        source = f"a miner's checkpoint of {time.strftime('%Y-%m-%d %H:%M', written)} UTC"
        if swarm.get("counts") is False:
            source += " (its own weights: no miner's update has counted yet)"
    else:
        found, epoch = from_swarm(settings, run)
        trained, source = {}, "the swarm's global state"
    export(found, settings, epoch=epoch, trained=trained, source=source)
    print(f"{settings.out}: the model of epoch {epoch}, from {found.place}")
    print(f"To publish it: hf upload USER/NAME {settings.out}")
    return 0


def export(
    found: Found, settings: ExportSettings, *, epoch: int, trained: dict[str, Any], source: str
) -> None:
    """Evaluate the model, and write it with its card."""
    run = found.run
    dataset = load_rows(run.data)
    texts = held_out_texts(run, dataset, rows=HELD_OUT_ROWS)
    shown = settings.logging.bars
    measured = evaluated("evaluate", found.model, found.tokenizer, texts, run=run, shown=shown)
    run_id = RunId.of(run, schema_hash=schema_hash(found.model), data_hash=dataset.hash)
    origin = Origin(
        run=run,
        run_id=str(run_id),
        epoch=epoch,
        source=source,
        rows=trained.get("rows"),
        tokens=trained.get("tokens"),
        held_out_loss=None if measured is None else measured.loss,
        held_out_rows=len(texts),
    )
    with _growing(settings.out, found, settings):
        save_model(
            settings.out,
            model=found.model,
            tokenizer=found.tokenizer,
            origin=origin,
            dtype=settings.dtype,
        )


def from_swarm(settings: ExportSettings, run: Run) -> tuple[Found, int]:
    """The model with the swarm's global state, and its epoch.

    Joins as an observer with a registered hotkey, checks the state, and leaves. Raises
    OperatorError, ChainError or SwarmError.
    """
    with contextlib.ExitStack() as parts:
        neuron = Neuron(settings, role="observer")
        parts.callback(neuron.close)
        task = load_task(run, threads=neuron.threads)
        observer = open_observer(Context(neuron, task))
        parts.callback(observer.close)
        neuron.keep_in_sync(lambda: observer.sync(working=0))
        state = _fetched(observer, neuron)
    set_weights(task.model, state.weights)
    place = f"the swarm of run {task.run_id}"
    return Found(task.model, task.tokenizer, run, place, {}), state.epoch


def _fetched(observer: Observer, neuron: Neuron) -> GlobalState:
    deadline = time.monotonic() + FETCH_SECONDS
    while time.monotonic() < deadline:
        neuron.go_on()
        observer.check()
        if observer.peers:
            state = observer.fetch(timeout_seconds=deadline - time.monotonic())
            if state is not None:
                return state
        neuron.stopping.wait(1.0)
    raise SwarmError(
        f"no peer of the run gave a sound state in {FETCH_SECONDS:.0f} s; are miners of this "
        "run.toml running, and is this hotkey registered on their subnet?"
    )


@contextlib.contextmanager
def _growing(folder: Path, found: Found, settings: ExportSettings) -> Iterator[None]:
    """A progress bar that follows the size of the draft while it is written."""
    size = 2 if settings.dtype != "float32" else 4
    total = size * found.model.num_parameters()
    done = threading.Event()

    def follow(bar: tqdm[Any]) -> None:
        while not done.wait(0.1):
            drafts = folder.parent.glob(f".{folder.name}-*/*.safetensors")
            with contextlib.suppress(OSError):
                bar.update(min(total, sum(path.stat().st_size for path in drafts)) - bar.n)

    shown = settings.logging.bars
    with progress_bar(title="write", total=total, unit="B", shown=shown) as bar:
        follower = threading.Thread(target=follow, args=(bar,), daemon=True)
        follower.start()
        try:
            yield
        finally:
            done.set()
            follower.join()
