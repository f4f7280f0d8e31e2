"""The distributions that are trained and matched are the models' own."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests.conftest import make_model, make_tokenizer, save_tiny
from tests.sampling.test_own_logits import OTHERS, make_other, with_head_adapter
from tests.trainers.mm_cases import PAIRS, ROWS, equal, logs_of, make, weights_of
from tests.trainers.test_pbkd_heads import LABELS, TERMS, naive_loss
from trl_kd import MMPbKDConfig, MMPbKDTrainer, OnlinePbKDConfig, OnlinePbKDTrainer, PbKDConfig, PbKDTrainer
from trl_kd.losses.heads import Head
from trl_kd.losses.moments import moment_matching
from trl_kd.rewards.reward_model import from_student
from trl_kd.trainers.online_pbkd.loading import load_reward_model


TEACHERS = {
    **{kind: lambda kind=kind: make_other(kind, seed=1) for kind in OTHERS},
    "LoRA on the head": with_head_adapter,
}


def save_other(folder, kind: str, seed: int = 0) -> str:
    make_other(kind, seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def student_dir(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("student"))


# ---- A teacher's own logits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("kind", TEACHERS)
def test_tokens_imitate_the_teachers_own_distribution(kind, terms, student_dir, pairs, settings):
    rows = [{**row, "preference": p, "teacher_side": s} for row, (p, s) in zip(pairs, LABELS, strict=False)]
    teacher = TEACHERS[kind]()
    trainer = PbKDTrainer(
        model=student_dir,
        args=PbKDConfig(**settings, imitation="token", **TERMS[terms]),
        train_dataset=Dataset.from_list(rows),
        teacher_model=teacher,
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    gradient = torch.autograd.grad(loss, list(trainer.model.parameters()))

    student = AutoModelForCausalLM.from_pretrained(student_dir).double()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        theirs = teacher(**inputs, use_cache=False).logits[:, :-1].double()
    expected = naive_loss(student(**inputs).logits[:, :-1], theirs, batch)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for got, want in zip(gradient, torch.autograd.grad(expected, list(student.parameters())), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", TEACHERS)
def test_matching_meets_the_teachers_own_distribution(kind, beta, student_dir, settings):
    teacher = TEACHERS[kind]()
    changed = {"lmbda": 0.0, "moment_coef": 0.0, "off_policy_beta": beta, "imitation_weight": 0.0, "max_steps": 1}
    trainer = make(student_dir, teacher, {**settings, "learning_rate": 0.0, **changed})
    trainer.train()
    (batch,) = [batch for batch in trainer.batches if batch["training"]][:1]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    keep = batch["completion_ids"].size(1)
    with torch.no_grad():
        log_pi, log_mu = (
            model(input_ids=ids, attention_mask=mask, use_cache=False)
            .logits[:, -keep - 1 : -1]
            .double()
            .log_softmax(-1)
            for model in (trainer.model.eval(), teacher)
        )
    if beta == 0:
        kl = (log_mu.exp() * (log_mu - log_pi)).sum(-1)
    elif beta == 1:
        kl = (log_pi.exp() * (log_pi - log_mu)).sum(-1)
    else:
        mixed = (beta * log_mu.exp() + (1 - beta) * log_pi.exp()).log()
        kl = beta * (log_mu.exp() * (log_mu - mixed)).sum(-1) + (1 - beta) * (log_pi.exp() * (log_pi - mixed)).sum(-1)
    expected = kl[batch["completion_mask"].bool()].mean().item()
    assert logs_of(trainer)[0]["mmpbkd/kl"] == pytest.approx(expected, rel=1e-4)


def test_q_learns_beside_a_teacher_of_its_own_logits(student_dir, settings):
    teacher = make_other("a layer before the output layer", seed=1)
    trainer = make(student_dir, teacher, {**settings, "max_steps": 2, "q_steps": 2, "lmbda": 0.5}, pairs=PAIRS)
    q = weights_of(trainer.adversary.q)
    trainer.train()
    assert not equal(q, weights_of(trainer.adversary.q))
    assert all(entry["mmpbkd/kl"] > 0 for entry in logs_of(trainer))


def test_a_teacher_of_padded_rows_and_its_own_logits(student_dir, pairs, settings):
    """It has rows that are no words; the words that both have are compared."""
    teacher = make_other("a layer before the output layer", seed=1)
    teacher.resize_token_embeddings(teacher.config.vocab_size + 7)
    trainer = PbKDTrainer(
        model=student_dir,
        args=PbKDConfig(**settings, imitation="token", dual_init=0.0),
        train_dataset=Dataset.from_list(pairs),
        teacher_model=teacher,
    )
    assert trainer.teacher.shared_tokens == len(make_tokenizer())
    assert trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset))).isfinite()


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("tile_bytes", [None, 4096])
def test_own_logits_equal_those_of_a_head(beta, tile_bytes):
    """Tiles, gradients and all, where a model's own logits are those of its output layer."""
    torch.manual_seed(0)
    hidden, theirs = torch.randn(11, 8, requires_grad=True), torch.randn(11, 6)
    weight, other = torch.randn(70, 8, requires_grad=True), torch.randn(70, 6)
    taken = torch.randint(0, 70, (11,))
    results, asked = [], []

    def own(h):
        asked.append(len(h))
        return h @ other.T

    for teacher in (Head(theirs, other), Head(theirs, theirs.new_empty(70, 0), own_logits=own)):
        outputs = moment_matching(
            Head(hidden, weight), teacher, actions_N=taken, beta=beta, temperature=0.7, tile_bytes=tile_bytes
        )
        loss = outputs.divergence_N.sum() + outputs.logps_N.sum()
        results.append([loss, *torch.autograd.grad(loss, [hidden, weight])])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    assert sum(asked) <= 3 * 11  # once a token in each pass, whatever the tiles
    if tile_bytes:
        assert max(asked) < 11


