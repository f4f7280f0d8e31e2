"""Token imitation compares the distributions that two models give: whatever a family does to its logits, over tokens that
mean the same to both."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
)

from tests.conftest import CHARACTERS, make_tokenizer, save_tiny
from trl_kd import PbKDConfig, PbKDTrainer
from trl_kd.trainers.common.vocabulary import check_same_vocabulary


TOKENS = len(CHARACTERS) + 3
FAMILIES = {
    "softcapping": (Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 1.5}, {"final_logit_softcapping": 3.0}),
    "scale": (CohereConfig, {"logit_scale": 0.25}, {"logit_scale": 0.5}),
    "divisor": (GraniteConfig, {"logits_scaling": 4.0}, {"logits_scaling": 2.0}),
    "bias": (PhiConfig, {}, {}),
    "bias of padded embeddings": (PhiConfig, {}, {"vocab_size": TOKENS + 11}),
}
"""The family, what the student does to its logits, and what the teacher does otherwise."""

LABELS = [(1.0, "chosen"), (None, "rejected"), (0.6, None), (1.0, "rejected")]


def save_family(folder, config_class, seed: int, **settings) -> str:
    sizes = {
        "vocab_size": TOKENS,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.5,
    }
    torch.manual_seed(seed)
    config = config_class(**{**sizes, **settings}, pad_token_id=0, bos_token_id=None, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config)
    if model.get_output_embeddings().bias is not None:  # zeros at first
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def logits(model, batch, raw: bool = False) -> torch.Tensor:
    """Before each next token, as the model itself gives them; `raw`: the product with its output embedding, and no more."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if raw:
        whole = model.base_model(**inputs).last_hidden_state @ model.get_output_embeddings().weight.T
    else:
        whole = model(**inputs).logits
    return whole[:, :-1, :TOKENS]


TERMS = {
    name: {"dual_init": dual, "imitation_radius": "inf"}
    for name, dual in {"with the preference term": 1e-12, "without": 0.0}.items()
}
"""Settings whose loss is the imitation term's, with a = 1, in either mode."""


def naive_loss(student_logits, teacher_logits, batch) -> torch.Tensor:
    """KL(teacher ‖ student), a mean over the tokens of the teacher's responses, by whole log-softmaxes."""
    log_pi, log_mu = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    kl_BT = (log_mu.exp() * (log_mu - log_pi)).sum(-1)
    if "labels" in batch:
        return kl_BT[batch["labels"][:, 1:] != -100].mean()
    mask_2BT = batch["completion_mask"][:, 1:].bool()
    of_side = dict(zip(("chosen", "rejected"), zip(kl_BT.chunk(2), mask_2BT.chunk(2), strict=True), strict=True))
    taught = [(of_side[side][0][row], of_side[side][1][row]) for row, (_, side) in enumerate(LABELS) if side]
    return torch.cat([kl_T[mask_T] for kl_T, mask_T in taught]).mean()


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_does_to_its_logits_is_done(name, terms, tmp_path, pairs, settings):
    config_class, of_student, of_teacher = FAMILIES[name]
    student_dir = save_family(tmp_path / "student", config_class, 0, **of_student)
    teacher_dir = save_family(tmp_path / "teacher", config_class, 1, **{**of_student, **of_teacher})
    rows = [{**row, "preference": p, "teacher_side": s} for row, (p, s) in zip(pairs, LABELS, strict=False)]
    trainer = PbKDTrainer(
        model=student_dir,
        args=PbKDConfig(
            **settings,
            imitation="token",
            teacher_model_name_or_path=teacher_dir,
            **TERMS[terms],
        ),
        train_dataset=Dataset.from_list(rows),
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    gradient = torch.autograd.grad(loss, list(trainer.model.parameters()))

    student, teacher = (AutoModelForCausalLM.from_pretrained(d).double() for d in (student_dir, teacher_dir))
    theirs = logits(teacher, batch).detach()
    expected = naive_loss(logits(student, batch), theirs, batch)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for got, want in zip(gradient, torch.autograd.grad(expected, list(student.parameters())), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))

    # Were it not done, for either of them, that would be seen
    for raw_student, raw_teacher in ((True, False), (False, True)):
        other = naive_loss(logits(student, batch, raw_student), logits(teacher, batch, raw_teacher), batch)
        assert abs(float(other.detach() / expected.detach()) - 1) > 0.02


# ---- The same tokens ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded before the tokenizers were compared")

    monkeypatch.setattr("trl.trainer.dpo_trainer.create_model_from_path", refuse)
    monkeypatch.setattr("trl_kd._trl.models.create_model_from_path", refuse)


def test_a_teacher_that_splits_text_differently_is_refused(no_weights, tiny_dir, tmp_path, pairs, settings):
    """It has the student's vocabulary, but reads all letters as small ones."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    args = PbKDConfig(
        **settings, imitation="token", teacher_model_name_or_path=save_tiny(tmp_path / "teacher", tokenizer)
    )
    message = "split text differently: token 0 of a probe text is 'z' for the teacher and 'Z' for the student"
    with pytest.raises(ValueError, match=message):
        PbKDTrainer(model=tiny_dir, args=args, train_dataset=Dataset.from_list(pairs))


def test_other_merges_of_the_same_vocabulary_are_refused():
    """Two byte-pair encodings with the same tokens: one makes "de f" of "def", the other "d ef"."""

    def tokenizer(merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
        words = ["<unk>", *CHARACTERS, "de", "ef"]
        vocabulary = {word: index for index, word in enumerate(words)}
        return PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>")), unk_token="<unk>"
        )

    merges = [("d", "e"), ("e", "f")]
    check_same_vocabulary(tokenizer(merges), tokenizer(merges))
    with pytest.raises(ValueError, match="split text differently.* is 'd' for the teacher and 'de' for the student"):
        check_same_vocabulary(tokenizer(merges), tokenizer(merges[::-1]))


def test_a_student_cannot_be_its_own_teacher(tiny_dir, pairs, settings):
    model = AutoModelForCausalLM.from_pretrained(tiny_dir)
    with pytest.raises(ValueError, match="`teacher_model` and `model` are the same object"):
        PbKDTrainer(
            model=model,
            args=PbKDConfig(**settings, imitation="token"),
            train_dataset=Dataset.from_list(pairs),
            teacher_model=model,
        )


def test_a_teacher_may_be_named(tiny_dir, tmp_path, pairs, settings):
    name = save_tiny(tmp_path / "teacher", seed=1)
    losses = []
    for given in ({"teacher_model_name_or_path": name}, {}):
        trainer = PbKDTrainer(
            model=tiny_dir,
            args=PbKDConfig(**settings, imitation="token", **given),
            train_dataset=Dataset.from_list(pairs),
            teacher_model=None if given else name,
        )
        batch = trainer.data_collator(list(trainer.train_dataset))
        losses.append(trainer.compute_loss(trainer.model, dict(batch)))
    assert losses[0] == losses[1]
