"""What no weights are needed for is checked before anything begins, by the dry run and by the run itself."""

import json
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest
import transformers.utils
import yaml
from transformers import PreTrainedModel

from tests.conftest import refuse_weights
from tests.scripts.conftest import replaced
from tests.scripts.test_online_pbkd import online, pairs_config  # noqa: F401
from tests.scripts.test_pbkd_dry_run import line


TRAINING = ("pbkd", "mm-pbkd", "online-pbkd", "rounds")
JUDGE = ("--preference", "judge:gpt-x")


@pytest.fixture
def commands(base, mm_base, online, jsonl, tmp_path, teacher_dir):  # noqa: F811
    """A command line of each way to train."""
    prompts = jsonl([{"prompt": "1+1="}], "rounds.jsonl")
    asking = {"dataset_name": prompts, "teacher": teacher_dir, "preference": "teacher_wins"}
    (tmp_path / "rounds.yaml").write_text(yaml.safe_dump(asking))
    rounds = [*replaced(base, "--dataset_name"), "--rounds", "1", "--pairs_config", str(tmp_path / "rounds.yaml")]
    return {"pbkd": base, "mm-pbkd": mm_base, "online-pbkd": online, "rounds": rounds}


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    refuse_weights(monkeypatch, PreTrainedModel)
    monkeypatch.setattr("trl_kd.scripts.rounds_dry_run._of_a_round", lambda *_: "")


# ---- Pushing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
@pytest.mark.parametrize("command", TRAINING)
def test_a_push_that_could_not_be(trl_kd, commands, monkeypatch, tmp_path, command, more):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    words = [*commands[command], "--push_to_hub", *more]
    assert "`push_to_hub` is true, but the Hub does not let you in" in trl_kd(*words).error
    assert "`hub_model_id` is 'me/my student'" in trl_kd(*words, "--hub_model_id", "me/my student").error
    told = trl_kd(*replaced(words, "--output_dir", str(tmp_path / "my out"))).error
    assert "my out', which names no repository of the Hub: set `hub_model_id`" in told
    told = trl_kd(*words, "--hub_token", "hf_secretsecretsecret").error
    assert "hf_secret" not in told


def test_one_process_asks_the_hub(trl_kd, base, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self, token: asked.append(token))
    text = trl_kd(*base, "--dry_run", "--push_to_hub", "--hub_token", "t").out
    assert line(text, "pushes") == "to out on the Hub"
    assert asked == ["t"]
    monkeypatch.setenv("RANK", "1")
    trl_kd(*base, "--dry_run", "--push_to_hub", "--hub_token", "t")
    assert asked == ["t"]


# ---- Packages and keys ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
@pytest.mark.parametrize("command", TRAINING)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--report_to", "tensorbord"], ["`report_to` is 'tensorbord'", "did you mean 'tensorboard'?"]),
        (["--report_to", "mine"], ["`report_to` is 'mine'", "all and none: drop it"]),
        (
            ["--attn_implementation", "flash_attention_2"],
            ["`attn_implementation` is 'flash_attention_2'", "flash-attn"],
        ),
        (["--attn_implementation", "kernels-community/x"], ["`attn_implementation` is", "the package kernels"]),
        (["--attn_implementation", "spda"], ["`attn_implementation` is 'spda'", "eager", "sdpa"]),
        (
            ["--model_init_kwargs", '{"attn_implementation": "flash_attention_3"}'],
            ["`model_init_kwargs` asks for attention by 'flash_attention_3'"],
        ),
    ],
)
def test_what_is_not_installed(trl_kd, commands, command, words, said, more):
    error = trl_kd(*commands[command], *words, *more).error
    assert all(part in error for part in said), error


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
@pytest.mark.parametrize("command", TRAINING)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--use_liger_kernel"], "`use_liger_kernel` is True, which needs its package: pip install liger-kernel"),
        (
            ["--optim", "galore_adamw"],
            "`optim` is 'galore_adamw', which cannot be used: You need to install `galore_torch`",
        ),
        (
            ["--save_strategy", "best"],
            "`save_strategy` is 'best', and `metric_for_best_model` is not set: name the metric",
        ),
        (
            ["--accelerate_config", "zero3"],
            "`accelerate_config` is 'zero3', which needs DeepSpeed: pip install deepspeed",
        ),
        (
            ["--model_init_kwargs", '{"attn_implementation": 5}'],
            "`model_init_kwargs` asks for attention by 5: it must",
        ),
        (["--model_init_kwargs", '{"dtype": "float99"}'], "`dtype` is 'float99': choose from 'auto', 'float32'"),
        (
            ["--model_init_kwargs", '{"nosuch": 1}'],
            "`nosuch` is neither an option of `from_pretrained` nor a field of",
        ),
    ],
)
def test_what_would_fail_when_weights_are_loaded(trl_kd, commands, monkeypatch, command, words, said, more):
    missing = ("deepspeed", "galore_torch", "liger_kernel")
    for module in ("trl_kd.scripts.launch", "trl_kd.scripts.checks"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None if name in missing else find_spec(name))
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: False)
    monkeypatch.setattr("transformers.trainer_optimizer.is_galore_torch_available", lambda: False)
    assert said in trl_kd(*commands[command], *words, *more).error


