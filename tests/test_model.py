"""Tests of models and tokenizers: the built-in ones to the bit, local folders, and refusals."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tiny import (
    ARCHITECTURES,
    END,
    POSITIONS,
    cut_the_network,
    save_tiny,
    tiny_model,
    tiny_tokenizer,
)
from torch import nn

from hiveminer.errors import OperatorError
from hiveminer.training.data import StoredRows
from hiveminer.training.model import (
    CHARACTERS_PER_TOKEN,
    builtin_model,
    builtin_tokenizer,
    choose_device,
    encode,
    integer_weights,
    load_model,
    load_tokenizer,
    parameter_count,
    report_beyond,
    schema_hash,
    shape_of_model,
    share_beyond,
    weights_hash,
)
from hiveminer.training.model_checks import check_fit, check_passes, without_noise

# The start of every run on the embedded network: machines that differ here cannot replay
# each other's work. A change is a new built-in model, and wants a new oldest_version.
BUILTIN_WEIGHTS = "6849c70bc08328dd0c897321625e15ba563d928f9582d6d3f25ed39d2d63f310"
BUILTIN_SCHEMA = "69db43889cc19b16032ee8c1a15cbe0a872ff36438d8fb809429929bce52ae8f"

END_OF_TEXT = 256
PADDING = 257


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_the_network(monkeypatch)


def one_line(error: pytest.ExceptionInfo[OperatorError]) -> str:
    said = str(error.value)
    assert "\n" not in said
    assert len(said) < 500
    return said


def test_builtin_weights_are_these_bits() -> None:
    torch.manual_seed(1)
    model = builtin_model()
    assert weights_hash(model) == BUILTIN_WEIGHTS
    assert schema_hash(model) == BUILTIN_SCHEMA
    torch.manual_seed(2)
    assert weights_hash(load_model()) == BUILTIN_WEIGHTS, "chance has a part in them"


def test_builtin_model_is_small_trains_and_has_no_dropout() -> None:
    model = builtin_model()
    assert parameter_count(model.parameters()) == 891_904
    assert model.training
    ids = torch.arange(10)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert model(input_ids=torch.zeros(1, 512, dtype=torch.long)).logits.shape == (1, 512, 258)


def test_integer_weights_are_spread_as_documented() -> None:
    weights = integer_weights("a.weight", (100, 100))
    assert weights.dtype == torch.float32
    assert weights.std().item() == pytest.approx(0.018, rel=0.05)
    assert abs(weights.mean().item()) < 0.001
    assert not torch.equal(weights, integer_weights("b.weight", (100, 100)))
    assert torch.equal(integer_weights("norm.weight", (3,)), torch.ones(3))
    assert torch.equal(integer_weights("norm.bias", (3,)), torch.zeros(3))
    first = int.from_bytes(hashlib.shake_256(b"a.weight").digest(2), "little", signed=True)
    assert weights[0, 0].item() == first / 2**20


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


def test_encode_pads_on_the_right_and_masks_the_padding() -> None:
    rows = encode(builtin_tokenizer(), ["abc", "", "a"])
    assert rows["input_ids"].tolist() == [
        [64, 65, 66, END_OF_TEXT],
        [END_OF_TEXT, PADDING, PADDING, PADDING],
        [64, END_OF_TEXT, PADDING, PADDING],
    ]
    assert rows["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]
    assert rows["input_ids"].dtype == rows["attention_mask"].dtype == torch.int64


def test_encode_takes_a_mapping_as_well() -> None:
    texts = ["one", "three"]
    by_list = encode(builtin_tokenizer(), texts)
    by_mapping = encode(builtin_tokenizer(), {"text": texts})
    assert by_list["input_ids"].tolist() == by_mapping["input_ids"].tolist()
    assert by_list["attention_mask"].tolist() == by_mapping["attention_mask"].tolist()


@pytest.mark.parametrize(("length", "tokens"), [(510, 511), (511, 512), (512, 512), (2000, 512)])
def test_encode_truncates_at_512_tokens(length: int, tokens: int) -> None:
    ids = encode(builtin_tokenizer(), ["x" * length, "y"])["input_ids"]
    assert ids.shape == (2, tokens)
    assert ids[0, -1] == END_OF_TEXT, "a truncated row keeps its end"


def test_encode_truncates_where_the_run_says() -> None:
    tokenizer = tiny_tokenizer(pad_token="<end>")
    rows = encode(tokenizer, ["w2 w3 w4 w5 w6", "w2"], max_length=4)
    assert rows["input_ids"].tolist() == [[2, 3, 4, END], [2, END, END, END]]
    assert rows["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.usefixtures("offline")
def test_a_local_folder_loads_with_its_weights(architecture: str, tmp_path: Path) -> None:
    saved = save_tiny(architecture, tmp_path)
    loaded = load_model(str(tmp_path))
    assert type(loaded) is type(saved)
    ours, theirs = dict(saved.named_parameters()), dict(loaded.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(value.dtype == torch.float32 for value in theirs.values())
    assert loaded.training
    assert weights_hash(loaded) == weights_hash(saved)
    tokenizer = load_tokenizer(str(tmp_path))
    assert encode(tokenizer, ["abc"])["input_ids"].tolist() == [[64, 65, 66, END_OF_TEXT]]
    check_fit(loaded, tokenizer, POSITIONS)


@pytest.mark.usefixtures("offline")
def test_a_model_saved_in_half_precision_is_trained_in_full(tmp_path: Path) -> None:
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}


@pytest.mark.usefixtures("offline")
def test_a_relative_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("gpt2", tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert schema_hash(load_model("mine")) == schema_hash(load_model("./mine"))


@pytest.mark.usefixtures("offline")
def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path: Path) -> None:
    tiny_tokenizer(padding_side="left").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id == END
    assert loaded.padding_side == "right"
    rows = encode(loaded, ["w2 w3", "w4"])
    assert rows["input_ids"].tolist() == [[2, 3, END], [4, END, END]]
    assert rows["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]], "an end of its own is text"


@pytest.mark.usefixtures("offline")
def test_a_missing_folder_is_told_in_one_line(tmp_path: Path) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(OperatorError, match="no such folder") as caught:
            load(str(tmp_path / "absent"))
        assert "absent" in one_line(caught)


@pytest.mark.usefixtures("offline")
def test_a_folder_without_a_model_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match=r"no config\.json") as caught:
        load_model(str(tmp_path))
    assert str(tmp_path) in one_line(caught)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(OperatorError, match="cannot be loaded") as caught:
        load_model(str(tmp_path))
    one_line(caught)
    (tmp_path / "config.json").write_text("{")
    builtin_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(OperatorError, match="cannot be loaded") as caught:
        load_model(str(tmp_path))
    one_line(caught)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(OperatorError, match="cannot be loaded") as caught:
        load_tokenizer(str(tmp_path))
    one_line(caught)


@pytest.mark.usefixtures("offline")
def test_a_model_of_an_unknown_kind_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no such kind"}')
    with pytest.raises(OperatorError, match="cannot be loaded") as caught:
        load_model(str(tmp_path))
    one_line(caught)


@pytest.mark.parametrize("name", ["nobody/nothing-of-this-name", "not a name!", "a/b/c", ""])
@pytest.mark.usefixtures("offline")
def test_a_name_that_is_none_is_told_in_one_line(name: str) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(OperatorError) as caught:
            load(name)
        assert f" {name}: " in one_line(caught)


def test_a_sequence_longer_than_the_models_is_refused() -> None:
    check_fit(builtin_model(), builtin_tokenizer(), 512)
    with pytest.raises(OperatorError, match=r"sequence_length is 513.* longest is 512"):
        check_fit(builtin_model(), builtin_tokenizer(), 513)


def test_a_tokenizer_larger_than_the_model_is_refused() -> None:
    check_fit(tiny_model("llama"), tiny_tokenizer(), POSITIONS)
    with pytest.raises(OperatorError, match="258 tokens and the model a place for 32"):
        check_fit(tiny_model("llama"), builtin_tokenizer(), POSITIONS)


def test_schema_hash_sees_names_and_shapes_and_no_values() -> None:
    model = tiny_model("llama")
    schema = schema_hash(model)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    assert schema_hash(model) == schema
    others = [tiny_model("qwen2"), tiny_model("llama", vocabulary=33)]
    renamed = torch.nn.ModuleDict({"other": model})
    assert len({schema, *map(schema_hash, others), schema_hash(renamed)}) == 4


def test_schema_hash_sees_a_shape_of_as_many_numbers() -> None:
    assert schema_hash(torch.nn.Linear(2, 6, bias=False)) != schema_hash(
        torch.nn.Linear(6, 2, bias=False)
    )


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


# --- what trains is what was named --------------------------------------------------------------


def change_config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | keys
    config.pop("layer_types", None)
    path.write_text(json.dumps(config))


def change_weights(folder: Path, **tensors: torch.Tensor) -> None:
    """Replace tensors of a folder's file; dots in their names are double underscores."""
    path = folder / "model.safetensors"
    changes = {name.replace("__", "."): value for name, value in tensors.items()}
    save_file(load_file(path) | changes, path, metadata={"format": "pt"})


