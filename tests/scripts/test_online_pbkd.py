"""`trl-kd online-pbkd` from arguments to a saved student, on tiny models, and what is refused before weights load."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import trl_kd.trainers.online_pbkd.trainer as online_pbkd_trainer
from tests.conftest import make_model, refuse_weights
from tests.sampling.fault_server import FaultServer, chat, error
from tests.scripts.conftest import replaced
from tests.scripts.test_pbkd_dry_run import line
from trl_kd.pairs import load_pairs
from trl_kd.pairs.lock import lock_folder
from trl_kd.rewards.reward_model import from_student
from trl_kd.scripts import training
from trl_kd.scripts.dry_run import reward_model_memory
from trl_kd.scripts.online_pbkd_build import TRL_REWARDS, reward_function, teacher_folder
from trl_kd.trainers.online_pbkd import learner as reward_learner


DIGITS = """
def digits(completions, **columns):
    return [float(sum(character.isdigit() for character in str(text))) for text in completions]
"""
ROWS = [{"prompt": f"{number}+1=", "completion": str(number + 1)} for number in range(8)]


@pytest.fixture
def pairs_config(tmp_path, teacher_dir):
    """Writes a `pairs_config` with some keys changed, and returns its path."""
    (tmp_path / "digits.py").write_text(DIGITS)
    settings = {
        "teacher": teacher_dir,
        "teacher_max_new_tokens": 6,
        "preference": f"verifier:{tmp_path / 'digits.py'}:digits",
    }

    def write(**changed):
        path = tmp_path / "pairs.yaml"
        kept = {name: value for name, value in (settings | changed).items() if value is not None}
        path.write_text(yaml.safe_dump(kept))
        return str(path)

    return write


@pytest.fixture
def online(tiny_dir, jsonl, pairs_config, tmp_path) -> list[str]:
    """A command line of two steps, each on two prompts with two answers, without a warm-up."""
    return [
        "online-pbkd",
        *("--model_name_or_path", tiny_dir),
        *("--dataset_name", jsonl(ROWS, "prompts.jsonl")),
        *("--pairs_config", pairs_config()),
        *("--output_dir", str(tmp_path / "out")),
        *("--bf16", "false", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true"),
        *("--max_steps", "2", "--per_device_train_batch_size", "4", "--gradient_checkpointing", "false"),
        *("--num_generations", "2", "--max_completion_length", "4"),
        *("--rm_lora_r", "0", "--rm_learning_rate", "1e-2", "--rm_warmup_accuracy", "0"),
    ]


@pytest.fixture
def trained(monkeypatch):
    """The trainers that commands have made."""
    made = []

    class Recorder(online_pbkd_trainer.OnlinePbKDTrainer):
        def __init__(self, *args, **kwargs):
            made.append(self)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(online_pbkd_trainer, "OnlinePbKDTrainer", Recorder)
    return made


def ok(outcome):
    assert outcome.code == 0, outcome.err
    return outcome


# ---- Runs ----------------------------------------------------------------------------------------------------------------


def test_a_run_saves_student_reward_model_and_pairs(trl_kd, online, tiny_dir, teacher_dir, out, trained):
    done = ok(trl_kd(*online, "--learning_rate", "1e-2", "--logging_steps", "1", "--rm_held_out", "0.3"))
    for metric in ("teacher_win_rate", "rm_accuracy", "rm_nll_mle", "rm_nll_adv", "violation", "dual", "dataset_size"):
        assert f"pbkd/{metric}" in done.out
    assert f"Model saved to {out}" in done.out
    student, start = (AutoModelForCausalLM.from_pretrained(path) for path in (out, tiny_dir))
    assert any(not torch.equal(a, b) for a, b in zip(student.parameters(), start.parameters(), strict=True))
    card = (out / "README.md").read_text()
    assert "- online-pbkd" in card
    assert f"Teacher: {Path(teacher_dir).name}." in card
    assert re.search(r"In the end there were \d+ preference pairs", card)
    reward = AutoModelForSequenceClassification.from_pretrained(out / "_online" / "reward_model")
    assert reward.config.num_labels == 1
    assert len(load_pairs(out / "_online" / "pairs")) == len(trained[0].learner.pool) > 0
    assert (Path(teacher_folder(trained[0].args)) / "answers.db").is_file()
    assert trained[0].state.global_step == 2


def test_the_command_line_wins_over_the_file(trl_kd, online, tmp_path, pairs_config, trained):
    settings = {
        "adversary": "mle",
        "confidence_radius": "theory",
        "rm_learning_rate": "1e-3",  # what YAML makes of 1e-3 without a point
        "reward_funcs": ["get_soft_overlong_punishment", f"{tmp_path / 'digits.py'}:digits"],
        "reward_weights": [0.0, 0.5, 1],
        "imitation_weight": 0.1,
        "save_strategy": False,
        "max_steps": 1,
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    words = replaced(replaced(online, "--max_steps"), "--rm_learning_rate")
    ok(trl_kd("online-pbkd", "--config", config, *words[1:], "--adversary", "pbkd", "--dual_init=7"))
    args = trained[0].args
    assert (args.adversary, args.confidence_radius, args.rm_learning_rate) == ("pbkd", "theory", 1e-3)
    assert (args.imitation_weight, args.dual_init, args.max_steps) == (0.1, 7.0, 1)
    assert trained[0].reward_func_names[1:] == ["digits", "reward_model"]
    assert trained[0].reward_weights.tolist() == [0.0, 0.5, 1.0]


def test_the_page_explains_every_metric(trl_kd, online, pairs_config, tmp_path, trained, monkeypatch):
    monkeypatch.setattr(reward_learner, "LEAST_HELD_OUT", 1)
    pairs_config(teacher=None, teacher_max_new_tokens=None, preference="teacher_wins")
    rows = Dataset.from_list([{**row, "completion": "777"} for row in ROWS])
    DatasetDict({"train": rows, "test": rows.select([0, 1])}).save_to_disk(tmp_path / "saved")
    words = replaced(replaced(online, "--dataset_name", str(tmp_path / "saved")), "--rm_warmup_accuracy", "0.01")
    words += ["--rm_held_out", "0.4", "--imitation_weight", "0.1", "--logging_steps", "1", "--max_steps", "1"]
    words += ["--eval_strategy", "steps", "--eval_steps", "1", "--per_device_eval_batch_size", "2"]
    ok(trl_kd(*words))
    logged = {name for entry in trained[0].state.log_history for name in entry if "pbkd/" in name}
    page = (Path(__file__).parents[2] / "docs" / "online.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"^\| `(pbkd/\w+)`", page, re.MULTILINE))
    assert {name.removeprefix("eval_") for name in logged} == explained


@pytest.mark.parametrize("named", [None, "pairs_config", "teacher_column"])
def test_the_teacher_is_a_column(named, trl_kd, online, jsonl, pairs_config, trained):
    """Named by either side, or by default."""
    column = "completion" if named is None else "said"
    rows = [{"prompt": row["prompt"], column: row["completion"]} for row in ROWS]
    pairs_config(teacher=None, teacher_max_new_tokens=None, teacher_column="said" if named == "pairs_config" else None)
    more = ["--teacher_column", "said"] if named == "teacher_column" else []
    ok(trl_kd(*replaced(online, "--dataset_name", jsonl(rows, "said.jsonl")), *more, "--max_steps", "1"))
    assert trained[0].args.teacher_column == column
    seen = {row[row["teacher_side"] or "chosen"] for row in trained[0].learner.pool.rows}
    assert seen <= {row["completion"] for row in ROWS}
    assert not Path(teacher_folder(trained[0].args)).exists()


def test_given_pairs_alone_with_lora_and_a_reward_model(trl_kd, online, jsonl, pairs, tmp_path, out, trained):
    """The paper's offline algorithm: D stays."""
    from_student(make_model(seed=3)).save_pretrained(tmp_path / "reward")
    AutoTokenizer.from_pretrained(online[2]).save_pretrained(tmp_path / "reward")
    words = [*replaced(online, "--pairs_config"), "--preference_dataset", jsonl(pairs), "--rm_lora_r", "2"]
    words += ["--reward_model_name_or_path", str(tmp_path / "reward")]
    words += ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj", "--max_steps", "1"]
    told = ok(trl_kd(*words, "--dry_run")).out
    ok(trl_kd(*words))
    learner = trained[0].learner
    assert len(learner.pool) == len(pairs)
    assert (out / "adapter_model.safetensors").is_file()
    count = sum(p.numel() for p in learner.model.parameters())
    learnt = sum(p.numel() for p in learner.model.parameters() if p.requires_grad)
    assert line(told, "reward model from").endswith(f"LoRA of rank 2: {count:,} parameters, {learnt:,} trained")
    assert line(told, "D").startswith(f"{len(pairs)} known pairs at the start")
    assert line(told, "D").endswith("; it stays")
    assert "reference" not in line(told, "memory")


