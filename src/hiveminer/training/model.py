"""The model and its tokenizer: built in, from a local folder, or from the hub.

The built-in model is small enough for a laptop, and its weights are the same bits on every
machine: they are made from integers, since a seeded `normal_` differs between processors. Other
models are checked (`model_checks`), and code in their folders is never run.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import pickle
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.activations import NewGELUActivation
from transformers.utils.logging import disable_progress_bar

from hiveminer.config.run import BUILTIN, is_local
from hiveminer.errors import OperatorError, first_line
from hiveminer.training import model_checks
from hiveminer.training.data import Rows

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"

WORD = 8
"""Longest word of the built-in tokenizer, in characters. With 64, each thread keeps 27 MB of them,
with 8 it keeps 4 MB, and encoding takes as long."""

CHARACTERS_PER_TOKEN = 32
"""A row is cut to this many characters per token of the sequence length before it is encoded, far
more than ordinary text has, so that a huge row costs no more than the part that is trained."""

_encoding = threading.Lock()
"""Each call sets a fast tokenizer's truncation and padding, which two threads must not do at
once."""

REPORTED_ROWS, REPORTED_SHARE = 256, 0.005
"""Rows to encode for the estimate of how much of the data is never trained, and the share above
which that is reported."""

Examples = Sequence[str] | Mapping[str, Sequence[str]]


def load_model(name: str = BUILTIN, *, revision: str = "") -> PreTrainedModel:
    """A causal language model on the CPU, in float32, without noise, ready to train.

    Raises OperatorError for one that cannot be read or trained (`model_checks`).
    """
    if name == BUILTIN:
        return builtin_model()
    config = load_config(name, revision=revision)
    if not sys.stderr.isatty():
        disable_progress_bar()  # type: ignore[no-untyped-call]
    model_checks.configure_without_noise(config)
    # It reports unused weights over many lines; `check_weights` does in one.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with _loading("model", name):
        if is_local(name):
            model_checks.check_dtypes(Path(name).expanduser())
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            _source(name, "model"),
            config=config,
            revision=revision or "main",
            dtype=torch.float32,
            trust_remote_code=False,
            weights_only=True,
            # So that an error can name what is wrong.
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        model: PreTrainedModel
        model, info = loaded
        model_checks.check_weights(model, info)
        model_checks.without_noise(model)
        model_checks.check_passes(model)
    model.train()
    return model


def load_config(name: str, *, revision: str = "") -> PreTrainedConfig:
    """A model's configuration. Raises OperatorError as `load_model` does."""
    with _loading("model", name):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            _source(name, "model"), revision=revision or "main", trust_remote_code=False
        )
        if getattr(config, "quantization_config", None) is not None:
            raise OperatorError("it is quantized, which cannot be trained; give the full model")
    return config


def shape_of_model(name: str = BUILTIN, *, revision: str = "") -> PreTrainedModel:
    """The model without its weights, on the meta device: names and shapes for little memory."""
    if name == BUILTIN:
        return builtin_model()
    config = load_config(name, revision=revision)
    with _loading("model", name), torch.device("meta"):
        auto: Any = AutoModelForCausalLM
        model: PreTrainedModel = auto.from_config(config, trust_remote_code=False)
    return model


def load_tokenizer(name: str = BUILTIN, *, revision: str = "") -> PreTrainedTokenizerBase:
    """A model's tokenizer, padding on the right; without a padding token, with its
    end-of-sequence token (only the attention mask tells padding from text)."""
    if name == BUILTIN:
        return builtin_tokenizer()
    with _loading("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(
            _source(name, "tokenizer"), revision=revision or "main", trust_remote_code=False
        )
        # transformers creates an empty one when it finds none.
        if not tokenizer("hello world", add_special_tokens=False).input_ids:
            raise OperatorError("it has no vocabulary; save_pretrained it there")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise OperatorError("it has neither a padding nor an end token; add one")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def encode(
    tokenizer: PreTrainedTokenizerBase, examples: Examples, *, max_length: int = 512
) -> BatchEncoding:
    """Rows of text to `input_ids` and `attention_mask`, each [rows, longest row].

    examples: a list of texts, or a mapping whose `text` is one. Rows are cut to
    `CHARACTERS_PER_TOKEN` characters per token and truncated to `max_length` tokens.
    """
    texts = examples["text"] if isinstance(examples, Mapping) else examples
    longest = max_length * CHARACTERS_PER_TOKEN
    with _encoding:
        encoded: BatchEncoding = tokenizer(
            [text[:longest] for text in texts],
            truncation=True, max_length=max_length, padding=True, return_tensors="pt",
        )  # fmt: skip
    return encoded


