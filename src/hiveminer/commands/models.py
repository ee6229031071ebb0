"""Finds the model that a command is to use: a folder, or what this machine's neurons have."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hiveminer.config.run import Run, load_run
from hiveminer.config.settings import Settings, UseSettings
from hiveminer.errors import OperatorError
from hiveminer.neuron import subnet_folder
from hiveminer.strategies.registry import checkpoint_weights
from hiveminer.training import model as models
from hiveminer.training.checkpoint import STATE_FOLDER, newest
from hiveminer.training.model_folder import set_weights


@dataclass(frozen=True)
class Found:
    """A model with trained weights, and where they come from.

    metadata: the checkpoint's; empty for a model folder.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    run: Run
    place: str
    metadata: dict[str, Any]


def find_model(settings: UseSettings) -> Found:
    """The model of `--model`, or of this machine's newest checkpoint. Raises OperatorError."""
    run = load_run(settings.neuron.run)
    if settings.model is None:
        return from_checkpoint(settings, run)
    name = str(settings.model.resolve())
    return Found(models.load_model(name), models.load_tokenizer(name), run, name, {})


def from_checkpoint(settings: Settings, run: Run) -> Found:
    """The run's model with the weights of the newest checkpoint on this machine, also while its
    neurons run. Raises OperatorError."""
    place = subnet_folder(settings)
    model = models.load_model(run.model.name, revision=run.model.revision)
    schema = models.schema_hash(model)
    refused: list[str] = []
    found = []
    for folder in sorted(place.glob(f"*/{STATE_FOLDER}")):
        checkpoint = newest(
            folder,
            accept=lambda metadata: _of_another_run(metadata, run, schema),
            refuse=refused.append,
        )
        if checkpoint is not None:
            found.append((folder, checkpoint))
    if not found:
        why = f" ({refused[0]})" if refused else ""
        raise OperatorError(
            f"there is no checkpoint of this run in {place}{why}; train first, name the run with "
            "--neuron.run, or export from the swarm with --source swarm"
        )
    folder, checkpoint = max(found, key=lambda each: written_at(each[1].metadata))
    for reason in refused:
        print(f"hiveminer: {reason}", file=sys.stderr)
    try:
        set_weights(model, checkpoint_weights(run, model, checkpoint.tensors))
    except ValueError as error:
        raise OperatorError(f"{folder / checkpoint.name}: {error}") from None
    tokenizer = models.load_tokenizer(run.model.name, revision=run.model.revision)
    return Found(model, tokenizer, run, str(folder / checkpoint.name), checkpoint.metadata)


def written_at(metadata: dict[str, Any]) -> float:
    """When a checkpoint was written, in seconds since 1970."""
    written = metadata.get("written_at")
    return written if isinstance(written, float | int) else 0.0


def _of_another_run(metadata: dict[str, Any], run: Run, schema: str) -> str | None:
    """Why a checkpoint is not of this run; does not read the data."""
    theirs = str(metadata.get("run_id", ""))[:200]
    ours = f"{run.name}-{run.hash[:12]}-{schema[:8]}"
    if theirs.startswith(f"{ours}-"):
        return None
    return f"it is of run {theirs}, and this is {ours}-..."
