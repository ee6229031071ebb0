"""Saves a trained model as a folder for transformers: weights, tokenizer and a model card.

The folder is written under another name and renamed, so that it is complete or absent.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hiveminer.__version__ import __version__
from hiveminer.config.run import BUILTIN, Run, is_local
from hiveminer.config.run_file import to_toml
from hiveminer.errors import OperatorError
from hiveminer.runtime.files import sync
from hiveminer.training.model import weights_hash

CARD, RUN_FILE, FACTS = "README.md", "run.toml", "hiveminer.json"

LIBRARIES = ("torch", "transformers", "hivemind", "bittensor")


@dataclass(frozen=True)
class Origin:
    """Where a model comes from, for its card.

    epoch: the epoch (or round) of the weights. rows, tokens: trained in all, None if unknown.
    held_out_loss: nats per token on `held_out_rows` rows. source: of the weights, in words.
    """

    run: Run
    run_id: str
    epoch: int
    source: str
    rows: int | None = None
    tokens: int | None = None
    held_out_loss: float | None = None
    held_out_rows: int = 0


def set_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Copy weights by name into a model; tied ones are given once. Raises ValueError, and changes
    nothing, when a name or a shape differs."""
    places = dict(model.named_parameters())
    for name in sorted({*places, *weights}):
        theirs = weights.get(name)
        if name not in places or theirs is None or theirs.shape != places[name].shape:
            raise ValueError(f"the weights do not fit the model: {name}")
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(weights[name])


def check_absent(folder: Path) -> None:
    """Raise OperatorError if the path exists."""
    if os.path.lexists(folder):
        raise OperatorError(f"{folder} exists already; choose another folder, or remove it")


def save_model(
    folder: Path,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    origin: Origin,
    dtype: str = "float32",
    replace: bool = False,
) -> None:
    """Write a model folder for `from_pretrained`.

    dtype: of the stored weights; the model itself is cast to it. replace: replace an existing
    folder. Raises OperatorError when the folder exists or cannot be written.
    """
    if not replace:
        check_absent(folder)
    facts = _facts(model, origin, dtype)
    model.to(getattr(torch, dtype))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True
        ) as beside:
            draft = Path(beside, "new")
            draft.mkdir()
            _write(draft, model, tokenizer, facts, origin)
            if replace and folder.exists():
                folder.rename(Path(beside, "old"))
            draft.rename(folder)
            sync(folder.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OperatorError(
            f"{folder} cannot be written: {reason}; choose another folder"
        ) from None


def read_facts(folder: Path) -> dict[str, Any]:
    """The card's metadata; empty for a folder that was not written by `save_model`."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _write(
    draft: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: dict[str, Any],
    origin: Origin,
) -> None:
    cached = model.config.use_cache
    model.config.use_cache = True  # off for training, on for those who generate
    try:
        model.save_pretrained(draft)
    finally:
        model.config.use_cache = cached
    tokenizer.save_pretrained(draft)
    (draft / RUN_FILE).write_text(to_toml(origin.run), encoding="utf-8")
    (draft / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (draft / CARD).write_text(card(facts, origin.run), encoding="utf-8")
    for path in draft.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read
        sync(path)
    sync(draft)


# --- the card ---------------------------------------------------------------------------------


def _facts(model: PreTrainedModel, origin: Origin, dtype: str) -> dict[str, Any]:
    said = asdict(origin)
    del said["run"]
    return said | {
        "weights_sha256": weights_hash(model),
        "dtype": dtype,
        "base_model": base_model(origin.run),
        "license": license_of(origin.run),
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"hiveminer": __version__} | {name: version(name) for name in LIBRARIES},
    }


def base_model(run: Run) -> str:
    """The name of the run's initial model; of a local folder only its own name."""
    name = run.model.name
    if name == BUILTIN:
        return "built into hiveminer"
    return Path(name).expanduser().name if is_local(name) else name


def license_of(run: Run) -> str | None:
    """The license that a local base model's card names."""
    name = run.model.name
    if name == BUILTIN or not is_local(name):
        return None
    try:
        card = (Path(name).expanduser() / CARD).read_text(encoding="utf-8")
        start, front, _ = card.split("---\n", 2)
    except (OSError, ValueError):  # no card, not UTF-8, or without a front matter
        return None
    found = re.search(r"""^license: *["']?([^\s"'].*?)["']?\s*$""", front, re.MULTILINE)
    return found[1] if found and not start else None


def card(facts: Mapping[str, Any], run: Run) -> str:
    """The model card, in Markdown with the front matter that the hub reads."""
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if facts["license"]:
        front.append(f"license: {facts['license']}")
    if not is_local(run.model.name) and run.model.name != BUILTIN:
        front.append(f"base_model: {run.model.name}")
    front += ["tags:", "- hiveminer", "- bittensor", "- hivemind", "---"]
    data = "local files" if is_local(run.data.name) else run.data.name
    if run.data.name == BUILTIN:
        data = "the Python standard library's source"
    loss = "not measured"
    if facts["held_out_loss"] is not None:
        loss = f"{facts['held_out_loss']:.4f} nats per token, on {facts['held_out_rows']} rows"
    rows = [
        ("run id", f"`{facts['run_id']}`"),
        ("epoch", facts["epoch"]),
        ("weights", facts["source"]),
        ("SHA-256 of the weights in float32", f"`{facts['weights_sha256']}`"),
        ("stored as", facts["dtype"]),
        ("rows trained", _known(facts["rows"])),
        ("tokens trained", _known(facts["tokens"])),
        ("held-out loss", loss),
        ("base model", facts["base_model"]),
        ("license of the base model", facts["license"] or "not known"),
        ("data", data),
        ("date", facts["written_at"]),
        ("versions", ", ".join(f"{name} {each}" for name, each in facts["versions"].items())),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        "\n".join(front)
        + f"\n\n# {run.name}\n\nA causal language model, trained by several miners together "
        "with Hiveminer."
        f"\n\n| | |\n|---|---|\n{table}\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```\n\n'
        "## The run\n\n```toml\n" + to_toml(run) + "```\n"
    )


def _known(count: int | None) -> str:
    return "not known" if count is None else f"{count:,}"
