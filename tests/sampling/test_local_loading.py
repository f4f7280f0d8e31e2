"""What a local model is loaded from, and what is recorded of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.conftest import make_model, make_tokenizer, save_tiny
from tests.sampling.test_local import SETTINGS, TOKENIZER, answers, make_requests
from trl_kd.sampling import SamplingSettings
from trl_kd.sampling.local import LocalSampler
from trl_kd.sampling.model_errors import BadModel


@pytest.fixture(scope="module")
def adapter_dir(tiny_dir, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("adapter"))
    sampler = LocalSampler(tiny_dir, SETTINGS)
    torch.manual_seed(0)
    model = get_peft_model(sampler.model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    return folder


def test_a_model_by_name_is_loaded_on_demand_and_freed(tiny_dir):
    sampler = LocalSampler(tiny_dir, SETTINGS)
    sampler.describe()
    assert sampler._model is None
    drawn = {(r.key, s): a for r, s, a in sampler.sample(make_requests())}
    assert drawn == answers(make_model())
    sampler.close()
    assert sampler._model is None
    assert {(r.key, s): a for r, s, a in sampler.sample(make_requests())} == drawn


def test_an_adapter_changes_answers(tiny_dir, adapter_dir):
    plain = answers(tiny_dir)
    adapted = answers(tiny_dir, adapter=adapter_dir)
    assert adapted != plain
    assert answers(adapter_dir) == adapted  # the folder names its base model
    given = PeftModel.from_pretrained(LocalSampler(tiny_dir, SETTINGS).model, adapter_dir)
    assert answers(given) == adapted


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_answers(tiny_dir, bits):
    pytest.importorskip("bitsandbytes")
    sampler = LocalSampler(tiny_dir, SETTINGS, model_init_kwargs={f"load_in_{bits}bit": True})
    drawn = list(sampler.sample(make_requests(2, (0, 1))))
    assert sampler.model.config.quantization_config.quant_method == "bitsandbytes"
    assert len(drawn) == 4
    assert sampler.describe()["model_options"] == {"dtype": "float32", f"load_in_{bits}bit": True}


def test_wrong_options_are_one_sentence(tiny_dir, adapter_dir):
    with pytest.raises(ValueError, match="`max_batch_tokens` is 0: it must be at least 1"):
        LocalSampler(tiny_dir, SETTINGS, max_batch_tokens=0)
    with pytest.raises(ValueError, match="`adapter` is for a model given by name, and `model` is a LlamaForCausalLM"):
        LocalSampler(make_model(), SETTINGS, adapter=adapter_dir)
    with pytest.raises(ValueError, match="is an adapter already"):
        LocalSampler(adapter_dir, SETTINGS, adapter=adapter_dir)
    soft = get_peft_model(make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="only adapters of weights"):
        answers(soft)


# Descriptions


def describe(model, settings=SETTINGS, **options) -> dict:
    return LocalSampler(model, settings, **options).describe()


def test_descriptions_tell_apart_what_answers_differently(tiny_dir, adapter_dir, tmp_path):
    other = make_tokenizer()
    other.chat_template = "{{ messages }}"
    trained = make_model()
    trained.model.layers[1].mlp.up_proj.weight.data += 0.01
    lora = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    changed = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    changed.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.data += 0.01
    described = [
        describe(tiny_dir),
        describe(tiny_dir, SamplingSettings(max_new_tokens=12, seed=4)),
        describe(tiny_dir, adapter=adapter_dir),
        describe(tiny_dir, tokenizer=other),
        describe(tiny_dir, model_init_kwargs={"dtype": "bfloat16"}),
        describe(tiny_dir, model_init_kwargs={"load_in_4bit": True}),
        describe(tiny_dir, model_init_kwargs={"revision": "v2"}, tokenizer=TOKENIZER),
        describe(tiny_dir, chat_template_kwargs={"enable_thinking": False}),
        *(describe(model, tokenizer=TOKENIZER) for model in (make_model(), trained, lora, changed)),
    ]
    for i, one in enumerate(described):
        assert all(one != another for another in described[i + 1 :])


def test_descriptions_leave_out_where_and_how_fast_it_runs(tiny_dir):
    options = {"device_map": "cpu", "attn_implementation": "sdpa", "token": "hf_secret"}
    assert describe(tiny_dir, max_batch_tokens=5, read_ahead=2, model_init_kwargs=options) == describe(tiny_dir)
    assert describe(make_model(), tokenizer=TOKENIZER) == describe(make_model(), tokenizer=TOKENIZER)


def test_a_folder_with_other_weights_is_another_model(tmp_path):
    folder = save_tiny(tmp_path / "student")
    before = describe(folder)
    save_tiny(tmp_path / "student", seed=1)
    assert describe(folder) != before


# Settings


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("temperature", float("nan")), ("top_p", 0), ("top_p", 1.1), ("max_new_tokens", 0)],
)
def test_settings_outside_their_range_are_one_sentence(field, value):
    with pytest.raises(ValueError, match=f"`{field}` is {value}: it must be"):
        SamplingSettings(**{field: value})


def test_seeds_of_answers():
    seeds = {SETTINGS.answer_seed(f"k{i}", sample) for i in range(50) for sample in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert SamplingSettings(stop="x").stop == ("x",)


# Adapters that cannot be used


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    return r"adapter_model\.safetensors: SafetensorError"


def gone(folder):
    (folder / "adapter_model.safetensors").unlink()
    return r"adapter_model\.safetensors: there is no such file"


def partly_gone(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    kept = {name: weight for name, weight in weights.items() if ".layers.1." not in name}
    save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})
    return r"adapter_model\.safetensors lacks weights that adapter_config\.json describes: .*layers\.1\."


def of_another_rank(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    return r"adapter_model\.safetensors: RuntimeError: .*size mismatch"


def of_no_kind(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "NOSUCH"}))
    return r"adapter_config\.json: KeyError: 'NOSUCH'"


def with_targets_that_are_not_there(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["nosuch"]}))
    return r"adapter_config\.json: .*nosuch"


@pytest.mark.parametrize(
    "spoil", [cut, gone, partly_gone, of_another_rank, of_no_kind, with_targets_that_are_not_there]
)
def test_an_adapter_that_cannot_be_used(spoil, tiny_dir, adapter_dir, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(adapter_dir, tmp_path / "adapter"))
    said = rf"The model '{tiny_dir}' with the adapter '{folder}' cannot be loaded: {folder}/{spoil(folder)}"
    with pytest.raises(BadModel, match=said):
        LocalSampler(tiny_dir, SETTINGS, adapter=str(folder)).load()
    monkeypatch.setattr("trl_kd.sampling.local.load_model", None)
    for sampler in (LocalSampler(tiny_dir, SETTINGS, adapter=str(folder)), LocalSampler(str(folder), SETTINGS)):
        with pytest.raises(BadModel, match=said):
            sampler.check_model()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"base_model_name_or_path": 5}'])
def test_a_config_of_an_adapter_that_is_none(content, tiny_dir, adapter_dir, tmp_path):
    folder = Path(shutil.copytree(adapter_dir, tmp_path / "adapter"))
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(BadModel, match=r"adapter_config\.json: "):
        LocalSampler(str(folder), SETTINGS)


def test_adapters_that_can_be_used(tiny_dir, adapter_dir, tmp_path):
    state = torch.get_rng_state()
    LocalSampler(tiny_dir, SETTINGS, adapter=adapter_dir).check_model()
    LocalSampler(adapter_dir, SETTINGS, model_init_kwargs={"load_in_4bit": True}).check_model()
    assert torch.equal(torch.get_rng_state(), state)
    trained = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    trained.save_pretrained(tmp_path)
    LocalSampler(tiny_dir, SETTINGS, adapter=str(tmp_path)).check_model()


def test_the_base_of_an_adapter_is_looked_at(tiny_dir, adapter_dir, tmp_path):
    base = Path(shutil.copytree(tiny_dir, tmp_path / "base"))
    (base / "model.safetensors").write_bytes(b"")
    with pytest.raises(BadModel, match=r"cannot be loaded: model\.safetensors: "):
        LocalSampler(str(base), SETTINGS, adapter=adapter_dir).check_model()
