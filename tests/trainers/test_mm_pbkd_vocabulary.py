"""Embeddings that families pad to different sizes, and vocabularies that only look alike."""

import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tests.conftest import CHARACTERS, make_model, make_tokenizer, save_tiny
from tests.trainers.mm_cases import PAIRS, PROMPTS, ROWS, logs_of, make, that_says, weights_of
from trl_kd import PbKDConfig, PbKDTrainer


TOKENS = len(CHARACTERS) + 3
SIZES = [(TOKENS, TOKENS + 9), (TOKENS + 9, TOKENS), (TOKENS + 4, TOKENS + 9), (TOKENS + 9, TOKENS + 4)]
"""Rows of the student's output embedding and of the teacher's."""
SAID = f"Only the {TOKENS} tokens that student and teacher share enter their softmaxes"


def in_doubles(model):
    copy = type(model)(model.config).double()
    copy.load_state_dict({name: weight.double() for name, weight in model.state_dict().items()})
    return copy


def log_softmax(model, batch: dict, words: int | None) -> torch.Tensor:
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        logits = in_doubles(model)(input_ids=ids, attention_mask=mask).logits
    return logits[:, :-1][:, -batch["completion_ids"].size(1) :, :words].log_softmax(-1)


def folder(tmp_path: Path, name: str, rows: int, **settings) -> str:
    return save_tiny(tmp_path / f"{name}-{rows}", vocab_size=rows, **settings)


@pytest.mark.parametrize(("ours", "theirs"), [*SIZES, (TOKENS + 9, TOKENS + 9)])
def test_the_loss_is_one_of_the_shared_tokens(ours, theirs, tmp_path, settings, caplog):
    """With equal sizes it is one of whole rows, as TRL's."""
    student, teacher = folder(tmp_path, "student", ours), folder(tmp_path, "teacher", theirs, seed=1, hidden_size=24)
    options = {"lmbda": 0.0, "learning_rate": 0.0, "max_steps": 2, "pairs": PAIRS, "per_device_train_batch_size": 8}
    with caplog.at_level(logging.INFO):
        trainer = make(student, teacher, settings, **options, off_policy_beta=1.0)
    words = None if ours == theirs else TOKENS
    assert caplog.text.count(SAID) == (0 if words is None else 1)
    trainer.train()
    batch, logged = trainer.batches[0], logs_of(trainer)[0]
    pi, mu = (log_softmax(model, batch, words) for model in (trainer.model, trainer.teacher_model))
    mask = batch["completion_mask"].bool()
    kl = (pi.exp() * (pi - mu)).sum(-1)[mask].mean()
    assert logged["loss"] == pytest.approx(float(kl), rel=1e-5)  # Q is zero
    entropy = -(pi.exp() * pi).sum(-1)[mask].mean()
    assert logged["entropy"] == pytest.approx(float(entropy), rel=1e-5)
    if words is not None:  # it would be another one with the rest
        whole = log_softmax(trainer.model, batch, None)
        other = -(whole.exp() * whole).sum(-1)[mask].mean()
        assert (abs(other - entropy) > 1e-2) == (ours > TOKENS)
    assert all(torch.isfinite(weight).all() for weight in weights_of(trainer.adversary.q))


@pytest.mark.parametrize(("ours", "theirs"), [(TOKENS + 9, TOKENS), (TOKENS, TOKENS + 9)])
def test_rows_that_are_no_token_are_never_sampled(ours, theirs, settings):
    """However likely both models find them."""
    beyond = dict.fromkeys(range(TOKENS, TOKENS + 9), 50.0)
    student, teacher = (
        that_says(beyond if rows > TOKENS else {}, rows, seed) for seed, rows in enumerate((ours, theirs))
    )
    tokenizer = make_tokenizer()
    options = {"lmbda": 0.5, "eval_rows": PROMPTS[:4], "processing_class": tokenizer}
    trainer = make(student, teacher, settings, PROMPTS, **options)
    trainer.train()
    trainer.evaluate()
    ids = torch.cat([batch["completion_ids"].flatten() for batch in trainer.batches])
    assert len(trainer.batches) == 4
    assert int(ids.max()) < TOKENS
    assert all(0 < entry["mmpbkd/kl"] < 20 for entry in logs_of(trainer))  # nor do they count


