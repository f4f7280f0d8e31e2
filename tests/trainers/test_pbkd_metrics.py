"""What is logged is what it says, against the float64 loops of `tests/reference/pbkd.py`; the router's loss beside it; and
evaluations, which leave a training alone."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

from tests.conftest import CHARACTERS, make_tokenizer
from tests.reference import pbkd as reference
from trl_kd import PbKDConfig, PbKDTrainer


HARD, SOFT, TIE, NULL = 1.0, 0.3, 0.5, None
LABELS = [(HARD, "rejected"), (SOFT, "chosen"), (TIE, "chosen"), (NULL, "rejected"), (HARD, None), (NULL, "chosen")]
SLACK = {"preference_nll_target": 0.05, "confidence_radius": 0.02}
ONE_STEP = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
"""The six rows in one window, whose two micro-batches hold different numbers of them."""


@pytest.fixture
def rows(pairs) -> list[dict]:
    return [{**row, "preference": p, "teacher_side": s} for row, (p, s) in zip(pairs, LABELS, strict=False)]


def make(folder, rows, settings, leave_reference: bool = True, **more) -> PbKDTrainer:
    dataset = Dataset.from_list(rows)
    args = PbKDConfig(**{**settings, **SLACK, "dual_init": 1.0, **more})
    trainer = PbKDTrainer(model=folder, args=args, train_dataset=dataset, eval_dataset=dataset)
    if leave_reference:
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return trainer


def in_doubles(model):
    copy = AutoModelForCausalLM.from_config(model.config).double()
    copy.load_state_dict({name: weight.double() for name, weight in model.state_dict().items()})
    return copy


def entropy(p: float) -> float:
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


@torch.no_grad()
def expected_metrics(trainer, ld_alpha: float | None) -> dict[str, float]:
    """The metrics of all training rows at once, in plain loops over rows and tokens."""
    student, start = in_doubles(trainer.model), in_doubles(trainer.ref_model)
    teacher = None if trainer.teacher is None else in_doubles(trainer.teacher.model)
    rows = [
        reference.Row(
            row["prompt_ids"], row["chosen_ids"], row["rejected_ids"], row["preference"], row["teacher_side"]
        )
        for row in trainer.train_dataset
    ]

    def preference(row, ld_alpha) -> float:
        z = reference.margin(student, start, row, trainer.beta, ld_alpha)
        return float(reference.bradley_terry(z, row.preference))

    known = [row for row in rows if row.preference is not None]
    # The constraint is on unweighted log-ratios: `ld_alpha` is a matter of the loss
    nll = sum(preference(row, None) - entropy(row.preference) for row in known) / len(known)
    texts = reference.texts_of(rows)
    q = trainer.args.final_imitation_q
    imitation = float(reference.texts_loss(student, texts, radius=0.02, q=q, ends=(1,), teacher=teacher))
    logps = [sum(reference.sequence_logps(student, text.prompt, text.response)) for text in texts]
    loss = trainer.args.imitation_weight * imitation
    loss += trainer.dual.value * sum(preference(row, ld_alpha) for row in known) / len(known)
    slack = SLACK["preference_nll_target"] + SLACK["confidence_radius"]
    return {
        "pbkd/preference_nll": nll,
        "pbkd/violation": nll - slack,
        "pbkd/imitation": imitation,
        "pbkd/teacher_nll": -float(sum(logps)) / sum(len(text.response) for text in texts),
        "pbkd/advantage": sum(reference.advantage(text, 0.02) for text in texts) / len(texts),
        "pbkd/rows_used": sum(reference.advantage(text, 0.02) > 0 for text in texts),
        "pbkd/known_preferences": len(known),
        "pbkd/dual": trainer.dual.value,
        "pbkd/lagrangian": loss - trainer.dual.value * slack,
    }


@pytest.mark.parametrize(("imitation", "ld_alpha"), [("sequence", None), ("sequence", 0.3), ("token", 0.3)])
def test_logged_metrics_equal_the_reference(imitation, ld_alpha, tiny_dir, teacher_dir, rows, settings):
    options = {"imitation": imitation, "ld_alpha": ld_alpha, "dual_init": 2.0, "imitation_weight": 0.7, "beta": 0.3}
    options["imitation_q_warmup"] = 0.0
    if imitation == "token":
        options["teacher_model_name_or_path"] = teacher_dir
    trainer = make(tiny_dir, rows, settings, **ONE_STEP, **options, per_device_eval_batch_size=4)
    expected = expected_metrics(trainer, ld_alpha)
    trainer.evaluate()
    evaluation = trainer.state.log_history[-1]  # a training begins a new history
    trainer.train()
    training = trainer.state.log_history[0]
    for name, value in expected.items():
        assert training[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
        assert evaluation[f"eval_{name}"] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_nothing_is_said_of_preferences_where_none_is_known(tiny_dir, rows, settings):
    unknown = [{**row, "preference": None} for row in rows]
    trainer = make(tiny_dir, unknown, settings, **ONE_STEP)
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["pbkd/known_preferences"] == 0
    assert not {"pbkd/preference_nll", "pbkd/violation"} & set(logged)
    assert logged["pbkd/lagrangian"] == pytest.approx(logged["loss"] - 0.07, abs=1e-5)


@pytest.mark.parametrize("ld_alpha", [None, 0.3])
def test_at_the_start_the_excess_nll_is_log_two_less_the_entropy(ld_alpha, tiny_dir, rows, settings):
    trainer = make(tiny_dir, rows, settings, leave_reference=False, **ONE_STEP, ld_alpha=ld_alpha)
    trainer.train()
    excess = [math.log(2) - entropy(row["preference"]) for row in rows if row["preference"] is not None]
    logged = trainer.state.log_history[0]
    assert logged["pbkd/preference_nll"] == pytest.approx(sum(excess) / 4, abs=1e-6)
    assert logged["pbkd/violation"] == pytest.approx(sum(excess) / 4 - 0.07, abs=1e-6)


# ---- The router's auxiliary loss ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts_dir(tmp_path_factory) -> str:
    """A tiny mixture of experts, which returns its router's logits."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(CHARACTERS) + 3,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    folder = tmp_path_factory.mktemp("experts")
    MixtralForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


