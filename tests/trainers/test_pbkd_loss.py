"""Loss and gradient of a batch against the float64 loops of `tests/reference/pbkd.py`, and the properties they must have."""

import math
import random

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from tests.conftest import save_tiny
from tests.reference import pbkd as reference
from trl_kd import PbKDConfig, PbKDTrainer


LABELS = {
    "hard": [(1.0, "chosen")] * 4,
    "teacher rejected": [(1.0, "rejected"), (1.0, "chosen"), (1.0, "rejected"), (1.0, None)],
    "soft": [(0.7, "chosen"), (0.5, "chosen"), (0.0, "rejected"), (1.0, "chosen")],
    "null": [(None, "chosen"), (1.0, "chosen"), (None, "rejected"), (1.0, "rejected")],
    "all": [(0.6, "chosen"), (None, "rejected"), (1.0, None), (None, None)],
    "no preference known": [(None, "chosen"), (None, "rejected"), (None, "chosen"), (None, None)],
    "no teacher": [(1.0, None), (0.4, None), (1.0, None), (1.0, None)],
}


ON = {"dual_init": 1.0}
EOS = 1


def make_trainer(folder, rows, settings, **more) -> PbKDTrainer:
    """A trainer with the preference term, whose student has left its reference, so that margins are not zero, and whose q is
    fixed."""
    if more.get("imitation_weight", 1.0) > 0:
        more.setdefault("imitation_q_warmup", 0.0)
    trainer = PbKDTrainer(
        model=folder,
        args=PbKDConfig(**{**settings, **ON, "per_device_train_batch_size": len(rows), **more}),
        train_dataset=Dataset.from_list(rows),
    )
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return trainer


def batch_of(trainer) -> dict:
    return trainer.data_collator(list(trainer.train_dataset))


def loss_and_gradient(trainer, batch=None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer) if batch is None else batch)
    return loss, torch.autograd.grad(loss, list(trainer.model.parameters()), allow_unused=True)


def reference_loss_and_gradient(trainer, **options) -> tuple[torch.Tensor, list[torch.Tensor]]:
    student, start = (AutoModelForCausalLM.from_config(trainer.model.config).double() for _ in range(2))
    student.load_state_dict({k: v.double() for k, v in trainer.model.state_dict().items()})
    start.load_state_dict({k: v.double() for k, v in trainer.ref_model.state_dict().items()})
    if trainer.teacher is not None:
        teacher = AutoModelForCausalLM.from_config(trainer.teacher.model.config).double()
        teacher.load_state_dict({k: v.double() for k, v in trainer.teacher.model.state_dict().items()})
        options["teacher"] = teacher
    rows = [
        reference.Row(
            row["prompt_ids"],
            row["chosen_ids"],
            row["rejected_ids"],
            row.get("preference", 1.0),
            row.get("teacher_side", "chosen"),
        )
        for row in trainer.train_dataset
    ]
    options = {"beta": trainer.beta, "dual": trainer.dual.value, "ends": (EOS,)} | options
    loss = reference.pbkd_loss(student, start, rows, **options)
    return loss, torch.autograd.grad(loss, list(student.parameters()), allow_unused=True)


def assert_equal(ours, theirs, tolerance: float = 2e-5) -> None:
    (loss, gradient), (expected_loss, expected_gradient) = ours, theirs
    torch.testing.assert_close(loss.double(), expected_loss, rtol=tolerance, atol=tolerance)
    scale = max(float(g.abs().max()) for g in expected_gradient)
    for got, expected in zip(gradient, expected_gradient, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=tolerance * scale)


def labelled(pairs: list[dict], labels: str) -> list[dict]:
    return [{**row, "preference": p, "teacher_side": s} for row, (p, s) in zip(pairs, LABELS[labels], strict=False)]


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 4.0), (2.0, 1e-12)])
def test_sequence_loss_equals_the_reference(labels, weights, tiny_dir, pairs, settings):
    weight, dual = weights
    trainer = make_trainer(
        tiny_dir, labelled(pairs, labels), settings, imitation_weight=weight, dual_init=dual, beta=0.2
    )
    assert_equal(loss_and_gradient(trainer), reference_loss_and_gradient(trainer, weight=weight))