@pytest.mark.parametrize("command", ["mm-pbkd", "online-pbkd"])
def test_vllm_that_is_not_installed(trl_kd, commands, monkeypatch, command):
    monkeypatch.setattr("trl_kd.scripts.checks.find_spec", lambda name: None if name == "vllm" else find_spec(name))
    for more in ([], ["--dry_run"]):
        assert "`use_vllm` is True, which needs vLLM" in trl_kd(*commands[command], "--use_vllm", *more).error


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor", "sgd", "lomo"])
def test_optimizers_that_can_be_made(trl_kd, base, monkeypatch, optim):
    monkeypatch.setattr("transformers.trainer_optimizer.is_lomo_available", lambda: True)  # it needs the model
    monkeypatch.setitem(sys.modules, "lomo_optim", SimpleNamespace(Lomo=None, AdaLomo=None))
    assert trl_kd(*base, "--dry_run", "--optim", optim).code == 0


def test_attention_of_a_teacher(trl_kd, mm_base, teacher_dir, tmp_path, jsonl):
    options = json.dumps({"attn_implementation": "flash_attention_2"})
    told = trl_kd(*mm_base, "--teacher_model_init_kwargs", options).error
    assert "`teacher_model_init_kwargs` asks for attention by 'flash_attention_2'" in told
    words = ("pairs", "--dataset_name", jsonl([{"prompt": "1", "s": "2"}]), "--output_dir", str(tmp_path / "out"))
    words = (*words, "--teacher", teacher_dir, "--student_column", "s", "--preference", "teacher_wins")
    assert "flash-attn" in trl_kd(*words, "--teacher_model_init_kwargs", options).error


def test_attention_that_is_installed(trl_kd, base, monkeypatch):
    monkeypatch.setattr(transformers.utils, "is_flash_attn_2_available", lambda: True)
    assert trl_kd(*base, "--dry_run", "--attn_implementation", "flash_attention_2").code == 0
    module = ModuleType("kernels")
    module.__spec__ = type(sys.__spec__)("kernels", None)
    monkeypatch.setitem(sys.modules, "kernels", module)
    assert trl_kd(*base, "--dry_run", "--attn_implementation", "flash_attention_3").code == 0


def test_a_key_that_is_not_set(trl_kd, commands, monkeypatch, tmp_path, jsonl):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump({"teacher_column": "completion", "preference": "judge:gpt-x"}))
    asking = {"dataset_name": jsonl([{"prompt": "1+1="}]), "teacher": "api:gpt-x", "preference": "teacher_wins"}
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(asking))
    trained = {
        "online-pbkd": ("judge.yaml", "`preference` is 'judge:gpt-x'"),
        "rounds": ("teacher.yaml", "`teacher` is"),
    }
    for command, (file, said) in trained.items():
        for more in ([], ["--dry_run"]):
            error = trl_kd(*replaced(commands[command], "--pairs_config", str(tmp_path / file)), *more).error
            assert said in error
            assert "no variable OPENAI_API_KEY" in error
    words = ("pairs", "--dataset_name", jsonl([{"prompt": "1", "s": "2"}]), "--output_dir", str(tmp_path / "out"))
    words = (*words, "--teacher", "api:gpt-x", "--student_column", "s", "--preference", "teacher_wins")
    assert "no variable OPENAI_API_KEY" in trl_kd(*words).error
    assert "`teacher_base_url`" in trl_kd(*words, "--dry_run").error
    told = trl_kd(*words, "--teacher_base_url", "http://localhost:1/v1", "--teacher_api_key_env", "MINE").error
    assert "`teacher_api_key_env` is 'MINE', but the environment has no such variable" in told
    for key in ("sk-proj-0123abcd", "AKIA0123456789ABCDEF", "abcdefgh"):  # in place of its variable
        told = trl_kd(*words, "--teacher_base_url", "http://localhost:1/v1", "--teacher_api_key_env", key)
        assert "`teacher_api_key_env` names no variable of the environment" in told.error
        assert key not in told.out + told.err
    local = trl_kd(*words, "--teacher_base_url", "http://localhost:1/v1", "--teacher_max_retries", "0").error
    assert "OPENAI_API_KEY" not in local  # nobody answers there, which is another matter


