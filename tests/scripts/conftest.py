"""The command line, run in this process."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from trl_kd.scripts import cli


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The line that says what is wrong. There is one, it is the last but for commands that show the way out, and no
        traceback is in front of it."""
        assert self.code == 2, (self.out, self.err)
        assert "Traceback" not in self.err
        lines = self.err.splitlines()
        while lines[-1].startswith("  "):
            lines.pop()
        assert [line for line in lines if "error: " in line] == lines[-1:]
        return lines[-1]


@pytest.fixture
def trl_kd(capfd, monkeypatch):
    """Runs `trl-kd` with words given one by one or, where they have no spaces, together."""
    for name in ("LOCAL_RANK", "TRL_KD_LAUNCHED"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str) -> Outcome:
        capfd.readouterr()
        code = cli.main([str(word) for word in words])
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture(autouse=True)
def key(monkeypatch):
    """A key as `api:` models of OpenAI's server need one. No test reaches it."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-a-test")


@pytest.fixture
def jsonl(tmp_path):
    """Writes rows to a JSONL file and returns its path."""

    def write(rows: list[dict], name: str = "pairs.jsonl") -> str:
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def base(tiny_dir, jsonl, pairs, tmp_path) -> list[str]:
    """A command line that trains for two steps."""
    return [
        "pbkd",
        *("--model_name_or_path", tiny_dir),
        *("--dataset_name", jsonl(pairs)),
        *("--output_dir", str(tmp_path / "out")),
        *("--bf16", "false", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"),
        *("--max_steps", "2", "--per_device_train_batch_size", "4", "--gradient_checkpointing", "false"),
    ]


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def mm_base(tiny_dir, teacher_dir, jsonl, pairs, tmp_path) -> list[str]:
    """A command line that matches a student to its teacher for two steps."""
    prompts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    return [
        "mm-pbkd",
        *("--model_name_or_path", tiny_dir),
        *("--teacher_model_name_or_path", teacher_dir),
        *("--dataset_name", jsonl(prompts, "prompts.jsonl")),
        *("--preference_dataset", jsonl(pairs)),
        *("--output_dir", str(tmp_path / "out")),
        *("--bf16", "false", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"),
        *("--max_steps", "2", "--per_device_train_batch_size", "4", "--gradient_checkpointing", "false"),
        *("--max_completion_length", "4", "--q_warmup_steps", "2"),
    ]


def replaced(words: list[str], key: str, *values: str) -> list[str]:
    """`words` with other values for `key`, or without it."""
    index = words.index(key)
    return [*words[:index], *([key, *values] if values else []), *words[index + 2 :]]
