"""Models whose files cannot be used: every command says which field and file, before weights load or anything is asked."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.conftest import make_tokenizer, refuse_weights
from tests.scripts.conftest import replaced


UNREADABLE = "cannot be loaded: its tokenizer cannot be read: tokenizer.json: "


def impossible(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 0}))
    return "cannot be loaded: config.json: ZeroDivisionError"


def unsafe(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cprint\n(S'run'\ntR.")
    return "cannot be loaded: pytorch_model.bin: it is damaged, or holds more than weights and is not safe to load"


def large(folder: Path) -> str:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    return "cannot be loaded: its tokenizer numbers 77 tokens, and its embeddings have 76 rows"


def untokenized(folder: Path) -> str:
    (folder / "tokenizer.json").write_text("{}")
    return UNREADABLE


def incomplete(folder: Path) -> str:
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if ".layers.0." not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return (
        "cannot be loaded: config.json describes 9 weights that are not in model.safetensors, and would be random: "
        "`model.layers.0.input_layernorm.weight`, "
    )


def nameless(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuch"]}))
    return "cannot be loaded: config.json: `architectures` is ['NoSuch'], and transformers "


@pytest.fixture(params=[impossible, unsafe, large, untokenized, incomplete, nameless])
def bad(request, tiny_dir, tmp_path, monkeypatch) -> tuple[str, str]:
    """The folder of a model that cannot be loaded, and what is to be said of it."""
    refuse_weights(monkeypatch)
    folder = tmp_path / "bad"
    shutil.copytree(tiny_dir, folder)
    return str(folder), request.param(folder)


def check(outcome, field: str, bad: tuple[str, str]) -> None:
    name, said = bad
    assert f"`{field}` is {name!r}, which {said}" in outcome.error
    assert "a TypeError" not in outcome.error


@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]])
def test_a_student(dry_run, bad, trl_kd, base):
    words = replaced(base, "--model_name_or_path", bad[0])
    check(trl_kd(*words, *dry_run), "model_name_or_path", bad)


@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]])
@pytest.mark.parametrize("field", ["model_name_or_path", "teacher_model_name_or_path"])
def test_models_of_distributions(field, dry_run, bad, trl_kd, mm_base):
    outcome = trl_kd(*replaced(mm_base, f"--{field}", bad[0]), *dry_run)
    if bad[1] == UNREADABLE and field.startswith("teacher") and not dry_run:
        assert f"The teacher {bad[0]!r} has no tokenizer that can be read" in outcome.error
        assert "(tokenizer.json: " in outcome.error
    elif "tokenizer" in bad[1] and field.startswith("teacher") and not dry_run:  # compared with the student's first
        assert "The teacher has another vocabulary than the student" in outcome.error
    else:
        check(outcome, field, bad)


@pytest.mark.parametrize("dry_run", [[], ["--dry_run"]])
@pytest.mark.parametrize("field", ["teacher", "student", "preference"])
def test_models_of_pairs(field, dry_run, bad, trl_kd, tiny_dir, jsonl, tmp_path):
    named = {"teacher": tiny_dir, "student": tiny_dir, "preference": "teacher_wins"}
    named[field] = f"likelihood:{bad[0]}" if field == "preference" else bad[0]
    words = [word for name, value in named.items() for word in (f"--{name}", value)]
    prompts = jsonl([{"prompt": "1+1="}], "prompts.jsonl")
    out = tmp_path / "pairs"
    check(trl_kd("pairs", "--dataset_name", prompts, *words, "--output_dir", str(out), *dry_run), field, bad)
    assert not out.exists()


@pytest.mark.parametrize("field", ["model_name_or_path", "teacher"])
def test_models_of_rounds(field, bad, trl_kd, base, tiny_dir, jsonl, tmp_path):
    teacher = bad[0] if field == "teacher" else tiny_dir
    settings = {"dataset_name": jsonl([{"prompt": "1+1="}], "prompts.jsonl"), "preference": "teacher_wins"}
    (tmp_path / "pairs.yaml").write_text(yaml.safe_dump(settings | {"teacher": teacher}))
    words = replaced(replaced(base, "--dataset_name"), "--model_name_or_path", tiny_dir)
    words += ["--rounds", "1", "--pairs_config", str(tmp_path / "pairs.yaml")]
    if field != "teacher":
        words = replaced(words, "--model_name_or_path", bad[0])
    check(trl_kd(*words), field, bad)


@pytest.mark.parametrize("field", ["model_name_or_path", "reward_model_name_or_path", "reward_funcs"])
def test_models_of_an_online_run(field, bad, trl_kd, base, tiny_dir, jsonl, pairs):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    words = ["online-pbkd", *replaced(base, "--dataset_name", jsonl(rows, "prompts.jsonl"))[1:]]
    words = replaced(words, "--model_name_or_path", tiny_dir)
    words += ["--preference_dataset", jsonl(pairs), "--num_generations", "2", "--rm_warmup_accuracy", "0"]
    outcome = trl_kd(*words, f"--{field}", bad[0])
    if field == "reward_model_name_or_path" and "NoSuch" in bad[1]:
        assert "with the classes ['NoSuch'] and 2 labels: give a sequence-classification checkpoint" in outcome.error
    elif field == "reward_model_name_or_path" and bad[1] == UNREADABLE:
        assert "The tokenizer of `reward_model_name_or_path`" in outcome.error
    else:
        check(outcome, field, bad)


def test_a_reward_function_without_a_head(trl_kd, base, tiny_dir, jsonl, pairs):
    """TRL would give it a random one."""
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    words = ["online-pbkd", *replaced(base, "--dataset_name", jsonl(rows, "prompts.jsonl"))[1:]]
    words += ["--adversary", "off", "--num_generations", "2", "--reward_funcs", tiny_dir]
    said = f"`reward_funcs` names {tiny_dir!r}, of the class LlamaForCausalLM, whose scores would be random"
    assert said in trl_kd(*words).error
