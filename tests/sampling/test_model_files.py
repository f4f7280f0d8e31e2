"""Files of a model that cannot be used: one sentence that names the file, before weights are read."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import make_tokenizer
from trl_kd.sampling.model_files import BadModel, check_model


@pytest.fixture
def folder(tiny_dir, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


def rewrite(path: Path, **changed) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


CONFIGS = {
    "hidden_size": (0, -1, "x", None, 15, 32),
    "num_attention_heads": (0, 3, "2"),
    "num_key_value_heads": (3,),
    "vocab_size": (0, -5, "many", 10),
    "num_hidden_layers": ("2",),
    "intermediate_size": (2.5, 64),
    "model_type": ("nope", None, 3),
    "architectures": (5,),
    "dtype": ("float13",),
    "hidden_act": ("nope",),
    "rms_norm_eps": (None,),
    "rope_parameters": (5, {"rope_type": "nope"}),
    "eos_token_id": ("x",),
    "quantization_config": (3,),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in CONFIGS.items() for value in values])
def test_an_impossible_config(field, value, folder):
    rewrite(folder / "config.json", **{field: value})
    with pytest.raises(BadModel, match=r"config\.json"):
        check_model(str(folder), {}, make_tokenizer())


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"3", '{"model_type": "lläma"}'.encode("latin-1")])
def test_a_config_that_is_none(content, folder):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(BadModel, match=r"config\.json"):
        check_model(str(folder), {}, make_tokenizer())


@pytest.mark.parametrize("kept", [0, 5, 1000])
def test_damaged_weights(kept, folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(BadModel, match=r"^model\.safetensors: SafetensorError: "):
        check_model(str(folder), {}, make_tokenizer())


def test_weights_of_another_model(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.norm.weight": weights["model.norm.weight"][:3]}, folder / "model.safetensors")
    check_model(str(folder), {}, make_tokenizer())  # vectors may be anything
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name][:3].contiguous()}, folder / "model.safetensors")
    said = (
        rf"model.safetensors and config.json are not of one model: `{name}` is 3 × 16 there, and 32 × 16 by the config"
    )
    with pytest.raises(BadModel, match=said):
        check_model(str(folder), {}, make_tokenizer())


def test_a_part_of_the_weights_that_is_missing(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(BadModel, match=r"^model-00001-of-00002\.safetensors: "):
        check_model(str(folder), {}, make_tokenizer())
    index.write_text("[]")
    with pytest.raises(BadModel, match=r"^model\.safetensors\.index\.json: TypeError"):
        check_model(str(folder), {}, make_tokenizer())


class Command:
    def __reduce__(self):
        return print, ("the weights have run this",)


def test_weights_that_are_not_safe_to_load(folder, capsys):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    check_model(str(folder), {}, make_tokenizer())
    AutoModelForCausalLM.from_pretrained(folder)
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        save({"model.norm.weight": Command()}, folder / "pytorch_model.bin")
        with pytest.raises(
            BadModel, match=r"^pytorch_model\.bin, which is not safe to load or damaged \(save it as safeten"
        ):
            check_model(str(folder), {}, make_tokenizer())
    assert "have run this" not in capsys.readouterr().out


def test_more_tokens_than_embeddings(folder):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(BadModel, match=r"numbers 77 tokens, and its embeddings have 76 rows .*'<new>' has none"):
        check_model(str(folder), {}, tokenizer)


def test_nothing_is_said_of_files_that_can_be_used(folder):
    check_model(str(folder), {}, make_tokenizer())
    check_model(str(folder), {"dtype": "bfloat16", "variant": "fp16"}, make_tokenizer())
    rewrite(folder / "config.json", architectures=["OfRemoteCode"])
    check_model(str(folder), {}, make_tokenizer())
