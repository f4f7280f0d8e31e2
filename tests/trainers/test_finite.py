"""Training stops at NaN and infinity, whatever they come from, and leaves the last checkpoint as it is."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from tests.conftest import make_model, make_tokenizer
from tests.trainers import mm_cases, online_cases, rounds_cases
from trl_kd import PbKDConfig, PbKDTrainer
from trl_kd.trainers.common.finite import FiniteTraining, NotFinite, require_finite
from trl_kd.trainers.mm_pbkd.adversary import descend


BY_STEPS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}


class Breaks(TrainerCallback):
    """Sets a weight of the student to a value when a step is done."""

    def __init__(self, step: int, value: float = math.nan):
        self.step, self.value = step, value

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            model.get_output_embeddings().weight.data[5, 0] = self.value


class BreaksGradient(TrainerCallback):
    """The gradient is no number, though the loss is."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            model.get_input_embeddings().weight.register_hook(lambda gradient: gradient * math.nan)


def make(name, tiny_dir, teacher_dir, pairs, settings, **more):
    settings = {**settings, **BY_STEPS, **more}
    if name == "pbkd":
        return PbKDTrainer(tiny_dir, args=PbKDConfig(**settings), train_dataset=Dataset.from_list(pairs))
    if name == "mm-pbkd":
        return mm_cases.make(tiny_dir, teacher_dir, {**settings, "lmbda": 0.5}, pairs=mm_cases.PAIRS)
    return online_cases.make(tiny_dir, settings, pairs=online_cases.PAIRS, imitation_weight=0.1, rm_held_out=0.2)


def files(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Copies(TrainerCallback):
    """Remembers the files of the first checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.files = files(Path(args.output_dir, "checkpoint-1"))


TRAINERS = ["pbkd", "mm-pbkd", "online-pbkd"]


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_weight_stops_before_it_is_saved(name, value, tiny_dir, teacher_dir, pairs, settings, tmp_path):
    trainer = make(name, tiny_dir, teacher_dir, pairs, settings)
    copies = Copies()
    for callback in (copies, Breaks(2, value)):
        trainer.add_callback(callback)
    with pytest.raises(NotFinite, match="Training stopped at step 2: a weight of the student is nan"):
        trainer.train()
    out = tmp_path / "out"
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    assert files(out / "checkpoint-1") == copies.files


@pytest.mark.parametrize("name", TRAINERS)
def test_a_broken_student_stops_the_next_step(name, tiny_dir, teacher_dir, pairs, settings):
    """It cannot be sampled either."""
    trainer = make(name, tiny_dir, teacher_dir, pairs, settings, save_strategy="no")
    trainer.add_callback(Breaks(2))
    with pytest.raises(NotFinite, match="Training stopped at step 3: (the loss|a weight of the student) is nan"):
        trainer.train()


@pytest.mark.parametrize("name", TRAINERS)
def test_a_broken_gradient_stops_before_the_update(name, tiny_dir, teacher_dir, pairs, settings):
    trainer = make(name, tiny_dir, teacher_dir, pairs, settings, save_strategy="no")
    trainer.add_callback(BreaksGradient())
    with pytest.raises(NotFinite, match="Training stopped at step 2: the gradient's norm is nan"):
        trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_the_last_step_is_looked_at_too(tiny_dir, teacher_dir, pairs, settings):
    trainer = make("pbkd", tiny_dir, teacher_dir, pairs, settings, save_strategy="no")
    trainer.add_callback(Breaks(4))
    with pytest.raises(NotFinite, match="at step 4"):
        trainer.train()


def test_accumulation_stops_in_its_micro_batch(tiny_dir, teacher_dir, pairs, settings, monkeypatch):
    trainer = make(
        "pbkd", tiny_dir, teacher_dir, pairs, settings, gradient_accumulation_steps=2, per_device_train_batch_size=1
    )
    original, losses = trainer._compute_loss, []

    def broken(*args):
        loss = original(*args)
        losses.append(loss)
        return loss * (math.nan if len(losses) == 4 else 1)

    monkeypatch.setattr(trainer, "_compute_loss", broken)
    with pytest.raises(NotFinite, match="Training stopped at step 2: the loss is nan"):
        trainer.train()
    assert len(losses) == 4


# ---- Rewards --------------------------------------------------------------------------------------------------------


def test_a_reward_of_infinity_is_named(tiny_dir, settings):
    def reward(prompts, completions, **columns):
        return [math.inf] * len(prompts)

    trainer = online_cases.make(
        tiny_dir, settings, adversary="off", reward_funcs=[reward], teacher=online_cases.Teacher()
    )
    with pytest.raises(NotFinite, match="Training stopped at step 1: `rewards/reward` is inf"):
        trainer.train()


def test_a_reward_that_is_not_given_is_no_fault(tiny_dir, settings):
    def reward(prompts, completions, **columns):
        return [None, *[float(len(text)) for text in completions[1:]]]

    trainer = online_cases.make(
        tiny_dir,
        settings,
        adversary="off",
        reward_funcs=[reward, lambda completions, **columns: [1.0] * len(completions)],
        teacher=online_cases.Teacher(),
    )
    trainer.train()


@pytest.mark.parametrize("place", ["trunk", "head"])
def test_a_broken_reward_model_stops(place, tiny_dir, settings):
    trainer = online_cases.make(tiny_dir, settings, pairs=online_cases.PAIRS, rm_held_out=0.2)
    model = trainer.learner.model
    weight = model.heads.mle.weight if place == "head" else next(p for p in model.parameters() if p.dim() > 1)
    weight.data.fill_(math.nan)
    with pytest.raises(NotFinite, match="Training stopped at step 1: `pbkd/rm_nll_mle` is nan"):
        trainer.train()


def test_a_discriminator_that_breaks_stops(tiny_dir, settings):
    trainer = online_cases.make(tiny_dir, settings, adversary="discriminator", teacher=online_cases.Teacher())
    trainer.learner.model.heads.adversary.weight.data.fill_(math.nan)
    with pytest.raises(NotFinite, match="Training stopped at step 1: (the gradient of the reward model|`rewards/)"):
        trainer.train()


def test_the_warm_up_of_a_reward_model_stops(tiny_dir, settings, monkeypatch):
    trainer = online_cases.make(
        tiny_dir, settings, pairs=mm_cases.PAIRS * 12, rm_held_out=0.5, rm_warmup_accuracy=0.6, rm_warmup_steps=5
    )
    trainer.learner.model.heads.mle.weight.data.fill_(math.nan)
    with pytest.raises(NotFinite, match="at step 1: `pbkd/rm_nll_mle` is nan"):
        trainer.train()


def test_a_broken_q_function_stops(tiny_dir, teacher_dir, settings):
    trainer = mm_cases.make(tiny_dir, teacher_dir, settings, pairs=mm_cases.PAIRS)
    for parameter in trainer.adversary.q.parameters():
        parameter.data.fill_(math.nan)
    with pytest.raises(NotFinite, match="Training stopped at step 1: "):
        trainer.train()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_broken_gradient_of_an_adversary_stops(precision):
    """In fp16 the step is left out, as the student's is."""
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([math.nan, 1.0])
    optimizer = torch.optim.Adam([weight])
    accelerator = SimpleNamespace(mixed_precision=precision, reduce=lambda flat, reduction: flat)
    if precision == "bf16":
        with pytest.raises(NotFinite, match="Training stopped: the gradient of Q is nan"):
            descend(optimizer, accelerator, "Q")
    else:
        descend(optimizer, accelerator, "Q")
    assert weight.tolist() == [1, 1]


def test_a_broken_student_is_told_at_once(tmp_path, pairs, settings):
    model = make_model()
    model.lm_head.weight.data.fill_(math.nan)
    model.save_pretrained(tmp_path / "broken")
    make_tokenizer().save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"The student '.*broken' gives logits that are NaN or infinite"):
        PbKDTrainer(str(tmp_path / "broken"), args=PbKDConfig(**settings), train_dataset=Dataset.from_list(pairs))


