"""`trl-kd mm-pbkd` from arguments to a saved student, on tiny models."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from datasets import DatasetDict, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_kd.trainers.mm_pbkd.trainer as mm_pbkd_trainer
from tests.conftest import save_tiny
from tests.scripts.conftest import replaced
from trl_kd.pairs import build_pairs
from trl_kd.preferences.simple import TeacherWins
from trl_kd.sampling.column import ColumnSampler
from trl_kd.scripts import mm_pbkd, training
from trl_kd.scripts.data import load_split


@pytest.fixture
def trained(monkeypatch):
    """The trainers that commands have made."""
    made = []

    class Recorder(mm_pbkd_trainer.MMPbKDTrainer):
        def __init__(self, *args, **kwargs):
            made.append(self)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(mm_pbkd_trainer, "MMPbKDTrainer", Recorder)
    return made


def ok(outcome):
    assert outcome.code == 0, outcome.err
    return outcome


def test_a_run_saves_a_student_that_loads(trl_kd, mm_base, tiny_dir, out, trained):
    done = ok(trl_kd(*mm_base, "--learning_rate", "1e-2", "--logging_steps", "1"))
    assert "mmpbkd/moment_gap" in done.out
    assert "mmpbkd/preference_nll" in done.out
    assert f"Model saved to {out}" in done.out
    student, start = (AutoModelForCausalLM.from_pretrained(path) for path in (out, tiny_dir))
    assert all(not torch.equal(a, b) for a, b in zip(student.parameters(), start.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(out).eos_token == "<eos>"
    card = (out / "README.md").read_text()
    assert "- mm-pbkd" in card
    assert "8 preference pairs held the Q-function" in card
    assert (out / "checkpoint-2" / "q_function.safetensors").is_file()
    assert trained[0].state.global_step == 2


def test_the_command_line_wins_over_the_file(trl_kd, mm_base, jsonl, pairs, tmp_path, trained):
    settings = {
        "preference_dataset": jsonl(pairs[:6], "fewer.jsonl"),
        "lmbda": 1,
        "q_head": "mlp",
        "q_learning_rate": "1e-2",  # what YAML makes of 1e-2 without a point
        "confidence_radius": 0.25,
        "max_steps": 1,
        "temperature": 0.9,
        "teacher_model_init_kwargs": {"dtype": "bfloat16"},
        "save_strategy": False,
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    words = replaced(replaced(mm_base, "--max_steps"), "--preference_dataset")
    ok(trl_kd("mm-pbkd", "--config", config, *words[1:], "--lmbda", "0.5", "--q_bound=2"))
    args = trained[0].args
    assert (args.lmbda, args.q_head, args.q_learning_rate, args.q_bound) == (0.5, "mlp", 1e-2, 2.0)
    assert (args.confidence_radius, args.temperature, args.max_steps) == (0.25, 0.9, 1)
    assert trained[0].preference_rows == 6
    assert trained[0].teacher_model.dtype == torch.bfloat16


def test_resuming_gives_what_an_unbroken_run_gives(trl_kd, mm_base, tmp_path, trained):
    def run(folder, *words):
        words = ["--save_steps", "1", "--learning_rate", "1e-2", "--lr_scheduler_type", "constant", *words]
        ok(trl_kd(*replaced(mm_base, "--output_dir", str(tmp_path / folder)), *words))
        return AutoModelForCausalLM.from_pretrained(tmp_path / folder).state_dict()

    unbroken = run("unbroken")
    run("broken", "--max_steps", "1")
    resumed = run("broken", "--resume_from_checkpoint", "true")
    assert trained[-1].state.global_step == 2
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    q, other = (trained[i].adversary.q.state_dict() for i in (0, -1))
    assert all(torch.equal(q[name], other[name]) for name in q)


@pytest.fixture
def folder_of_pairs(pairs, tmp_path):
    """What `trl-kd pairs` writes: an equal row, and one whose source had a column that trainers would read."""
    from datasets import Dataset

    rows = [
        {"prompt": row["prompt"], "right": row["chosen"], "wrong": row["rejected"] if i else row["chosen"], "label": i}
        for i, row in enumerate(pairs)
    ]
    sources = {"teacher": ColumnSampler("right"), "student": ColumnSampler("wrong")}
    build_pairs(Dataset.from_list(rows), **sources, preference=TeacherWins(), output_dir=tmp_path / "made")
    return str(tmp_path / "made")


@pytest.mark.parametrize("lmbda", ["1", "0"])
def test_a_folder_of_pairs_gives_prompts_and_preferences(trl_kd, mm_base, folder_of_pairs, pairs, lmbda, trained):
    words = replaced(mm_base, "--dataset_name", folder_of_pairs)
    ok(trl_kd(*replaced(words, "--preference_dataset", folder_of_pairs), "--lmbda", lmbda))
    trainer = trained[0]
    assert trainer.preference_rows == len(pairs) - 1
    assert sorted(trainer.train_dataset["prompt"]) == sorted(row["prompt"] for row in pairs)
    if lmbda == "1":
        assert "completion" not in trainer.train_dataset.column_names
    else:  # the teacher's texts
        said = dict(zip(trainer.train_dataset["prompt"], trainer.train_dataset["completion"], strict=True))
        assert said == {row["prompt"]: row["chosen"] for row in pairs}


def test_texts_of_the_teacher_on_either_side_or_none(jsonl, pairs):
    from trl import DatasetMixtureConfig

    rows = [
        {**pairs[0], "teacher_side": None, "teacher": None},
        {**pairs[1], "teacher_side": "rejected", "teacher": None},
        {**pairs[2], "teacher_side": None, "teacher": "forty two"},
    ]
    for streaming in (False, True):
        args = mm_pbkd.MMPbKDScriptArguments(dataset_name=jsonl(rows), dataset_streaming=streaming)
        dataset, _ = mm_pbkd.load_prompts(args, DatasetMixtureConfig(), False, with_completions=True)
        assert isinstance(dataset, IterableDataset) == streaming
        assert [row["completion"] for row in dataset] == [None, pairs[1]["rejected"], "forty two"]


def test_a_folder_with_a_card_is_read_as_it_is_now(tmp_path):
    """`datasets` caches such a folder under its last name and its card, and knows nothing of its path or its files."""
    from datasets import Dataset

    card = "---\nconfigs:\n- config_name: default\n  data_files: [{split: train, path: data/*.parquet}]\n---\n"
    for name, count in (("a", 3), ("b", 5), ("a", 4)):
        folder = tmp_path / name / "same_name"
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(card)
        Dataset.from_dict({"prompt": ["1"] * count}).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
        assert len(load_split(str(folder), None, "train", streaming=False)) == count


@pytest.mark.parametrize("source", ["split", "parquet"])
def test_sources_of_pairs(source, trl_kd, mm_base, pairs, tmp_path, trained):
    from datasets import Dataset

    dataset = Dataset.from_list(pairs)
    if source == "split":
        DatasetDict({"train": dataset.select([0]), "more": dataset}).save_to_disk(path := tmp_path / "saved")
    else:
        dataset.to_parquet(path := tmp_path / "pairs.parquet")
    words = replaced(mm_base, "--preference_dataset", str(path))
    ok(trl_kd(*words, *(["--preference_dataset_split", "more"] if source == "split" else []), "--max_steps", "1"))
    assert trained[0].preference_rows == len(pairs)


def test_without_preferences_and_with_evaluation(trl_kd, mm_base, tmp_path, jsonl, pairs, trained):
    from datasets import Dataset

    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in pairs])
    DatasetDict({"train": prompts, "test": prompts.select([0, 1])}).save_to_disk(tmp_path / "saved")
    words = replaced(replaced(mm_base, "--preference_dataset"), "--dataset_name", str(tmp_path / "saved"))
    ok(trl_kd(*words, "--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "1"))
    assert trained[0].adversary.pairs is None
    assert any("eval_mmpbkd/kl" in entry for entry in trained[0].state.log_history)


def test_the_page_explains_every_metric(trl_kd, mm_base, tmp_path, jsonl, pairs, trained):
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs])
    DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "saved")
    words = replaced(mm_base, "--dataset_name", str(tmp_path / "saved"))
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "1", "--pair_held_out", "0.3"]
    ok(
        trl_kd(
            *words,
            *evaluation,
            "--lmbda",
            "0.5",
            "--imitation_weight",
            "0.1",
            "--logging_steps",
            "1",
            "--max_steps",
            "1",
        )
    )
    logged = {name for entry in trained[0].state.log_history for name in entry if "mmpbkd/" in name}
    page = (Path(__file__).parents[2] / "docs" / "white_box.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"^\| `(mmpbkd/\w+)`", page, re.MULTILINE))
    assert {name.removeprefix("eval_") for name in logged} == explained


def test_a_padded_teacher_and_lora(trl_kd, mm_base, tmp_path, out, trained):
    teacher = save_tiny(tmp_path / "padded", vocab_size=80, seed=1)
    words = replaced(mm_base, "--teacher_model_name_or_path", teacher)
    ok(trl_kd(*words, "--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj", "--max_steps", "1"))
    assert trained[0].teacher.shared_tokens == 76
    assert (out / "adapter_model.safetensors").is_file()


def test_a_student_in_four_bits(trl_kd, mm_base, out, trained):
    pytest.importorskip("bitsandbytes")
    words = ["--use_peft", "--lora_r", "2", "--load_in_4bit", "--lora_target_modules", "all-linear"]
    ok(trl_kd(*mm_base, *words, "--max_steps", "1"))
    assert trained[0].model.get_base_model().is_loaded_in_4bit


def test_pushing(trl_kd, mm_base, monkeypatch):
    trainer_class = mm_pbkd_trainer.MMPbKDTrainer
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self, token: {})
    pushed = []
    monkeypatch.setattr(trainer_class, "init_hf_repo", lambda self, **kwargs: None)
    monkeypatch.setattr(trainer_class, "push_to_hub", lambda self, **kwargs: pushed.append(kwargs))
    monkeypatch.setattr(trainer_class, "_push_from_checkpoint", lambda *args: None, raising=False)
    words = ["--push_to_hub", "--hub_model_id", "me/student", "--hub_token", "hf_secretsecretsecret"]
    done = ok(trl_kd(*mm_base, *words, "--max_steps", "1"))
    assert pushed[-1] == {"dataset_name": None}  # the prompts are a file here, which the Hub does not know
    assert "hf_secret" not in done.out + done.err


def test_launch_options_go_to_the_launcher(mm_base, monkeypatch, trl_kd):
    seen = []
    monkeypatch.setattr(training, "launch", lambda *args: seen.append(args) or 0)
    assert trl_kd(*mm_base, "--multi_gpu", "--num_processes", "2").code == 0
    module, script_args, launch_args = seen[0]
    assert module == "trl_kd.scripts.mm_pbkd"
    assert script_args == mm_base[1:]
    assert launch_args == ["--multi_gpu", "--num_processes", "2"]


def test_help_lists_every_field(trl_kd):
    done = ok(trl_kd("mm-pbkd", "--help"))
    for name in ("lmbda", "q_head", "preference_dataset_split", "teacher_model_name_or_path", "dry_run", "use_peft"):
        assert f"--{name}" in done.out
    assert "trl-kd mm-pbkd" in done.out
