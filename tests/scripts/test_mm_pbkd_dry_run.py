"""`trl-kd mm-pbkd --dry_run`: what it tells, and what it leaves alone."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import trl_kd.scripts.mm_pbkd_dry_run as mm_pbkd_dry_run
from tests.conftest import CHARACTERS, make_tokenizer, save_tiny
from tests.scripts.conftest import replaced
from tests.scripts.test_pbkd_dry_run import line
from trl_kd.rewards.q_function import Q_HEADS, QFunction
from trl_kd.scripts import memory


@pytest.fixture
def dry(trl_kd, mm_base):
    def run(*words, base=mm_base):
        done = trl_kd(*base, "--dry_run", *words)
        assert done.code == 0, done.err
        return done.out

    return run


def test_the_table(dry, out, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # no weights
    text = dry()
    assert line(text, "teacher").endswith(", same vocabulary")
    assert line(text, "embeddings") == "76 rows both, for 76 tokens"
    assert line(text, "train columns") == "prompt, completion (text)"
    assert line(text, "train prompts") == "8, 8 with a completion of the teacher's"
    assert line(text, "row 0") == "4 prompt tokens"
    assert line(text, "first 8 rows") == "longest prompt 6 tokens"
    assert line(text, "states") == (
        "all on-policy: the student samples up to 4 tokens a prompt; `completion` is not read"
    )
    assert line(text, "pairs columns") == "prompt, chosen, rejected (text)"
    assert line(text, "pairs") == "8 rows, 8 known, 8 strict; 0 held out (0 strict)"
    assert line(text, "pairs a step") == "4 (1 steps of Q with 4 each)"
    assert line(text, "first 8 pairs").startswith("longest 11 tokens, 0 truncated to `pair_max_length` = 1024")
    assert line(text, "warm-up").startswith("2 steps of Q: fewer than 100")
    assert line(text, "steps").startswith("2, 4 rows a step")
    # one adversary and one twin, on hidden states of 16 units
    assert line(text, "Q") == f"linear, {2 * 16 * 17} parameters"
    assert "+ teacher" in line(text, "memory")
    assert line(text, "memory").endswith(f"+ Q {2 * 16 * 17 * 16 / 1024:.1f} KiB")
    assert "reference " not in line(text, "memory")
    assert text.rstrip().endswith("Ready to train.")
    assert not out.exists()


def test_off_policy_states(dry):
    text = dry("--lmbda", "0.25", "--max_completion_length", "2")
    assert line(text, "states").startswith("0.25 on-policy: the student samples up to 2 tokens a prompt; 0.75 the")
    assert line(text, "row 0") == "4 prompt + 2 completion tokens"  # "2" and the end
    assert "longest completion 3, 4 truncated to `max_completion_length` = 2" in line(text, "first 8 rows")
    assert line(text, "Q") == f"linear, {3 * 16 * 17} parameters"  # two twins
    assert line(dry("--lmbda", "0"), "states").startswith("all the teacher's: `completion`")


def test_pairs_are_counted(dry, jsonl, mm_base):
    labels = [None] * 200 + [1.0] * 1500 + [0.5] * 300
    rows = [{"prompt": f"{i}=", "chosen": "1", "rejected": "2", "preference": p} for i, p in enumerate(labels)]
    words = replaced(mm_base, "--preference_dataset", jsonl(rows, "many.jsonl"))
    text = dry("--q_steps", "2", "--pair_batch_size", "6", "--pair_max_length", "6", base=words)
    told = line(text, "pairs")
    assert told.startswith("2000 rows, 1800 known, 1500 strict; 180 held out (")
    assert 130 < int(told.split("(")[1].split()[0]) < 170
    assert line(text, "pairs a step") == "12 (2 steps of Q with 6 each)"
    assert line(text, "first 100 pairs") == "longest 6 tokens, 0 truncated to `pair_max_length` = 6, 0 left out"
    assert line(text, "warm-up") == "at most 2 steps of Q, until its held-out accuracy is above chance"
    assert line(dry("--dual_max", "0", "--dual_init", "0", base=words), "warm-up") == "none"


@pytest.mark.parametrize("implicit", [False, True])
def test_pairs_are_held_out_by_their_prompts(implicit, dry, jsonl, mm_base):
    """Six to a prompt, so that of the twenty that make a tenth eighteen are held out."""
    rows = [{"prompt": f"{i % 34}=", "chosen": f"1{i}", "rejected": f"2{i}"} for i in range(204)]
    if implicit:
        rows = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in rows]
    words = replaced(mm_base, "--preference_dataset", jsonl(rows, "many.jsonl"))
    assert line(dry(base=words), "pairs") == "204 rows, 204 known, 204 strict; 18 held out (18 strict)"


def test_without_pairs(dry, mm_base):
    words = replaced(mm_base, "--preference_dataset")
    text = dry(base=words)
    assert line(text, "pairs") == "none: moment matching without preferences"
    assert line(text, "Q") == f"linear, {16 * 17} parameters"
    text = dry("--moment_coef", "0", base=words)
    assert line(text, "pairs") == "none: plain distillation"
    assert "Q " not in line(text, "memory")


def test_imitation_by_pairs(dry, jsonl, mm_base):
    """Of the eight completions one wins, one loses and one ties; a fourth pair is of another text."""
    told = [("1+1=", "2", "3", 1.0), ("2+3=", "6", "5", 1.0), ("40+2=", "42", "9", 0.5), ("7-5=", "8", "9", 1.0)]
    rows = [dict(zip(("prompt", "chosen", "rejected", "preference"), row, strict=True)) for row in told]
    words = replaced(mm_base, "--preference_dataset", jsonl(rows, "told.jsonl"))
    more = ("--imitation_weight", "0.5", "--lmbda", "0", "--imitation_radius", "0")
    text = dry("--moment_coef", "0", *more, base=words)
    assert line(text, "imitation") == ("weight 0.5; 3 of 8 completions stand in the pairs; 2 of weight 0")
    assert "pairs a step" not in text
    assert line(dry(*more[:4], base=replaced(mm_base, "--preference_dataset")), "imitation") == (
        "weight 0.5, of all completions alike"
    )
    assert "of all completions" not in dry()


def test_messages(dry, jsonl, mm_base):
    def say(role, text):
        return [{"role": role, "content": text}]

    rows = [{"prompt": say("user", "1+1"), "completion": say("assistant", "2"), "source": "x"}] * 4
    words = replaced(mm_base, "--dataset_name", jsonl(rows, "chats.jsonl"))
    pair = {"prompt": say("user", "1+1"), "chosen": say("assistant", "2"), "rejected": say("assistant", "3")}
    text = dry("--lmbda", "0", base=replaced(words, "--preference_dataset", jsonl([pair] * 2, "compared.jsonl")))
    assert line(text, "train columns") == "prompt, completion (messages)"
    assert line(text, "row 0") == f"{len('u?1+1a?')} prompt + 2 completion tokens"


def test_steps_leave_out_what_fills_none(dry):
    text = dry("--max_steps", "-1", "--num_train_epochs", "3", "--per_device_train_batch_size", "3")
    assert line(text, "steps").startswith("6 in 3 epochs, 3 rows a step")


def test_the_steps_are_those_of_the_trainer(trl_kd, mm_base, out):
    words = ["--max_steps", "-1", "--num_train_epochs", "2", "--per_device_train_batch_size", "3"]
    assert trl_kd(*replaced(mm_base, "--preference_dataset"), *words, "--lmbda", "0").code == 0
    assert json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())["max_steps"] == 4


def test_a_stream(dry):
    assert line(dry("--dataset_streaming"), "train prompts") == "a stream: checked as it is read"


def test_a_padded_teacher_in_four_bits(dry, tmp_path, mm_base):
    pytest.importorskip("bitsandbytes")
    teacher = save_tiny(tmp_path / "padded", vocab_size=80, seed=1)
    words = replaced(mm_base, "--teacher_model_name_or_path", teacher)
    whole = dry(base=words)
    assert line(whole, "embeddings") == (
        "student 76 rows, teacher 80; the 76 tokens that they share enter the softmaxes"
    )
    options = json.dumps({"load_in_4bit": True, "dtype": "bfloat16"})
    small = dry("--teacher_model_init_kwargs", options, base=words)
    assert line(small, "memory") != line(whole, "memory")


@pytest.mark.parametrize("broken", ["swapped", "small"])
def test_the_vocabulary_is_checked_before_any_data(trl_kd, mm_base, tmp_path, monkeypatch, broken):
    def refuse(*args):
        raise AssertionError("data was about to load")

    monkeypatch.setattr(mm_pbkd_dry_run, "load_prompts", refuse)
    if broken == "swapped":
        save_tiny(tmp_path / "other", make_tokenizer(CHARACTERS[1] + CHARACTERS[0] + CHARACTERS[2:]))
    else:
        save_tiny(tmp_path / "other", vocab_size=60)
    words = replaced(mm_base, "--teacher_model_name_or_path", str(tmp_path / "other"))
    error = trl_kd(*words, "--dry_run").error
    assert "vocabulary" in error
    assert ("token 3 is '1' for the teacher" if broken == "swapped" else "60 rows") in error


@pytest.mark.parametrize("head", Q_HEADS)
@pytest.mark.parametrize("width", [16, 96])
def test_the_size_of_q(head, width):
    q = QFunction(head, width, width, 1.0, 3, torch.Generator())
    assert memory.q_parameters(head, width, 3) == sum(p.numel() for p in q.parameters())
