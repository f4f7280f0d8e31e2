"""What a step costs: each model runs forward as often as `DPOTrainer` runs it, and a teacher once."""

from collections import Counter

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaModel
from trl import DPOConfig, DPOTrainer

from trl_kd import PbKDConfig, PbKDTrainer


LABELS = [(1.0, "chosen"), (0.6, "rejected"), (1.0, None), (0.5, "chosen")]
WITH_NULL = [(1.0, "chosen"), (None, "rejected"), (1.0, None), (None, "chosen")]
LORA = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}
COSTS = {
    "sequence": ({}, LABELS, {"student": 1, "reference": 1}),
    "token": ({"imitation": "token"}, LABELS, {"student": 1, "reference": 1, "teacher": 1}),
    "precomputed reference": ({"precompute_ref_log_probs": True}, LABELS, {"student": 1}),
    "null rows": ({}, WITH_NULL, {"student": 1, "reference": 1}),
    "null rows, hinge": ({"loss_type": "hinge"}, WITH_NULL, {"student": 1, "reference": 1}),
    "null rows, hinge, token, precomputed reference": (
        {"loss_type": "hinge", "imitation": "token", "precompute_ref_log_probs": True},
        WITH_NULL,
        {"student": 1, "teacher": 1},
    ),
    "null rows, weighting": ({"use_weighting": True}, WITH_NULL, {"student": 1, "reference": 1}),
    "ld_alpha": ({"ld_alpha": 0.5}, LABELS, {"student": 1, "reference": 1}),
    "moving dual": (
        {"dual_learning_rate": 0.5, "preference_nll_target": 0.1},
        WITH_NULL,
        {"student": 1, "reference": 1},
    ),
    "adapter": (LORA, LABELS, {"student": 2}),  # once with its adapter, once without it as the reference
}
"""Settings, labels, and the forwards of each model for a micro-batch."""


def labelled(pairs: list[dict], labels: list) -> Dataset:
    return Dataset.from_list(
        [{**row, "preference": p, "teacher_side": s} for row, (p, s) in zip(pairs, labels, strict=False)]
    )


def count_forwards(trainer) -> Counter:
    """Counts from now on, by hooks, how often each model's backbone runs."""
    counts: Counter = Counter()
    teacher = getattr(trainer, "teacher", None)
    models = {"student": trainer.model, "reference": trainer.ref_model, "teacher": teacher and teacher.model}
    for name, model in models.items():
        if model is not None:
            backbone = next(module for module in model.modules() if isinstance(module, LlamaModel))
            backbone.register_forward_pre_hook(lambda *_, name=name: counts.update([name]))
    return counts


@pytest.mark.parametrize("case", COSTS)
def test_forwards_of_one_optimizer_step(case, tiny_dir, teacher_dir, pairs, settings):
    options, labels, expected = COSTS[case]
    more = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1} | options
    if more.get("imitation") == "token":
        more["teacher_model_name_or_path"] = teacher_dir
    peft_config = more.pop("peft_config", None)
    trainer = PbKDTrainer(
        model=tiny_dir,
        args=PbKDConfig(**{**settings, "dual_init": 1.0, **more}),
        train_dataset=labelled(pairs, labels),
        peft_config=peft_config,
    )
    counts = count_forwards(trainer)
    trainer.train()
    assert trainer.state.global_step == 1
    assert counts == {name: 2 * count for name, count in expected.items()}  # two micro-batches


def test_dpo_takes_as_many(tiny_dir, pairs, settings):
    trainer = DPOTrainer(
        model=tiny_dir,
        args=DPOConfig(**{**settings, "max_steps": 1}),
        train_dataset=Dataset.from_list(pairs),
    )
    counts = count_forwards(trainer)
    trainer.train()
    assert counts == {"student": 1, "reference": 1}


def test_an_evaluation_takes_one_of_each_a_batch(tiny_dir, teacher_dir, pairs, settings):
    more = {"per_device_eval_batch_size": 2, "imitation": "token", "teacher_model_name_or_path": teacher_dir}
    args = PbKDConfig(**settings, **more, dual_init=1.0)
    rows = labelled(pairs, WITH_NULL)
    trainer = PbKDTrainer(model=tiny_dir, args=args, train_dataset=rows, eval_dataset=rows)
    counts = count_forwards(trainer)
    trainer.evaluate()
    assert counts == {"student": 2, "reference": 2, "teacher": 2}
