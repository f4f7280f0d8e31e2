"""The chain of docs/gsm8k.md with tiny models: a real server as the teacher, the verifier, training, accuracy."""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import make_tokenizer, save_tiny
from tests.sampling.real_server import serving
from trl_kd.pairs import load_pairs
from trl_kd.preferences.reward_function import load_function


for package in ("openai", "fastapi", "uvicorn"):
    pytest.importorskip(package, reason="needs the extras `api` and `transformers[serving]`")

ROOT = Path(__file__).parents[2]
DIGITS = "0123456789"
QUESTIONS = 16

pytestmark = pytest.mark.skipif("WORLD_SIZE" in os.environ, reason="runs in this process")


def save_digits(folder, **settings) -> str:
    """A model of which about every thirteenth answer of one token is the right digit."""
    return save_tiny(folder, make_tokenizer(DIGITS), vocab_size=len(DIGITS) + 3, **settings)


@pytest.fixture
def files(tmp_path):
    rows = [
        {"question": f"{i}{i + 3}", "answer": f"What is left of {i}{i + 3}?\n#### {i % 10}"} for i in range(QUESTIONS)
    ]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return tmp_path


@pytest.mark.slow
def test_gsm8k_from_an_api_to_a_distilled_student(files, trl_kd, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)  # as the recipes' own paths want it
    teacher, student = save_digits(files / "teacher", seed=1, hidden_size=24), save_digits(files / "start")
    with serving(teacher, files / "served") as url:
        words = (
            *("pairs", "--config", "recipes/gsm8k/pairs.yaml", "--dataset_name", files / "train.jsonl"),
            *("--teacher", f"api:{teacher}", "--teacher_base_url", url, "--teacher_max_new_tokens", "1"),
            *("--student", student, "--student_max_new_tokens", "1", "--student_model_init_kwargs", "{}"),
            *("--output_dir", files / "pairs"),
        )
        looked = trl_kd(*words, "--dry_run")
        assert looked.code == 0, looked.err
        assert f"{2 * QUESTIONS} answers to ask" in looked.out
        done = trl_kd(*words)
        assert done.code == 0, done.err
    summary = json.loads((files / "pairs" / "summary.json").read_text())
    assert summary["usage"]["teacher"]["requests"] == 2 * QUESTIONS
    pairs = load_pairs(files / "pairs")
    assert {0.5, 1.0} <= {row["preference"] for row in pairs}
    for row in pairs:
        assert row["prompt"][0]["role"] == "user"
        if row["preference"] == 1:
            assert row["answer"].endswith(f"#### {row['chosen'][0]['content']}")

    trained = trl_kd(
        *("pbkd", "--config", "recipes/gsm8k/pbkd.yaml", "--model_name_or_path", student),
        *("--dataset_name", files / "pairs", "--output_dir", files / "student", "--max_steps", "2"),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--max_length", "32"),
        *("--use_cpu", "true", "--bf16", "false", "--disable_tqdm", "true", "--save_strategy", "no"),
        *("--learning_rate", "0.1", "--warmup_steps", "0"),
    )
    assert trained.code == 0, trained.err
    before, after = (load_file(files / name / "model.safetensors") for name in ("start", "student"))
    assert any(not before[name].equal(after[name]) for name in before)

    accuracy = load_function(f"{ROOT / 'recipes/gsm8k/accuracy.py'}:main")
    answers = ("--max_new_tokens", "1", "--dtype", "float32", "--output", str(files / "accuracy.json"))
    models = [student, str(files / "student")]
    accuracy([*models, "--dataset_name", str(files / "test.jsonl"), "--dataset_split", "train", *answers])
    found = json.loads((files / "accuracy.json").read_text())
    assert list(found) == models
    assert all(
        of["questions"] == QUESTIONS and 0 <= of["low"] <= of["value"] <= of["high"] <= 1 for of in found.values()
    )
    assert f"{models[1]}: {found[models[1]]['value']:.1%} right" in capfd.readouterr().out
