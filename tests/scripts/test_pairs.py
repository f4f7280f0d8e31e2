"""`trl-kd pairs` from the command line: parts by name, bad input, shards, push, and the chain to a student."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

import trl_kd.scripts.pairs as pairs_script
from tests.conftest import make_tokenizer
from tests.preferences.test_reward_model import make_reward_model
from trl_kd.pairs import load_pairs
from trl_kd.scripts.pairs_arguments import PairsArguments
from trl_kd.scripts.pairs_build import make_preference, make_sampler


REWARD = """
def reward(prompts, completions, answer, **kwargs):
    return [float(completion == truth) for completion, truth in zip(completions, answer)]

def shorter(prompts, first, second, **columns):
    return [0.5 if len(a) == len(b) else float(len(a) < len(b)) for a, b in zip(first, second)]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with prompts and a module of the user's."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"question": f"{i}+1=", "answer": str(i + 1), "t": str(i + 1 + (i % 5 == 0)), "s": str(i + i % 2)}
        for i in range(20)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(REWARD)
    return tmp_path


SOURCES = ("--teacher_column", "t", "--student_column", "s")
BASE = ("--dataset_name", "prompts.jsonl", "--prompt_column", "question", "--output_dir", "pairs")
VERIFIER = ("--preference", "verifier:my_rewards.py:reward")


def test_columns_and_a_verifier(folder, trl_kd):
    done = trl_kd("pairs", *BASE, *SOURCES, *VERIFIER)
    assert done.code == 0, done.err
    assert "teacher wins" in done.out
    pairs = load_pairs("pairs")
    assert len(pairs) == 20
    assert {"t", "s", "question"}.isdisjoint(pairs.column_names)
    assert {"answer", "score_chosen", "teacher_side"} <= set(pairs.column_names)
    for row in pairs:
        assert row["score_chosen"] >= row["score_rejected"]
        assert (row["preference"] is None) == (row["chosen"] == row["rejected"])
    for name in ("pairs.html", "README.md", "summary.json"):
        assert (folder / "pairs" / name).is_file()


def test_a_reward_model_that_gives_nan_is_bad_input(folder, trl_kd):
    model = make_reward_model()
    model.score.weight.data[0, 0] = math.nan
    model.save_pretrained("broken")
    make_tokenizer().save_pretrained("broken")
    done = trl_kd("pairs", *BASE, *SOURCES, "--preference", "reward_model:./broken")
    assert done.code == 2
    assert "gives the score nan to a response to '10+1=': its weights are broken" in done.err


def test_peft_is_not_imported_where_no_model_runs(folder):
    """PEFT imports bitsandbytes, which writes to stderr on a machine without its kernels."""
    words = ["pairs", *BASE, *SOURCES, "--preference", "teacher_wins"]
    program = (
        f"import sys; from trl_kd.scripts.cli import main; code = main({words!r}); "
        "print('loaded:', [m for m in ('peft', 'bitsandbytes') if m in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "loaded: []" in done.stdout


@pytest.mark.parametrize("preference", ["teacher_wins", "function:my_rewards.py:shorter", "column:label"])
def test_other_preferences_by_name(preference, folder, trl_kd):
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({**row, "label": "student"}) + "\n" for row in rows))
    done = trl_kd("pairs", *BASE, *SOURCES, "--preference", preference)
    assert done.code == 0, done.err
    known = [row for row in load_pairs("pairs") if row["preference"] is not None]
    assert known
    if preference == "column:label":
        assert {row["teacher_side"] for row in known} == {"rejected"}


