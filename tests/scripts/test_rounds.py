"""`trl-kd pbkd --rounds`: from two YAML files to a student and a report, and what is refused before weights load."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM

from tests.conftest import refuse_weights
from tests.scripts.conftest import replaced
from trl_kd.evaluation.rounds_report import make_page, write_rounds_report
from trl_kd.pairs import load_pairs
from trl_kd.trainers.rounds import rounds as rounds_module


DIGITS = """
def digits(completions, **columns):
    return [float(sum(character.isdigit() for character in text)) for text in completions]
"""


@pytest.fixture
def pairs_config(tmp_path, jsonl, teacher_dir):
    """Writes a `pairs_config` with some keys changed, and returns its path."""
    (tmp_path / "digits.py").write_text(DIGITS)
    prompts = jsonl([{"prompt": f"{number}+1="} for number in range(6)], "prompts.jsonl")
    settings = {
        "dataset_name": prompts,
        "teacher": teacher_dir,
        "preference": f"verifier:{tmp_path / 'digits.py'}:digits",
        "teacher_max_new_tokens": 6,
        "student_max_new_tokens": 6,
        "num_student_samples": 2,
        "seed": 3,
    }

    def write(**changed):
        path = tmp_path / "pairs.yaml"
        path.write_text(yaml.safe_dump(settings | changed))
        return str(path)

    return write


@pytest.fixture
def rounds(base, pairs_config):
    """A command line of two rounds."""
    words = replaced(base, "--dataset_name")
    return [
        *words,
        "--rounds",
        "2",
        "--pairs_config",
        pairs_config(),
        "--logging_steps",
        "1",
        "--dual_init",
        "1",
        "--learning_rate",
        "1e-2",
    ]


class Hub:
    """Takes what is uploaded, by the Hub's own rules of what to ignore."""

    uploads: list[set[str]] = []

    def __init__(self, token=None): ...

    def create_repo(self, name, **options):
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, folder_path, ignore_patterns, **options):
        files = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
        self.uploads.append(set(filter_repo_objects(files, ignore_patterns=ignore_patterns)))


def test_a_run(monkeypatch, trl_kd, rounds, out):
    done = trl_kd(*rounds)
    assert done.code == 0, done.err
    told = json.loads((out / "rounds.json").read_text())
    for line in (
        "Round 1 of 2: at its start the student wins",
        "Round 2 of 2:",
        "After 2 rounds:",
        f"Model saved to {out}",
    ):
        assert line in done.out
    assert [record["steps"] for record in told["rounds"]] == [2, 2]
    seeds = {}
    for place in ("round-1", "round-2", "after-2"):
        settings = json.loads((out / place / "pairs/settings.json").read_text())
        seeds[place] = [settings[source]["settings"]["seed"] for source in ("teacher", "student")]
        assert settings["prompts"]["dataset"].endswith("prompts.jsonl")
    # The first round's are those of `trl-kd pairs`; the teacher's stay, the student's move on
    assert seeds == {"round-1": [6, 7], "round-2": [6, 10_007], "after-2": [6, 20_007]}
    assert told["rounds"][1]["pairs"] == sum(len(load_pairs(out / f"round-{n}/pairs")) for n in (1, 2))
    AutoModelForCausalLM.from_pretrained(out)
    page = (out / "rounds.html").read_text()
    assert page.count("<svg") == 5
    for said in ("Cumulative regret", "·√k", "after the last", "accuracy"):
        assert said in page
    assert "## Rounds" in (out / "README.md").read_text()

    assert "`round_schedule` was 'all' and is 'round'" in trl_kd(*rounds, "--round_schedule", "round").error

    assert "`push_to_hub` is true, but the Hub does not let you in" in trl_kd(*rounds, "--push_to_hub").error
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self, token: {})
    monkeypatch.setattr(rounds_module, "HfApi", Hub)
    again = trl_kd(*rounds, "--push_to_hub")
    assert again.code == 0, again.err
    assert "Round 1" not in again.out
    assert json.loads((out / "rounds.json").read_text()) == told
    assert "pushed to the Hub: me/out" in again.out
    assert {"model.safetensors", "README.md", "rounds.json", "rounds.html"} <= Hub.uploads[0]
    assert not [name for name in Hub.uploads[0] if "/" in name or name.startswith((".", "_"))]

    more = trl_kd(*rounds, "--rounds", "3", "--dry_run").out
    assert "The pairs of round 3." in more
    assert not re.search(r"6 answers to ask", more)  # the teacher's: all are stored
    assert "The pairs of round" not in trl_kd(*rounds, "--dry_run").out

    changed = trl_kd(*rounds, "--beta", "0.2")
    assert "`beta` was 0.1 and is 0.2" in changed.error


