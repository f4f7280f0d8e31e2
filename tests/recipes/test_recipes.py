"""Every recipe is understood and runs: two steps, on tiny models made on the spot."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from tests.conftest import make_model
from trl_kd.pairs import load_pairs
from trl_kd.preferences.reward_function import load_function
from trl_kd.rewards.reward_model import from_student
from trl_kd.scripts import cli, mm_pbkd, online_pbkd, pbkd
from trl_kd.scripts.arguments import parse
from trl_kd.scripts.pairs_arguments import PairsArguments


RECIPES = Path(__file__).parents[2] / "recipes"
ALL = sorted(RECIPES.rglob("*.yaml"))
PAIRS = [path for path in ALL if path.stem.startswith("pairs")]
FILES = [path for path in ALL if path not in PAIRS]
MATCHING = [path for path in FILES if path.stem.startswith("mm_pbkd")]
ONLINE = [path for path in FILES if path.stem.startswith("online_pbkd")]
ROUNDS = [path for path in FILES if path.stem.endswith("rounds")]

pytestmark = pytest.mark.skipif("WORLD_SIZE" in os.environ, reason="runs in this process")


def say(role, text):
    return [{"role": role, "content": text}]


@pytest.fixture
def chats(pairs, tmp_path) -> str:
    rows = [
        {
            "prompt": say("user", row["prompt"]),
            "chosen": say("assistant", row["chosen"]),
            "rejected": say("assistant", row["rejected"]),
            "teacher_side": "chosen" if index else "rejected",
            "preference": 1.0 if index < 6 else 0.5,
        }
        for index, row in enumerate(pairs)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def sums(tmp_path) -> str:
    """Prompts of running sums, each with its answer."""
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{n}+1+1=", "answer": f"{n + 1},{n + 2}"}) for n in range(4)))
    return str(path)


@pytest.fixture
def reward_dir(tiny_dir, tmp_path) -> str:
    """A reward model with the student's tokenizer."""
    folder = tmp_path / "reward"
    from_student(make_model()).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_dir).save_pretrained(folder)
    return str(folder)


def test_there_are_recipes():
    for paths in (MATCHING, [path for path in FILES if path not in MATCHING]):
        assert {"running_sums", "qwen2.5", "gsm8k"} <= {path.parent.name for path in paths}


