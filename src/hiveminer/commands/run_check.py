"""`hiveminer run check FILE`: reports what is wrong or unwise in a run.toml."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hiveminer.config.run import BUILTIN, Run, is_local, load_run
from hiveminer.config.settings import RunCheckSettings, WorkSettings
from hiveminer.errors import OperatorError, one_line
from hiveminer.training.data import load_rows, split_held_out
from hiveminer.training.memory import FLOAT32, memory_left
from hiveminer.training.model import shape_of_model
from hiveminer.training.model_checks import check_length
from hiveminer.training.optimizer import usual_learning_rate
from hiveminer.training.task import load_model


def main(settings: RunCheckSettings) -> int:
    """Print what is wrong or unwise; 0 when nothing is wrong."""
    run = load_run(settings.file)
    run.check_version()
    remarks = [*about_run(run)]
    wrong: list[str] = []
    with _listed(wrong):
        model = shape_of_model(run.model.name, revision=run.model.revision)
        parameters = model.num_parameters()
        remarks += about_learning_rate(run, parameters=parameters)
        check_length(model.config, run.model.sequence_length)
        if 2 * FLOAT32 * parameters < memory_left(torch.device("cpu")):
            load_model(run)
        else:
            remarks.append(f"model {run.model.name} is too large to check its weights here")
    with _listed(wrong):
        rows = load_rows(run.data)
        remarks += about_data(run, rows=len(rows), data_hash=rows.hash)
    for line in wrong:
        print(f"wrong: {line}")
    for line in remarks:
        print(f"unwise: {line}")
    if not wrong and not remarks:
        print(f"{settings.file}: no problems found")
    return 1 if wrong else 0


@contextmanager
def _listed(wrong: list[str]) -> Iterator[None]:
    try:
        yield
    except OperatorError as error:
        wrong.append(one_line(error))


def about_learning_rate(run: Run, *, parameters: int) -> Iterator[str]:
    """Remarks on a rate that is far from usual for this many parameters."""
    rate, usual = run.optimizer.learning_rate, usual_learning_rate(parameters)
    size = f"a model of {parameters / 1e6:,.1f} million parameters"
    if rate > 5 * usual:
        yield (
            f"optimizer.learning_rate {rate:g} is high: about {usual:.1e} is usual for {size}, "
            "and training may diverge"
        )
    elif rate < usual / 100:
        yield (
            f"optimizer.learning_rate {rate:g} is low: about {usual:.1e} is usual for {size} "
            "from scratch, and a tenth of that for one that is trained already"
        )


def about_run(run: Run) -> Iterator[str]:
    """Remarks on the epochs, and on keys that change nothing."""
    rows = WorkSettings().rows
    epoch = run.swarm.epoch_samples
    if epoch < rows:
        yield (
            f"swarm.epoch_samples {epoch} is less than the {rows} rows of a usual request: each "
            "request waits for several averaging rounds"
        )
    if run.limits.rows < rows:
        yield (
            f"limits.rows {run.limits.rows} is less than the {rows} rows that a validator asks "
            "for by default: its requests are refused, unless it sets --validator.rows"
        )
    data = run.data
    on_hub = data.name != BUILTIN and not is_local(data.name)
    for key, used in (("config", on_hub), ("revision", on_hub), ("rows", data.streaming)):
        if getattr(data, key) and not used:
            kind = "streaming source" if key == "rows" else "hub data set"
            yield f"data.{key} changes nothing here: it is for a {kind}"


def about_data(run: Run, *, rows: int, data_hash: str) -> Iterator[str]:
    """Remarks on the data and its held-out share."""
    train, held_out = split_held_out(rows, run.data.held_out)
    if not run.data.hash:
        yield (
            f'data.hash is empty: set it to "{data_hash}", so that a machine with other data '
            "refuses to start"
        )
    if not held_out:
        yield (
            f"data.held_out {run.data.held_out:g} of {rows} rows holds none out: nothing shows "
            "whether the model improves"
        )
    if len(train) < run.swarm.epoch_samples:
        yield (
            f"the data has {len(train)} rows to train on, and an epoch takes "
            f"{run.swarm.epoch_samples}: rows are repeated within each epoch"
        )