def test_off_is_rloo_with_rewards(trl_kd, online, tmp_path, trained, out):
    words = replaced(online, "--pairs_config")
    ok(trl_kd(*words, "--adversary", "off", "--reward_funcs", f"{tmp_path / 'digits.py'}:digits", "--max_steps", "1"))
    assert trained[0].learner is None
    assert not (out / "_online").exists()


def test_resuming_gives_what_an_unbroken_run_gives(trl_kd, online, tmp_path, trained):
    def run(folder, *words):
        words = ["--save_steps", "1", "--learning_rate", "1e-2", "--lr_scheduler_type", "constant", *words]
        ok(trl_kd(*replaced(online, "--output_dir", str(tmp_path / folder)), *words))
        return AutoModelForCausalLM.from_pretrained(tmp_path / folder).state_dict()

    unbroken = run("unbroken")
    run("broken", "--max_steps", "1")
    resumed = run("broken", "--resume_from_checkpoint", "true")
    assert trained[-1].state.global_step == 2
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    first, last = trained[0].learner, trained[-1].learner
    assert first.pool.rows == last.pool.rows
    assert first.dual.value == last.dual.value
    weights, others = (learner.model.state_dict() for learner in (first, last))
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_reward_model_that_is_not_fit_is_one_line(trl_kd, online, monkeypatch):
    monkeypatch.setattr(reward_learner, "LEAST_HELD_OUT", 1)
    words = ["--rm_warmup_accuracy", "1", "--rm_warmup_steps", "2", "--rm_held_out", "0.4", "--rm_learning_rate", "0"]
    told = trl_kd(*online, *words).error
    assert "After `rm_warmup_steps` = 2 the reward model orders" in told
    assert "Start from a stronger `reward_model_name_or_path`" in told