@pytest.mark.parametrize("path", ALL, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_its_header_says_what_it_takes(path):
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    for word in ("Data:", "Hardware:", "Time:", "Measured:"):
        assert word in header, f"{path.name} does not say its {word}"
    assert f"--config {path.relative_to(RECIPES.parent)}" in header


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
class TestRecipe:
    def test_it_runs_two_steps(
        self, path, chats, sums, tiny_dir, teacher_dir, reward_dir, tmp_path, capfd, monkeypatch
    ):
        monkeypatch.chdir(RECIPES.parent)
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        words = {
            "model_name_or_path": tiny_dir,
            "dataset_name": chats,
            "output_dir": tmp_path / "out",
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "use_cpu": True,
            "bf16": False,
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        if path in MATCHING:
            command = "mm-pbkd"
            words |= {"preference_dataset": chats, "pair_max_length": 64, "max_completion_length": 4}
            words["q_warmup_steps"] = 2
        elif path in ONLINE:
            command = "online-pbkd"
            words |= {"max_completion_length": 4, "rm_warmup_accuracy": 0, "rm_max_length": 64}
        else:
            command, words["max_length"] = "pbkd", 64
        if path in ROUNDS + ONLINE:
            pairs = yaml.safe_load(Path(RECIPES.parent, recipe["pairs_config"]).read_text(encoding="utf-8"))
            pairs["teacher"] = teacher_dir
            pairs.pop("teacher_base_url", None)
            graded = not pairs["preference"].startswith("verifier:")
            if graded:
                pairs["preference"] = f"reward_model:{reward_dir}"
                pairs["preference_model_init_kwargs"] = {"dtype": "float32"}
            if path in ROUNDS:
                del words["dataset_name"]
                words |= {"rounds": 2, "prompts_per_round": 4}
                pairs |= {"dataset_name": sums, "student_max_new_tokens": 4}
            elif not graded:
                words["dataset_name"] = sums
            (tmp_path / "its_pairs.yaml").write_text(yaml.safe_dump(pairs))
            words["pairs_config"] = tmp_path / "its_pairs.yaml"
        if "teacher_model_name_or_path" in recipe:
            words["teacher_model_name_or_path"] = teacher_dir
        if "load_in_4bit" in recipe.get("teacher_model_init_kwargs", {}):
            pytest.importorskip("bitsandbytes")
        if "reward_model_name_or_path" in recipe:
            words["reward_model_name_or_path"] = teacher_dir
        argv = [word for key, value in words.items() for word in (f"--{key}", str(value))]
        assert cli.main([command, "--config", str(path), *argv, "--dry_run"]) == 0, capfd.readouterr().err
        assert cli.main([command, "--config", str(path), *argv]) == 0, capfd.readouterr().err
        saved = "adapter_model" if recipe.get("use_peft") else "model"
        assert (tmp_path / "out" / f"{saved}.safetensors").is_file()


@pytest.mark.parametrize("method", ["pbkd", "mm_pbkd"])
def test_the_running_sums_recipe_is_what_the_demo_does(method):
    from trl_kd.demo.experiment import Cell, DemoSettings
    from trl_kd.demo.methods import recipe as demo_recipe
    from trl_kd.tasks import TASKS

    settings, task = DemoSettings(), TASKS["running_sums"]
    recipe = yaml.safe_load((RECIPES / "running_sums" / f"{method}.yaml").read_text(encoding="utf-8"))
    cell = Cell(task, 0, settings, Path("runs/demo/running_sums/seed0"))
    assert recipe["model_name_or_path"] == str(cell.model_folder("start"))
    assert recipe["dataset_name"] == str(cell.folder / "pairs")
    assert recipe["max_steps"] == settings.steps
    assert recipe["per_device_train_batch_size"] == settings.batch_size
    assert recipe["learning_rate"] == settings.learning_rate
    row = {"prompt": "1=", "chosen": "1", "rejected": "2", "preference": 1.0, "teacher_side": "chosen"}
    done = demo_recipe(method, [row], cell.model_folder("teacher"), task)
    assert {name: recipe[name] for name in done.settings} == done.settings
    if method == "mm_pbkd":
        assert recipe["teacher_model_name_or_path"] == done.arguments["teacher_model"]
        assert recipe["preference_dataset"] == recipe["dataset_name"]


def test_the_rounds_are_the_demos_too():
    """The same start, teacher, questions and number of updates as its offline runs."""
    offline, rounds, pairs = (
        yaml.safe_load((RECIPES / "running_sums" / f"{name}.yaml").read_text(encoding="utf-8"))
        for name in ("pbkd", "pbkd_rounds", "pairs_rounds")
    )
    assert rounds["rounds"] * rounds["max_steps"] == offline["max_steps"]
    for name in ("model_name_or_path", "per_device_train_batch_size", "learning_rate", "seed", "max_length"):
        assert rounds[name] == offline[name]
    assert pairs["dataset_name"] == f"{offline['dataset_name']}/data"
    assert str(RECIPES.parent / rounds["pairs_config"]) == str(RECIPES / "running_sums/pairs_rounds.yaml")
    reward = load_function(f"{RECIPES / 'running_sums' / 'reward.py'}:correct")
    assert reward(completions=["1,2", " 1,2 ", "2"], answer=["1,2"] * 3) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "path", [path for path in PAIRS if path.stem == "pairs"], ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_pairs_recipes_run(path, tiny_dir, teacher_dir, tmp_path, monkeypatch, capfd):
    """On tiny models, both local, with three prompts in the place of the Hub's."""
    monkeypatch.chdir(RECIPES.parent)
    questions = [
        {"question": f"{n}+1=", "prompt": say("user", f"{n}+1="), "answer": f"#### {n + 1}"} for n in range(3)
    ]
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    column = recipe.get("prompt_column", "prompt")
    rows = [{name: row[name] for name in (column, "answer")} for row in questions]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe |= {"dataset_name": str(tmp_path / "prompts.jsonl"), "teacher": teacher_dir, "student": tiny_dir}
    recipe |= {"teacher_max_new_tokens": 4, "student_max_new_tokens": 4, "student_model_init_kwargs": None}
    recipe["output_dir"] = str(tmp_path / "out")
    for name in ("dataset_config", "teacher_base_url"):  # of the Hub, and of a server
        recipe.pop(name, None)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main(["pairs", "--config", str(tmp_path / "tiny.yaml")]) == 0, capfd.readouterr().err
    pairs = load_pairs(tmp_path / "out")
    assert len(pairs) >= 3
    assert pairs[0]["prompt"] == say("user", "0+1=")
    assert pairs[0]["chosen"][0]["role"] == "assistant"


def test_who_is_right_on_gsm8k():
    reward = load_function(f"{RECIPES / 'gsm8k' / 'reward.py'}:correct")
    truth = "2 + 1,000 = 1002\n#### 1,002"
    said = ["It is 1,002.", "so 1002.0", "It is 7", "none", say("assistant", "1 002 or 1002")]
    assert reward(completions=said, answer=[truth] * 5) == [1.0, 1.0, 0.0, 0.0, 1.0]


def test_commands_in_headers_are_understood():
    classes = {
        "pbkd": pbkd.DATACLASSES,
        "mm-pbkd": mm_pbkd.DATACLASSES,
        "online-pbkd": online_pbkd.DATACLASSES,
        "pairs": (PairsArguments,),
    }
    for path in ALL:
        header = "\n".join(line[1:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
        found = re.findall(r"trl-kd (pbkd|mm-pbkd|online-pbkd|pairs) ((?:.*\\\n)*.*)", header)
        assert found, path
        for command, words in found:
            argv = words.replace("\\\n", " ").split()
            argv = [str(RECIPES.parent / word) if word.startswith("recipes/") else word for word in argv]
            parse(classes[command], argv, f"trl-kd {command}")
