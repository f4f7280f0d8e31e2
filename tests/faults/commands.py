"""The commands in this process, so that one may run hundreds of times, and a complete recipe of each."""

import io
import json
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from accelerate.state import AcceleratorState

from tests.sampling.fault_server import FaultServer, chat
from tests.scripts.conftest import Outcome
from trl_kd.scripts import cli


WORDS = {name: [name] for name in ("pairs", "pbkd", "mm-pbkd", "online-pbkd")} | {"rounds": ["pbkd"]}
"""How each command is called; rounds are one of `pbkd`."""


def run(*words: str) -> Outcome:
    """Runs `trl-kd`. What it has changed in the environment and in accelerate's state is taken back."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ), redirect_stdout(out), redirect_stderr(err):
        for name in ("LOCAL_RANK", "TRL_KD_LAUNCHED"):
            os.environ.pop(name, None)
        os.environ["OPENAI_API_KEY"] = "sk-of-a-test"
        try:
            code = cli.main(list(words))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
    return Outcome(code, out.getvalue(), err.getvalue())


ROWS = [
    {"prompt": "1+1=", "completion": "2", "chosen": "2", "rejected": "3", "teacher_side": "chosen", "preference": 1.0},
    {
        "prompt": "2+3=",
        "completion": "5",
        "chosen": "6",
        "rejected": "5",
        "teacher_side": "rejected",
        "preference": 0.2,
    },
    {"prompt": "9*9=", "completion": "81", "chosen": "81", "rejected": "8", "teacher_side": "chosen", "preference": 1},
]

_TRAINING = {
    **{"bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 1},
    **{"per_device_train_batch_size": 2, "gradient_checkpointing": False},
}


class Recipes:
    """A context manager: a folder with models and rows, a server that answers, and a recipe of each command that passes its
    dry run."""

    def __init__(self, folder: Path, student: str, teacher: str):
        self.folder = folder
        self.out = folder / "out"
        self.student, self.teacher = str(folder / "student"), str(folder / "teacher")
        shutil.copytree(student, self.student)
        shutil.copytree(teacher, self.teacher)
        self.rows = str(folder / "rows.jsonl")
        Path(self.rows).write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
        self.server = FaultServer(lambda body, _: chat(*["2"] * min(body.get("n") or 1, 4)))

    def __enter__(self) -> "Recipes":
        self.server.__enter__()
        # So that a recipe without an address asks nobody else
        self.environment = mock.patch.dict(os.environ, OPENAI_BASE_URL=self.server.url)
        self.environment.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.environment.stop()
        self.server.__exit__(*error)

    def of(self, command: str) -> dict[str, Any]:
        """The recipe of a command, by the names of its fields."""
        asked = {"teacher": "api:m", "teacher_base_url": self.server.url, "preference": "teacher_wins"}
        student = {"model_name_or_path": self.student, "output_dir": str(self.out), **_TRAINING}
        own: dict[str, dict[str, Any]] = {
            "pairs": {
                **asked,
                **{"student": "api:m", "student_base_url": self.server.url, "dataset_name": self.rows},
                "output_dir": str(self.out),
            },
            "pbkd": {**student, "dataset_name": self.rows},
            "mm-pbkd": {
                **student,
                **{"teacher_model_name_or_path": self.teacher, "dataset_name": self.rows},
                **{"preference_dataset": self.rows, "max_completion_length": 4, "q_warmup_steps": 1},
            },
            "online-pbkd": {
                **student,
                **{"dataset_name": self.rows, "pairs_config": self.write("online.yaml", asked)},
                **{"num_generations": 2, "max_completion_length": 4, "rm_lora_r": 0, "rm_warmup_accuracy": 0},
            },
            "rounds": {
                **student,
                **{"rounds": 1, "pairs_config": self.write("rounds.yaml", asked | {"dataset_name": self.rows})},
            },
        }
        return own[command]

    def write(self, name: str, recipe: Any) -> str:
        """Writes a recipe, or the text or bytes of one, and returns its path."""
        if isinstance(recipe, dict):
            recipe = yaml.safe_dump(recipe, allow_unicode=True)
        path = self.folder / name
        path.write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode("utf-8", "surrogatepass"))
        return str(path)

    def dry_run(self, command: str, recipe: Any, *words: str) -> Outcome:
        return run(*WORDS[command], "--config", self.write("recipe.yaml", recipe), *words, "--dry_run")
