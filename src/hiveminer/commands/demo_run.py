"""The demo's run: the built-in one, or one of the user's text, model and run.toml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hiveminer.config.run import BUILTIN, Run, SparselocoSection, is_local, load_run, run_from_table
from hiveminer.config.settings import DemoSettings, WorkSettings
from hiveminer.errors import OperatorError

FEWEST_ROWS = 4
"""Less cannot be split into rows to train and held-out rows."""

HELD_OUT_ROWS = 8
"""Held-out rows of small data, but at most a quarter of it."""

TRAINED_SHARE = 0.1
"""Learning rate of a trained model, as a share of the rate for training from scratch."""

SPARSELOCO: dict[str, Any] = {
    "round_blocks": 18,
    "mark_blocks": 7,
    "cut_blocks": 7,
    "density": 1.0,
    "bits": 2,
    "rho": 0.95,
    "contributor_power": 1.0,
}
"""[sparseloco] for one machine: bytes between its processes are free, so updates are dense, and a
slow step has time for its cut."""

BLOCK_SECONDS = 0.6
"""Of the embedded network under strategy `sparseloco`, so that rounds are short."""


@dataclass(frozen=True)
class DemoRun:
    """The run, and the rows that the validator sends per request."""

    run: Run
    request_rows: int = WorkSettings().rows

    @property
    def has_rounds(self) -> bool:
        """Whether the miners' updates are counted in rounds on the chain."""
        return self.run.strategy == "sparseloco"


def demo_run(settings: DemoSettings) -> DemoRun:
    """The run for these settings. Raises OperatorError for unusable data or models."""
    table = load_run(settings.run).model_dump()
    table["strategy"] = settings.strategy or table["strategy"]
    if (
        table["strategy"] == "sparseloco"
        and table["sparseloco"] == SparselocoSection().model_dump()
    ):
        table["sparseloco"] = SPARSELOCO
    if settings.data is None and settings.model is None and settings.run is None:
        return DemoRun(run_from_table(table, source="hiveminer demo"))
    if settings.data is not None:
        column = table["data"]["column"]
        name = _absolute(settings.data)
        table["data"] = {"name": name, "column": column, "split": _split(name)}
    if settings.model is not None:
        table["model"] = {"name": _absolute(settings.model)}
        table |= _fitted(table, keep_rate=settings.run is not None)
    return _with_rows(run_from_table(table, source="hiveminer demo"))


def _split(name: str) -> str:
    """Every file of a folder if its names do not form splits: "test ideas.md" is a note."""
    from hiveminer.training.readers import EVERY_SPLIT, find_files

    if is_local(name):
        try:
            find_files(Path(name), split="train")
        except OperatorError:
            return EVERY_SPLIT
    return "train"


def _absolute(name: str) -> str:
    return str(Path(name).expanduser().resolve()) if is_local(name) else name


def _fitted(table: dict[str, Any], *, keep_rate: bool) -> dict[str, Any]:
    """Sequence length and learning rate for the user's model."""
    from hiveminer.training.model import shape_of_model
    from hiveminer.training.optimizer import usual_learning_rate

    model = shape_of_model(table["model"]["name"])
    positions = getattr(model.config, "max_position_embeddings", None) or 512
    section = {**table["model"], "sequence_length": min(512, positions)}
    if keep_rate or table["model"]["name"] == BUILTIN:
        return {"model": section}
    rate = TRAINED_SHARE * usual_learning_rate(model.num_parameters())
    optimizer = {**table["optimizer"], "learning_rate": float(f"{rate:.1e}")}
    return {"model": section, "optimizer": optimizer}


def _with_rows(run: Run) -> DemoRun:
    """The held-out share and the rows per request, adapted to small data."""
    from hiveminer.training.data import load_rows, split_held_out

    rows = load_rows(run.data)
    count = len(rows)
    if count < FEWEST_ROWS:
        raise OperatorError(
            f"data {run.data.name}: {count} row{'s' * (count != 1)} of text; a demo needs "
            f"{FEWEST_ROWS} at least: give it more text"
        )
    held_out = max(round(count * run.data.held_out), min(HELD_OUT_ROWS, count // 4))
    data = run.data.model_copy(update={"held_out": held_out / count, "hash": rows.hash})
    run = run.model_copy(update={"data": data})
    train, _ = split_held_out(count, data.held_out)
    return DemoRun(run, min(WorkSettings().rows, len(train), run.limits.rows))
