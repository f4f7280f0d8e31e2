"""`trl-kd pbkd` from arguments to a saved student, on a tiny model."""

import json
import shutil

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, Features, Value
from transformers import AutoModelForCausalLM, AutoTokenizer

import trl_kd.scripts.pbkd as pbkd
import trl_kd.trainers.pbkd.trainer as pbkd_trainer


@pytest.fixture
def trained(monkeypatch):
    """The trainers that commands have made."""
    made = []

    class Recorder(pbkd_trainer.PbKDTrainer):
        def __init__(self, *args, **kwargs):
            made.append(self)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(pbkd_trainer, "PbKDTrainer", Recorder)
    return made


def replaced(base, key, *values):
    index = base.index(key)
    return [*base[:index], *([key, *values] if values else []), *base[index + 2 :]]


def ok(outcome):
    assert outcome.code == 0, outcome.err
    return outcome


def test_a_run_saves_a_student_that_loads(trl_kd, base, tiny_dir, out):
    done = ok(trl_kd(*base, "--learning_rate", "1e-2", "--logging_steps", "1"))
    assert "pbkd/imitation" in done.out
    assert f"Model saved to {out}" in done.out
    student, start = (AutoModelForCausalLM.from_pretrained(path) for path in (out, tiny_dir))
    assert any(not torch.equal(a, b) for a, b in zip(student.parameters(), start.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(out).eos_token == "<eos>"
    card = (out / "README.md").read_text()
    assert "- pbkd" in card
    assert (out / "checkpoint-2" / "pbkd_dual.json").is_file()


def test_the_command_line_wins_over_the_file(trl_kd, base, tmp_path, trained):
    settings = {
        "beta": 0.3,
        "dual_init": 1,
        "learning_rate": "1e-4",  # what YAML makes of 1e-4 without a point
        "max_steps": 1,
        "num_train_epochs": 2,
        "imitation_weight": 2,
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1, 0.5],
        "confidence_radius": 0.25,
        "save_strategy": False,  # what YAML makes of a bare `no`
        "remove_unused_columns": True,
        "lr_scheduler_kwargs": None,
        "env": {"TRL_KD_TEST": 3},
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    words = ["--beta=0.2", "--loss_type", "sigmoid", "--loss_weights", "1", "--no_remove_unused_columns"]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRL_KD_TEST", raising=False)
        ok(trl_kd("pbkd", f"--config={config}", *replaced(base, "--max_steps")[1:], *words))
        patch.undo()
    args = trained[0].args
    assert (args.beta, args.learning_rate, args.max_steps, args.imitation_weight) == (0.2, 1e-4, 1, 2.0)
    assert (args.loss_type, args.loss_weights, args.confidence_radius) == (["sigmoid"], [1.0], 0.25)
    assert args.save_strategy == "no"
    assert args.remove_unused_columns is False


@pytest.mark.parametrize("source", ["saved", "dict", "odd split", "parquet", "folder", "csv", "json"])
def test_sources(source, trl_kd, base, pairs, tmp_path, trained):
    dataset = Dataset.from_list(pairs)
    path = tmp_path / "source"
    if source == "saved":
        dataset.save_to_disk(path)
    elif source == "dict":
        DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(path)
    elif source == "odd split":
        DatasetDict({"pairs": dataset}).save_to_disk(path)
    elif source == "parquet":
        dataset.to_parquet(path := tmp_path / "pairs.parquet")
    elif source == "folder":
        path.mkdir()
        dataset.to_parquet(path / "train.parquet")
        dataset.select([0]).to_parquet(path / "test.parquet")
    elif source == "csv":
        text = Dataset.from_list([{**row, "prompt": "q" + row["prompt"]} for row in pairs])
        text.cast(Features(dict.fromkeys(("prompt", "chosen", "rejected"), Value("string"))))
        text = text.map(lambda row: {"chosen": row["chosen"] + "!", "rejected": row["rejected"] + "!"})  # not numbers
        text.to_csv(path := tmp_path / "pairs.csv")
    else:
        (path := tmp_path / "pairs.json").write_text(json.dumps(pairs))
    ok(trl_kd(*replaced(base, "--dataset_name", str(path)), "--max_steps", "1"))
    assert len(trained[0].train_dataset) == len(pairs)
    assert trained[0].eval_dataset is None


def test_a_stream(trl_kd, base, trained):
    ok(trl_kd(*base, "--dataset_streaming"))
    assert trained[0].state.global_step == 2


def test_a_mixture_with_evaluation(trl_kd, base, jsonl, pairs, tmp_path, trained):
    files = [jsonl(pairs, "a.jsonl"), jsonl(pairs, "b.jsonl")]
    config = tmp_path / "mixture.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "datasets": [{"path": "json", "data_files": file} for file in files],
                "test_split_size": 0.25,
                "eval_strategy": "steps",
                "eval_steps": 1,
            }
        )
    )
    ok(trl_kd(*replaced(base, "--dataset_name"), "--dual_init", "1", "--config", config))
    assert (len(trained[0].train_dataset), len(trained[0].eval_dataset)) == (12, 4)
    assert any("eval_loss" in entry for entry in trained[0].state.log_history)


