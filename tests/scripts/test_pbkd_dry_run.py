"""`trl-kd pbkd --dry_run`: what it tells, and what it leaves alone."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import ModelConfig, get_peft_config

from tests.conftest import make_model, save_tiny
from trl_kd.scripts import memory


@pytest.fixture
def dry(trl_kd, base):
    def run(*words):
        done = trl_kd(*base, "--dry_run", *words)
        assert done.code == 0, done.err
        return done.out

    return run


def line(text, name):
    found = [entry for entry in text.splitlines() if entry.strip().startswith(name + "  ")]
    assert len(found) == 1, text
    return found[0].strip()[len(name) :].strip()


def test_the_table(dry, out, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # no weights
    text = dry("--dual_init", "1")
    assert line(text, "output_dir").endswith("(will be created)")
    assert line(text, "train columns") == "prompt, chosen, rejected (text)"
    assert line(text, "train rows") == "8, 0 with an empty response"
    unnamed = "no column `teacher_side` or `teacher`: "
    assert line(text, "train teacher") == f"{unnamed}every chosen answer is taken as the teacher's"
    assert line(text, "train preferences") == "8 known (0 soft or reversed), 0 null"
    assert line(text, "train imitation") == "8 of 8 rows are imitated"
    assert "end '<eos>'" in line(text, "tokenizer")
    assert line(text, "chat template") == "yes"
    assert line(text, "row 0") == "4 prompt + 2 chosen, 2 rejected tokens"
    assert "longest 11 tokens, 0 truncated to `max_length` = 1024, 0 left out" in line(text, "first 8 rows")
    assert line(text, "end token") == "'<eos>' ends both responses in 8 of 8 rows"
    assert line(text, "steps").startswith("2, 4 rows a step")
    assert "reference" in line(text, "memory")
    assert "an estimate" in text
    assert "activations" in text
    assert text.rstrip().endswith("Ready to train.")
    assert not out.exists()


def test_a_file_that_names_no_teacher(dry):
    text = dry("--imitation_weight", "0", "--dual_init", "1")
    assert "train imitation" not in text
    assert line(text, "train teacher") == "no column `teacher_side` or `teacher`: nothing is imitated"
    stream = dry("--dataset_streaming", "true")
    assert "every chosen answer is taken as the teacher's" in line(stream, "train teacher")
    assert "with a text of the teacher" not in text + stream


def test_counts_labels_and_truncation(dry, jsonl, pairs):
    pairs[0]["preference"] = 0.7
    pairs[1] |= {"preference": None, "rejected": ""}
    pairs[2]["teacher"] = "forty two"
    for row in pairs:
        row.setdefault("teacher", None)
        row.setdefault("preference", 1.0)
        row["teacher_side"] = None if row["teacher"] else "chosen"
    jsonl(pairs)
    text = dry("--max_length", "8", "--dual_init", "1")
    assert line(text, "train rows") == "9, 8 with a text of the teacher, 1 with an empty response"
    assert line(text, "train preferences") == "7 known (1 soft or reversed), 2 null"
    assert "truncated to `max_length` = 8" in line(text, "first 9 rows")
    assert not line(text, "first 9 rows").split("tokens, ")[1].startswith("0 ")


def test_messages(dry, jsonl):
    def say(role, text):
        return [{"role": role, "content": text}]

    jsonl([{"prompt": say("user", "1+1"), "chosen": say("assistant", "2"), "rejected": say("assistant", "3")}])
    assert line(dry(), "train columns") == "prompt, chosen, rejected (messages)"


def test_steps(dry):
    text = dry("--max_steps", "-1", "--num_train_epochs", "3", "--gradient_accumulation_steps", "2")
    assert line(text, "steps").startswith("3 in 3 epochs, 8 rows a step (4 × 1 processes × 2 accumulated)")


def test_a_stream(dry, trl_kd, base):
    assert line(dry("--dataset_streaming"), "train rows") == "a stream: checked as it is read"
    error = trl_kd(*base, "--dry_run", "--dataset_streaming", "--max_steps", "-1").error
    assert "`max_steps` is not set" in error


def test_processes_are_counted(dry, tmp_path):
    assert "(4 × 8 processes" in line(dry("--accelerate_config", "multi_gpu"), "steps")
    assert "(4 × 3 processes" in line(dry("--accelerate_config", "multi_gpu", "--num_processes", "3"), "steps")
    assert "(4 × 1 processes" in line(dry("--accelerate_config", "single_gpu"), "steps")


def test_a_teacher(dry, teacher_dir):
    pytest.importorskip("bitsandbytes")
    options = json.dumps({"load_in_4bit": True, "dtype": "bfloat16"})
    text = dry(
        "--imitation", "token", "--teacher_model_name_or_path", teacher_dir, "--teacher_model_init_kwargs", options
    )
    assert line(text, "teacher") == f"{teacher_dir}, same vocabulary"
    assert "+ teacher" in line(text, "memory")


def test_lora_needs_no_reference(dry):
    text = dry("--use_peft", "--lora_r", "2", "--dual_init", "1")
    assert "reference" not in line(text, "memory")
    total, trained = (int(n.split()[0].replace(",", "")) for n in line(text, "parameters").split(", "))
    assert 0 < trained < total


class TestMemory:
    def test_sizes(self, tiny_dir):
        model, empty = make_model(), memory.empty_model(tiny_dir)
        count = sum(p.numel() for p in model.parameters())
        assert all(p.device.type == "meta" for p in empty.parameters())
        assert memory.model_size(empty, "float32").bytes == 4 * count
        assert memory.model_size(empty, torch.bfloat16).bytes == 2 * count
        assert memory.model_size(empty, "auto").bytes == 4 * count
        linear = sum(m.weight.numel() for n, m in model.named_modules() if "proj" in n)
        four = memory.model_size(empty, "bfloat16", "load_in_4bit")
        assert four.linear == linear
        assert four.bytes == pytest.approx(2 * (count - linear) + 0.5625 * linear)

    def test_shared_embeddings_count_once(self, tmp_path):
        save_tiny(tmp_path, tie_word_embeddings=True)
        empty = memory.empty_model(str(tmp_path))
        model = make_model(tie_word_embeddings=True)
        assert memory.model_size(empty, "float32").parameters == sum(p.numel() for p in model.parameters())

    def test_what_is_trained(self, tiny_dir):
        model = memory.empty_model(tiny_dir)
        assert memory.trainable_parameters(model, None) == sum(p.numel() for p in model.parameters())
        lora = get_peft_config(ModelConfig(use_peft=True, lora_r=2, lora_target_modules=["q_proj", "v_proj"]))
        assert memory.trainable_parameters(model, lora) == 2 * 2 * 2 * (
            16 + 16
        )  # layers × modules × rank × (in + out)

    @pytest.mark.parametrize(
        ("optim", "size"),
        [("adamw_torch_fused", 8), ("adamw_8bit", 2), ("sgd", 0), ("lion_32bit", 4), ("adafactor", 0.1)],
    )
    def test_optimizers(self, optim, size):
        assert memory.optimizer_bytes(optim) == size

    def test_readable(self):
        assert [memory.readable(n) for n in (2048, 3 * 2**20, 5 * 2**30)] == ["2.0 KiB", "3.0 MiB", "5.0 GiB"]


def test_without_the_preference_term_it_says_which_rows_teach(dry, jsonl, pairs):
    labels = [(1.0, "chosen"), (0.0, "chosen"), (0.5, None), (None, "rejected")]
    jsonl([{**row, "preference": p, "teacher_side": s} for row, (p, s) in zip(pairs, labels, strict=False)])
    text = dry()
    said = "2 of 4 rows teach; 1 left out: the teacher did not win; 1 left out: no text of the teacher's"
    assert line(text, "train imitation") == said
    assert line(text, "row 0") == "4 prompt + 2 imitated tokens"
    assert line(text, "end token") == "'<eos>' ends the teacher's response in 2 of 2 rows"
    assert line(dry("--max_steps", "-1", "--num_train_epochs", "1"), "steps").startswith("1 in 1 epochs")
    assert "reference" not in line(text, "memory")
    assert "4 of 4" not in dry("--dataset_streaming", "true")