def refused(folder: Path, words: str) -> str:
    with pytest.raises(OperatorError, match=words) as caught:
        load_model(str(folder))
    return one_line(caught)


def small(**keys: Any) -> dict[str, Any]:
    return {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    } | keys


@pytest.mark.usefixtures("offline")
def test_weights_that_are_missing_are_refused_by_name(tmp_path: Path) -> None:
    tf.LlamaModel(tf.LlamaConfig(**small())).save_pretrained(tmp_path / "base")
    refused(tmp_path / "base", r"lack lm_head\.weight")
    save_tiny("llama", tmp_path / "more")
    change_config(tmp_path / "more", num_hidden_layers=3)
    refused(tmp_path / "more", r"lack model\.layers\.2\.input_layernorm\.weight, .* and 6 more")
    save_tiny("llama", tmp_path / "fewer")
    change_config(tmp_path / "fewer", num_hidden_layers=1)
    refused(tmp_path / "fewer", r"hold model\.layers\.1\..* more layers than config\.json says")


@pytest.mark.usefixtures("offline")
def test_tied_weights_are_not_missing_and_others_are_not_needed(tmp_path: Path) -> None:
    config = tf.LlamaConfig(**small(tie_word_embeddings=True))
    saved = tf.LlamaForCausalLM(config)
    saved.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    change_weights(tmp_path, v_head__summary__weight=torch.zeros(1, 32))
    loaded = load_model(str(tmp_path))
    assert weights_hash(loaded) == weights_hash(saved) == weights_hash(load_model(str(tmp_path)))


