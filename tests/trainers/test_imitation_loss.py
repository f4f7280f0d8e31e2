"""The loss without the preference term: against the float64 loops of `tests/reference/pbkd.py`, and against `SFTTrainer`."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from tests.reference import pbkd as reference
from trl_kd import PbKDConfig, PbKDTrainer


OFF = {"dual_init": 0.0}
PLAIN = {**OFF, "imitation_radius": math.inf, "imitation_q": 0.0}
EOS = 1
LABELS = [(1.0, "chosen"), (0.3, "rejected"), (None, "rejected"), (0.5, "chosen"), (0.0, "chosen"), (0.8, None)]


@pytest.fixture
def rows(pairs) -> list[dict]:
    """Eight pairs: wins, a soft label, unknown ones, a tie, losses, one without a text of the teacher's."""
    labels = [*LABELS, (1.0, "chosen"), (0.9, "chosen")]
    return [{**row, "preference": p, "teacher_side": s} for row, (p, s) in zip(pairs, labels, strict=True)]


def make(folder, rows, settings, **more) -> PbKDTrainer:
    args = PbKDConfig(**{**settings, **OFF, "per_device_train_batch_size": 8, **more})
    return PbKDTrainer(model=folder, args=args, train_dataset=Dataset.from_list(rows))


def weights_of(trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def assert_close(ours, theirs, tolerance=1e-5) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def in_doubles(model):
    copy = AutoModelForCausalLM.from_config(model.config).double()
    copy.load_state_dict({name: weight.double() for name, weight in model.state_dict().items()})
    return copy


def texts_of(rows, tokenizer) -> list[reference.Text]:
    """Pairs of one prompt and teacher's text as one text."""
    texts: dict = {}
    for row in rows:
        side = row.get("teacher_side", "chosen")
        if side is None:
            continue
        known = texts.setdefault((row["prompt"], row[side]), [])
        if row["preference"] is not None and row["chosen"] != row["rejected"]:
            known.append(row["preference"] if side == "chosen" else 1 - row["preference"])
    ids = [tuple(tokenizer(part)["input_ids"] for part in key) for key in texts]
    return [reference.Text(p, [*t, EOS], known) for (p, t), known in zip(ids, texts.values(), strict=True)]


def loss_and_gradient(trainer):
    trainer.model.train()
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model, batch)
    return loss, torch.autograd.grad(loss, list(trainer.model.parameters()))


def assert_equals_reference(trainer, rows, **options) -> None:
    loss, gradient = loss_and_gradient(trainer)
    student = in_doubles(trainer.model)
    expected = reference.texts_loss(student, texts_of(rows, trainer._tokenizer), ends=(EOS,), **options)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=2e-5)
    of_reference = torch.autograd.grad(expected, list(student.parameters()))
    scale = max(float(g.abs().max()) for g in of_reference)
    for got, want in zip(gradient, of_reference, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=3e-5 * scale)


@pytest.mark.parametrize("radius", [0.0, 0.05, 0.7, math.inf])
@pytest.mark.parametrize("q", [0.0, 0.5, 1.0])
def test_loss_and_gradient_equal_the_reference(radius, q, tiny_dir, rows, settings):
    options = {"imitation_radius": radius, "imitation_q": q, "imitation_q_warmup": 0.0, "imitation_weight": 1.7}
    trainer = make(tiny_dir, rows, settings, **options)
    assert_equals_reference(trainer, rows, radius=radius, q=q, weight=1.7)


@pytest.mark.parametrize("q", [0.0, 0.4, 1.0])
def test_token_imitation_has_the_same_weights(q, tiny_dir, teacher_dir, rows, settings):
    named = {"imitation": "token", "teacher_model_name_or_path": teacher_dir}
    trainer = make(
        tiny_dir, rows, settings, **named, imitation_radius=0.05, imitation_q=q or None, imitation_q_warmup=0.0
    )
    teacher = in_doubles(trainer.teacher.model)
    assert_equals_reference(trainer, rows, radius=0.05, q=q, teacher=teacher)


def test_pairs_of_one_text_are_one_text_with_the_mean_preference(tiny_dir, rows, settings):
    """The third is unknown, and the fourth has the same text twice: neither counts in the mean."""
    row = {**rows[0], "teacher_side": "chosen"}
    others = [("4", 1.0), ("5", 0.4), ("6", None), (row["chosen"], 0.0), ("7", 0.9)]
    same = [{**row, "rejected": text, "preference": p} for text, p in others]
    swapped = {**row, "chosen": "8", "rejected": row["chosen"], "preference": 0.2, "teacher_side": "rejected"}
    elsewhere = {**row, "prompt": "1-1=", "preference": 0.0}  # the same text for another prompt
    data = [*same, swapped, elsewhere, *rows[1:]]
    trainer = make(tiny_dir, data, settings, imitation_q=0.5, imitation_q_warmup=0.0)
    merged = make(
        tiny_dir, [{**row, "preference": 0.775}, *rows[1:]], settings, imitation_q=0.5, imitation_q_warmup=0.0
    )
    assert len(trainer.train_dataset) == len(merged.train_dataset)
    assert_close([loss_and_gradient(trainer)[0]], [loss_and_gradient(merged)[0]], 1e-6)
    assert_equals_reference(trainer, data, radius=0.02, q=0.5)


