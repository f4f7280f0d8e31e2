"""Bad input to `trl-kd mm-pbkd`: one line that names the field, its value and the way out, before any weight loads."""

import pytest
import yaml

import trl_kd.trainers.mm_pbkd.trainer as mm_pbkd_trainer
from tests.conftest import CHARACTERS, make_tokenizer, save_tiny
from tests.scripts.conftest import replaced
from trl_kd.scripts.training import _explained


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """Whatever is wrong is said before weights load: `DistillationTrainer`'s constructor begins with them."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights were about to load")

    monkeypatch.setattr(mm_pbkd_trainer.DistillationTrainer, "__init__", refuse)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lmda", "0.2"], ["unknown key `--lmda`", "did you mean `lmbda`"]),
        (["--preference_datset", "x"], ["unknown key `--preference_datset`", "did you mean `preference_dataset`"]),
        (["--lmbda", "1.5"], ["`lmbda` is 1.5", "between 0 and 1"]),
        (["--q_head", "deep"], ["`q_head`", "'deep'", "'linear', 'mlp', 'adapter'"]),
        (["--q_steps", "0"], ["`q_steps` is 0"]),
        (["--confidence_radius", "wide"], ["`confidence_radius` is 'wide'", "'theory'"]),
        (["--dual_init", "90"], ["`dual_init` is 90", "`dual_max`"]),
        (["--imitation_weight", "1"], ["`imitation_weight` is 1.0", "`lmbda`"]),
        (["--moment_coef", "0"], ["`preference_dataset` is", "`moment_coef` is 0"]),
        (["--preference_dataset", "./nowhere"], ["`preference_dataset` is './nowhere'", "no such file or folder"]),
        (["--preference_dataset", "owner/none"], ["`preference_dataset` is 'owner/none'", "of the Hub"]),
        (["--preference_dataset_split", "dev"], ["`preference_dataset_split` is 'dev'", "has the splits 'train'"]),
        (["--pair_max_length", "4"], ["8 of 8 rows", "max_length` = 4"]),
        (["--per_device_train_batch_size", "9"], ["8 prompts", "one step takes 9", "`per_device_train_batch_size`"]),
        (["--load_in_4bit"], ["`load_in_4bit` is True", "`use_peft`"]),
        (["--teacher_model_name_or_path", "./nowhere"], ["`teacher_model_name_or_path` is './nowhere'"]),
        (["--model_name_or_path", "./nowhere"], ["`model_name_or_path` is './nowhere'"]),
        (["--resume_from_checkpoint", "true"], ["`resume_from_checkpoint` is true", "no checkpoint"]),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry_run"]], ids=["run", "dry"])
def test_bad_values(trl_kd, mm_base, words, said, more):
    error = trl_kd(*mm_base, *words, *more).error
    assert all(part in error for part in said), error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ({"lmda": 0.2}, ["unknown key `lmda` in", "did you mean `lmbda`"]),
        ({"lmbda": "half"}, ["`lmbda` is 'half' in", "a number"]),
        ({"q_head": "deep"}, ["`q_head` is 'deep' in", "'adapter'"]),
        ({"imitation": "token"}, ["unknown key `imitation`"]),  # of `trl-kd pbkd`
    ],
)
def test_bad_yaml(trl_kd, mm_base, tmp_path, text, said):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(text))
    error = trl_kd(*mm_base, "--config", tmp_path / "bad.yaml").error
    assert all(part in error for part in said), error


def test_what_must_be_given(trl_kd, mm_base):
    error = trl_kd(*replaced(mm_base, "--teacher_model_name_or_path")).error
    assert "`teacher_model_name_or_path` is not set" in error
    assert "`trl-kd pbkd`" in error
    assert "`model_name_or_path` is not set" in trl_kd(*replaced(mm_base, "--model_name_or_path")).error
    assert "give the prompts" in trl_kd(*replaced(mm_base, "--dataset_name")).error
    for name in ("config", "split"):
        words = [*replaced(mm_base, "--preference_dataset"), f"--preference_dataset_{name}", "x"]
        assert f"`preference_dataset_{name}` is 'x', but `preference_dataset` is not set" in trl_kd(*words).error


@pytest.mark.parametrize(
    ("field", "change", "said"),
    [
        ("dataset_name", lambda row: row.pop("prompt"), ["no column 'prompt'", "it has chosen, rejected"]),
        ("dataset_name", lambda row: row.update(completion=[{"role": "a", "content": "b"}]), ["`prompt` is text but"]),
        ("preference_dataset", lambda row: row.pop("chosen"), ["lacks the column 'chosen'", "prompt, rejected"]),
        ("preference_dataset", lambda row: row.update(preference=1.5), ["Row 0", "`preference` is 1.5"]),
        ("preference_dataset", lambda row: row.update(preference=None), ["no row with a known `preference`"]),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry_run"]], ids=["run", "dry"])
def test_bad_rows(trl_kd, mm_base, jsonl, pairs, field, change, said, more):
    for row in pairs:
        change(row)
    words = replaced(mm_base, f"--{field}", jsonl(pairs, "bad.jsonl"))
    error = trl_kd(*words, *more, "--lmbda", "0.5").error
    assert all(part in error for part in said), error


@pytest.mark.parametrize("more", [[], ["--dry_run"]], ids=["run", "dry"])
def test_another_vocabulary(trl_kd, mm_base, tmp_path, more):
    teacher = save_tiny(tmp_path / "other", make_tokenizer(CHARACTERS[1] + CHARACTERS[0] + CHARACTERS[2:]))
    error = trl_kd(*replaced(mm_base, "--teacher_model_name_or_path", teacher), *more).error
    assert "another vocabulary" in error
    assert "token 3 is '1' for the teacher" in error


def test_nothing_is_written(trl_kd, mm_base, out):
    assert trl_kd(*mm_base, "--pair_max_length", "4").code == 2
    assert trl_kd(*mm_base, "--dry_run").code == 0
    assert not out.exists()


# ---- Which model cannot be read -------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--dry_run"]], ids=["run", "dry"])
@pytest.mark.parametrize("field", ["model_name_or_path", "teacher_model_name_or_path"])
def test_a_model_that_is_nowhere_is_named_offline(trl_kd, mm_base, field, more):
    """The library's own sentence, "We couldn't connect", names none."""
    error = trl_kd(*replaced(mm_base, f"--{field}", "nosuch/model"), *more).error
    assert error.startswith(f"trl-kd mm-pbkd: error: `{field}` is 'nosuch/model', which cannot be loaded: We couldn't")
    assert error.count("nosuch/model") == 1


NAMES = {"teacher_model_name_or_path": "org/M-7B", "model_name_or_path": "org/M-7B-Instruct"}


@pytest.mark.parametrize("turned", [False, True], ids=["the student's is longer", "the teacher's is longer"])
@pytest.mark.parametrize("field", NAMES)
def test_a_name_that_begins_as_another_blames_its_own_field(field, turned):
    models = dict(zip(NAMES, reversed(NAMES.values()) if turned else NAMES.values(), strict=True))
    error = OSError(f"{models[field]} is not a local folder and is not a valid model identifier")
    assert str(_explained(error, models, pushes=True)).startswith(f"`{field}` is '{models[field]}', which")


def test_an_error_that_is_of_no_model_keeps_its_words():
    error = OSError("No space left on device")
    assert _explained(error, NAMES, pushes=False) is error
    student = {"model_name_or_path": "org/M"}
    assert "`model_name_or_path` is 'org/M'" in str(_explained(error, student, pushes=False))
    assert _explained(error, student, pushes=True) is error
