"""The five commands on inputs as small as they can be, and what each must come to."""

import hashlib
import json
import re
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.compat.cases import numbers_of
from tests.conftest import save_tiny


OUT = "out"
AT_ONCE = 2
"""Requests that are under way together."""

QUESTIONS = ["1+1=", "2+3=", "40+2=", "7-5=", "12+13=", "9*9="]
REWARDS = """\
def digits(completions, **columns):
    return [float(sum(character.isdigit() for character in str(text))) for text in completions]
"""
TRAINING = {
    "model_name_or_path": "start",
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "logging_steps": 1,
    "max_steps": 4,  # in the middle of an epoch
    "save_steps": 1,
    "save_total_limit": 2,
    "learning_rate": 0.003,
    "per_device_train_batch_size": 2,
    "seed": 3,
}
MOVING = {"dual_learning_rate": 0.5, "preference_nll_target": 0.1, "confidence_radius": 0.05}
ASKING = {"teacher": "api:teacher", "teacher_max_new_tokens": 6, "max_concurrency": AT_ONCE, "seed": 3}
SCORED = {"preference": "verifier:rewards.py:digits", "preference_scale": 1.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "pairs": ASKING
    | {
        "dataset_name": "questions.jsonl",
        "student": "start",
        "student_max_new_tokens": 4,
        "num_student_samples": 2,
        "preference": "judge:judge",
    },
    "pbkd": TRAINING | MOVING | {"dataset_name": "pairs.jsonl"},
    "mm-pbkd": TRAINING
    | {
        "dual_learning_rate": 0.5,
        "confidence_radius": 0.05,
        "teacher_model_name_or_path": "teacher",
        "dataset_name": "answers.jsonl",
        "preference_dataset": "pairs.jsonl",
        "lmbda": 0.5,
        "max_completion_length": 4,
        "q_warmup_steps": 2,
    },
    "online-pbkd": TRAINING
    | {
        "dataset_name": "questions.jsonl",
        "pairs_config": "asking.yaml",
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 4,
        "rm_lora_r": 0,
        "rm_learning_rate": 0.01,
        "rm_warmup_accuracy": 0.0,
    },
    "rounds": TRAINING
    | MOVING
    | {"rounds": 2, "pairs_config": "sampling.yaml", "prompts_per_round": 3, "max_steps": 3, "save_total_limit": 1},
    "asking": ASKING | SCORED,
    # Answers of the student end by a letter, not by their length: a cut one has no end to learn
    "sampling": ASKING
    | SCORED
    | {
        "dataset_name": "questions.jsonl",
        "student_stop": list("abcdefghijklmnopqrstuvwxyz"),
        "student_max_new_tokens": 60,
    },
}


@dataclass(frozen=True)
class Command:
    """
    Parameters:
        name (`str`): Of `CONFIGS`.
        begins (`str`): Command of `trl-kd`.
        paid_twice (`int`): Requests that a kill may cost, as docs/reliability.md says.
    """

    name: str
    begins: str
    paid_twice: int = 2 * AT_ONCE

    @property
    def words(self) -> list[str]:
        return [self.begins, "--config", f"{self.name}.yaml", "--output_dir", OUT]


COMMANDS = {
    command.name: command
    for command in (
        Command("pairs", "pairs", 4 * AT_ONCE),  # its judge is asked in both orders
        Command("pbkd", "pbkd"),
        Command("mm-pbkd", "mm-pbkd"),
        Command("online-pbkd", "online-pbkd"),
        Command("rounds", "pbkd"),
    )
}


def write_inputs(folder: Path) -> None:
    """What all commands read."""
    save_tiny(folder / "start", num_hidden_layers=1)
    save_tiny(folder / "teacher", seed=1, num_hidden_layers=1)
    (folder / "rewards.py").write_text(REWARDS)
    for name, config in CONFIGS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    answers = ["2", "5", "42", "2", "25", "81"]
    worse = ["3", "six", "4", "3", "2.5", "8"]
    rows: dict[str, list[dict[str, str]]] = {
        "questions": [{"prompt": question} for question in QUESTIONS],
        "answers": [{"prompt": q, "completion": a} for q, a in zip(QUESTIONS, answers, strict=True)],
        "pairs": [
            {"prompt": q, "chosen": a, "rejected": w} for q, a, w in zip(QUESTIONS, answers, worse, strict=True)
        ],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def work_folder(folder: Path, inputs: Path) -> Path:
    """A folder of its own for a run: what is read is not below it, so that all names are relative and the same."""
    folder.mkdir()
    for path in inputs.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


# ---- What a run comes to -------------------------------------------------------------------------------------------------


def read_result(folder: Path) -> dict[str, Any]:
    """Every file of a finished run by its name below `OUT`, with what it holds: its bytes, unless a clock or the number of
    requests has a part in them."""
    out = folder / OUT
    return {str(path.relative_to(out)): _read(path) for path in sorted(out.rglob("*")) if path.is_file()}


def _read(path: Path) -> Any:
    if path.name == "trainer_state.json":
        state = json.loads(path.read_text(encoding="utf-8"))
        return {"step": state["global_step"], "logs": numbers_of(state["log_history"])}
    if path.name == "answers.db":
        return _without_usage("\n".join(_rows(path)))
    if path.name in ("training_args.bin", "_lock"):  # how and when it was begun
        return None
    if path.suffix in (".json", ".md", ".html"):
        return _without_usage(path.read_text(encoding="utf-8"))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _rows(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        tables = ("settings", "answers", "labels", "nulls")
        return [f"{name} {row}" for name in tables for row in sorted(connection.execute(f"SELECT * FROM {name}"))]


def _without_usage(text: str) -> str:
    """A text without the number of requests, which counts those that were paid twice, too."""
    return re.sub(
        r'requests to the \w+.*?completion tokens|"requests": .*?"cost": [\d.]+', "usage", text, flags=re.DOTALL
    )


def counted(folder: Path) -> int:
    """Requests that a finished run has counted."""
    usages = [usage for path in folder.rglob("answers.db") for usage in _usages(path)]
    return sum(json.loads(usage)["requests"] for usage in usages)


def _usages(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return [value for (value,) in connection.execute("SELECT value FROM settings WHERE name LIKE 'usage %'")]


def asked(bodies: list[dict[str, Any]]) -> Counter[tuple[Any, ...]]:
    """How often a server was asked for each thing."""
    return Counter((b["model"], b["messages"][-1]["content"], b.get("seed"), b.get("n") or 1) for b in bodies)