def test_the_end_tokens_of_text_and_template_keep_their_likelihood(tiny_dir, rows, settings):
    trainer = make(tiny_dir, rows, settings, imitation_q=1.0, imitation_q_warmup=0.0)
    labels = torch.tensor([[EOS, 4, 0]])
    assert trainer._is_end(labels).tolist() == [[True, False, False]]


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("imitation", ["sequence", "token"])
def test_bfloat16_logits_of_certainty_make_no_nan(imitation, q, tiny_dir, teacher_dir, rows, settings):
    """Tokens of a probability of 1 and of 0, through the model's own output layer."""
    named = {"imitation": imitation, "imitation_q": q, "imitation_q_warmup": 0.0}
    if imitation == "token":
        named["teacher_model_name_or_path"] = teacher_dir
    trainer = make(tiny_dir, rows, settings, **named, model_init_kwargs={"dtype": "bfloat16"})
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.mul_(1e3)
    loss, gradient = loss_and_gradient(trainer)
    assert trainer.model.dtype == torch.bfloat16
    assert loss.isfinite()
    assert all(part.isfinite().all() for part in gradient)


# ---- The warm-up of q --------------------------------------------------------------------------------------------------


def test_q_rises_over_its_share_of_the_steps(tiny_dir, rows, settings):
    trainer = make(tiny_dir, rows, settings, max_steps=8, imitation_q=0.8, imitation_q_warmup=0.5)
    trainer.train()
    logged = [entry["pbkd/q"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8])
    trainer.model.eval()
    assert trainer.imitation_q == 0.8  # evaluations are comparable


# ---- TRL's SFTTrainer --------------------------------------------------------------------------------------------------


def sft(folder, rows, settings, **more) -> SFTTrainer:
    args = SFTConfig(**{**settings, "per_device_train_batch_size": 2, **more})
    trainer = SFTTrainer(model=folder, args=args, train_dataset=Dataset.from_list(rows))
    trainer.train()
    return trainer


TEN = {"max_steps": 10, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_length": 12}


def test_with_an_infinite_radius_it_is_sft(tiny_dir, pairs, settings):
    """Ten steps with accumulation, the last of each epoch a short one."""
    pairs = pairs[:7]
    ours = make(tiny_dir, pairs, settings, **TEN, **PLAIN)
    ours.train()
    theirs = sft(tiny_dir, [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs], settings, **TEN)
    assert_close(weights_of(ours), weights_of(theirs))
    logs = [[entry for entry in t.state.log_history if "loss" in entry] for t in (ours, theirs)]
    for one, other in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "learning_rate"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


def test_with_q_of_one_it_is_sft_with_the_dft_loss(tiny_dir, pairs, settings):
    """On texts whose end token is left out of both. TRL's loss has another value, with the same gradient."""
    rows = [{**row, "chosen_finish_reason": "length"} for row in pairs]
    ours = make(tiny_dir, rows, settings, **TEN, **{**PLAIN, "imitation_q": 1.0, "imitation_q_warmup": 0.0})
    texts = [{name: row[name] for name in ("input_ids", "labels")} for row in ours.train_dataset]
    assert all(text["input_ids"][-1] == EOS and text["labels"][-1] == -100 for text in texts)
    ours.train()
    theirs = sft(tiny_dir, texts, settings, **TEN, loss_type="dft")
    assert_close(weights_of(ours), weights_of(theirs))
    norms = [[entry["grad_norm"] for entry in t.state.log_history if "loss" in entry] for t in (ours, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_rows_that_teach_nothing_are_as_if_they_were_not_there(tiny_dir, rows, settings):
    options = {**TEN, "imitation_radius": 0.0, "imitation_q": 0.5}
    whole = make(tiny_dir, rows, settings, **options)
    alone = make(tiny_dir, [rows[i] for i in (0, 1, 2, 6, 7)], settings, **options)
    assert len(whole.train_dataset) == len(alone.train_dataset) == 5
    for trainer in (whole, alone):
        trainer.train()
    for one, other in zip(weights_of(whole), weights_of(alone), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("imitation", ["sequence", "token"])
def test_accumulation_equals_one_batch_with_uneven_weights(imitation, tiny_dir, teacher_dir, rows, settings):
    exact = {
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "learning_rate": 0.1,
        "max_steps": 3,
    }
    if imitation == "token":
        exact |= {"imitation": "token", "teacher_model_name_or_path": teacher_dir}
    rows = [row for i, row in enumerate(rows) if i not in (4, 5)] * 2
    rows = [{**row, "prompt": f"{i}{row['prompt']}"} for i, row in enumerate(rows)]  # twelve texts
    weights, logs = [], []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = make(tiny_dir, rows, settings, **exact, **batches)
        trainer.train()
        weights.append(weights_of(trainer))
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    for other, logged in zip(weights[1:], logs[1:], strict=True):
        assert_close(other, weights[0])
        for one, entry in zip(logs[0], logged, strict=True):
            for name in ("loss", *(name for name in one if name.startswith("pbkd/"))):
                assert entry[name] == pytest.approx(one[name], rel=1e-4), name


def test_equal_weights_do_not_cancel(tiny_dir, rows, settings):
    """A text of weight ½ in a batch of its own pulls half as hard as one of weight 1, but for the factor that all have."""
    rows = [{**rows[0], "preference": 1.0}, {**rows[1], "preference": 0.75, "teacher_side": "chosen"}]
    trainer = make(tiny_dir, rows, settings, imitation_radius=0.0, imitation_q=0.0)
    lengths = [2, 2 if len(rows[1]["chosen"]) == 1 else 3]
    assert trainer.mean_advantage == pytest.approx((lengths[0] + 0.5 * lengths[1]) / sum(lengths))
    trainer.model.train()
    for row, weight in zip(trainer.train_dataset, (1.0, 0.5), strict=True):
        loss = trainer.compute_loss(trainer.model, trainer.data_collator([row]))
        ids = torch.tensor([row["input_ids"]])
        nll = AutoModelForCausalLM.from_pretrained(tiny_dir)(input_ids=ids, labels=torch.tensor([row["labels"]])).loss
        assert float(loss) == pytest.approx(weight * float(nll) / trainer.mean_advantage, rel=1e-4)
