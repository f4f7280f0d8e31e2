"""Files of a model that cannot be used: one sentence that names the file, before weights are read."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import make_tokenizer
from trl_kd.sampling.loading import load_model
from trl_kd.sampling.model_errors import BadModel
from trl_kd.sampling.model_files import check_model


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
    "num_hidden_layers": ("2", -1, 0, 1, 3),
    "intermediate_size": (2.5, 64),
    "model_type": ("nope", None, 3),
    "architectures": (5, [5], "LlamaForCausalLM", ["NoSuch"], [], None),
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
    sizes = {"model.layers.0.mlp.up_proj.weight": ("3 × 16", "32 × 16"), "model.norm.weight": ("3", "16")}
    for name, (there, wanted) in sizes.items():
        save_file(weights | {name: weights[name][:3].contiguous()}, folder / "model.safetensors")
        said = (
            rf"model.safetensors and config.json are not of one model: `{name}` is {there} there, and {wanted} by the"
        )
        with pytest.raises(BadModel, match=said):
            check_model(str(folder), {}, make_tokenizer())
        check_model(str(folder), {"ignore_mismatched_sizes": True}, make_tokenizer())


def without(folder: Path, *names: str) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(names)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def test_weights_that_are_missing(folder):
    without(folder, "model.layers.0.")
    said = (
        r"config\.json describes 9 weights that are not in model\.safetensors, and would be random: "
        r"`model\.layers\.0\.input_layernorm\.weight`, `model\.layers\.0\.mlp\.down_proj\.weight`, .*, …; save the whole"
    )
    with pytest.raises(BadModel, match=said):
        check_model(str(folder), {}, make_tokenizer())
    with pytest.raises(BadModel, match=said):  # the loader looks too: at weights that were not here, or are quantised
        load_model(str(folder), {})


def test_weights_that_are_missing_by_an_option(folder):
    check_model(str(folder), {"num_hidden_layers": 1}, make_tokenizer())  # on purpose
    with pytest.raises(BadModel, match=r"9 weights that are not in model\.safetensors.* `model\.layers\.2\."):
        check_model(str(folder), {"num_hidden_layers": 3}, make_tokenizer())


def test_weights_of_a_layer_that_nothing_reads(folder):
    rewrite(folder / "config.json", num_hidden_layers=1)
    said = r"config\.json describes fewer layers than model\.safetensors has: nothing would read `model\.layers\.1\."
    with pytest.raises(BadModel, match=said):
        check_model(str(folder), {}, make_tokenizer())
    rewrite(folder / "config.json", num_nextn_predict_layers=1)  # DeepSeek's, which transformers leaves out
    check_model(str(folder), {}, make_tokenizer())


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 76}
LAYERS = {**SMALL, "intermediate_size": 32, "num_key_value_heads": 1}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK = {**LATENT, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
FAMILIES = {
    "tied": ("LlamaConfig", LAYERS | {"tie_word_embeddings": True}, "model.embed_tokens."),
    "fused experts": ("MixtralConfig", LAYERS | {"num_local_experts": 4}, "model.layers.1.block_sparse_moe.experts."),
    "more experts": ("Qwen3MoeConfig", LAYERS | EXPERTS, "model.layers.0.mlp.experts.2."),
    "experts in one": (
        "GptOssConfig",
        LAYERS | {"num_local_experts": 4, "head_dim": 8},
        "model.layers.1.mlp.experts.",
    ),
    "routers with buffers": ("DeepseekV3Config", LAYERS | DEEPSEEK | {"num_key_value_heads": 2}, "model.norm."),
    "turned": ("GPT2Config", SMALL, "transformer.h.1.attn.c_attn."),
    "prefixes": ("GPTNeoXConfig", SMALL | {"intermediate_size": 32}, "gpt_neox.layers.1.mlp."),
    "computed": ("FalconConfig", SMALL, "transformer.h.0.mlp."),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_does_without_is_not_missed(family, tmp_path):
    config, settings, name = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(getattr(transformers, config)(**settings))
    model.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    check_model(str(tmp_path), {"dtype": "bfloat16", "attn_implementation": "eager"})
    assert torch.equal(torch.get_rng_state(), state)
    without(tmp_path, name)
    with pytest.raises(BadModel, match=r"config\.json .*model"):
        check_model(str(tmp_path), {})


def test_weights_under_the_names_of_the_backbone(folder):
    """As saved by `AutoModel`: transformers adds the prefix while it loads."""
    weights = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): w for name, w in weights.items()}, folder / "model.safetensors")
    check_model(str(folder), {}, make_tokenizer())
    load_model(str(folder), {})


def test_a_classifier_without_its_head(folder):
    config = json.loads((folder / "config.json").read_text())
    head = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "x"}, "label2id": {"x": 0}}
    (folder / "config.json").write_text(json.dumps(config | head))
    with pytest.raises(BadModel, match=r"describes 1 weights .* `score\.weight`"):
        check_model(str(folder), {}, make_tokenizer())


def test_weights_of_the_hub_that_are_here(folder, tmp_path, monkeypatch):
    """What is downloaded is looked at as a folder is; what is not yet, is not."""
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (tmp_path / "hub" / "models--a--b" / "refs").mkdir()
    (tmp_path / "hub" / "models--a--b" / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, snapshot)
    options = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}
    check_model("a/b", options)
    without(snapshot, "model.norm.")
    with pytest.raises(BadModel, match=r"`model\.norm\.weight`"):
        check_model("a/b", options)
    (snapshot / "model.safetensors").unlink()
    check_model("a/b", options)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    check_model("a/b", options)


def test_options_that_are_none(folder):
    with pytest.raises(BadModel, match="`dtype` is 'float99': choose from 'auto', 'float32', 'bfloat16', 'float16'"):
        check_model(str(folder), {"dtype": "float99"})
    with pytest.raises(
        BadModel, match="`nosuch` is neither an option of `from_pretrained` nor a field of config.json"
    ):
        check_model(str(folder), {"nosuch": 1})
    check_model(
        str(folder), {"dtype": torch.bfloat16, "use_cache": False, "low_cpu_mem_usage": True, "device_map": None}
    )


def test_a_part_of_the_weights_that_is_missing(folder):
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
    with pytest.raises(BadModel, match=r"^model\.safetensors\.index\.json: there is no such file beside model-00002"):
        check_model(str(folder), {}, make_tokenizer())
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
        with pytest.raises(BadModel, match=r"^pytorch_model\.bin: it is damaged, or holds more .* as safetensors$"):
            check_model(str(folder), {}, make_tokenizer())
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BadModel, match=r"^pytorch_model\.bin: EOFError"):
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
    rewrite(folder / "config.json", architectures=["OfRemoteCode"], auto_map={"AutoModelForCausalLM": "a.B"})
    check_model(str(folder), {}, make_tokenizer())