@pytest.mark.usefixtures("offline")
def test_weights_of_another_shape_or_kind_are_refused_by_name(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "vocabulary")
    change_config(tmp_path / "vocabulary", vocab_size=320)
    refused(tmp_path / "vocabulary", r"is \[258, 16\] in its weights and \[320, 16\] by its config")
    save_tiny("llama", tmp_path / "integers")
    norm = torch.ones(16, dtype=torch.int8)
    change_weights(tmp_path / "integers", model__norm__weight=norm)
    refused(tmp_path / "integers", r"model\.norm\.weight in model\.safetensors is I8")
    save_tiny("llama", tmp_path / "infinite")
    change_weights(tmp_path / "infinite", model__norm__weight=torch.full((16,), torch.inf))
    refused(tmp_path / "infinite", r"model\.norm\.weight holds numbers that are not finite")
    save_tiny("llama", tmp_path / "quantized")
    change_config(tmp_path / "quantized", quantization_config={"quant_method": "fp8"})
    refused(tmp_path / "quantized", "it is quantized")


NOISY = {
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4)
    ),
    "gpt_bigcode": lambda: tf.GPTBigCodeForCausalLM(
        tf.GPTBigCodeConfig(vocab_size=300, n_positions=512, n_embd=32, n_layer=2, n_head=4)
    ),
    "bloom": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.1)
    ),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=300, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=32, layerdrop=0.5, dropout=0.1,
        )
    ),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**small(attention_dropout=0.3))),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(
            **small(num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.3)
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOISY)
@pytest.mark.usefixtures("offline")
def test_noise_is_off_so_that_a_replay_gives_the_same_loss(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    NOISY[kind]().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.training
    rows = torch.arange(24).reshape(2, 12)
    losses = {loaded(input_ids=rows, labels=rows).loss.item() for _ in range(4)}
    assert len(losses) == 1


def test_noise_that_cannot_be_turned_off_is_refused() -> None:
    model = tiny_model("llama")
    model.model.norm.register_forward_hook(
        lambda module, _, output: nn.functional.dropout(output, 0.01, module.training)
    )
    without_noise(model)
    with pytest.raises(OperatorError, match="two passes over the same row differ") as caught:
        check_passes("mine", model)
    assert one_line(caught).startswith("model mine: ")
    evaluated = tiny_model("llama")
    evaluated.model.norm.register_forward_hook(
        lambda module, _, output: output * (2 if module.training else 1)
    )
    with pytest.raises(OperatorError, match="differently in training and in evaluation"):
        check_passes("mine", evaluated)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_causal_model_passes_and_one_that_sees_what_follows_is_refused(architecture: str) -> None:
    model = tiny_model(architecture)
    check_passes("mine", model)
    assert model.training
    inner = model.transformer.ln_f if architecture == "gpt2" else model.model.norm
    inner.register_forward_hook(lambda _, __, output: output + 1e-3 * output.mean(1, keepdim=True))
    with pytest.raises(OperatorError, match="it is not causal"):
        check_passes("mine", model)


@pytest.mark.usefixtures("offline")
def test_an_encoder_is_refused(tmp_path: Path) -> None:
    tf.BertLMHeadModel(tf.BertConfig(**small(is_decoder=False))).save_pretrained(tmp_path)
    refused(tmp_path, "it is not causal")
    change_config(tmp_path, is_decoder=True)
    assert load_model(str(tmp_path)).training


@pytest.mark.usefixtures("offline")
def test_code_from_a_folder_is_never_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("the operator was asked")

    monkeypatch.setattr("builtins.input", asked)
    folder, executed = tmp_path / "model", tmp_path / "executed"
    save_tiny("llama", folder)
    code = f"open({str(executed)!r}, 'w').close()\n"
    (folder / "conf.py").write_text(code + "class C: pass\n")
    (folder / "tokens.py").write_text(code + "class T: pass\n")
    names = {"AutoConfig": "conf.C", "AutoModelForCausalLM": "conf.C"}
    change_config(folder, auto_map=names)
    assert type(load_model(str(folder))) is tf.LlamaForCausalLM, "transformers has that kind"
    change_config(folder, model_type="mine")
    assert "code from its own folder, which is never run" in refused(folder, "cannot be loaded")
    with pytest.raises(OperatorError, match="never run"):
        shape_of_model(str(folder))
    path = folder / "tokenizer_config.json"
    changes = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["tokens.T", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with contextlib.suppress(OperatorError):
        load_tokenizer(str(folder))
    assert not executed.exists()


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.usefixtures("offline")
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickled_weights_are_read_without_running_them(tmp_path: Path) -> None:
    folder, executed = tmp_path / "model", tmp_path / "executed"
    saved = save_tiny("llama", folder)
    (folder / "model.safetensors").unlink()
    torch.save(saved.state_dict(), folder / "pytorch_model.bin")
    assert weights_hash(load_model(str(folder))) == weights_hash(saved)
    with (folder / "pytorch_model.bin").open("wb") as stream:
        pickle.dump({"a": Evil(executed)}, stream)
    refused(folder, "a pickle that holds more than tensors, which is never loaded")
    assert not executed.exists()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.usefixtures("offline")
def test_what_lies_in_the_folder_instead_is_named(tmp_path: Path, file: str) -> None:
    save_tiny("llama", tmp_path / "pointer")
    (tmp_path / "pointer" / file).write_text(POINTER)
    assert "git lfs pull" in refused(tmp_path / "pointer", f"{file} is a Git LFS pointer")
    save_tiny("llama", tmp_path / "torn")
    path = tmp_path / "torn" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(tmp_path / "torn", r"model\.safetensors cannot be read")
    path.unlink()
    refused(tmp_path / "torn", "cannot be loaded .*no file named")
    refused(tmp_path / "torn" / "config.json", "a file; give the folder")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "adapter", "an adapter without its base model")


@pytest.mark.usefixtures("offline")
def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers makes an empty one for GPT-2."""
    for architecture in ("gpt2", "llama"):
        folder = tmp_path / architecture
        tiny_model(architecture).save_pretrained(folder)
        with pytest.raises(OperatorError, match="the folder holds no tokenizer") as caught:
            load_tokenizer(str(folder))
        one_line(caught)


def test_a_token_number_beyond_the_embeddings_is_refused() -> None:
    tokenizer = tiny_tokenizer(pad_token="<end>")
    tokenizer.add_tokens(["new"])
    with pytest.raises(OperatorError, match="33 tokens and the model a place for 32"):
        check_fit(tiny_model("llama"), tokenizer, POSITIONS)


def test_the_shape_of_a_model_takes_no_memory(tmp_path: Path) -> None:
    saved = save_tiny("llama", tmp_path)
    shape = shape_of_model(str(tmp_path))
    assert {value.device.type for value in shape.parameters()} == {"meta"}
    assert schema_hash(shape) == schema_hash(saved)


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
    report_beyond(0.0, max_length=64)
    report_beyond(share, max_length=64)
    assert len(caplog.messages) == 1
    assert "about 100% of the data lies beyond the sequence length of 64" in caplog.messages[0]
    assert "raise model.sequence_length" in caplog.messages[0]
