"""A tiny model learns: sampled answers to unseen questions, over its start and over `DPOTrainer`, by a stated margin."""

import random

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from trl_kd import PbKDConfig, PbKDTrainer
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


@pytest.mark.slow
def test_it_learns_more_than_its_start_and_than_dpo(start, tmp_path):
    folder, answers = start
    rng = random.Random(1)
    teacher = [largest_digit(q) if rng.random() < 0.85 else rng.choice("0123456789") for q in TRAIN]
    rows = [
        pair_row(q, t, s, 0.5 + 0.5 * ((t == largest_digit(q)) - (s == largest_digit(q))))
        for q, t, s in zip(TRAIN, teacher, answers, strict=True)
    ]
    strict = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows if row["preference"] == 1]
    found = {}
    for name, trainer_class, config_class, data in (
        ("dpo", DPOTrainer, DPOConfig, strict),
        ("pbkd", PbKDTrainer, PbKDConfig, rows),
    ):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        found["start"] = accuracy(model, tokenizer)
        args = config_class(str(tmp_path / name), **STEPS, max_steps=100, seed=0)
        trainer = trainer_class(model, args=args, train_dataset=Dataset.from_list(data), processing_class=tokenizer)
        trainer.train()
        found[name] = accuracy(trainer.model, tokenizer)
    assert found["pbkd"] > found["start"] + 0.2, found
    assert found["pbkd"] > found["dpo"] + 0.05, found
