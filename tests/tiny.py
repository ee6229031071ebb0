"""Models and tokenizers that are made in a moment, and a machine without a network."""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from hiveminer.errors import OperatorError
from hiveminer.training.model import builtin_tokenizer

ARCHITECTURES = ("gpt2", "llama", "qwen2")

VOCABULARY = 32
END = 1
POSITIONS = 64


def tiny_model(
    architecture: str, *, vocabulary: int = VOCABULARY, layers: int = 2
) -> PreTrainedModel:
    """The same numbers each time, large enough that tokens differ in loss."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=END,
        eos_token_id=END,
    )
    auto: Any = AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config)
    return model


def tiny_tokenizer(
    *, pad_token: str | None = None, padding_side: str = "right"
) -> PreTrainedTokenizerFast:
    """Words `w2` to `w31` are the tokens 2 to 31; each row ends with `<end>`, token 1."""
    words = {"<unknown>": 0, "<end>": END} | {f"w{n}": n for n in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        unk_token="<unknown>",
        pad_token=pad_token,
        padding_side=padding_side,
    )


def save_tiny(architecture: str, folder: Path) -> PreTrainedModel:
    """A model and a tokenizer of bytes, as `save_pretrained` writes them."""
    # Of bytes, since transformers takes any Qwen2 folder's tokenizer for a byte-level one.
    tokenizer = builtin_tokenizer()
    model = tiny_model(architecture, vocabulary=len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def cut_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is not asked, and a test that looks up any host all the same fails."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"the network was asked: {args}")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Read once, when the package is imported; another test may have been first.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@contextlib.contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    """Writing more fails in the middle, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def one_line(error: pytest.ExceptionInfo[OperatorError]) -> str:
    """The words of an error that an operator reads: one line, and not a long one."""
    words = str(error.value)
    assert "\n" not in words
    assert len(words) < 500
    return words
