"""Tests of models and tokenizers: the built-in ones to the bit, local folders, and refusals."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    ARCHITECTURES,
    END,
    POSITIONS,
    cut_the_network,
    one_line,
    save_tiny,
    tiny_model,
    tiny_tokenizer,
)

from hiveminer.errors import OperatorError
from hiveminer.training.data import StoredRows
from hiveminer.training.model import (
    CHARACTERS_PER_TOKEN,
    builtin_model,
    builtin_tokenizer,
    choose_device,
    encode,
    load_model,
    load_tokenizer,
    schema_hash,
    share_beyond,
    weights_hash,
)
from hiveminer.training.model_checks import check_fit

# The start of every run on the embedded network: machines that differ here cannot replay
# each other's work. A change is a new built-in model, and wants a new oldest_version.
BUILTIN_WEIGHTS = "6849c70bc08328dd0c897321625e15ba563d928f9582d6d3f25ed39d2d63f310"
BUILTIN_SCHEMA = "69db43889cc19b16032ee8c1a15cbe0a872ff36438d8fb809429929bce52ae8f"

END_OF_TEXT = 256
PADDING = 257


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_the_network(monkeypatch)


def refused(load: Callable[[str], object], name: str | Path, words: str) -> None:
    with pytest.raises(OperatorError, match=words) as caught:
        load(str(name))
    assert str(name) in one_line(caught)


def test_builtin_weights_are_these_bits() -> None:
    torch.manual_seed(1)
    model = builtin_model()
    assert weights_hash(model) == BUILTIN_WEIGHTS
    assert schema_hash(model) == BUILTIN_SCHEMA
    torch.manual_seed(2)
    assert weights_hash(load_model()) == BUILTIN_WEIGHTS, "chance has a part in them"


def test_builtin_model_is_small_trains_and_has_no_dropout() -> None:
    model = builtin_model()
    assert model.num_parameters() == 891_904
    assert model.training
    ids = torch.arange(10)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert model(input_ids=torch.zeros(1, 512, dtype=torch.long)).logits.shape == (1, 512, 258)


def test_builtin_tokenizer_has_short_words() -> None:
    """Each of the library's threads keeps ten thousand of them for good."""
    splitter = builtin_tokenizer().backend_tokenizer.pre_tokenizer
    words = [word for word, _ in splitter.pre_tokenize_str("x" * 1000 + "\n" * 20)]
    assert max(map(len, words)) <= 8


def test_builtin_tokenizer_is_one_token_a_byte_and_an_end() -> None:
    tokenizer = builtin_tokenizer()
    assert len(tokenizer) == 258
    every_byte = [tokenizer(chr(number)).input_ids for number in range(128)]
    assert all(len(ids) == 2 and ids[1] == END_OF_TEXT for ids in every_byte)
    assert tokenizer("Hi, ü\n\t€").input_ids == [
        39, 72, 11, 220, 127, 120, 198, 197, 158, 224, 105, END_OF_TEXT,
    ]  # fmt: skip
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (END_OF_TEXT, PADDING)


@pytest.mark.parametrize(
    "text", ["", " ", "  two  spaces ", "x" * 200, "naïve 漢字 🙂\r\n\x00\x1c", "a\u2028b"]
)
def test_builtin_tokenizer_loses_nothing(text: str) -> None:
    ids = builtin_tokenizer()(text).input_ids
    assert len(ids) == len(text.encode()) + 1
    assert builtin_tokenizer().decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("examples", [["abc", "", "a"], {"text": ["abc", "", "a"]}], ids=type)