COEFFICIENT = 0.5


def test_with_experts_it_is_dpo_without_our_terms(experts_dir, pairs, settings):
    logs, weights = [], []
    more = {"router_aux_loss_coef": COEFFICIENT, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    ours = PbKDConfig(**{**settings, **more}, imitation_weight=0.0, dual_init=1.0)
    for trainer_class, args in ((DPOTrainer, DPOConfig(**{**settings, **more})), (PbKDTrainer, ours)):
        trainer = trainer_class(model=experts_dir, args=args, train_dataset=Dataset.from_list(pairs))
        assert trainer.aux_loss_enabled
        trainer.train()
        logs.append(trainer.state.log_history)
        weights.append(list(trainer.model.parameters()))
    assert len(logs[0]) == len(logs[1]) == 4
    for theirs, entry in zip(*logs, strict=True):
        for name in theirs:
            if not name.endswith(("runtime", "per_second")):
                assert entry[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name
    for theirs, weight in zip(*weights, strict=True):
        torch.testing.assert_close(weight, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge"])
@pytest.mark.parametrize("labels", ["all known", "some null"])
def test_the_dual_multiplies_the_preference_loss_alone(loss, labels, experts_dir, rows, settings):
    """L = λ·L_DPO + c·aux, loss and gradient, with aux as TRL logs it."""
    rows = [{**row, "preference": None if labels == "some null" and i % 3 == 0 else 1.0} for i, row in enumerate(rows)]
    options = {"imitation_weight": 0.0, "loss_type": loss, "per_device_train_batch_size": len(rows)}

    def loss_and_gradient(dual, coefficient):
        trainer = make(experts_dir, rows, settings, dual_init=dual, router_aux_loss_coef=coefficient, **options)
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
        gradient = torch.autograd.grad(loss, list(trainer.model.parameters()), allow_unused=True)
        flat = torch.cat([torch.zeros(0) if g is None else g.flatten() for g in gradient])
        logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        return loss.detach(), flat, logged

    preference, preference_gradient, logged = loss_and_gradient(1.0, 0.0)
    assert "aux_loss" not in logged
    router, router_gradient, logged = loss_and_gradient(1e-12, COEFFICIENT)
    assert float(router) == pytest.approx(COEFFICIENT * logged["aux_loss"], rel=1e-6)
    assert float(router) > 0.1
    assert float(router_gradient.abs().max()) > 1e-4
    whole, gradient, logged = loss_and_gradient(3.0, COEFFICIENT)
    torch.testing.assert_close(whole, 3 * preference + router, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, 3 * preference_gradient + router_gradient, rtol=1e-4, atol=1e-6)


def test_the_lagrangian_has_the_routers_loss_once(experts_dir, rows, settings):
    more = {"router_aux_loss_coef": COEFFICIENT, "dual_init": 3.0, "per_device_eval_batch_size": 3}
    trainer = make(experts_dir, rows, settings, **ONE_STEP, **more)
    trainer.evaluate()
    evaluation = trainer.state.log_history[-1]  # a training begins a new history
    trainer.train()
    training = trainer.state.log_history[0]
    assert training["pbkd/lagrangian"] == pytest.approx(training["loss"] - 3 * 0.07, rel=1e-5)
    assert evaluation["eval_pbkd/lagrangian"] == pytest.approx(evaluation["eval_loss"] - 3 * 0.07, rel=1e-5)


# ---- An evaluation within a step ------------------------------------------------------------------------------------


class EvaluateWithinSteps(TrainerCallback):
    """Evaluates after every micro-batch but the last of each optimizer step."""

    trainer: PbKDTrainer
    evaluations = 0

    def on_substep_end(self, args, state, control, **kwargs):
        self.trainer.evaluate()
        self.evaluations += 1


def test_an_evaluation_within_a_step_changes_nothing(tiny_dir, rows, settings):
    moving = {"dual_learning_rate": 0.5, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}
    found = []
    for callback in (None, EvaluateWithinSteps()):
        trainer = make(tiny_dir, rows, settings, **moving)
        if callback is not None:
            callback.trainer = trainer
            trainer.add_callback(callback)
        trainer.train()
        logs = [
            {name: value for name, value in entry.items() if name.startswith(("pbkd/", "rewards/")) or name == "loss"}
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
        found.append((trainer.dual.history, logs, list(trainer.model.parameters())))
    assert callback.evaluations == 6  # after two of three micro-batches, in three steps
    assert len(found[0][0]) == 3
    assert found[0][:2] == found[1][:2]
    assert all(torch.equal(a, b) for a, b in zip(found[0][2], found[1][2], strict=True))