def test_gradients_of_rows_that_are_no_token_are_zero(tmp_path, settings):
    student, teacher = folder(tmp_path, "student", TOKENS + 9), folder(tmp_path, "teacher", TOKENS, seed=1)
    trainer = make(student, teacher, settings, lmbda=0.5, pairs=PAIRS, weight_decay=0.0)
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    moved = (trainer.model.lm_head.weight.detach() != before).any(1)
    assert moved.tolist() == [True] * TOKENS + [False] * 9


@pytest.mark.parametrize(("ours", "theirs"), SIZES[:2])
def test_token_imitation_of_pbkd_is_one_of_the_shared_tokens(ours, theirs, tmp_path, pairs, settings, caplog):
    student, teacher = folder(tmp_path, "student", ours), folder(tmp_path, "teacher", theirs, seed=1, hidden_size=24)
    options = {"imitation": "token", "teacher_model_name_or_path": teacher, "dual_init": 1e-12, "learning_rate": 0.0}
    args = PbKDConfig(**{**settings, **options, "max_steps": 1, "per_device_train_batch_size": 8})
    with caplog.at_level(logging.INFO):
        trainer = PbKDTrainer(model=student, args=args, train_dataset=Dataset.from_list(pairs))
    assert caplog.text.count(SAID) == 1
    trainer.train()
    loaded = in_doubles(trainer.model), in_doubles(AutoModelForCausalLM.from_pretrained(teacher))
    total, tokens = 0.0, 0
    for row in trainer.train_dataset:
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        with torch.no_grad():
            log_pi, log_mu = (model(ids).logits[0, :, :TOKENS].log_softmax(-1) for model in loaded)
        tokens += len(row["chosen_ids"])
        for t in range(len(row["prompt_ids"]) - 1, ids.size(1) - 1):
            total += float((log_mu[t].exp() * (log_mu[t] - log_pi[t])).sum())
    logged = logs_of(trainer)[0]["pbkd/imitation"]
    assert logged == pytest.approx(total / tokens, rel=1e-5)


# ---- Vocabularies that differ ---------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were about to load")

    monkeypatch.setattr("trl.DistillationTrainer.__init__", refuse)


def test_another_vocabulary_is_refused_by_its_first_token(tmp_path, tiny_dir, settings, no_weights):
    teacher = save_tiny(tmp_path / "other", tokenizer=make_tokenizer(CHARACTERS.replace("ab", "ba")))
    with pytest.raises(ValueError, match="vocabulary.*token 23 is 'b' for the teacher .* and 'a' for the student"):
        make(tiny_dir, teacher, settings)
    with pytest.raises(ValueError, match="vocabulary.*token 23 is"):  # as a model, which knows where it comes from
        make(tiny_dir, AutoModelForCausalLM.from_pretrained(teacher), settings)


def test_an_embedding_without_room_for_the_tokens_is_refused(tiny_dir, settings, no_weights):
    with pytest.raises(ValueError, match=f"vocabulary has {TOKENS - 1} rows and the student's {TOKENS}, for {TOKENS}"):
        make(tiny_dir, make_model(vocab_size=TOKENS - 1), settings)


def test_a_teacher_without_a_tokenizer_is_known_by_its_size(tiny_dir, settings, caplog):
    """Made on the spot, or saved without one."""
    with caplog.at_level(logging.INFO):
        trainer = make(tiny_dir, make_model(1, TOKENS + 9), settings, ROWS, lmbda=0.5, max_steps=1)
    assert "The teacher has no tokenizer on disk: only the sizes of the vocabularies are compared." in caplog.text
    assert caplog.text.count(SAID) == 1
    trainer.train()
    assert logs_of(trainer)[0]["mmpbkd/kl"] > 0