def test_masked_words_of_a_teacher_are_finite():
    hidden = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(30, 8)

    def masked(h):
        logits = h @ weight.T
        logits[:, 4:6] = -torch.inf
        return logits

    for beta in (0.0, 0.4, 1.0):
        teacher = Head(hidden.detach(), weight.new_empty(30, 0), own_logits=masked)
        loss = moment_matching(Head(hidden, weight), teacher, beta=beta).divergence_N.sum()
        (gradient,) = torch.autograd.grad(loss, [hidden])
        assert loss.isfinite()
        assert gradient.isfinite().all()


# ---- A student whose logits are not the loss's ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", OTHERS)
def test_a_student_of_such_a_kind_is_refused(kind, student_dir, tmp_path, pairs, settings):
    name = save_other(tmp_path / "other", kind)
    rows = Dataset.from_list(pairs)
    answered = Dataset.from_list(ROWS)
    online = OnlinePbKDConfig(**settings, num_generations=2, rm_warmup_accuracy=0.0)
    model_type = OTHERS[kind]().model_type
    ways = [
        lambda: PbKDTrainer(name, args=PbKDConfig(**settings), train_dataset=rows),
        lambda: MMPbKDTrainer(
            name, student_dir, args=MMPbKDConfig(**settings, moment_coef=0.0), train_dataset=answered
        ),
        lambda: OnlinePbKDTrainer(name, args=online, train_dataset=answered, preference_dataset=rows),
    ]
    for build in ways:
        with pytest.raises(ValueError, match=f"of the type '{model_type}', .*Take a student of another type"):
            build()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_fused_layer_that_is_used_is_what_is_compared(temperature, student_dir, settings, monkeypatch):
    """Were TRL's layer wrong, by its temperature say, that would be seen."""
    online = OnlinePbKDConfig(**settings, num_generations=2, rm_warmup_accuracy=0.0, temperature=temperature)
    rows = {"train_dataset": Dataset.from_list(ROWS), "preference_dataset": Dataset.from_list(PAIRS)}
    trainer = OnlinePbKDTrainer(student_dir, args=online, **rows)
    trainer.temperature = 2.0
    with pytest.raises(ValueError, match="has log-probabilities that differ by"):
        trainer._look_at_student()


def test_a_reference_of_such_a_kind_is_refused(student_dir, pairs, settings):
    reference = make_other("a layer before the output layer")
    args = PbKDConfig(**settings, dual_init=1.0)
    with pytest.raises(ValueError, match="^The reference model '', of the type 'modernbert-decoder'"):
        PbKDTrainer(student_dir, reference, args=args, train_dataset=Dataset.from_list(pairs))


def test_looking_changes_nothing(student_dir, teacher_dir, pairs, settings, monkeypatch):
    """A run is the same to the bit with and without the look."""
    results = []
    for looks in (True, False):
        if not looks:
            monkeypatch.setattr(
                "trl_kd.trainers.common.student_head.CheckedStudent._look_at_student", lambda self: None
            )
            monkeypatch.setattr("trl_kd.trainers.common.teacher.Teacher.look", lambda self: None)
        of = {**settings, "disable_dropout": False}
        trainer = PbKDTrainer(
            student_dir,
            args=PbKDConfig(**of, imitation="token", teacher_model_name_or_path=teacher_dir),
            train_dataset=Dataset.from_list(pairs),
            peft_config=LoraConfig(lora_dropout=0.3),
        )
        trainer.train()
        matched = make(student_dir, teacher_dir, {**settings, "lmbda": 0.5}, pairs=PAIRS)
        matched.train()
        results.append([*weights_of(trainer.model), *weights_of(matched.model), *weights_of(matched.adversary.q)])
    assert equal(*results)


# ---- A reward model's trunk -----------------------------------------------------------------------------------------


def test_a_trunk_keeps_the_layer_before_the_head(tmp_path, settings):
    kind = "a layer before the output layer"
    model = make_other(kind)
    made = from_student(model)
    name = save_other(tmp_path / "trunk", kind)
    args = OnlinePbKDConfig(**settings, num_generations=2, rm_lora_r=0)
    loaded = load_reward_model(name, make_tokenizer(), make_model(), args).model
    for trunk in (made, loaded):
        assert torch.equal(trunk.head.dense.weight, model.lm_head.dense.weight)
        assert torch.equal(trunk.head.norm.weight, model.lm_head.norm.weight)
        assert torch.equal(trunk.model.layers[0].mlp.Wi.weight, model.model.layers[0].mlp.Wi.weight)