@pytest.mark.slow
def test_from_prompts_to_a_student(folder, tiny_dir, teacher_dir, trl_kd):
    """Two local models answer, one of them judges, `trl-kd pbkd` trains on the folder, and the student loads."""
    (folder / "pairs.yaml").write_text(
        f"dataset_name: prompts.jsonl\nprompt_column: question\nteacher: {teacher_dir}\nstudent: {tiny_dir}\n"
        "num_student_samples: 2\nteacher_max_new_tokens: 4\nstudent_max_new_tokens: 4\nstudent_stop: ['=']\n"
        f"preference: likelihood:{teacher_dir}\npreference_scale: 1.0\noutput_dir: pairs\nmax_prompts: 6\n"
    )
    assert trl_kd("pairs", "--config", "pairs.yaml").code == 0
    pairs = load_pairs("pairs")
    assert 6 <= len(pairs) <= 12
    assert all(row["preference"] is None or 0.5 <= row["preference"] <= 1 for row in pairs)
    again = trl_kd("pairs", "--config", "pairs.yaml")
    assert again.code == 0
    assert load_pairs("pairs").to_list() == pairs.to_list()
    changed = trl_kd("pairs", "--config", "pairs.yaml", "--teacher_temperature", "0.5")
    assert changed.code == 2
    assert "temperature" in changed.error
    trained = trl_kd(
        *("pbkd", "--model_name_or_path", tiny_dir, "--dataset_name", "pairs", "--output_dir", "student"),
        *(
            "--max_steps",
            "2",
            "--bf16",
            "false",
            "--use_cpu",
            "--report_to",
            "none",
            "--per_device_train_batch_size",
            "2",
        ),
    )
    assert trained.code == 0, trained.err
    AutoModelForCausalLM.from_pretrained(folder / "student")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), ["`dataset_name` is not set"]),
        ((*BASE, *VERIFIER), ["`teacher` and `teacher_column` are neither set"]),
        ((*BASE, *SOURCES, *VERIFIER, "--teacher", "x"), ["`teacher` and `teacher_column` are both set"]),
        ((*BASE, *SOURCES), ["`preference` is not set", "teacher_wins"]),
        ((*BASE, *SOURCES, "--preference", "best"), ["`preference` is 'best'", "verifier"]),
        ((*BASE, *SOURCES, "--preference", "verifier:my_rewards.nothing"), ["my_rewards.nothing"]),
        ((*BASE, *SOURCES, "--preference", "column:label"), ["'label'", "answer"]),
        (
            (*BASE, "--teacher_column", "x", "--student_column", "s", *VERIFIER),
            ["`teacher_column` is 'x'", "'answer'"],
        ),
        ((*BASE, *SOURCES, *VERIFIER, "--num_teacher_samples", "0"), ["`num_teacher_samples` is 0"]),
        ((*BASE, *SOURCES, *VERIFIER, "--shard", "4/4"), ["`shard` is '4/4'"]),
        ((*BASE, *SOURCES, *VERIFIER, "--policy", "worst"), ["`policy`", "best_vs_worst"]),
        ((*BASE, *SOURCES, *VERIFIER, "--polisy", "all"), ["unknown key `--polisy`", "did you mean `policy`"]),
        ((*BASE, *SOURCES, *VERIFIER, "--num_processes", "2"), ["unknown key `--num_processes`"]),
        ((*BASE, *SOURCES, *VERIFIER, "--max_prompts", "0"), ["`max_prompts` is 0"]),
        ((*BASE, *SOURCES, *VERIFIER, "--teacher_base_url", "http://x"), ["`teacher_base_url` is set", "api:MODEL"]),
        (
            (*BASE, "--teacher", "./nowhere", "--student_column", "s", *VERIFIER),
            ["`teacher` is './nowhere'", "no such"],
        ),
        (
            (
                *BASE,
                "--teacher",
                "./nowhere",
                "--student_column",
                "s",
                *VERIFIER,
                "--teacher_model_init_kwargs",
                "[1]",
            ),
            ["`teacher_model_init_kwargs` must be a JSON object", "it is a list"],
        ),
        ((*BASE, *SOURCES, "--preference", "reward_model:./nowhere"), ["`preference` is './nowhere'", "no such"]),
        ((*BASE[:-2], *SOURCES, *VERIFIER), ["`output_dir` is not set"]),
        ((*BASE, "--teacher", "api:", "--student_column", "s", *VERIFIER), ["`teacher` is 'api:'"]),
        (
            (*BASE, "--teacher", "api:m", "--teacher_adapter", "x", "--student_column", "s", *VERIFIER),
            ["`teacher_adapter` is set"],
        ),
        ((*BASE, *SOURCES, *VERIFIER, "--student_adapter", "x"), ["`student_adapter` is set"]),
        (("--merge", "nowhere", "--output_dir", "pairs"), ["`merge` names 'nowhere'"]),
    ],
)
def test_bad_input_is_one_line(words, said, folder, trl_kd):
    if not words:
        words = ("--output_dir", "pairs")
    done = trl_kd("pairs", *words)
    assert done.code == 2
    for text in said:
        assert text in done.error
    assert not (folder / "pairs" / "data").exists()