def test_options_and_an_adapter(trl_kd, rounds, out, pairs_config, tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(yaml.safe_load(Path(pairs_config(teacher_seed=5)).read_text())))
    words = [
        "--prompts_per_round",
        "4",
        "--accumulate",
        "false",
        "--reference",
        "previous",
        "--round_optimizer",
        "carried",
        "--round_schedule",
        "round",
    ]
    words += ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
    done = trl_kd(*replaced(rounds, "--pairs_config", str(path)), *words)
    assert done.code == 0, done.err
    told = json.loads((out / "rounds.json").read_text())
    settings = told["settings"]
    assert (settings["prompts_per_round"], settings["accumulate"]) == (4, False)
    assert [settings[name] for name in ("reference", "optimizer", "schedule")] == ["previous", "carried", "round"]
    assert settings["teacher"]["settings"]["seed"] == 5
    assert [record["pairs"] for record in told["rounds"]] == [record["new_pairs"] for record in told["rounds"]]
    assert (out / "adapter_model.safetensors").is_file()
    second = json.loads((out / "round-2/pairs/settings.json").read_text())["student"]
    assert second["adapter"] == str(out / "round-1/student")


TURNING = """
calls = []

def turning(completions, **columns):
    calls.append(0)
    return [float(sum(map(str.isdigit, text))) if len(calls) == 1 else 0.0 for text in completions]
"""


def test_a_round_in_which_nothing_teaches_is_a_success(trl_kd, rounds, out, pairs_config, tmp_path):
    (tmp_path / "turning.py").write_text(TURNING)
    pairs_config(preference=f"verifier:{tmp_path / 'turning.py'}:turning")
    words = [*rounds, "--dual_init", "0", "--imitation_radius", "0", "--no_accumulate", "--rounds", "3"]
    done = trl_kd(*words)
    assert done.code == 0, done.err
    assert "After 1 rounds: the student wins 50.0 %" in done.out
    said = "No row of the data of round 2 teaches (0 of "
    assert said in done.out
    assert said in (out / "rounds.html").read_text()
    AutoModelForCausalLM.from_pretrained(out)
    dry = trl_kd(*words, "--dry_run")
    assert "3, of which 1 are finished, after which no row teaches" in dry.out
    assert "The pairs of round" not in dry.out


def test_help_lists_it(trl_kd):
    done = trl_kd("pbkd", "--help")
    for name in (
        "--rounds",
        "--pairs_config",
        "--prompts_per_round",
        "--accumulate",
        "--reference",
        "--round_optimizer",
        "--round_schedule",
    ):
        assert re.search(rf"{name}\b", done.out)


def test_a_dry_run(trl_kd, rounds, out):
    done = trl_kd(*rounds, "--dry_run", "--rounds", "3", "--prompts_per_round", "4")
    assert done.code == 0, done.err
    told = dict(re.findall(r"^  ([\w ]+?)  +(.*)$", done.out, re.MULTILINE))
    assert done.out.startswith("Dry run: the rounds, then one answer of each source, and nothing is written.")
    assert told["rounds"] == "3"
    assert told["student answers"] == "8 a round, 32 in all (at the end once more)"
    assert told["teacher answers"] == "6 in all, each once"
    assert told["pairs of a round"] == "at most 8"
    assert told["D in the last"] == "at most 24, all rounds"
    assert told["steps"].startswith("2 a round, 6 in all")
    assert "reference" in told["memory"]
    assert re.search(r"about .* one model at a time: student .*, teacher ", told["memory to sample"])
    assert "P(teacher ≻ student) =" in told["preference"]
    assert not out.exists()
    assert told["optimizer"] == "carried in each round"
    alone = trl_kd(*rounds, "--dry_run", "--dual_init", "0", "--student_wins", "gated", "--prompts_per_round", "3")
    told = dict(re.findall(r"^  ([\w' ]+?)  +(.*)$", alone.out, re.MULTILINE))
    assert "reference" not in told["memory"]
    assert told["preference term"].startswith("off: the teacher's answers are imitated")
    assert told["student's wins"] == "imitated where 3 answers to a prompt were compared; at most 2 are: never"
    epochs = trl_kd(*replaced(rounds, "--max_steps"), "--dry_run", "--num_train_epochs", "1")
    assert "at most 3 in the first to 6 in the last round, 9 in all" in epochs.out


