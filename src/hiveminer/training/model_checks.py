"""Checks that a model can be trained with others, and refuses it otherwise. The caller names it.

Machines average weights, and replays compare losses: so all weights must come from the model's
files, each pass must give the same loss, and no token may depend on a later one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hiveminer.errors import OperatorError, first_line
from hiveminer.training.readers import LFS_POINTER

logger = logging.getLogger(__name__)

NOISE = re.compile(r"drop|jitter|noise")
"""Found in the names of settings for noise."""

PROBE_TOKENS = 16
TOLERANCE = 1e-5
"""Relative to the largest output, for passes that should agree."""

FLOATING = frozenset({"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"})
"""Types of weights, as safetensors and PyTorch write them."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip

SHOWN = 3


# Before loading ----------------------------------------------------------------------------


def check_folder(folder: Path, *, what: str) -> None:
    """Refuse a local folder without what transformers needs. what: `model` or `tokenizer`."""
    if folder.is_file():
        raise OperatorError("a file; give the folder that it is in")
    if not folder.is_dir():
        raise OperatorError(
            "no such folder; give 'builtin', a folder written by save_pretrained, or a hub name"
        )
    if (folder / "adapter_config.json").exists():
        raise OperatorError(
            "an adapter without its base model; merge the two "
            "(merge_and_unload) and save_pretrained the result"
        )
    if not (folder / "config.json").is_file():
        raise OperatorError("the folder holds no config.json; save_pretrained it")
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise OperatorError(
                    f"{path.name} is a Git LFS pointer, not the file itself; run "
                    "git lfs pull in the folder"
                )
    if what == "tokenizer" and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise OperatorError("the folder holds no tokenizer; save_pretrained it there as well")


def check_dtypes(folder: Path) -> None:
    """Refuse weights that are not floating-point numbers."""
    paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    for path in paths:
        for key, kind in _dtypes(path).items():
            if kind not in FLOATING and key.endswith((".weight", ".bias")):
                raise OperatorError(
                    f"{key} in {path.name} is {kind}; give the model in a floating-point format"
                )


def _dtypes(path: Path) -> dict[str, str]:
    """The types of a file's weights, which are not read themselves."""
    if path.suffix == ".bin":
        weights = torch.load(path, map_location="meta", weights_only=True)
        return {key: str(each.dtype).removeprefix("torch.") for key, each in weights.items()}
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise OperatorError(
            f"{path.name} cannot be read ({str(error)[:200]}); download it again"
        ) from None


# Noise -------------------------------------------------------------------------------------


def configure_without_noise(config: PreTrainedConfig) -> None:
    """Set every dropout, jitter and noise of a configuration to zero, in place."""
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            configure_without_noise(value)
        elif isinstance(value, float) and NOISE.search(key):
            setattr(config, key, 0.0)


def without_noise(model: nn.Module) -> None:
    """Turn off all dropout, jitter and noise, in place: replays need equal losses, and a row that
    is trained once is not overfitted."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for key, value in list(vars(module).items()):
            if isinstance(value, float) and NOISE.search(key):
                setattr(module, key, 0.0)


# After loading -----------------------------------------------------------------------------


def check_weights(model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    """Refuse a model whose weights are not those of its files.

    info: transformers' `output_loading_info`.
    """
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        key, there, here = mismatched[0]
        raise OperatorError(
            f"{key} is {list(there)} in its weights and {list(here)} by its config.json; the two "
            f"do not belong together ({len(mismatched)} such)",
        )
    if info["missing_keys"]:
        raise OperatorError(
            f"its weights lack {_listed(info['missing_keys'])}; each machine would fill these at "
            "random: give a complete causal language model",
        )
    unused = sorted(info["unexpected_keys"])
    kinds = {_kind(key) for key in model.state_dict()}
    if more := [key for key in unused if _kind(key) in kinds]:
        raise OperatorError(
            f"its weights hold {_listed(more)}, for which its config.json has no place: it has "
            "more layers than config.json says",
        )
    # Those that have weights of their own, by their names without numbers.
    layers = tuple(kind.rpartition(".")[0] + "." for kind in kinds)
    if parts := [key for key in unused if _kind(key).startswith(layers)]:
        raise OperatorError(
            f"its weights hold {_listed(parts)}, which the model of its config.json does not "
            "compute with; merge adapters, or give the config.json that belongs to the weights",
        )
    if unused:
        place = model.name_or_path
        logger.warning("model %s: weights that it does not have: %s", place, _listed(unused))
    for key, value in model.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise OperatorError(f"{key} holds numbers that are not finite")


def _listed(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    more = len(keys) - SHOWN
    return ", ".join(keys[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _kind(key: str) -> str:
    """A parameter's name without the numbers of layers."""
    return re.sub(r"\d+", "N", key)


def check_passes(model: PreTrainedModel) -> None:
    """Refuse a model that computes with noise, or whose tokens depend on later ones."""
    positions = getattr(model.config, "max_position_embeddings", None) or PROBE_TOKENS
    vocabulary = vocabulary_size(model)
    ids = torch.arange(3, 3 + 7 * min(PROBE_TOKENS, positions), 7) % vocabulary
    other = ids.clone()
    other[-1] = (other[-1] + vocabulary // 2) % vocabulary
    try:
        with torch.no_grad():
            model.train()
            first, *more = (_logits(model, ids) for _ in range(3))
            model.train(False)
            evaluated, changed = _logits(model, ids), _logits(model, other)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise OperatorError(f"it cannot compute a row: {first_line(error)}") from error
    finally:
        model.train()
    if not bool(torch.isfinite(first).all()):
        raise OperatorError("what it computes is not finite")
    if not all(torch.equal(first, again) for again in more):
        raise OperatorError(
            "two passes over the same row differ: it computes with dropout or another noise that "
            "cannot be turned off",
        )
    if not _close(first, evaluated):
        raise OperatorError("it computes differently in training and in evaluation")
    if not _close(evaluated[:-1], changed[:-1]):
        raise OperatorError(
            "it is not causal: changing the last token changes what it predicts before it; give a "
            "decoder",
        )


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids[None]).logits[0]
    return logits.float()


def _close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= TOLERANCE * one.abs().max())


def vocabulary_size(model: PreTrainedModel) -> int:
    """The number of tokens that have an embedding."""
    embeddings: Any = model.get_input_embeddings()
    return len(embeddings.weight)


def check_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Refuse a tokenizer or a sequence length that is too large for the model."""
    vocabulary = vocabulary_size(model)
    tokens = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))
    if tokens > vocabulary:
        raise OperatorError(
            f"the tokenizer has {tokens} tokens and the model a place for {vocabulary}; "
            "give the tokenizer that belongs to the model"
        )
    check_length(model.config, max_length)


def check_length(config: PreTrainedConfig, max_length: int) -> None:
    """Refuse a sequence length that is too large for the model."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise OperatorError(
            f"model.sequence_length is {max_length}, the model's longest is {positions}; lower it "
            "in run.toml"
        )
