"""Tests of the checks of models: what trains is what was named, or it is refused."""

from __future__ import annotations

import contextlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tiny import (
    ARCHITECTURES,
    cut_the_network,
    one_line,
    save_tiny,
    tiny_model,
)
from torch import nn

from hiveminer.errors import OperatorError
from hiveminer.training.model import (
    load_model,
    load_tokenizer,
    schema_hash,
    shape_of_model,
    weights_hash,
)
from hiveminer.training.model_checks import check_passes, without_noise


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_the_network(monkeypatch)


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


def test_weights_that_are_missing_are_refused_by_name(tmp_path: Path) -> None:
    tf.LlamaModel(tf.LlamaConfig(**small())).save_pretrained(tmp_path / "base")
    refused(tmp_path / "base", r"lack lm_head\.weight")
    save_tiny("llama", tmp_path / "more")
    change_config(tmp_path / "more", num_hidden_layers=3)
    refused(tmp_path / "more", r"lack model\.layers\.2\.input_layernorm\.weight, .* and 6 more")
    save_tiny("llama", tmp_path / "fewer")
    change_config(tmp_path / "fewer", num_hidden_layers=1)
    refused(tmp_path / "fewer", r"hold model\.layers\.1\..* more layers than config\.json says")


@pytest.mark.parametrize(
    "key",
    ["lm_head__bias", "model__norm__bias", "model__layers__0__self_attn__q_proj__lora_A__weight"],
)
def test_weights_of_the_models_own_parts_are_never_left_out(tmp_path: Path, key: str) -> None:
    save_tiny("llama", tmp_path)
    change_weights(tmp_path, **{key: torch.zeros(4, 4)})
    refused(tmp_path, f"hold {key.replace('__', '.')}, which the model .* does not compute with")


def test_tied_weights_are_not_missing_and_others_are_not_needed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tf.LlamaConfig(**small(tie_word_embeddings=True))
    saved = tf.LlamaForCausalLM(config)
    saved.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    change_weights(tmp_path, v_head__summary__weight=torch.zeros(1, 32))
    loaded = load_model(str(tmp_path))
    assert "weights that it does not have: v_head.summary.weight" in caplog.text
    assert weights_hash(loaded) == weights_hash(saved) == weights_hash(load_model(str(tmp_path)))


def test_weights_of_another_shape_or_kind_are_refused_by_name(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "vocabulary")
    change_config(tmp_path / "vocabulary", vocab_size=320)
    refused(tmp_path / "vocabulary", r"is \[258, 16\] in its weights and \[320, 16\] by its config")
    save_tiny("llama", tmp_path / "integers")
    norm = torch.ones(16, dtype=torch.int8)
    change_weights(tmp_path / "integers", model__norm__weight=norm)
    refused(tmp_path / "integers", r"model\.norm\.weight in model\.safetensors is I8")
    save_tiny("llama", tmp_path / "pickled")
    weights = load_file(tmp_path / "pickled" / "model.safetensors")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(weights | {"model.norm.weight": norm}, tmp_path / "pickled" / "pytorch_model.bin")
    refused(tmp_path / "pickled", r"model\.norm\.weight in pytorch_model\.bin is int8")
    save_tiny("llama", tmp_path / "infinite")
    change_weights(tmp_path / "infinite", model__norm__weight=torch.full((16,), torch.inf))
    refused(tmp_path / "infinite", r"model\.norm\.weight holds numbers that are not finite")
    save_tiny("llama", tmp_path / "quantized")
    change_config(tmp_path / "quantized", quantization_config={"quant_method": "fp8"})
    refused(tmp_path / "quantized", "it is quantized")


NOISY = [
    tf.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4),
    tf.GPTBigCodeConfig(vocab_size=300, n_positions=512, n_embd=32, n_layer=2, n_head=4),
    tf.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.1),
    tf.OPTConfig(
        **small(ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64),
        layerdrop=0.5,
        dropout=0.1,
    ),
    tf.LlamaConfig(**small(attention_dropout=0.3)),
    tf.MixtralConfig(**small(num_key_value_heads=2, num_local_experts=4, router_jitter_noise=0.3)),
]


@pytest.mark.parametrize("config", NOISY, ids=lambda config: config.model_type)
def test_noise_is_off_so_that_a_replay_gives_the_same_loss(config: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
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
    with pytest.raises(OperatorError, match="two passes over the same row differ"):
        check_passes(model)
    evaluated = tiny_model("llama")
    evaluated.model.norm.register_forward_hook(
        lambda module, _, output: output * (2 if module.training else 1)
    )
    with pytest.raises(OperatorError, match="differently in training and in evaluation"):
        check_passes(evaluated)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_causal_model_passes_and_one_that_sees_what_follows_is_refused(architecture: str) -> None:
    model = tiny_model(architecture)
    check_passes(model)
    assert model.training
    inner = model.transformer.ln_f if architecture == "gpt2" else model.model.norm
    inner.register_forward_hook(lambda _, __, output: output + 1e-3 * output.mean(1, keepdim=True))
    with pytest.raises(OperatorError, match="it is not causal"):
        check_passes(model)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    tf.BertLMHeadModel(tf.BertConfig(**small(is_decoder=False))).save_pretrained(tmp_path)
    refused(tmp_path, "it is not causal")
    change_config(tmp_path, is_decoder=True)
    assert load_model(str(tmp_path)).training


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


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers makes an empty one for GPT-2."""
    for architecture in ("gpt2", "llama"):
        folder = tmp_path / architecture
        tiny_model(architecture).save_pretrained(folder)
        with pytest.raises(OperatorError, match="the folder holds no tokenizer") as caught:
            load_tokenizer(str(folder))
        one_line(caught)


def test_the_shape_of_a_model_takes_no_memory(tmp_path: Path) -> None:
    saved = save_tiny("llama", tmp_path)
    shape = shape_of_model(str(tmp_path))
    assert {value.device.type for value in shape.parameters()} == {"meta"}
    assert schema_hash(shape) == schema_hash(saved)