def test_encode_pads_on_the_right_and_masks_the_padding(examples: Any) -> None:
    rows = encode(builtin_tokenizer(), examples)
    assert rows["input_ids"].tolist() == [
        [64, 65, 66, END_OF_TEXT],
        [END_OF_TEXT, PADDING, PADDING, PADDING],
        [64, END_OF_TEXT, PADDING, PADDING],
    ]
    assert rows["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert rows["input_ids"].dtype == rows["attention_mask"].dtype == torch.int64


@pytest.mark.parametrize(("length", "tokens"), [(510, 511), (511, 512), (512, 512), (2000, 512)])
def test_encode_truncates_at_512_tokens(length: int, tokens: int) -> None:
    ids = encode(builtin_tokenizer(), ["x" * length, "y"])["input_ids"]
    assert ids.shape == (2, tokens)
    assert ids[0, -1] == END_OF_TEXT, "a truncated row keeps its end"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_local_folder_loads_with_its_weights(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = save_tiny(architecture, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    loaded = load_model("mine")
    assert type(loaded) is type(saved)
    assert all(value.dtype == torch.float32 for value in loaded.parameters())
    assert loaded.training
    assert weights_hash(loaded) == weights_hash(saved)
    tokenizer = load_tokenizer("./mine")
    assert encode(tokenizer, ["abc"])["input_ids"].tolist() == [[64, 65, 66, END_OF_TEXT]]
    check_fit(loaded, tokenizer, POSITIONS)


def test_a_model_saved_in_half_precision_is_trained_in_full(tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path: Path) -> None:
    tiny_tokenizer(padding_side="left").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id == END
    assert loaded.padding_side == "right"
    rows = encode(loaded, ["w2 w3", "w4"])
    assert rows["input_ids"].tolist() == [[2, 3, END], [4, END, END]]
    assert rows["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]], "an end of its own is text"


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_what_is_no_model_is_told_in_one_line(
    load: Callable[[str], object], tmp_path: Path
) -> None:
    refused(load, tmp_path / "absent", "no such folder")
    refused(load, tmp_path, r"no config\.json")
    builtin_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    for config in ('{"model_type": "gpt2"}', "{", '{"model_type": "no such kind"}'):
        (tmp_path / "config.json").write_text(config)
        refused(load, tmp_path, "cannot be loaded")
    for name in ("nobody/nothing-of-this-name", "not a name!", "a/b/c", ""):
        refused(load, name, f" {name}: ")


def test_a_tokenizer_or_a_sequence_larger_than_the_model_is_refused() -> None:
    check_fit(builtin_model(), builtin_tokenizer(), 512)
    with pytest.raises(OperatorError, match=r"sequence_length is 513.* longest is 512"):
        check_fit(builtin_model(), builtin_tokenizer(), 513)
    tokenizer = tiny_tokenizer(pad_token="<end>")
    check_fit(tiny_model("llama"), tokenizer, POSITIONS)
    tokenizer.add_tokens(["new"])
    with pytest.raises(OperatorError, match="33 tokens and the model a place for 32"):
        check_fit(tiny_model("llama"), tokenizer, POSITIONS)


def test_schema_hash_sees_names_and_shapes_and_no_values() -> None:
    model = tiny_model("llama")
    schema = schema_hash(model)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    assert schema_hash(model) == schema
    others: list[torch.nn.Module] = [tiny_model("qwen2"), tiny_model("llama", vocabulary=33)]
    others += [torch.nn.ModuleDict({"other": model})]
    others += [torch.nn.Linear(2, 6, bias=False), torch.nn.Linear(6, 2, bias=False)]
    assert len({schema, *map(schema_hash, others)}) == 6


def test_weights_hash_sees_one_bit() -> None:
    model = tiny_model("gpt2")
    before = weights_hash(model)
    with torch.no_grad():
        value = model.transformer.ln_f.bias
        value[0] = torch.nextafter(value[0], torch.tensor(1.0))
    assert weights_hash(model) != before


def test_a_device_is_chosen_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device(None) == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device(None) == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(None) == torch.device("cuda")
    assert choose_device("cpu") == torch.device("cpu"), "who asks for the CPU gets it"


@pytest.mark.parametrize("wanted", ["", "gpu", "cuda:99", "cpu:one", "vulkan", "meta"])
def test_a_device_that_is_not_there_is_told_in_one_line(wanted: str) -> None:
    with pytest.raises(OperatorError) as caught:
        choose_device(wanted)
    assert one_line(caught).startswith(f"--neuron.device {wanted}: ")


def test_several_threads_may_encode_at_once() -> None:
    tokenizer = builtin_tokenizer()

    def length(longest: int) -> int:
        return int(encode(tokenizer, ["x" * 600] * 20, max_length=longest)["input_ids"].shape[1])

    wanted = [16, 64, 256, 512] * 25
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(length, wanted)) == wanted


# --- long rows ----------------------------------------------------------------------------------


def test_a_row_is_cut_before_it_is_encoded() -> None:
    seen = []

    class Watched:
        def __call__(self, texts: list[str], **options: Any) -> Any:
            seen.extend(map(len, texts))
            return builtin_tokenizer()(texts, **options)

    watched: Any = Watched()
    rows = encode(watched, ["x" * 4_000_000, "short"], max_length=64)
    assert seen == [64 * CHARACTERS_PER_TOKEN, 5]
    assert rows["input_ids"].shape == (2, 64)
    assert (
        rows["input_ids"][0].tolist()
        == encode(builtin_tokenizer(), ["x" * 1000], max_length=64)["input_ids"][0].tolist()
    )


def test_what_is_never_trained_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = builtin_tokenizer()  # one token per byte, and one at the end
    texts = ["x" * 63] * 300 + ["x" * 63 * 3]
    short = StoredRows(texts[:300], hashlib.sha256())
    assert share_beyond(tokenizer, short, max_length=64) == 0
    long = StoredRows(["x" * 1000, "x" * 63, "x" * 1_000_000], hashlib.sha256())
    share = share_beyond(tokenizer, long, max_length=64)
    assert share == pytest.approx(1 - 3 * 63 / 1_001_063, abs=1e-3)
    assert len(caplog.messages) == 1
    assert "about 100% of the data lies beyond the sequence length of 64" in caplog.messages[0]
    assert "raise model.sequence_length" in caplog.messages[0]