# ---- Rounds, and what is no fault -----------------------------------------------------------------------------------


def test_a_round_that_breaks_is_not_finished(tiny_dir, tmp_path):
    rounds = rounds_cases.make(tmp_path / "out", tiny_dir, rounds=2, callbacks=[Breaks(3)])
    with pytest.raises(NotFinite, match="Training stopped at step 4"):
        rounds.run()
    student = tmp_path / "out" / "round-1" / "student"
    assert [path.name for path in student.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not list(student.glob("*.safetensors"))
    rounds_cases.make(tmp_path / "out", tiny_dir, rounds=2).run()  # which goes on from the checkpoint
    assert (student / "model.safetensors").is_file()


def test_overflows_of_fp16_are_left_out():
    class Plain:
        def _get_grad_norm(self, norm):
            return norm

    class Trainer(FiniteTraining, Plain):
        state = SimpleNamespace(global_step=0)

    trainer = Trainer()
    trainer.accelerator = SimpleNamespace(mixed_precision="fp16")
    assert trainer._get_grad_norm(math.inf) == math.inf
    trainer.accelerator = SimpleNamespace(mixed_precision="bf16")
    assert trainer._get_grad_norm(None) is None
    assert trainer._get_grad_norm(torch.tensor(1.0)) == 1
    with pytest.raises(NotFinite, match="at step 1: the gradient's norm is inf"):
        trainer._get_grad_norm(torch.tensor(math.inf))


def test_the_first_metric_that_is_none_is_named():
    require_finite(loss=1.0)
    with pytest.raises(NotFinite, match="`reward` is -inf"):
        require_finite(loss=1.0, reward=-math.inf)