def test_resuming_with_another_reward_model_is_one_line(trl_kd, online):
    online = [*online, "--max_steps", "1", "--save_steps", "1"]
    ok(trl_kd(*online))
    told = trl_kd(*online, "--max_steps", "2", "--rm_lora_r", "3", "--resume_from_checkpoint", "true").error
    assert "resume with the `reward_model_name_or_path` and `rm_lora_r` of that run" in told


def test_pushing_without_a_way_to_the_hub_is_one_line(trl_kd, online, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    told = trl_kd(
        *online, "--push_to_hub", "--hub_model_id", "me/student", "--hub_token", "hf_secretsecretsecret"
    ).error
    assert "offline" in told.lower()
    assert "hf_secret" not in told


def test_launch_options_go_to_the_launcher(online, monkeypatch, trl_kd):
    seen = []
    monkeypatch.setattr(training, "launch", lambda *args: seen.append(args) or 0)
    assert trl_kd(*online, "--multi_gpu", "--num_processes", "2").code == 0
    assert seen == [("trl_kd.scripts.online_pbkd", online[1:], ["--multi_gpu", "--num_processes", "2"])]


def test_help_lists_every_field(trl_kd):
    done = ok(trl_kd("online-pbkd", "--help"))
    for name in (
        "adversary",
        "pairs_config",
        "preference_dataset",
        "reward_model_name_or_path",
        "reward_funcs",
        "dry_run",
    ):
        assert f"--{name}" in done.out
    assert "online-pbkd" in ok(trl_kd("--help")).out


@pytest.mark.parametrize("name", TRL_REWARDS)
def test_rewards_by_trls_names(name):
    assert callable(reward_function(name))


# ---- Dry runs ------------------------------------------------------------------------------------------------------------


def test_the_table(trl_kd, online, teacher_dir, out, monkeypatch):
    refuse_weights(monkeypatch)  # no weights
    told = ok(trl_kd(*online, "--dry_run", "--rm_steps", "2", "--gradient_accumulation_steps", "2")).out
    assert line(told, "train columns") == "prompt, completion (text)"
    assert line(told, "train prompts") == "8"
    assert line(told, "row 0") == "4 prompt tokens"
    assert line(told, "generation batch") == (
        "8 rows: 4 prompts, 2 answers of up to 4 tokens each, for 1 optimizer steps"
    )
    assert line(told, "teacher") == f"{teacher_dir}, asked once for each prompt"
    assert line(told, "preference").endswith("digits.py:digits")
    assert line(told, "D") == "empty at the start; at most 8 more a generation batch"
    assert line(told, "reward model") == (
        "2 steps a generation batch with 8 pairs each, 50% of them from the newest batch"
    )
    assert line(told, "warm-up") == "none"
    assert line(told, "student climbs") == "the adversarial head, held by λ and ζ; imitation 4"
    for part in ("reference", "reward model", "teacher"):
        assert f"+ {part} " in line(told, "memory")
    assert told.rstrip().endswith("Ready to train.")
    assert not out.exists()


def test_a_column_is_read_and_steps_are_those_of_the_trainer(trl_kd, online, pairs_config, trained):
    pairs_config(teacher=None, teacher_max_new_tokens=None)
    words = [*replaced(online, "--max_steps"), "--num_train_epochs", "2", "--gradient_accumulation_steps", "2"]
    words += ["--steps_per_generation", "3", "--num_iterations", "2", "--learning_rate", "0"]
    told = ok(trl_kd(*words, "--dry_run")).out
    assert line(told, "teacher") == "the column 'completion', given for 8"
    assert line(told, "shown") == "row 0: 0+1="
    assert line(told, "its answer") == "1"
    ok(trl_kd(*words))
    assert line(told, "steps").startswith(f"{trained[0].state.max_steps} in 2 epochs")


def test_a_reward_model_that_is_nowhere_is_said_once(trl_kd, online):
    for more in ([], ["--dry_run"]):
        error = trl_kd(*online, "--reward_model_name_or_path", "no/such", *more).error
        assert error.count("`reward_model_name_or_path` is 'no/such', which cannot be loaded") == 1


def test_what_the_warm_up_takes(trl_kd, online, jsonl):
    many = jsonl([{"prompt": f"{number}+1="} for number in range(400)], "many.jsonl")
    words = replaced(replaced(online, "--dataset_name", many), "--rm_warmup_accuracy")
    told = ok(trl_kd(*words, "--dry_run", "--num_generations", "4", "--rm_held_out", "0.2")).out
    said = re.search(r"until 65% of 100 or more .* at most (\d+)$", line(told, "warm-up"))
    assert 200 < int(said[1]) < 440
    for more in ([], ["--dry_run"]):  # 40 prompts with two answers each
        assert "`rm_held_out` is 0.1, which holds out at most" in trl_kd(*words, *more).error
    fixed = jsonl([{"prompt": f"{number}+1=", "chosen": "1", "rejected": "2"} for number in range(600)], "fixed.jsonl")
    words = [*replaced(words, "--pairs_config"), "--preference_dataset", fixed]
    words += ["--dry_run", "--rm_held_out", "0.3", "--adversary", "mle"]
    assert "or do without imitation by `imitation_weight=0`" in trl_kd(*words).error
    told = ok(trl_kd(*words, "--imitation_weight", "0")).out
    said = re.search(r"\((\d+) strict\); it stays$", line(told, "D"))
    assert line(told, "warm-up").endswith(f"at most {said[1]}")


def test_a_server_is_asked_once(trl_kd, online, pairs_config, jsonl, out, monkeypatch):
    """And told off in one line where it answers no more."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    words = replaced(online, "--dataset_name", jsonl(rows, "chats.jsonl"))
    with FaultServer(lambda body, number: chat("777") if number < 3 else error(400, "No more.")) as server:
        pairs_config(teacher="api:big", teacher_base_url=server.url)
        told = ok(trl_kd(*words, "--dry_run")).out
        assert server.count == 1
        assert re.search(r"^  its answer +777 \(stop\)\n +8 answers to ask: about", told, re.MULTILINE)
        assert not out.exists()
        ok(trl_kd(*words, "--max_steps", "1"))
        assert server.count == 3  # one for each prompt of the batch
        shutil.rmtree(out / "checkpoint-1")  # to start over; the teacher's answers stay
        assert "No more." in trl_kd(*words, "--seed", "1", "--max_steps", "2").error
        assert "No more." in trl_kd(*words, "--dry_run").error


def test_memory_of_the_reward_model(tiny_dir):
    args = SimpleNamespace(trust_remote_code=False, reward_bound=5.0, rm_lora_r=0)
    model = SimpleNamespace(model_name_or_path=tiny_dir, use_peft=False, load_in_4bit=False, load_in_8bit=False)
    count, learnt, size = reward_model_memory(args, model, None)
    body = sum(p.numel() for p in make_model().model.parameters())
    width = make_model().config.hidden_size
    assert count == learnt == body + 2 * width
    assert size == 16 * count  # weights, gradients and Adam's two moments


# ---- Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "pairs", "said"),
    [
        (["--adversary", "gan"], {}, "`adversary`"),
        (["--pairs_config", "nowhere.yaml"], {}, "`pairs_config` is 'nowhere.yaml': no such file"),
        (["--preference_dataset_split", "x"], {}, "`preference_dataset_split` is 'x', but `preference_dataset` is not"),
        (["--preference_dataset", "nowhere.jsonl"], {}, "`preference_dataset` is 'nowhere.jsonl': no such file"),
        (["--model_name_or_path", "./nowhere"], {}, "`model_name_or_path` is './nowhere': no such folder"),
        (["--reward_model_name_or_path", "./nowhere"], {}, "`reward_model_name_or_path` is './nowhere': no such folder"),
        (["--reward_funcs", "lenght"], {}, "`reward_funcs` names 'lenght', which is none of TRL's rewards"),
        (["--reward_funcs", "nowhere.length"], {}, "`reward_funcs` names 'nowhere.length': cannot load"),
        (["--reward_funcs", "./nowhere"], {}, "`reward_funcs` is './nowhere': no such folder"),
        (["--reward_weights", "1", "2"], {}, "`reward_weights` has 2 numbers, and there are 1 rewards"),
        (["--teacher_column", "said"], {}, "`teacher_column` is 'said', but the teacher is `teacher` ="),
        (["--per_device_train_batch_size", "64"], {}, "has 8 prompts, and one generation batch takes 32"),
        (["--adversary", "off"], {}, "`adversary` is 'off' and there are no `reward_funcs`"),
        ([], {"student": "x"}, "`student` is set, but the student is the one that is trained"),
        ([], {"num_student_samples": 2}, "`num_student_samples` is set, but `num_generations`"),
        ([], {"num_teacher_samples": 2}, "`num_teacher_samples` is set, but the teacher answers each prompt once"),
        ([], {"dataset_name": "x"}, "`dataset_name` is set, but the prompts are those of the training's own"),
        ([], {"policy": "all"}, "`policy` is set, but each of the student's answers"),
        ([], {"output_dir": "x"}, "`output_dir` is set, but the teacher's answers are kept in"),
        ([], {"push_to_hub": True}, "`push_to_hub` is set, but the pairs are not pushed"),
        ([], {"teachre": "x"}, "unknown key `teachre`"),
        ([], {"teacher": "./nowhere"}, "`teacher` is './nowhere': no such folder"),
        ([], {"teacher": None, "teacher_max_new_tokens": None, "teacher_column": "x"}, "no column 'x'"),
        ([], {"preference": None}, "`preference` is not set"),
        ([], {"preference": "column:x"}, "'x'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dry", [True, False])
def test_bad_input(dry, words, pairs, said, trl_kd, online, pairs_config, out, monkeypatch):
    refuse_weights(monkeypatch)
    pairs_config(**pairs)
    assert said in trl_kd(*online, *words, *(["--dry_run"] if dry else [])).error
    assert not out.exists()


def test_no_preferences(trl_kd, online):
    told = trl_kd(*replaced(online, "--pairs_config")).error
    assert "`adversary` is 'pbkd', which is held by preferences, and there are none: give `pairs_config`" in told


def test_a_reward_model_for_nobody(trl_kd, online, tiny_dir, tmp_path):
    words = ["--adversary", "off", "--reward_model_name_or_path", tiny_dir]
    told = trl_kd(
        *replaced(online, "--pairs_config"), *words, "--reward_funcs", f"{tmp_path / 'digits.py'}:digits"
    ).error
    assert "`reward_model_name_or_path` is given, but `adversary` is 'off'" in told


def test_a_second_run_is_refused_before_weights_load(trl_kd, online, tmp_path, monkeypatch):
    refuse_weights(monkeypatch)
    (tmp_path / "out").mkdir()
    with lock_folder(tmp_path / "out"):
        assert "out` is being written by process" in trl_kd(*online).error