@pytest.mark.parametrize("labels", ["hard", "all", "no teacher"])
def test_token_loss_equals_the_reference(labels, tiny_dir, teacher_dir, pairs, settings):
    trainer = make_trainer(
        tiny_dir, labelled(pairs, labels), settings, imitation="token", teacher_model_name_or_path=teacher_dir
    )
    assert_equal(loss_and_gradient(trainer), reference_loss_and_gradient(trainer, weight=1.0))


@pytest.mark.parametrize("bigger", ["teacher", "student"])
def test_embeddings_padded_to_another_size_share_their_tokens(bigger, tmp_path, pairs, settings):
    padded = save_tiny(tmp_path / "padded", seed=1, vocab_size=90)
    plain = save_tiny(tmp_path / "plain", seed=2)
    student, teacher = (plain, padded) if bigger == "teacher" else (padded, plain)
    options = {"imitation": "token", "teacher_model_name_or_path": teacher, "dual_init": 1e-12}
    trainer = make_trainer(student, pairs[:3], settings, **options)
    with torch.no_grad():  # the rows past the tokenizer's tokens are as likely as the others
        for model in (trainer.model, trainer.teacher.model):
            model.get_output_embeddings().weight[len(trainer.processing_class) :] += 3.0
    expected = reference_loss_and_gradient(trainer, weight=1.0, tokens=len(trainer.processing_class))
    assert_equal(loss_and_gradient(trainer), expected)


def test_rows_of_one_text_share_its_weight(tiny_dir, pairs, settings):
    """Three rows of one text, and a fourth that knows nothing: p is the mean of three, and each has a quarter of a."""
    others = [("4", 1.0), ("5", 0.2), ("6", 0.7), ("7", None)]
    rows = [{**pairs[0], "rejected": text, "preference": p} for text, p in others] + pairs[1:4]
    trainer = make_trainer(tiny_dir, rows, settings)
    assert_equal(loss_and_gradient(trainer), reference_loss_and_gradient(trainer, weight=1.0))
    shares = trainer.train_dataset["imitation_share"]
    assert shares == [0.25] * 4 + [1.0] * 3


def test_rows_from_which_nothing_is_learnt_are_left_out(tiny_dir, pairs, settings, caplog):
    """The third is imitated, the fourth has a known preference, the others neither."""
    labels = [(0.0, "chosen"), (None, None), (None, "chosen"), (0.0, "chosen"), (None, None)]
    rows = [{**row, "preference": p, "teacher_side": s} for row, (p, s) in zip(pairs, labels, strict=False)]
    rows[0]["preference"] = None
    rows[0] |= {"rejected": "4"}
    rows.append({**rows[0], "rejected": "5", "preference": 0.0})  # the first row's text has lost
    trainer = make_trainer(tiny_dir, rows, settings)
    kept = [rows[index] for index in (2, 3, 5)]
    assert trainer.train_dataset["prompt"] == [row["prompt"] for row in kept]
    assert "1 of 6 rows are imitated; 3 of weight 0: the teacher did not win" in caplog.text
    assert "3 of them left out: no known preference either" in caplog.text
    without = make_trainer(tiny_dir, kept, settings)
    loss, gradient = loss_and_gradient(without)
    assert_equal(loss_and_gradient(trainer), (loss.double(), [g.double() for g in gradient]))


def test_third_text_is_a_row_of_imitation_alone(tiny_dir, pairs, settings):
    rows = [{**pairs[0], "teacher": "7"}, {**pairs[1], "teacher": pairs[1]["rejected"]}, {**pairs[2], "teacher": None}]
    trainer = make_trainer(tiny_dir, rows, settings)
    assert len(trainer.train_dataset) == 4
    assert [row["teacher_side"] for row in trainer.train_dataset] == [None, "chosen", "rejected", None]
    assert [row["preference"] for row in trainer.train_dataset] == [1.0, None, 1.0, 1.0]
    assert_equal(loss_and_gradient(trainer), reference_loss_and_gradient(trainer, weight=1.0))


