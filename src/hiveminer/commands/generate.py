"""`hiveminer generate`: streams a text's continuation by the trained model."""

from __future__ import annotations

import sys

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from hiveminer.commands.models import find_model
from hiveminer.config.settings import GenerateSettings
from hiveminer.errors import OperatorError
from hiveminer.training.model import choose_device


def main(settings: GenerateSettings) -> int:
    """Print the text and its continuation."""
    if not settings.text:
        raise OperatorError('give the text to continue: hiveminer generate "text"')
    found = find_model(settings)
    found.model.to(choose_device(settings.neuron.device))  # type: ignore[arg-type]
    print(f"hiveminer: {found.place}", file=sys.stderr, flush=True)
    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    continuation(
        found.model,
        found.tokenizer,
        settings.text,
        tokens=settings.tokens,
        temperature=settings.temperature,
        streamer=TextStreamer(found.tokenizer, skip_special_tokens=True),
    )
    return 0


def continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    tokens: int,
    temperature: float = 0.0,
    streamer: TextStreamer | None = None,
) -> str:
    """The text's continuation, of at most `tokens` tokens and within the model's positions;
    temperature 0: always the most probable token."""
    # Without special tokens: an end-of-text token after the prompt would end the text.
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise OperatorError("the text has no token in this model's vocabulary")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None:
        ids = ids[:, -max(1, positions - tokens) :]
        tokens = min(tokens, positions - ids.shape[1])
    model.train(False)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max(1, tokens),
        do_sample=temperature > 0,
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"temperature": temperature} if temperature > 0 else {}),
    )
    ids = ids.to(model.device)
    output = model.generate(  # type: ignore[operator]
        input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config,
        streamer=streamer,
    )  # fmt: skip
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
