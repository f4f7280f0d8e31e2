"""Bad input to `trl-kd pbkd`: one line that names the field, its value and the way out, before any weight loads."""

import json
import shutil

import pytest
import torch
from datasets import Dataset, DatasetDict

import trl_kd.trainers.pbkd.trainer as pbkd_trainer
from tests.conftest import CHARACTERS, make_tokenizer, save_tiny


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """Whatever is wrong is said before weights load: `DPOTrainer`'s constructor begins with them."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights were about to load")

    monkeypatch.setattr(pbkd_trainer.DPOTrainer, "__init__", refuse)


def replaced(base, key, value=None):
    """`base` with another value for `key`, or without it."""
    index = base.index(key)
    return base[:index] + ([] if value is None else [key, value]) + base[index + 2 :]


# ---- Keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--betta", "0.2"], ["unknown key `--betta`", "`--beta`" and "did you mean `beta`"]),
        (["--imitation-weigth=2"], ["unknown key `--imitation-weigth`", "did you mean `imitation_weight`"]),
        (["--learning_r", "1"], ["unknown key `--learning_r`", "`learning_rate`"]),  # no abbreviations
        (["--no_remove_unused"], ["unknown key `--no_remove_unused`", "`no_remove_unused_columns`"]),
        (["--num_proceses", "2"], ["unknown key `--num_proceses`", "`trl-kd pbkd --help` lists the keys"]),
        (["--lora_rank", "8"], ["unknown key `--lora_rank`", "did you mean `lora_r`?"]),
        (["--logging_dir", "x"], ["unknown key `--logging_dir`", "TENSORBOARD_LOGGING_DIR"]),
        (["--batch-size=2"], ["unknown key `--batch-size`", "did you mean `per_device_train_batch_size`?"]),
        (["--lr", "1"], ["unknown key `--lr`", "did you mean `learning_rate`?"]),
        (["--model", "x"], ["unknown key `--model`", "did you mean `model_name_or_path`?"]),
        (["--imitation_q_", "1"], ["did you mean `imitation_q_warmup`?"]),
        (["--lora", "x"], ["did you mean `use_peft`?"]),
        (["--module"], ["unknown key `--module`"]),  # what to launch is not the user's to say
        (["--qqqqqqq"], ["unknown key `--qqqqqqq`", "trl-kd pbkd --help"]),
        (["stray"], ["unexpected word 'stray'"]),
        (["--use_peft", "true", "stray"], ["unexpected word 'stray'"]),
        (["--multi_gpu", "stray"], ["unexpected word 'stray'"]),
        (["--num_processes", "two"], ["`num_processes` is 'two'", "a whole number"]),
        (["--config"], ["`config`", "expected one argument"]),
    ],
)
def test_unknown_keys_on_the_command_line(trl_kd, base, words, said):
    error = trl_kd(*base, *words).error
    assert all(part in error for part in said), error


@pytest.mark.parametrize("value", ["[1]", "3", "dtype", "{bad", '"x"'])
@pytest.mark.parametrize("name", ["model_init_kwargs", "lr_scheduler_kwargs"])
def test_mappings_on_the_command_line(name, value, trl_kd, base):
    shown = repr(value) if name == "lr_scheduler_kwargs" else "a text (it is not shown, since a key may stand in it)"
    assert f"`{name}` is {shown}: it must be a mapping, as in JSON" in trl_kd(*base, f"--{name}", value).error


def test_keys_that_are_known_in_every_spelling(trl_kd, base):
    done = trl_kd(*base, "--imitation-weight=0.5", "--no-remove-unused-columns", "--dry-run")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("betta: 0.2", ["unknown key `betta` in", "did you mean `beta`"]),
        ("learning-rate: 0.2", ["unknown key `learning-rate`", "`learning_rate`"]),
        ("num_proceses: 2", ["unknown key `num_proceses`", "lists the keys"]),
        ("lora_rank: 8", ["unknown key `lora_rank` in", "did you mean `lora_r`?"]),
        ("help: true", ["unknown key `help`"]),
        ("beta: [", ["not readable as YAML"]),
        ("- beta", ["must hold a mapping"]),
        ("", ["must hold a mapping"]),
        ("beta: high", ["`beta` is 'high' in", "it must be a number"]),
        ("output_dir: 5", ["`output_dir` is 5 in", "it must be text: put it into quotes, as in output_dir: '5'"]),
        ("run_name: 2024_01", ["`run_name` is 202401 in", "put it into quotes"]),
        ("output_dir: [a]", ["`output_dir` is ['a'] in", "it must be text."]),
        ("dataset_name: {a: b}", ["`dataset_name` is {'a': 'b'} in", "it must be text."]),
        ("loss_type: [sigmoid, 1]", ["`loss_type` is ['sigmoid', 1] in", "it must be text"]),
        ("model_init_kwargs: [1]", ["`model_init_kwargs` is a list in", "it must be a mapping of names to values"]),
        ("model_init_kwargs: 3", ["`model_init_kwargs` is a number in", "it must be a mapping of names to values"]),
        ("model_init_kwargs: '[1]'", ["`model_init_kwargs` is a text", "it must be a mapping, as in JSON"]),
        ("beta: {a: 1}", ["`beta` is {'a': 1} in", "it must be a number"]),
        ("max_steps: 2.5", ["`max_steps` is 2.5 in", "a whole number"]),
        ("max_steps: null", ["`max_steps` is null in"]),
        ("use_peft: perhaps", ["`use_peft` is 'perhaps' in", "true or false"]),
        ("imitation: words", ["`imitation` is 'words' in", "'sequence', 'token'"]),
        ("dtype: float33", ["`dtype` is 'float33' in", "'bfloat16'"]),
        ("env: 3", ["`env` in", "mapping"]),
        ("datasets: [{name: x}]", ["`datasets` in", "needs a `path`"]),
        ("datasets: [{path: 5}]", ["`path` is 5 in an entry of `datasets` in", "it must be text"]),
        ("resume_from_checkpoint: true", ["`resume_from_checkpoint` is true, but", "has no checkpoint"]),
        ("fsdp_config: nowhere.json", ["`fsdp_config` is 'nowhere.json': no such file."]),
        ("accelerator_config: nowhere.json", ["`accelerator_config` is 'nowhere.json': no such file."]),
        ("num_machines: 2", ["`num_machines` is 2, but `main_process_ip` is not set"]),
        ("datasets: [{path: x, splt: train}]", ["unknown key `splt`", "did you mean `split`"]),
    ],
)
def test_bad_yaml(trl_kd, base, tmp_path, text, said):
    config = tmp_path / "bad.yaml"
    config.write_text(text)
    error = trl_kd(*base, "--config", config).error
    assert all(part in error for part in said), error


# ---- Values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--beta", "high"], ["`beta` is 'high'", "a number"]),
        (["--gradient_accumulation_steps", "0"], ["`gradient_accumulation_steps` is 0"]),
        (["--report_to", "clearml"], ["`report_to` is 'clearml'", "not installed"]),
        (["--beta", "-1"], ["`beta` is -1.0"]),
        (["--beta", "nan"], ["`beta` is 'nan'"]),
        (["--use_peft", "perhaps"], ["`use_peft`", "perhaps"]),
        (["--imitation", "words"], ["`imitation`", "'words'", "'sequence', 'token'"]),
        (["--imitation_weight", "-0.5"], ["`imitation_weight` is -0.5", "at least 0"]),
        (["--imitation_weight", "nan"], ["`imitation_weight` is 'nan'"]),
        (["--dual_init", "-1"], ["`dual_init` is -1.0"]),
        (["--dual_init", "20"], ["`dual_init` is 20", "`dual_max`"]),
        (["--dual_init", "0", "--beta", "0.2"], ["`beta` is 0.2, which only the preference term reads"]),
        (["--dual_init", "0", "--imitation_radius", "wide"], ["`imitation_radius` is 'wide'"]),
        (["--confidence_radius", "wide"], ["`confidence_radius` is 'wide'", "'theory'"]),
        (["--dual_learning_rate", "0.1"], ["`preference_nll_target` is not set"]),
        (["--imitation", "token"], ["`imitation='token'`", "`teacher_model_name_or_path`"]),
        (["--teacher_model_name_or_path", "x"], ["`teacher_model_name_or_path` is set", "`imitation='token'`"]),
        (["--load_in_4bit"], ["`load_in_4bit` is True", "`use_peft`"]),
        (["--load_in_4bit", "--load_in_8bit", "--use_peft"], ["8 bit and 4 bit"]),
        (["--resume_from_checkpoint", "true"], ["`resume_from_checkpoint` is true", "no checkpoint"]),
        (
            ["--lr_scheduler_type", "warmup_stable_decay"],
            ["`lr_scheduler_type` is 'warmup_stable_decay'", "num_decay_steps"],
        ),
        (["--resume_from_checkpoint", "nowhere"], ["`resume_from_checkpoint` is 'nowhere'"]),
        (["--accelerate_config", "zero9"], ["`accelerate_config` is 'zero9'", "zero2"]),
        (["--config", "nowhere.yaml"], ["`config` is 'nowhere.yaml'", "no such file"]),
        (["--learning_rate", "1e-3", "--lr_scheduler_type", "cosin"], ["cosin"]),
    ],
)
def test_bad_values(trl_kd, base, words, said):
    error = trl_kd(*base, *words).error
    assert all(part in error for part in said), error


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may do bf16")
def test_bf16_where_there_is_none(trl_kd, base):
    base.remove("--use_cpu")
    error = trl_kd(*replaced(base, "--bf16", "true")).error
    assert "`bf16` is True" in error
    assert "`use_cpu`" in error
    assert trl_kd(*replaced(base, "--bf16"), "--dry_run").code == 0  # unset it is False


def test_what_must_be_given(trl_kd, base):
    assert "`model_name_or_path` is not set" in trl_kd(*replaced(base, "--model_name_or_path")).error
    assert "neither `dataset_name` nor `datasets`" in trl_kd(*replaced(base, "--dataset_name")).error
    assert "drop one of them" in trl_kd(*base, "--datasets", "some/dataset").error


def test_an_output_dir_that_cannot_be_written_to(trl_kd, base, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "`output_dir` is" in (error := trl_kd(*replaced(base, "--output_dir", str(folder))).error)
        assert "'file' is a file" in error
    error = trl_kd(*replaced(base, "--output_dir", "/proc/nowhere")).error
    assert "`output_dir` is '/proc/nowhere', which cannot be written to" in error


def test_the_traceback_is_shown_when_asked_for(trl_kd, base):
    done = trl_kd(*base, "--imitation_weight", "-1", "--traceback")
    assert done.code == 2
    assert "Traceback" in done.err
    assert "_check_ranges" in done.err


# ---- Data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row.pop("rejected"), ["lacks the column 'rejected'", "it has chosen, prompt"]),
        (lambda row: row.update(preference=1.5), ["Row 0", "`preference` is 1.5", "[0, 1]"]),
        (lambda row: row.update(preference=-0.1), ["`preference` is -0.1"]),
        (lambda row: row.update(teacher_side="left"), ["`teacher_side` is 'left'", "'chosen', 'rejected' or null"]),
        (lambda row: row.update(chosen=None), ["`chosen` is null"]),
        (lambda row: row.update(prompt="1+" * 600), ["leaves no response token", "`max_length`"]),
    ],
)
def test_bad_rows(trl_kd, base, jsonl, pairs, change, said):
    for row in pairs:
        change(row)
    jsonl(pairs)
    for more in ([], ["--dry_run"]):
        error = trl_kd(*base, *more).error
        assert all(part in error for part in said), error


def test_a_max_length_that_leaves_no_response(trl_kd, base):
    error = trl_kd(*base, "--max_length", "4").error
    assert "8 of 8 rows" in error
    assert "`max_length` = 4" in error


def test_sources_that_are_not_there(trl_kd, base, tmp_path):
    def error(name):
        return trl_kd(*replaced(base, "--dataset_name", str(name))).error

    assert "no such file or folder" in error("./nowhere")
    assert "no such file or folder" in error("nowhere.jsonl")
    assert "no such file or folder here" in error("owner/nowhere")  # it might be on the Hub, which is out of reach
    (tmp_path / "pairs.txt").write_text("")
    assert "its name must end in .jsonl" in error(tmp_path / "pairs.txt")
    (tmp_path / "empty").mkdir()
    assert "holds neither a saved dataset nor" in error(tmp_path / "empty")
    (tmp_path / "broken.jsonl").write_text('{"prompt": ')
    assert "is no JSON" in error(tmp_path / "broken.jsonl")
    Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}).save_to_disk(tmp_path / "none")
    assert "is empty" in error(tmp_path / "none")


def test_splits_that_are_not_there(trl_kd, base, pairs, tmp_path):
    words = [*base, "--dataset_train_split", "trian"]
    assert "`dataset_train_split` is 'trian'" in (error := trl_kd(*words).error)
    assert "has the splits 'train'" in error
    error = trl_kd(*base, "--eval_strategy", "steps").error
    assert "`dataset_test_split` is 'test'" in error
    assert "`eval_strategy`" in error
    two = DatasetDict({"a": Dataset.from_list(pairs), "b": Dataset.from_list(pairs)})
    two.save_to_disk(tmp_path / "two")
    error = trl_kd(*replaced(base, "--dataset_name", str(tmp_path / "two"))).error
    assert "`dataset_train_split` is 'train'" in error
    assert "'a', 'b'" in error


def test_messages_without_a_chat_template(trl_kd, base, jsonl, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    model = save_tiny(tmp_path / "plain", tokenizer)
    messages = {
        part: [{"role": role, "content": "1"}]
        for part, role in [("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")]
    }
    jsonl([messages])
    for more in ([], ["--dry_run"]):
        error = trl_kd(*replaced(base, "--model_name_or_path", model), *more).error
        assert "no chat template" in error


# ---- Models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
def test_a_model_that_is_not_there(trl_kd, base, tmp_path, more):
    def error(name):
        return trl_kd(*replaced(base, "--model_name_or_path", str(name)), *more).error

    assert "`model_name_or_path` is './nowhere': no such folder" in error("./nowhere")
    assert "`model_name_or_path` is 'owner/nowhere'" in error("owner/nowhere")
    (tmp_path / "empty").mkdir()
    assert "there is no config.json in it" in error(tmp_path / "empty")


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
def test_a_teacher_that_is_not_there_or_speaks_another_language(trl_kd, base, tmp_path, more):
    words = [*base, *more, "--imitation", "token", "--teacher_model_name_or_path"]
    assert "`teacher_model_name_or_path` is './nowhere': no such folder" in trl_kd(*words, "./nowhere").error
    assert "`model_name_or_path`" not in trl_kd(*words, "owner/nowhere").error  # the student is fine
    swapped = make_tokenizer(CHARACTERS[1] + CHARACTERS[0] + CHARACTERS[2:])
    teacher = save_tiny(tmp_path / "other", swapped)
    error = trl_kd(*words, teacher).error
    assert "another vocabulary" in error
    assert "`imitation='sequence'`" in error or "imitation='sequence'" in error


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
def test_what_is_said_first(trl_kd, base, jsonl, pairs, more):
    """Arguments, then the dataset, then the models."""
    words = replaced(base, "--model_name_or_path", "./nowhere") + more
    jsonl([{**pairs[0], "preference": 2}])
    assert "`imitation_weight`" in trl_kd(*words, "--imitation_weight", "-1").error
    assert "`preference` is 2" in trl_kd(*words).error
    jsonl(pairs)
    assert "`model_name_or_path`" in trl_kd(*words).error


def test_nothing_is_written(trl_kd, base, out):
    assert trl_kd(*base, "--max_length", "4").code == 2
    assert trl_kd(*base, "--dry_run").code == 0
    assert not out.exists()


def test_credentials_are_not_printed(trl_kd, base):
    words = replaced(base, "--dataset_name", "https://me:secret@example.com/x")
    assert "secret" not in trl_kd(*words).err
    assert json.dumps("secret") not in trl_kd(*words).out


@pytest.mark.parametrize(
    ("name", "text"), [("e.jsonl", ""), ("e.jsonl", "\n\n"), ("e.csv", ""), ("e.csv", "prompt,chosen,rejected\n")]
)
def test_an_empty_file(name, text, trl_kd, base, tmp_path):
    (tmp_path / name).write_text(text)
    assert "is empty: it needs at least one row" in trl_kd(*base, "--dataset_name", str(tmp_path / name)).error


def test_what_is_missing_is_said_first(trl_kd):
    assert "`model_name_or_path` is not set" in trl_kd("pbkd").error


def test_weights_that_are_not_there(trl_kd, base, tiny_dir, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_dir, folder)
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in trl_kd(*base, "--model_name_or_path", str(folder), "--dry_run").error
    (folder / "config.json").rename(folder / "adapter_config.json")
    assert "merge it into its base model" in trl_kd(*base, "--model_name_or_path", str(folder), "--dry_run").error
