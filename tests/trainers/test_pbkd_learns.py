"""A tiny model learns: sampled answers to unseen questions, over its start and over `DPOTrainer`, by a stated margin."""

import random

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from trl_kd import PbKDConfig, PbKDTrainer
from trl_kd.demo.methods import flip_labels
from trl_kd.evaluation.generation import generate
from trl_kd.pairs import pair_row
from trl_kd.tasks.models import make_model, make_tokenizer


QUESTIONS = random.Random(0).sample([f"{number:03d}=" for number in range(1000)], 1000)
TRAIN, TEST = QUESTIONS[:600], QUESTIONS[600:]
STEPS = {"per_device_train_batch_size": 32, "learning_rate": 3e-3, "max_length": 16, "save_strategy": "no"}
STEPS |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}


def largest_digit(question):
    return max(question[:3])


def accuracy(model, tokenizer, questions=TEST):
    """Of four sampled answers each."""
    answers = generate(model, tokenizer, questions * 4, 2, seed=1)
    right = [answer == largest_digit(question) for question, answer in zip(questions * 4, answers, strict=True)]
    return sum(right) / len(right)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A student that has seen a few right answers, and what it then answers to the training questions."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = make_tokenizer("0123456789=")
    rows = Dataset.from_list([{"prompt": q, "completion": largest_digit(q)} for q in TRAIN])
    args = SFTConfig(str(folder), **STEPS, max_steps=40, seed=0)
    trainer = SFTTrainer(make_model(tokenizer, 32, 1, seed=0), args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(folder))
    return folder, generate(trainer.model, tokenizer, TRAIN, 2, seed=0)


def labelled(answers) -> list[dict]:
    """Pairs of a teacher that is right in 85 % of its answers."""
    rng = random.Random(1)
    teacher = [largest_digit(q) if rng.random() < 0.85 else rng.choice("0123456789") for q in TRAIN]
    return [
        pair_row(q, t, s, 0.5 + 0.5 * ((t == largest_digit(q)) - (s == largest_digit(q))))
        for q, t, s in zip(TRAIN, teacher, answers, strict=True)
    ]


def learnt(trainer_class, config_class, folder, data, output_dir) -> float:
    """Accuracy of the start after 100 steps."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    args = config_class(str(output_dir), **STEPS, max_steps=100, seed=0)
    trainer = trainer_class(model, args=args, train_dataset=Dataset.from_list(data), processing_class=tokenizer)
    trainer.train()
    return accuracy(trainer.model, tokenizer)


@pytest.mark.slow
def test_it_learns_more_than_its_start_and_than_dpo(start, tmp_path):
    folder, answers = start
    rows = labelled(answers)
    strict = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows if row["preference"] == 1]
    before = accuracy(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    dpo = learnt(DPOTrainer, DPOConfig, folder, strict, tmp_path / "dpo")
    pbkd = learnt(PbKDTrainer, PbKDConfig, folder, rows, tmp_path / "pbkd")
    assert pbkd > before + 0.2, (pbkd, before)
    assert pbkd > dpo + 0.05, (pbkd, dpo)


@pytest.mark.slow
def test_wrong_labels_cost_it_less_than_sft_on_the_chosen_answers(start, tmp_path):
    folder, answers = start
    rows = flip_labels(labelled(answers), 0.2, seed=0)
    # A flipped label of 1 is one of 0: the second answer is the chosen one
    sides = {1: "chosen", 0: "rejected"}
    strict = [(row["prompt"], row[sides[row["preference"]]]) for row in rows if row["preference"] in sides]
    texts = [{"prompt": prompt, "completion": text} for prompt, text in strict]
    sft = learnt(SFTTrainer, SFTConfig, folder, texts, tmp_path / "sft")
    pbkd = learnt(PbKDTrainer, PbKDConfig, folder, rows, tmp_path / "pbkd")
    assert pbkd > sft + 0.1, (pbkd, sft)