def test_soft_labels_with_ld_alpha(tiny_dir, pairs, settings):
    trainer = make_trainer(tiny_dir, labelled(pairs, "all"), settings, ld_alpha=0.3)
    assert_equal(loss_and_gradient(trainer), reference_loss_and_gradient(trainer, weight=1.0, ld_alpha=0.3))


@pytest.mark.parametrize("labels", ["soft", "all"])
def test_soft_labels_take_the_sigmoids_own_weight(labels, tiny_dir, pairs, settings):
    """A sigmoid loss of weight 2 is λ = 2."""
    options = {"loss_type": ["sigmoid"], "loss_weights": [2.0], "imitation_weight": 0.5}
    trainer = make_trainer(tiny_dir, labelled(pairs, labels), settings, **options)
    ours = loss_and_gradient(trainer)
    trainer.dual.value = 2.0
    assert_equal(ours, reference_loss_and_gradient(trainer, weight=0.5))


def test_soft_labels_beside_sft_leave_the_sft_loss_alone(tiny_dir, pairs, settings):
    """In a mixture with TRL's `sft` only the sigmoid part sees the labels."""
    rows = labelled(pairs, "soft")
    both = {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.5, 3.0], "imitation_weight": 0.0}
    alone = {"loss_type": ["sigmoid"], "loss_weights": [0.5], "imitation_weight": 0.0}
    hard = [{**row, "preference": 1.0} for row in rows]
    differences = []
    for labels in (rows, hard):
        mixed, sigmoid = (loss_and_gradient(make_trainer(tiny_dir, labels, settings, **o)) for o in (both, alone))
        differences.append((mixed[0] - sigmoid[0], [a - b for a, b in zip(mixed[1], sigmoid[1], strict=True)]))
    (loss, gradient), expected = differences
    assert_equal((loss, gradient), (expected[0].double(), [g.double() for g in expected[1]]))


NULL_LOSSES = {
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo"},
    "mixture": {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]},
    "weighting": {"use_weighting": True},
    "JS": {"f_divergence_type": "js_divergence"},
}


@pytest.mark.parametrize("loss", NULL_LOSSES)
def test_any_loss_of_known_rows_is_as_if_null_rows_were_not_there(loss, tiny_dir, pairs, settings):
    options = {**NULL_LOSSES[loss], "imitation_weight": 0.0, "dual_init": 3.0}
    known = make_trainer(tiny_dir, [pairs[1], pairs[4], pairs[6]], settings, **options)
    rows = [{**row, "preference": 1.0 if i in (1, 4, 6) else None} for i, row in enumerate(pairs)]
    mixed = make_trainer(tiny_dir, rows, settings, **options)
    loss_, gradient = loss_and_gradient(known)
    assert_equal(loss_and_gradient(mixed), (loss_.double(), [g.double() for g in gradient]))
    names = [name for name in known._metrics["train"] if name.startswith("rewards/")]
    assert len(names) == 4
    for name in names:
        assert mixed._metrics["train"][name] == pytest.approx(known._metrics["train"][name], rel=1e-4, abs=1e-6)


def test_swapping_a_pair_its_label_and_its_writer_changes_nothing(tiny_dir, pairs, settings):
    rows = labelled(pairs, "soft")
    other = {"chosen": "rejected", "rejected": "chosen", None: None}
    swapped = [
        {
            "prompt": row["prompt"],
            "chosen": row["rejected"],
            "rejected": row["chosen"],
            "preference": 1 - row["preference"],
            "teacher_side": other[row["teacher_side"]],
        }
        for row in rows
    ]
    loss, gradient = loss_and_gradient(make_trainer(tiny_dir, rows, settings))
    assert_equal(
        loss_and_gradient(make_trainer(tiny_dir, swapped, settings)), (loss.double(), [g.double() for g in gradient])
    )