def share_beyond(tokenizer: PreTrainedTokenizerBase, rows: Rows, *, max_length: int) -> float:
    """The share of the text beyond the sequence length, which is never trained; estimated from
    rows spread evenly over the data. From REPORTED_SHARE on it is logged, with the remedy."""
    step = -(-len(rows) // REPORTED_ROWS)
    trained = total = 0.0
    for text in rows.texts(range(0, len(rows), step)):
        part = text[: max_length * CHARACTERS_PER_TOKEN]
        tokens = len(tokenizer(part, verbose=False).input_ids)
        trained += len(part) * min(1.0, max_length / max(1, tokens))
        total += len(text)
    share = 1 - trained / total if total else 0.0
    if share >= REPORTED_SHARE:
        logger.warning(
            "about %.0f%% of the data lies beyond the sequence length of %d tokens and is never "
            "trained: cut its rows into shorter ones, or raise model.sequence_length in run.toml",
            100 * share, max_length,
        )  # fmt: skip
    return share


def schema_hash(model: torch.nn.Module) -> str:
    """Hex SHA-256 of the parameters' names and shapes, which peers must share to average."""
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
    """The wanted device, or the best of `cuda`, `mps` and `cpu`. Call it after Hivemind's
    processes have started: a CUDA context does not survive a fork."""
    if wanted is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device).item()  # `meta` makes a tensor and holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OperatorError(f"--neuron.device {wanted}: {first_line(error)}") from None
    return device


def builtin_tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte, an end-of-text token after each row, and a padding token: 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    # Splitting changes no token. It bounds the work on long lines, and the size of what the
    # library keeps for good: the last 10,000 words of each of its threads, one per core.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{WORD}}}"), "isolated"),
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
    """A GPT-2 of 0.9 million parameters over bytes, with `integer_weights`."""
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
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(integer_weights(name, tuple(value.shape)))
    return ready_to_train(model)


def integer_weights(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Initial float32 values that are the same bits on every machine.

    Vectors are ones (a norm's scale) or zeros (biases). Matrices are uniform with a standard
    deviation of about 0.018: 16-bit integers from SHAKE-256 of the parameter's name, times a
    power of two, which is exact on every processor.
    """
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    count = int(np.prod(shape))
    stream = hashlib.shake_256(name.encode()).digest(2 * count)
    integers = np.frombuffer(stream, dtype="<i2").astype(np.float32)
    return torch.from_numpy(integers * np.float32(2.0**-20)).reshape(shape)


def ready_to_train(model: PreTrainedModel) -> PreTrainedModel:
    """Remove what only slows training: the cache of keys and values, and GPT-2's GELU in eight
    passes, which PyTorch computes in one."""
    model.config.use_cache = False
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
    model.train()
    return model


def _source(name: str, what: str) -> str:
    """The argument for transformers: a checked folder's path, or a hub name."""
    if not name:
        raise OperatorError(f"the name is empty; give {BUILTIN!r} or a folder")
    if not is_local(name):
        return name
    folder = Path(name).expanduser()
    model_checks.check_folder(folder, what=what)
    return str(folder)


@contextlib.contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    """Name the model or tokenizer in a check's error, and report whatever a library raises."""
    try:
        yield
    except OperatorError as error:
        raise OperatorError(f"{what} {name}: {error}") from error
    except Exception as error:
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            reason = "it needs code from its own folder, which is never run"
        elif isinstance(error, pickle.UnpicklingError):
            reason = "its weights are a pickle that holds more than tensors, which is never loaded"
        raise OperatorError(
            f"{what} {name}: cannot be loaded ({reason}); give {BUILTIN!r}, a folder written by "
            "save_pretrained, or a hub name this machine can reach"
        ) from error