def test_shards_merge_to_what_one_run_writes(folder, trl_kd):
    assert trl_kd("pairs", *BASE, *SOURCES, *VERIFIER).code == 0
    for index in range(3):
        words = (*BASE[:-1], f"piece{index}", *SOURCES, *VERIFIER, "--shard", f"{index}/3")
        assert trl_kd("pairs", *words).code == 0
    assert trl_kd("pairs", "--merge", "piece0", "piece1", "piece2", "--output_dir", "whole").code == 0
    assert load_pairs("whole").to_list() == load_pairs("pairs").to_list()
    done = trl_kd("pairs", "--merge", "piece0", "piece1", "piece2", "--output_dir", "pairs")
    assert "holds the answers of a build" in done.error


def test_arguments_reach_the_parts(folder):
    """Servers, limits, prompts, adapters and seeds, each where it belongs; nothing is asked."""
    (folder / "template.txt").write_text("{prompt}{first}{second}")
    args = PairsArguments(
        teacher="api:t", teacher_base_url=["http://a/v1"], teacher_system_prompt="Be brief.", teacher_temperature=0.5,
        student="vllm:s", student_adapter="lora", student_stop=["x"], seed=3,
        preference="judge:j", judge_base_url=["http://b/v1"], judge_template="template.txt",
        max_requests=5, max_tokens=6, max_cost=7.0, price_in=1.0, price_out=2.0, max_concurrency=4,
    )  # fmt: skip
    teacher, student, judge = make_sampler(args, "teacher"), make_sampler(args, "student"), make_preference(args)
    assert (teacher.model, teacher.system_prompt, teacher.settings.temperature) == ("t", "Be brief.", 0.5)
    assert student.adapter == "lora"
    assert student.settings.stop == ("x",)
    assert teacher.settings.seed != student.settings.seed
    assert (judge.model, judge.template) == ("j", "{prompt}{first}{second}")
    for client, url in ((teacher.client, "http://a/v1"), (judge.client, "http://b/v1")):
        assert (client.urls, client.max_concurrency) == ([url], 4)
        assert client.budget.caps == {"max_requests": 5, "max_tokens": 6, "max_cost": 7.0}
        assert (client.budget.price_in, client.budget.price_out) == (1.0, 2.0)


def test_options_reach_the_builder(folder, trl_kd, monkeypatch):
    seen = {}
    monkeypatch.setattr(pairs_script, "build_pairs", lambda prompts, **options: seen.update(options))
    monkeypatch.setattr(pairs_script, "_report", lambda folder: None)
    words = (
        "--policy",
        "all",
        "--max_pairs_per_prompt",
        "3",
        "--truncated",
        "drop",
        "--seed",
        "5",
        "--relabel",
        "true",
    )
    words += ("--num_student_samples", "2", "--shard", "1/2")
    assert trl_kd("pairs", *BASE, *SOURCES, *VERIFIER, *words).code == 0
    expected = {"policy": "all", "max_pairs_per_prompt": 3, "truncated": "drop", "seed": 5, "relabel": True}
    expected |= {"num_student_samples": 2, "num_teacher_samples": 1, "shard": (1, 2)}
    assert {name: seen[name] for name in expected} == expected


def test_push_sends_pairs_card_and_page_but_not_the_answers(folder, trl_kd, monkeypatch):
    calls = []

    class Api:
        def whoami(self, token):
            calls.append(("whoami", "me", {}))

        def create_repo(self, name, **kwargs):
            calls.append(("create", name, kwargs))
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, **kwargs):
            calls.append(("upload", kwargs))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    done = trl_kd("pairs", *BASE, *SOURCES, *VERIFIER, "--push_to_hub", "--hub_private_repo", "true")
    assert done.code == 0, done.err
    (first, *_), (_, name, created), (_, uploaded) = calls
    assert first == "whoami"  # before anything else
    assert name == "pairs"
    assert created["repo_type"] == "dataset"
    assert created["private"] is True
    assert uploaded["repo_id"] == "me/pairs"
    assert "data/*.parquet" in uploaded["allow_patterns"]
    assert not any("answers" in pattern for pattern in uploaded["allow_patterns"])


def test_a_saved_dataset_and_a_stream(folder, trl_kd):
    Dataset.from_json("prompts.jsonl").save_to_disk("saved")
    words = (*BASE, *SOURCES, *VERIFIER)
    assert trl_kd("pairs", *words).code == 0
    expected = load_pairs("pairs").to_list()
    for other in (("--dataset_name", "saved"), ("--dataset_name", "prompts.jsonl", "--dataset_streaming", "true")):
        out = f"pairs-{other[1]}-{len(other)}"
        assert trl_kd("pairs", *words[2:-4], *SOURCES, *VERIFIER, *other, "--output_dir", out).code == 0
        assert load_pairs(out).to_list() == expected