# ---- What the dry run says -----------------------------------------------------------------------------------------------


def test_how_a_run_will_train(trl_kd, commands):
    text = trl_kd(
        *commands["pbkd"], "--dry_run", "--save_steps", "1", "--save_total_limit", "1", "--warmup_steps", "3"
    ).out
    assert line(text, "learning rate") == "2e-05, linear, warm-up 3 steps"
    assert line(text, "precision") == "no mixed precision, weights in float32"
    assert line(text, "trains") == "all weights"
    for said in ("imitation_weight 1", "imitation_q 0.5", "imitation_radius 0.02", "dual_init 0"):
        assert said in text
    saves = line(text, "saves")
    assert saves.startswith(
        "a checkpoint every 1 steps and after the last, 2 in all, of which the newest 1 are kept; "
    )
    assert "the student and its card in" in saves
    assert "warning" not in text


@pytest.mark.parametrize("command", TRAINING)
def test_every_method_says_its_own(trl_kd, commands, command):
    text = trl_kd(*commands[command], "--dry_run", "--bf16", "true", "--dtype", "bfloat16").out
    settings = {"mm-pbkd": "moment_coef 1", "online-pbkd": "adversary pbkd"}.get(command, "student_wins ")
    assert settings in text
    assert "imitation_weight" in text
    assert line(text, "precision") == "bf16 mixed precision, weights in bfloat16"
    assert line(text, "saves")
    assert line(text, "learning rate").startswith("2e-05" if command in ("pbkd", "rounds") else "1e-06")


@pytest.mark.parametrize("command", TRAINING)
def test_lora_with_a_learning_rate_of_full_training(trl_kd, commands, command):
    words = [*commands[command], "--dry_run", "--use_peft", "--lora_r", "2"]
    text = trl_kd(*words).out
    assert "LoRA needs about ten times as much" in line(text, "warning")
    assert line(text, "trains").startswith("LoRA of rank 2, alpha 32, dropout 0.05, on ")
    text = trl_kd(*words, "--learning_rate", "2e-4", "--use_dora", "--lora_target_modules", "q_proj", "v_proj").out
    assert "  warning" not in text
    assert line(text, "trains").startswith("DoRA of rank 2")
    assert line(text, "trains").endswith("on q_proj, v_proj")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--save_strategy", "no"], "; no checkpoints"),
        (["--save_strategy", "epoch"], "a checkpoint after each epoch; "),
        (["--save_strategy", "best", "--metric_for_best_model", "loss"], "a checkpoint whenever loss is better; "),
        (["--save_steps", "0.5", "--max_steps", "10"], "a checkpoint every 5 steps and after the last, 2 in all; "),
        (["--save_steps", "0"], "a checkpoint after the last step alone; "),
        (["--save_steps", "-1"], "a checkpoint after the last step alone; "),
        (["--save_only_model"], "without the optimizer (none can be resumed)"),
    ],
)
def test_what_is_saved(trl_kd, base, words, said):
    assert said in line(trl_kd(*base, "--dry_run", *words).out, "saves")


@pytest.mark.parametrize(
    "line",
    ["max_grad_norm: .inf", "max_grad_norm: -1.0", "fsdp: false", "fsdp: []", "save_steps: -1", "seed: 4294967295"],
)
def test_values_that_transformers_takes_are_taken(trl_kd, base, tmp_path, line):
    (tmp_path / "values.yaml").write_text(line)
    assert "Ready to train." in trl_kd(*base, "--dry_run", "--config", str(tmp_path / "values.yaml")).out


@pytest.mark.parametrize("command", TRAINING)
def test_a_folder_where_a_result_belongs(trl_kd, commands, out, command):
    (out / "README.md").mkdir(parents=True)
    error = trl_kd(*commands[command]).error
    assert f"`{out}/README.md` is a folder, where the file with results of this run belongs: move it away" in error
