"""The demo's trained model, and a text that it wrote before and after training."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hiveminer.config.run import Run
from hiveminer.errors import OperatorError
from hiveminer.validation.models import MODELS_FOLDER, name_of

PROMPT_CHARACTERS = 60


def evaluations(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics with a held-out loss: first that of the initial model."""
    return [line for line in lines if line["kind"] == "held_out" and line["loss"]]


def keep_model(state: Path, lines: Sequence[dict[str, Any]], out: Path) -> bool:
    """Move the validator's model that was evaluated last to `out`; returns whether there was one.

    state: the validator's folder. lines: the programs' metrics.
    """
    evaluated = evaluations(lines)
    if not evaluated:
        return False
    name = name_of(evaluated[-1]["epoch"])
    folder = next(state.glob(f"*/*/*/{MODELS_FOLDER}/{name}"), None)
    if folder is not None:
        shutil.rmtree(out, ignore_errors=True)
        folder.rename(out)
    return folder is not None


def samples(run: Run, model: Path) -> dict[str, str]:
    """`prompt`, and what the initial (`before`) and the trained model (`after`) wrote."""
    import torch

    from hiveminer.commands.evaluate import held_out_texts
    from hiveminer.commands.generate import continuation
    from hiveminer.training.data import load_rows
    from hiveminer.training.model import load_model, load_tokenizer

    prompt = prompt_of(held_out_texts(run, load_rows(run.data), rows=32))
    written = {"prompt": prompt}
    for name, place in (("before", run.model.name), ("after", str(model))):
        torch.manual_seed(0)
        with contextlib.suppress(OperatorError):
            written[name] = continuation(
                load_model(place, revision=run.model.revision if name == "before" else ""),
                load_tokenizer(place),
                prompt,
                tokens=120,
                temperature=0.7,
            )
    return written


def prompt_of(texts: Sequence[str]) -> str:
    """The beginning of the first row with enough text, cut at a space."""
    for text in texts:
        start = text.strip()
        if len(start) > 2 * PROMPT_CHARACTERS:
            cut = start[:PROMPT_CHARACTERS]
            return cut[: max(cut.rfind(" "), PROMPT_CHARACTERS // 2)]
    return next((text.strip()[:PROMPT_CHARACTERS] for text in texts if text.strip()), "The")