@pytest.mark.parametrize("imitation", ["sequence", "token"])
def test_padding_changes_nothing(imitation, tiny_dir, teacher_dir, pairs, settings):
    named = {"teacher_model_name_or_path": teacher_dir} if imitation == "token" else {}
    trainer = make_trainer(tiny_dir, labelled(pairs, "all"), settings, imitation=imitation, **named)
    batch = batch_of(trainer)
    loss, gradient = loss_and_gradient(trainer, dict(batch))
    for name in ("input_ids", "attention_mask", "completion_mask"):
        batch[name] = torch.nn.functional.pad(batch[name], (0, 7))
    assert_equal(loss_and_gradient(trainer, batch), (loss.double(), [g.double() for g in gradient]), tolerance=1e-6)


def test_at_the_start_the_preference_loss_is_log_two(tiny_dir, pairs, settings):
    trainer = PbKDTrainer(
        model=tiny_dir, args=PbKDConfig(**settings, **ON, imitation_weight=0.0), train_dataset=Dataset.from_list(pairs)
    )
    loss, _ = loss_and_gradient(trainer)
    assert float(loss) == pytest.approx(math.log(2))


def test_a_teacher_equal_to_the_student_has_nothing_to_teach(tiny_dir, pairs, settings):
    trainer = PbKDTrainer(
        model=tiny_dir,
        args=PbKDConfig(**settings, imitation="token", teacher_model_name_or_path=tiny_dir, dual_init=0.0),
        train_dataset=Dataset.from_list(pairs),
    )
    loss, gradient = loss_and_gradient(trainer)
    assert float(loss) == pytest.approx(0.0, abs=1e-5)
    assert max(float(g.abs().max()) for g in gradient) < 1e-5


def test_nor_has_it_in_bf16(tiny_dir, pairs, settings):
    """A prepared student runs under autocast in `DPOTrainer`, and so does the teacher."""
    args = {"imitation": "token", "teacher_model_name_or_path": tiny_dir, "dual_init": 0.0}
    settings |= {"bf16": True, "max_steps": 1}
    trainer = PbKDTrainer(model=tiny_dir, args=PbKDConfig(**settings, **args), train_dataset=Dataset.from_list(pairs))
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["pbkd/imitation"] == pytest.approx(0, abs=1e-6)
    assert logged["grad_norm"] == pytest.approx(0, abs=1e-6)


def test_null_rows_do_not_move_the_student_through_the_preference_loss(tiny_dir, pairs, settings):
    rows = [{**row, "preference": None} for row in pairs[:4]]
    trainer = make_trainer(tiny_dir, rows, settings)
    trainer.args.imitation_weight = 0.0  # with which these rows would be left out
    loss, gradient = loss_and_gradient(trainer)
    assert float(loss) == pytest.approx(0.0, abs=1e-6)
    assert all(float(g.abs().max()) == 0.0 for g in gradient)


def test_accumulation_equals_one_batch_with_null_rows_unevenly_spread(tiny_dir, pairs, settings):
    """Two micro-batches, one with a single known row, give the gradient of the four rows at once."""
    rows = labelled(pairs, "all")
    random.Random(0).shuffle(rows)
    weights = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        trainer = PbKDTrainer(
            model=tiny_dir,
            args=PbKDConfig(
                **{
                    **settings,
                    **ON,
                    "per_device_train_batch_size": size,
                    "gradient_accumulation_steps": steps,
                    "max_steps": 2,
                    "optim": "sgd",
                    "lr_scheduler_type": "constant",
                    "max_grad_norm": 0.0,
                }
            ),
            train_dataset=Dataset.from_list(rows),
        )
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        logged = trainer.state.log_history[0]
        if size == 4:
            first = logged
        for name in ("pbkd/imitation", "pbkd/preference_nll", "pbkd/lagrangian", "pbkd/known_preferences", "loss"):
            assert logged[name] == pytest.approx(first[name], rel=1e-4), name
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=1e-5, atol=1e-6)
