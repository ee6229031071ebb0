"""The models that a validator keeps: the newest and the best by held-out loss, as folders."""

from __future__ import annotations

import logging
import math
import re
import shutil
from pathlib import Path

from transformers import PreTrainedModel

from hiveminer.errors import OperatorError
from hiveminer.training.model_folder import Origin, read_facts, save_model
from hiveminer.training.task import Task

logger = logging.getLogger(__name__)

MODELS_FOLDER = "models"
"""In the neuron's folder; contains folders such as `epoch-000012`."""

_NAME = re.compile(r"epoch-\d{6,}")


class KeptModels:
    """Writes a model folder for each evaluated state, and removes all but the newest and best.

    keep: how many of the newest, besides the best by held-out loss; 0 keeps none. A full disk is
    logged, and never ends the validation.
    """

    def __init__(self, folder: Path, *, task: Task, keep: int):
        self.folder = folder
        self.task = task
        self.keep = keep

    def save(self, model: PreTrainedModel, *, epoch: int, loss: float | None, rows: int) -> None:
        """Keep a model of an epoch. loss: held-out, in nats per token, on `rows` rows."""
        if not self.keep:
            return
        origin = Origin(
            run=self.task.run,
            run_id=str(self.task.run_id),
            epoch=epoch,
            source="the global state that a validator downloaded",
            held_out_loss=loss,
            held_out_rows=rows,
        )
        place = self.folder / name_of(epoch)
        try:
            save_model(
                place, model=model, tokenizer=self.task.tokenizer, origin=origin, replace=True
            )
        except OperatorError as error:
            logger.warning("the model of epoch %d is not kept: %s", epoch, error)
            return
        models = sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))
        best = min(models, key=_loss)
        for path in models[: -self.keep]:
            if path != best:
                shutil.rmtree(path, ignore_errors=True)


def name_of(epoch: int) -> str:
    return f"epoch-{epoch:06d}"


def _loss(path: Path) -> float:
    loss = read_facts(path).get("held_out_loss")
    return loss if isinstance(loss, float) else math.inf