def test_an_evaluation_split(trl_kd, base, pairs, tmp_path, trained):
    dataset = Dataset.from_list(pairs)
    DatasetDict({"train": dataset, "dev": dataset.select([0, 1])}).save_to_disk(tmp_path / "saved")
    words = ["--eval_strategy", "steps", "--eval_steps", "1", "--dataset_test_split", "dev"]
    ok(trl_kd(*replaced(base, "--dataset_name", str(tmp_path / "saved")), *words))
    assert len(trained[0].eval_dataset) == 2


def test_lora(trl_kd, base, out, trained):
    words = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj", "--learning_rate", "1e-2"]
    ok(trl_kd(*base, *words))
    assert (out / "adapter_model.safetensors").is_file()
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 2
    assert set(config["target_modules"]) == {"q_proj", "v_proj"}


def test_a_student_in_four_bits(trl_kd, base, out, trained):
    pytest.importorskip("bitsandbytes")
    ok(trl_kd(*base, "--use_peft", "--lora_r", "2", "--load_in_4bit", "--lora_target_modules", "all-linear"))
    assert (out / "adapter_model.safetensors").is_file()
    assert trained[0].model.get_base_model().is_loaded_in_4bit


def test_a_white_box_teacher(trl_kd, base, teacher_dir, trained):
    options = json.dumps({"dtype": "float32"})
    words = ["--imitation", "token", "--teacher_model_name_or_path", teacher_dir]
    ok(trl_kd(*base, *words, "--teacher_model_init_kwargs", options))
    assert trained[0].teacher.model is not None


def test_resuming_gives_what_an_unbroken_run_gives(trl_kd, base, tmp_path, trained):
    def run(folder, *words):
        words = ["--save_steps", "1", "--learning_rate", "1e-2", "--lr_scheduler_type", "constant", *words]
        ok(trl_kd(*replaced(base, "--output_dir", str(tmp_path / folder)), *words))
        return AutoModelForCausalLM.from_pretrained(tmp_path / folder).state_dict()

    unbroken = run("unbroken")
    run("broken", "--max_steps", "1")
    (tmp_path / "broken" / "checkpoint-2").mkdir()  # killed while it was saved
    resumed = run("broken", "--resume_from_checkpoint", "true")
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    assert trained[-1].state.global_step == 2
    # A folder by name, too
    run("again", "--resume_from_checkpoint", str(tmp_path / "broken" / "checkpoint-1"))
    run("fresh", "--resume_from_checkpoint", "false")


def test_pushing(trl_kd, base, out, monkeypatch, trained):
    monkeypatch.setattr(pbkd_trainer.PbKDTrainer, "init_hf_repo", lambda self, **kwargs: None)
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self, token: {})
    pushed = []
    monkeypatch.setattr(pbkd_trainer.PbKDTrainer, "push_to_hub", lambda self, **kwargs: pushed.append(kwargs))
    monkeypatch.setattr(pbkd_trainer.PbKDTrainer, "_push_from_checkpoint", lambda *args: None, raising=False)
    done = ok(trl_kd(*base, "--push_to_hub", "--hub_model_id", "me/student", "--hub_token", "hf_secretsecretsecret"))
    assert pushed[-1] == {"dataset_name": None}  # the pairs are a file here, which the Hub does not know
    assert "hf_secret" not in done.out + done.err


def test_a_bug_in_training_keeps_its_traceback(trl_kd, base, monkeypatch):
    def broken(self, *args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(pbkd_trainer.PbKDTrainer, "training_step", broken)
    with pytest.raises(ValueError, match="a bug"):
        trl_kd(*base)


def test_model_init_kwargs_win(trl_kd, base, trained):
    ok(trl_kd(*base, "--dtype", "float32", "--model_init_kwargs", '{"dtype": "bfloat16"}'))
    assert trained[0].model.dtype == torch.bfloat16


def test_help_lists_every_field(trl_kd):
    done = ok(trl_kd("pbkd", "--help"))
    for name in ("imitation_weight", "model_name_or_path", "dataset_name", "dry_run", "accelerate_config", "use_peft"):
        assert f"--{name}" in done.out
    assert pbkd.COMMAND.prog in done.out


def test_a_damaged_file_of_weights(trl_kd, base, tiny_dir, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_dir, folder)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    assert (
        "cannot be loaded: model.safetensors: SafetensorError"
        in trl_kd(*base, "--model_name_or_path", str(folder)).error
    )
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in trl_kd(*base, "--model_name_or_path", str(folder)).error


def test_a_training_that_breaks_is_one_line_and_saves_nothing(trl_kd, base, out):
    broken = trl_kd(
        *replaced(base, "--max_steps", "4"), "--learning_rate", "1e36", "--optim", "sgd", "--save_steps", "1"
    )
    assert "pbkd: error: Training stopped at step " in broken.error
    assert not list(out.glob("*.safetensors"))
