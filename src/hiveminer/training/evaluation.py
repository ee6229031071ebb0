"""Measures a model on rows of text: loss, perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hiveminer.training.model import CHARACTERS_PER_TOKEN, encode
from hiveminer.training.trainer import IGNORED

HELD_OUT_ROWS = 32
"""Held-out rows that validators evaluate each global state on, and exports their model."""


@dataclass(frozen=True)
class Evaluation:
    """loss: mean over the predicted tokens (all of a row but its first), in nats. bytes: UTF-8
    bytes of the text of these tokens."""

    rows: int
    tokens: int
    bytes: int
    loss: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(700.0, self.loss))

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, as the loss per token is not."""
        return self.loss * self.tokens / math.log(2) / max(1, self.bytes)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    sequence_length: int,
    batch_size: int = 8,
    on_rows: Callable[[int], object] = lambda _rows: None,
) -> Evaluation | None:
    """Evaluate a model on rows, each truncated to `sequence_length` tokens; None when there is
    nothing to predict. on_rows: called with the number of rows after each batch."""
    nats, tokens = 0.0, 0
    device = next(model.parameters()).device
    was_training = model.training
    model.train(False)
    try:
        for start in range(0, len(texts), batch_size):
            batch = list(texts[start : start + batch_size])
            encoded = encode(tokenizer, batch, max_length=sequence_length)
            ids, mask = encoded["input_ids"].to(device), encoded["attention_mask"].to(device)
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORED)
            losses = cross_entropy(
                logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
            )
            nats += float(losses.double().sum())
            tokens += int((targets != IGNORED).sum())
            on_rows(len(batch))
    finally:
        model.train(was_training)
    size = sum(predicted_bytes(tokenizer, text, max_length=sequence_length) for text in texts)
    return Evaluation(len(texts), tokens, size, nats / tokens) if tokens else None


def predicted_bytes(tokenizer: PreTrainedTokenizerBase, text: str, *, max_length: int) -> int:
    """UTF-8 bytes of the predicted part of a text: truncated, and without its first token."""
    text = text[: max_length * CHARACTERS_PER_TOKEN]
    if not tokenizer.is_fast:
        ids = encode(tokenizer, [text], max_length=max_length)["input_ids"][0]
        return len(str(tokenizer.decode(ids[1:], skip_special_tokens=True)).encode("utf-8"))
    encoded = tokenizer(text, truncation=True, max_length=max_length, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    if not offsets:
        return 0
    return len(text[offsets[0][1] : max(end for _, end in offsets)].encode("utf-8"))
