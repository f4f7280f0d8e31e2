"""Q of `MMPbKDTrainer`: its warm-up, its steps, its forms, and what of the preferences reaches it."""

import logging
import math
import random

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from trl import DistillationConfig, DistillationTrainer

from tests.trainers.mm_cases import PAIRS, PROMPTS, ROWS, equal, logs_of, make, weights_of
from trl_kd import MMPbKDConfig, MMPbKDTrainer
from trl_kd.rewards.q_function import Q_HEADS
from trl_kd.trainers.mm_pbkd.adversary import FIRST_LOOK, looks_of


MANY = [
    {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": f"{a}x", "preference": 1.0 if (a + b) % 5 else 0.5}
    for a in range(16)
    for b in range(17)
]
"""272 pairs of which a fifth are ties; the letter is always wrong."""


def state_of(trainer) -> tuple:
    adversary = trainer.adversary
    optimizer = [value for state in adversary.optimizer.state.values() for value in state.values()]
    return weights_of(adversary.q), [v.clone() for v in optimizer], trainer.dual.state_dict(), adversary.pairs.seen


# ---- Warm-up --------------------------------------------------------------------------------------------------------


def test_the_warm_up_ends_once_held_out_pairs_are_ordered(tiny_dir, teacher_dir, settings, caplog):
    options = {"pairs": MANY, "pair_held_out": 0.5, "q_warmup_steps": 60, "q_learning_rate": 0.2, "max_steps": 1}
    trainer = make(tiny_dir, teacher_dir, settings, **options)
    pairs = trainer.adversary.pairs
    assert 100 <= pairs.strict < 136  # the ties among the 136 held out do not count
    with caplog.at_level(logging.INFO):
        trainer.train()
    first = logs_of(trainer)[0]
    assert first["mmpbkd/warmup_steps"] in (10, 20, 40)
    assert first["mmpbkd/held_out_accuracy"] > 0.5 + 1.645 * 0.5 / math.sqrt(pairs.strict)
    assert pairs.seen == (first["mmpbkd/warmup_steps"] + 1) * 4
    said = [record for record in caplog.records if "warm-up" in record.message]
    assert [record.levelname for record in said] == ["INFO", "INFO"]
    threshold = 0.5 + 2.2414 * 0.5 / math.sqrt(pairs.strict)  # 5 % by four looks, one-sided
    # Newer releases of accelerate put `[RANK 0] ` before it
    assert said[0].message.removeprefix("[RANK 0] ").startswith("After 10 steps of its warm-up Q orders ")
    assert f"of {pairs.strict} held-out pairs rightly; above {threshold:.1%} the warm-up ends" in said[0].message
    ended = f"{first['mmpbkd/warmup_steps']:.0f} steps and ended at {first['mmpbkd/held_out_accuracy']:.1%}."
    assert said[1].message.removeprefix("[RANK 0] ") == f"Q's warm-up took {ended}"
    assert len(trainer.dual.history) == 1  # λ moves with the student's steps alone


def test_a_warm_up_that_teaches_nothing_is_said(tiny_dir, teacher_dir, settings, caplog):
    options = {"pairs": MANY, "pair_held_out": 0.5, "q_warmup_steps": 12, "q_learning_rate": 0.0, "max_steps": 2}
    trainer = make(tiny_dir, teacher_dir, settings, **options)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    first, second = logs_of(trainer)
    assert (first["mmpbkd/warmup_steps"], first["mmpbkd/held_out_accuracy"]) == (12, 0.0)
    assert "mmpbkd/warmup_steps" not in second
    assert f"After q_warmup_steps=12 Q orders 0.0% of {trainer.adversary.pairs.strict} held-out pairs" in caplog.text


def test_with_few_pairs_the_warm_up_goes_by_steps_and_says_so(tiny_dir, teacher_dir, settings, caplog):
    trainer = make(tiny_dir, teacher_dir, settings, pairs=PAIRS, q_warmup_steps=5, max_steps=1)
    with caplog.at_level(logging.INFO):
        trainer.train()
    assert "2 strict pairs are held out" in caplog.text
    assert "it takes 100): its warm-up takes all 5 steps" in caplog.text
    assert logs_of(trainer)[0]["mmpbkd/warmup_steps"] == 5
    assert "mmpbkd/held_out_accuracy" not in logs_of(trainer)[0]


def test_labels_at_random_end_a_warm_up_rarely(tiny_dir, teacher_dir, settings):
    """Five looks, each at an accuracy that is chance alone, share the 5 %; each at 5 % would end one in four."""
    options = {"pairs": MANY, "pair_held_out": 0.5, "q_warmup_steps": 100}
    adversary = make(tiny_dir, teacher_dir, settings, **options).adversary
    strict, stream = adversary.pairs.strict, random.Random(0)
    adversary.step = lambda moments: {}
    adversary.held_out_accuracy = lambda: sum(stream.random() < 0.5 for _ in range(strict)) / strict
    ended = [adversary.warm_up()["warmup_steps"] < 100 for _ in range(400)]
    assert sum(ended) / 400 < 0.08
    adversary.held_out_accuracy = lambda: 0.5 + 3 * 0.5 / math.sqrt(strict)
    assert adversary.warm_up()["warmup_steps"] == FIRST_LOOK


def test_looks_grow_apart(tiny_dir, teacher_dir, settings):
    """So that they cost a logarithmic number of passes over the held-out pairs."""
    assert looks_of(100) == [10, 20, 40, 80, 100]
    assert [looks_of(steps) for steps in (1, 10, 11, 40)] == [[1], [10], [10, 11], [10, 20, 40]]
    adversary = make(tiny_dir, teacher_dir, settings, pairs=MANY, pair_held_out=0.5, q_warmup_steps=100).adversary
    taken, looked = [], []
    adversary.step = lambda moments: taken.append(moments)
    adversary.held_out_accuracy = lambda: looked.append(len(taken)) or 0.5
    assert adversary.warm_up() == {"warmup_steps": 100, "held_out_accuracy": 0.5}
    assert looked == [10, 20, 40, 80, 100]


@pytest.mark.parametrize("attention_dropout", [0.0, 0.5])
def test_the_warm_up_touches_neither_the_student_nor_its_random_stream(
    attention_dropout, tiny_dir, teacher_dir, settings
):
    more = {"model_init_kwargs": {"attention_dropout": attention_dropout}}
    trainer = make(tiny_dir, teacher_dir, settings, pairs=PAIRS, q_warmup_steps=3, lmbda=0.5, q_head="mlp", **more)
    trainer.model.train()
    student, teacher = weights_of(trainer.model), weights_of(trainer.teacher_model)
    stream = torch.random.get_rng_state()
    trainer.adversary.warm_up()
    assert torch.equal(torch.random.get_rng_state(), stream)
    assert equal(weights_of(trainer.model), student)
    assert equal(weights_of(trainer.teacher_model), teacher)
    assert trainer.model.training
    assert all(p.grad is None for p in trainer.model.parameters())
    assert trainer.adversary.q.outputs.abs().sum((1, 2)).min() > 0  # the adversary and both twins have learnt
    assert trainer.dual.history == []


def test_no_warm_up_without_pairs_or_where_they_hold_nothing(tiny_dir, teacher_dir, settings):
    for options in ({"pairs": None}, {"pairs": PAIRS, "dual_init": 0.0, "dual_max": 0.0}):
        trainer = make(tiny_dir, teacher_dir, settings, q_warmup_steps=50, max_steps=1, **options)
        trainer.train()
        assert "mmpbkd/warmup_steps" not in logs_of(trainer)[0]
        assert trainer.preference_rows == 0  # which the card would speak of


# ---- Preferences ----------------------------------------------------------------------------------------------------


def test_null_rows_are_dropped_and_ties_and_soft_labels_used(tiny_dir, teacher_dir, settings):
    """While Q is zero, the excess NLL of a batch is log 2 less the mean entropy of its labels: here of all rows."""
    labels = [None, 0.5, 0.8, 1.0, 0.0, float("nan")] * 2
    pairs = [{**row, "preference": p, "teacher_side": None} for row, p in zip(PAIRS, labels, strict=False)]
    trainer = make(tiny_dir, teacher_dir, settings, pairs=pairs, pair_held_out=0.0, pair_batch_size=64, max_steps=1)
    assert trainer.adversary.pairs.size == len(trainer.adversary.pairs) == 8
    assert trainer.preference_rows == 8
    trainer.train()
    entropies = [math.log(2), -(0.8 * math.log(0.8) + 0.2 * math.log(0.2)), 0.0, 0.0]
    excess = math.log(2) - sum(entropies) / 4
    logged = logs_of(trainer)[0]
    assert logged["mmpbkd/preference_nll"] == pytest.approx(excess, abs=1e-6)
    assert logged["mmpbkd/preference_nll_mle"] == pytest.approx(excess, abs=1e-6)
    assert logged["mmpbkd/violation"] == pytest.approx(-0.05, abs=1e-6)
    assert logged["mmpbkd/accuracy"] == 0  # a Q of zero orders nothing


def test_the_label_says_which_response_is_preferred(tiny_dir, teacher_dir, settings):
    """Pairs turned around, with labels turned around, teach the same Q."""
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"], "preference": 0.0} for row in PAIRS]
    found = []
    for pairs in (PAIRS, turned):
        trainer = make(tiny_dir, teacher_dir, settings, pairs=pairs, q_warmup_steps=5)
        trainer.adversary.warm_up()
        found.append(weights_of(trainer.adversary.q))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


FIXED_AT_ZERO = {
    "no room": {"dual_max": 0.0, "dual_init": 0.0},
    "no rate": {"dual_learning_rate": 0.0, "dual_init": 0.0},
}


@pytest.mark.parametrize("case", FIXED_AT_ZERO)
@pytest.mark.parametrize("q_head", Q_HEADS)
def test_at_a_dual_fixed_at_zero_the_preferences_are_as_good_as_none(q_head, case, tiny_dir, teacher_dir, settings):
    found = []
    for pairs in (None, PAIRS):
        options = {"pairs": pairs, "q_head": q_head, "lmbda": 0.5, "q_steps": 2, **FIXED_AT_ZERO[case]}
        trainer = make(tiny_dir, teacher_dir, settings, **{**options, "q_warmup_steps": 5})
        trainer.train()
        found.append((weights_of(trainer.model), weights_of(trainer.adversary.q)))
        assert [name for name in logs_of(trainer)[-1] if name in ("mmpbkd/violation", "mmpbkd/dual")] == []
    assert equal(found[0][0], found[1][0])
    assert equal(found[0][1], found[1][1])


@pytest.mark.parametrize("q_head", [head for head in Q_HEADS if head != "linear"])
def test_once_the_dual_is_zero_the_twins_leave_the_trunk_alone(q_head, tiny_dir, teacher_dir, settings):
    """It is the adversary's then, and the preferences must not reach it."""
    trainer = make(tiny_dir, teacher_dir, settings, pairs=PAIRS, q_head=q_head, q_warmup_steps=3, dual_init=0.5)
    adversary = trainer.adversary
    adversary.warm_up()
    moved = {}
    for dual in (1.0, 0.0):
        trainer.dual.value = dual
        adversary.learn_preferences(dual)
        moved[dual] = {n: p.grad is not None and bool(p.grad.any()) for n, p in adversary.q.named_parameters()}
        twin = adversary.q.outputs.grad[1]
        assert twin.any()
        assert bool(adversary.q.outputs.grad[0].any()) == (dual > 0)
        adversary.optimizer.zero_grad()
        hidden = torch.randn(5, 16)
        adversary.features(hidden, 0).sum().backward()
        reached = {n: p.grad is not None and bool(p.grad.any()) for n, p in adversary.q.named_parameters()}
        assert all(on == (name == "outputs" or dual == 0) for name, on in reached.items())
        adversary.optimizer.zero_grad()
    assert all(moved[1.0].values())
    assert [name for name, on in moved[0.0].items() if on] == ["outputs"]


def test_a_violation_that_is_no_number_leaves_the_dual(tiny_dir, teacher_dir, settings, monkeypatch):
    trainer = make(tiny_dir, teacher_dir, settings, pairs=PAIRS)
    adversary = trainer.adversary
    learn = adversary.learn_preferences
    for violation in (math.nan, math.inf, -math.inf):
        monkeypatch.setattr(adversary, "learn_preferences", lambda dual, v=violation: {**learn(dual), "violation": v})
        adversary.step()
        assert trainer.dual.value == 5.0
        assert trainer.dual.history == []
    monkeypatch.undo()
    adversary.step()
    assert len(trainer.dual.history) == 1


# ---- Steps ----------------------------------------------------------------------------------------------------------


def test_evaluation_leaves_q_and_the_dual_untouched(tiny_dir, teacher_dir, settings):
    options = {"pairs": PAIRS, "lmbda": 0.5, "eval_rows": ROWS[:6], "q_steps": 2, "per_device_eval_batch_size": 4}
    trainer = make(tiny_dir, teacher_dir, settings, **options)
    trainer.train()
    before, steps = state_of(trainer), len(trainer.dual.history)
    assert steps == 6
    trainer.evaluate()
    after = state_of(trainer)
    assert equal(after[0], before[0])
    assert equal(after[1], before[1])
    assert after[2:] == before[2:]
    assert not trainer._kept
    assert not any(p.grad is not None and p.grad.any() for p in trainer.adversary.q.parameters())
    logged = trainer.state.log_history[-1]
    assert {"eval_loss", "eval_mmpbkd/kl", "eval_mmpbkd/moment_gap", "eval_mmpbkd/held_out_accuracy"} <= set(logged)


def test_several_evaluation_sets_measure_the_held_out_pairs_once(tiny_dir, teacher_dir, settings, monkeypatch):
    sets = DatasetDict({"a": Dataset.from_list(PROMPTS[:4]), "b": Dataset.from_list(PROMPTS[4:])})
    options = {"pairs": PAIRS, "eval_rows": sets, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    trainer = make(tiny_dir, teacher_dir, settings, **options)
    measure, measured = trainer.adversary.held_out_accuracy, []
    monkeypatch.setattr(trainer.adversary, "held_out_accuracy", lambda: measured.append(measure()) or measured[-1])
    for count in (1, 2):  # Q goes on in a second training, whose steps have the same numbers
        trainer.train()
        assert len(measured) == count
    logged = [e for e in trainer.state.log_history if "eval_a_loss" in e or "eval_b_loss" in e]
    assert [value for e in logged for name, value in e.items() if "held_out" in name] == [
        accuracy for accuracy in measured[1:] for _ in "ab"
    ]


@pytest.mark.parametrize("pairs", [None, PAIRS])
def test_q_takes_its_steps_for_each_of_the_students(pairs, tiny_dir, teacher_dir, settings):
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "lmbda": 0.5}
    found = []
    for q_steps in (1, 3):
        trainer = make(tiny_dir, teacher_dir, settings, pairs=pairs, q_steps=q_steps, max_steps=2, **options)
        trainer.train()
        assert {int(state["step"]) for state in trainer.adversary.optimizer.state.values()} == {2 * q_steps}
        assert not trainer._kept
        if pairs:
            assert trainer.adversary.pairs.seen == 2 * q_steps * 4
            assert len(trainer.dual.history) == 2 * q_steps
        found.append(trainer.adversary.q.outputs[0].detach().norm().item())
    assert found[1] > 1.5 * found[0] > 0


def test_a_further_step_of_q_sees_the_moments_that_the_first_saw(tiny_dir, teacher_dir, settings):
    """Without preferences and at a step size of nearly nothing, all steps of Q are along one gradient: Adam's second step
    is its first."""
    options = {"q_learning_rate": 1e-6, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    found = []
    for q_steps in (1, 2):
        trainer = make(tiny_dir, teacher_dir, settings, q_steps=q_steps, max_steps=1, lmbda=0.5, **options)
        trainer.train()
        found.append(trainer.adversary.q.outputs.detach().clone())
    large = found[0].abs() > 0.9 * found[0].abs().max()  # where Adam's epsilon is nothing
    assert large.float().mean() > 0.5
    torch.testing.assert_close(found[1][large], 2 * found[0][large], rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("q_head", Q_HEADS)
def test_forms_of_q(q_head, tiny_dir, teacher_dir, settings):
    trainer = make(tiny_dir, teacher_dir, settings, pairs=PAIRS, q_head=q_head, q_warmup_steps=2)
    before = weights_of(trainer.adversary.q)
    assert len(before) == (1 if q_head == "linear" else 2)
    trainer.train()
    logs = logs_of(trainer)
    assert all(not torch.equal(a, b) for a, b in zip(before, weights_of(trainer.adversary.q), strict=True))
    assert all(entry["mmpbkd/q_abs_mean"] > 0 for entry in logs)
    assert all(0 <= entry["mmpbkd/q_saturation"] <= 1 and entry["mmpbkd/advantage_std"] > 0 for entry in logs)
    assert [entry["mmpbkd/dual"] for entry in logs] == pytest.approx([5.0, *trainer.dual.history[:2]])


def test_a_radius_of_zero_makes_the_twin_the_adversary(tiny_dir, teacher_dir, settings):
    options = {"pairs": PAIRS, "confidence_radius": 0.0, "lmbda": 0.5, "q_steps": 2}
    trainer = make(tiny_dir, teacher_dir, settings, **options)
    trainer.train()
    q, hidden = trainer.adversary.q, torch.randn(5, 16)
    for baseline in (0, 1):
        met = trainer.adversary.features(hidden, baseline)
        assert torch.equal(met, q(hidden, [1 + baseline])[0])
        assert not met.requires_grad  # the moments do not move it
    assert trainer.dual.history == []  # there is nothing for λ to do
    logs = logs_of(trainer)
    assert logs[-1]["mmpbkd/q_abs_mean"] > 0
    for entry in logs:
        assert entry["mmpbkd/preference_nll"] == entry["mmpbkd/preference_nll_mle"]
        assert entry["mmpbkd/violation"] == 0


def test_theorys_radius_is_of_the_pairs_to_learn_from(tiny_dir, teacher_dir, settings):
    options = {"pairs": PAIRS, "confidence_radius": "theory", "confidence_constant": 2.0, "confidence_delta": 0.1}
    trainer = make(tiny_dir, teacher_dir, settings, **options)
    assert trainer.dual.radius == pytest.approx(2.0 * math.log(18 / 0.1) / 18)


def test_the_state_gradient_is_one_of_later_tokens_and_no_part_of_the_loss(tiny_dir, teacher_dir, settings):
    found = []
    for on in (False, True):
        trainer = make(tiny_dir, teacher_dir, settings, lmbda=0.5, state_gradient=on, max_steps=1)
        trainer.train()
        found.append((logs_of(trainer)[0], trainer.completions))
    assert found[0][1] == found[1][1]
    assert found[1][0]["loss"] == pytest.approx(found[0][0]["loss"], rel=1e-5)
    assert found[1][0]["grad_norm"] != pytest.approx(found[0][0]["grad_norm"], rel=0.05)
    # With one token there is no later one
    found = []
    for on in (False, True):
        trainer = make(tiny_dir, teacher_dir, settings, state_gradient=on, max_steps=1, max_completion_length=1)
        trainer.train()
        found.append(logs_of(trainer)[0]["grad_norm"])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


# ---- At its defaults it takes what `DistillationTrainer` takes ------------------------------------------------------


DROP_IN = {
    "JS": ({"beta": 0.3, "temperature": 0.7}, {}),
    "streams and evaluation sets": (
        {"beta": 0.0, "eval_strategy": "steps", "eval_steps": 1},
        {
            "train_dataset": Dataset.from_list(PROMPTS).to_iterable_dataset(),
            "eval_dataset": DatasetDict({"a": Dataset.from_list(PROMPTS), "b": Dataset.from_list(PROMPTS[:3])}),
        },
    ),
    "LoRA": (
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"peft_config": LoraConfig(target_modules=["q_proj", "v_proj"])},
    ),
}


@pytest.mark.parametrize("case", DROP_IN)
def test_the_first_step_is_that_of_distillation(case, tiny_dir, teacher_dir, settings):
    """Q is zero then. A plain `DistillationConfig` will do, and every parameter moves."""
    options, keywords = DROP_IN[case]
    args = {**settings, "max_steps": 1, "max_completion_length": 6, **options}
    keywords = {"train_dataset": Dataset.from_list(PROMPTS), **keywords}
    trainers = []
    for trainer_class in (DistillationTrainer, MMPbKDTrainer):
        trainer = trainer_class(tiny_dir, teacher_dir, args=DistillationConfig(**args), **keywords)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        trainers.append(trainer)
    theirs, ours = trainers
    for expected, found in zip(theirs.state.log_history[:-1], ours.state.log_history[:-1], strict=True):
        for name in set(expected) - {"step_time"}:
            if not name.endswith(("runtime", "per_second")):
                evaluated = name.startswith("eval_") and name.endswith("_loss")  # with a Q that has taken a step
                same = "eval_mmpbkd/kl" if evaluated else name
                assert found[same] == pytest.approx(expected[name], rel=1e-5), name
    for (name, weight), expected in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)
        stays = "lora_A" in name or not weight.requires_grad  # A moves from the second step on, since B is zero
        assert torch.equal(weight, before[name]) == stays, name


def test_the_teacher_may_be_named_in_the_settings(tiny_dir, teacher_dir, settings):
    """`DistillationTrainer` ignores it there."""
    named = {"teacher_model_name_or_path": teacher_dir, "max_completion_length": 6}
    args = DistillationConfig(**{**settings, **named})
    trainer = MMPbKDTrainer(model=tiny_dir, args=args, train_dataset=Dataset.from_list(PROMPTS))
    assert isinstance(trainer.args, MMPbKDConfig)
    trainer.train()
    assert [entry["mmpbkd/q_abs_mean"] > 0 for entry in logs_of(trainer)] == [False, True, True]
