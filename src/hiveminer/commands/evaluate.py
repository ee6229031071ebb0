"""`hiveminer evaluate`: the trained and the initial model on held-out rows."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hiveminer.commands.models import find_model
from hiveminer.config.run import Run
from hiveminer.config.settings import EvaluateSettings
from hiveminer.errors import OperatorError
from hiveminer.runtime.metrics import progress_bar
from hiveminer.training.data import Rows, load_rows, split_held_out
from hiveminer.training.evaluation import Evaluation, evaluate
from hiveminer.training.model import choose_device, load_model, load_tokenizer
from hiveminer.training.model_checks import check_fit


def main(settings: EvaluateSettings, *, as_json_text: bool = False) -> int:
    """Print loss, perplexity and bits per byte of the trained and the run's initial model."""
    found = find_model(settings)
    run = found.run
    texts = held_out_texts(run, load_rows(run.data), rows=settings.rows)
    if not texts:
        raise OperatorError(
            "the run holds out no rows: set data.held_out in run.toml to evaluate on some"
        )
    models = {
        "trained": (found.model, found.tokenizer),
        "start": (
            load_model(run.model.name, revision=run.model.revision),
            load_tokenizer(run.model.name, revision=run.model.revision),
        ),
    }
    results = {}
    for name, (model, tokenizer) in models.items():
        check_fit(model, tokenizer, run.model.sequence_length)
        model.to(choose_device(settings.neuron.device))  # type: ignore[arg-type]
        shown = settings.logging.bars
        result = evaluated(f"evaluate {name}", model, tokenizer, texts, run=run, shown=shown)
        if result is None:
            raise OperatorError("the held-out rows have no text to predict")
        results[name] = result
    if as_json_text:
        figures = {
            name: asdict(each)
            | {"perplexity": each.perplexity, "bits_per_byte": each.bits_per_byte}
            for name, each in results.items()
        }
        print(json.dumps({"model": found.place} | figures))
    else:
        print(f"hiveminer: {found.place}", file=sys.stderr)
        _print(results)
    return 0


def held_out_texts(run: Run, dataset: Rows, *, rows: int) -> list[str]:
    """The first `rows` of the run's held-out rows."""
    _, held_out = split_held_out(len(dataset), run.data.held_out)
    return dataset.texts(list(held_out)[:rows])


def evaluated(
    title: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    run: Run,
    shown: bool,
) -> Evaluation | None:
    """Evaluate with a progress bar; None when there is nothing to predict."""
    length = run.model.sequence_length
    with progress_bar(title=title, total=len(texts), unit="row", shown=shown) as bar:
        return evaluate(model, tokenizer, texts, sequence_length=length, on_rows=bar.update)


def _print(results: dict[str, Evaluation]) -> None:
    table = Table(title="held-out rows", title_justify="left")
    for heading in ("", "rows", "loss per token", "perplexity", "bits per byte"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, result in results.items():
        table.add_row(
            name,
            str(result.rows),
            f"{result.loss:.4f}",
            f"{result.perplexity:,.2f}",
            f"{result.bits_per_byte:.4f}",
        )
    Console().print(table)
