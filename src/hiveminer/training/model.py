"""The model and its tokenizer: transformers, behind one door.

Three places a model can come from: built in, a local folder written by
`save_pretrained`, or the hub. The built-in one is small enough for a laptop and has the
same weights, bit for bit, on every machine: they are made from integers, since a seeded
`normal_` is not the same on every processor.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.activations import NewGELUActivation

from hiveminer.config.run import BUILTIN, is_local
from hiveminer.errors import OperatorError

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"

Examples = Sequence[str] | Mapping[str, Sequence[str]]


def load_model(name: str = BUILTIN, *, revision: str = "") -> PreTrainedModel:
    """A causal language model on the CPU, in float32, ready to train.

    Raises OperatorError when there is no such model or it cannot be read.
    """
    if name == BUILTIN:
        return builtin_model()
    source = _source(name, "model")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source, revision=revision or "main", dtype=torch.float32
        )
    except Exception as error:
        raise _unreadable("model", name, error) from error
    without_dropout(model)
    model.train()
    return model


def without_dropout(model: torch.nn.Module) -> None:
    """Turn all dropout off, in place.

    A row is trained once, which leaves nothing to overfit to; and a miner's curve can only
    be compared with a replay's where the same rows give the same loss.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "resid_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def load_tokenizer(name: str = BUILTIN, *, revision: str = "") -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model, padding on the right.

    A tokenizer without a padding token pads with its end-of-sequence token; padding is
    told from text by the attention mask, never by the token's number.
    """
    if name == BUILTIN:
        return builtin_tokenizer()
    source = _source(name, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main")
    except Exception as error:
        raise _unreadable("tokenizer", name, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise OperatorError(f"tokenizer {name}: it has neither a padding nor an end token; add one")
    tokenizer.padding_side = "right"
    return tokenizer


def encode(
    tokenizer: PreTrainedTokenizerBase, examples: Examples, *, max_length: int = 512
) -> BatchEncoding:
    """Rows of text to tensors: `input_ids` and `attention_mask`, each [rows, longest row].

    `examples` is a list of texts, or a mapping whose `text` is one. Rows are truncated to
    `max_length` tokens and padded to the longest of them.
    """
    texts = examples["text"] if isinstance(examples, Mapping) else examples
    encoded: BatchEncoding = tokenizer(
        list(texts), truncation=True, max_length=max_length, padding=True, return_tensors="pt"
    )
    return encoded


def check_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Refuse a tokenizer or a sequence length that the model has no place for."""
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, torch.Tensor)
    vocabulary = embeddings.shape[0]
    if len(tokenizer) > vocabulary:
        raise OperatorError(
            f"the tokenizer has {len(tokenizer)} tokens and the model a place for {vocabulary}: "
            "they do not belong together"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise OperatorError(
            f"model.sequence_length is {max_length}, the model's longest is {positions}: lower it "
            "in run.toml"
        )


def schema_hash(model: torch.nn.Module) -> str:
    """Hex SHA-256 of the parameters' names and shapes, in order: who may average with whom."""
    lines = (f"{name} {tuple(value.shape)}\n" for name, value in model.named_parameters())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def weights_hash(model: torch.nn.Module) -> str:
    """Hex SHA-256 of the parameters' bits, as little-endian float32."""
    digest = hashlib.sha256()
    for name, value in model.named_parameters():
        digest.update(name.encode())
        digest.update(value.detach().to("cpu", torch.float32).numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def choose_device(wanted: str | None) -> torch.device:
    """`cuda` if there is one, then `mps`, then `cpu`; or the one that was asked for.

    Call it after Hivemind's processes have started: a CUDA context does not survive a fork.
    """
    if wanted is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device).item()  # `meta` makes a tensor and holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0][:200]
        raise OperatorError(f"--neuron.device {wanted}: {reason}") from None
    return device


def builtin_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, an end-of-text token after each row, and a padding token: 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    # Pieces bound the tokenizer's work on long lines; they change no token.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\s\S]{1,64}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT, PADDING])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END_OF_TEXT}",
        special_tokens=[(END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        padding_side="right",
        model_max_length=512,
    )


def builtin_model() -> PreTrainedModel:
    """A GPT-2 of 0.9 million parameters over bytes; its weights come from `integer_weights`."""
    config = GPT2Config(
        vocab_size=258,
        n_positions=512,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=257,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(integer_weights(name, tuple(value.shape)))
    return ready_to_train(model)


def integer_weights(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Start values that are the same bits on every machine, float32, of the given shape.

    Vectors are ones (a norm's scale) or zeros (biases). Matrices are uniform with a
    standard deviation of about 0.018: 16-bit integers read off SHAKE-256 of the
    parameter's name, times a power of two, which no processor rounds.
    """
    if len(shape) == 1:
        is_scale = name.endswith("weight")
        return torch.ones(shape) if is_scale else torch.zeros(shape)
    count = int(np.prod(shape))
    stream = hashlib.shake_256(name.encode()).digest(2 * count)
    integers = np.frombuffer(stream, dtype="<i2").astype(np.float32)
    return torch.from_numpy(integers * np.float32(2.0**-20)).reshape(shape)


def ready_to_train(model: PreTrainedModel) -> PreTrainedModel:
    """The same function, without what only slows training: a cache of keys and values, and
    GPT-2's GELU in eight passes over its input where PyTorch has one."""
    model.config.use_cache = False
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
    model.train()
    return model


def parameter_count(parameters: Iterable[torch.Tensor]) -> int:
    return sum(value.numel() for value in parameters)


def _source(name: str, what: str) -> str:
    if not is_local(name):
        return name
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise OperatorError(
            f"{what} {name}: no such folder; give {BUILTIN!r}, a folder written by "
            "save_pretrained, or a hub name"
        )
    if not (folder / "config.json").is_file():
        raise OperatorError(f"{what} {name}: the folder holds no config.json; save_pretrained it")
    return str(folder)


def _unreadable(what: str, name: str, error: Exception) -> OperatorError:
    reason: Any = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return OperatorError(
        f"{what} {name}: cannot be loaded ({reason}); give {BUILTIN!r}, a folder written by "
        "save_pretrained, or a hub name this machine can reach"
    )
