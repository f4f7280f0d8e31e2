"""Every recipe is understood and runs: two steps, on tiny models made on the spot."""

import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from trl_kd.scripts import cli


RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(RECIPES.rglob("*.yaml"))

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


def test_there_are_recipes():
    assert {"running_sums", "qwen2.5", "gsm8k"} <= {path.parent.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
class TestRecipe:
    def test_its_header_says_what_it_takes(self, path):
        header = path.read_text(encoding="utf-8").split("\n\n")[0]
        assert all(line.startswith("#") for line in header.splitlines())
        for word in ("Data:", "Hardware:", "Time:", "Measured:"):
            assert word in header, f"{path.name} does not say its {word}"
        assert f"--config {path.relative_to(RECIPES.parent)}" in header

    def test_it_runs_two_steps(self, path, chats, tiny_dir, teacher_dir, tmp_path, capfd):
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        words = {
            "model_name_or_path": tiny_dir,
            "dataset_name": chats,
            "output_dir": tmp_path / "out",
            "max_steps": 2,
            "max_length": 64,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "use_cpu": True,
            "bf16": False,
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        if "teacher_model_name_or_path" in recipe:
            pytest.importorskip("bitsandbytes")
            words["teacher_model_name_or_path"] = teacher_dir
        argv = [word for key, value in words.items() for word in (f"--{key}", str(value))]
        assert cli.main(["pbkd", "--config", str(path), *argv, "--dry_run"]) == 0, capfd.readouterr().err
        assert cli.main(["pbkd", "--config", str(path), *argv]) == 0, capfd.readouterr().err
        saved = "adapter_model" if recipe.get("use_peft") else "model"
        assert (tmp_path / "out" / f"{saved}.safetensors").is_file()


def test_the_running_sums_recipe_is_what_the_demo_does():
    from trl_kd.scripts.demo_experiment import Cell, DemoSettings
    from trl_kd.tasks import TASKS

    settings = DemoSettings()
    recipe = yaml.safe_load((RECIPES / "running_sums" / "pbkd.yaml").read_text(encoding="utf-8"))
    cell = Cell(TASKS["running_sums"], 0, settings, Path("runs/demo/running_sums/seed0"))
    assert recipe["model_name_or_path"] == str(cell.model_folder("start"))
    assert recipe["dataset_name"] == str(cell.folder / "pairs" / "pairs.jsonl")
    assert recipe["max_steps"] == settings.steps
    assert recipe["per_device_train_batch_size"] == settings.batch_size
    assert recipe["learning_rate"] == settings.learning_rate


class TestMakePairs:
    @pytest.fixture
    def script(self, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["make_pairs.py"])
        return runpy.run_path(str(RECIPES / "make_pairs.py"), run_name="make_pairs")

    def test_its_pairs_are_what_the_recipes_read(self, script, tiny_dir, teacher_dir, tmp_path, capsys):
        questions = [{"question": f"{n}+1=", "answer": f"#### {n + 1}"} for n in range(6)]
        (tmp_path / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, questions)))
        output = tmp_path / "runs" / "pairs.jsonl"
        words = f"--dataset {tmp_path} --prompt_column question --verifier gsm8k --teacher {teacher_dir} "
        words += f"--student {tiny_dir} --max_new_tokens 4 --batch_size 4 --limit 5 --output {output}"
        script["main"](words.split())
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        assert len(rows) == 5
        assert rows[0]["prompt"] == say("user", "0+1=")
        assert set(rows[0]) == {"prompt", "chosen", "rejected", "preference", "teacher_side"}
        assert "PairCounts(total=5" in capsys.readouterr().out

    def test_who_is_right(self, script):
        row = {"answer": "2 + 1,000 = 1002\n#### 1,002"}
        assert script["last_number"]("costs $1,002.50 or so") == 1002.5
        assert script["last_number"]("none") is None
        prefer = script["_preference"]
        assert prefer("gsm8k", row, "It is 1002.", "It is 7") == 1.0
        assert prefer("gsm8k", row, "It is 7", "It is 1,002") == 0.0
        assert prefer("gsm8k", row, "so 1002", "the answer is 1002.0") == 0.5
        assert prefer(None, row, "anything", "else") == 1.0


def test_commands_in_headers_are_understood():
    parser = runpy.run_path(str(RECIPES / "make_pairs.py"), run_name="make_pairs")["_parser"]()
    for path in FILES:
        header = "\n".join(line[1:] for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
        for command in re.findall(r"make_pairs\.py ((?:.*\\\n)*.*)", header):
            parser.parse_args(command.replace("\\\n", " ").split())