@pytest.mark.parametrize(
    ("words", "pairs", "said"),
    [
        (["--rounds", "0"], {}, "`rounds` is 0"),
        (["--dataset_name", "pairs"], {}, "`dataset_name` is set, but with `rounds` the prompts are those of"),
        (["--eval_strategy", "steps"], {}, "`eval_strategy` is 'steps', but rounds have no evaluation data"),
        (["--resume_from_checkpoint", "true"], {}, "`resume_from_checkpoint` is 'true', but rounds go on"),
        (["--pairs_config", "nowhere.yaml"], {}, "`pairs_config` is 'nowhere.yaml': no such file"),
        (["--max_length", "3"], {}, "`max_length` is 3, and the shortest of the first 6 prompts has"),
        (["--prompts_per_round", "7"], {}, "`prompts_per_round` is 7, but there are 6 prompts"),
        (["--reference", "end"], {}, "`reference`"),
        (["--model_name_or_path", "./nowhere"], {}, "`model_name_or_path` is './nowhere': no such folder"),
        (["--model_name_or_path", "nowhere"], {}, "`model_name_or_path` is 'nowhere', which cannot be loaded"),
        ([], {"student": "other"}, "`student` is set, but each round's student is the one that it trains"),
        ([], {"output_dir": "other"}, "`output_dir` is set, but the pairs are kept in"),
        ([], {"shard": "0/2"}, "`shard` is set, but it is for `trl-kd pairs` alone"),
        ([], {"dataset_streaming": True}, "`dataset_streaming` is set, but rounds read the prompts again"),
        ([], {"teachre": "x"}, "unknown key `teachre`"),
        ([], {"teacher": "./nowhere"}, "`teacher` is './nowhere': no such folder"),
        ([], {"preference": None}, "`preference` is not set"),
        ([], {"preference": "column:prompt"}, "`preference` reads the column 'prompt'"),
        ([], {"dataset_name": "nowhere.jsonl"}, "`dataset_name` is 'nowhere.jsonl': no such file"),
    ],
)  # fmt: skip
def test_bad_input(words, pairs, said, trl_kd, rounds, pairs_config, out, monkeypatch):
    refuse_weights(monkeypatch)
    pairs_config(**pairs)
    error = trl_kd(*rounds, *words).error
    assert said in error
    assert not out.exists()


def test_a_round_that_breaks_is_one_line(trl_kd, rounds, out):
    words = replaced(replaced(rounds, "--learning_rate", "1e36"), "--max_steps", "4")
    broken = trl_kd(*words, "--optim", "sgd", "--save_steps", "1")
    assert "pbkd: error: Training stopped at step " in broken.error
    assert not list(out.glob("round-1/student/*.safetensors"))


def test_pairs_that_are_gone_are_one_line(trl_kd, rounds, out, monkeypatch):
    monkeypatch.setattr(
        rounds_module.PbKDRounds, "_sample", lambda self, number: (out / "round-1/pairs/data").mkdir(parents=True)
    )
    assert "round-1/pairs" in trl_kd(*rounds).error


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pairs_config", "pairs.yaml"),
        ("prompts_per_round", "4"),
        ("accumulate", "false"),
        ("reference", "previous"),
        ("round_optimizer", "carried"),
        ("round_schedule", "round"),
    ],
)
def test_companions_without_rounds(name, value, trl_kd, base):
    error = trl_kd(*base, f"--{name}", value).error
    assert f"`{name}` is" in error
    assert "`rounds` is not set" in error


def test_a_page_of_rounds_under_way(tmp_path):
    record = {"round": 1, "stage": "sampled", "prompts": 4, "new_pairs": 4, "pairs": 4, "regret": 0.0}
    record |= {
        "teacher_preferred": None,
        "equal_answers": 0,
        "teacher_win_rate": None,
        "student_win_rate": None,
        "teacher_win_interval": None,
    }
    told = {
        "settings": {"accumulate": False, "reference": "previous", "model": "<b>"},
        "rounds": [record],
        "final": None,
    }
    told["regret_coefficient"] = 0.0
    assert make_page(told, "student").sections[0].tables[0].rows[0][2] == "no known pair"
    (tmp_path / "rounds.json").write_text(json.dumps(told))
    assert "&lt;b&gt;" in write_rounds_report(tmp_path).read_text()
    with pytest.raises(FileNotFoundError, match=r"has no `rounds.json`"):
        write_rounds_report(tmp_path / "other")
