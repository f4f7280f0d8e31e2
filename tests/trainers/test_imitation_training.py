"""Whole trainings without the preference term: what a step runs, checkpoints, adapters, streams, images, evaluations."""

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig
from transformers import BitsAndBytesConfig, LlamaModel
from trl import DPOConfig
from trl.trainer import dpo_trainer
from trl.trainer.dpo_trainer import create_model_from_path

from tests.trainers.test_pbkd_metrics import COEFFICIENT, experts_dir  # noqa: F401
from tests.trainers.test_pbkd_vision import dataset as image_dataset
from tests.trainers.test_pbkd_vision import llava_dir  # noqa: F401
from trl_kd import PbKDConfig, PbKDTrainer
from trl_kd.trainers.pbkd.config import settle_config
from trl_kd.trainers.pbkd.imitation_step import NoReference


OFF = {"dual_init": 0.0}
LABELS = [(1.0, "chosen"), (0.3, "rejected"), (None, "rejected"), (0.5, "chosen"), (0.0, "chosen"), (0.8, None)]


@pytest.fixture
def rows(pairs) -> list[dict]:
    labels = [*LABELS, (1.0, "chosen"), (0.9, "chosen")]
    return [{**row, "preference": p, "teacher_side": s} for row, (p, s) in zip(pairs, labels, strict=True)]


def make(folder, rows, settings, peft_config=None, quantization_config=None, stream=False, **more) -> PbKDTrainer:
    train = Dataset.from_list(rows)
    given = {name: more.pop(name) for name in ("eval_dataset", "compute_metrics", "teacher_model") if name in more}
    return PbKDTrainer(
        model=folder,
        args=PbKDConfig(**{**settings, **OFF, **more}),
        train_dataset=train.to_iterable_dataset() if stream else train,
        peft_config=peft_config,
        quantization_config=quantization_config,
        **given,
    )


def logs_of(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def weights_of(trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


# ---- What a step runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("imitation", ["sequence", "token"])
@pytest.mark.parametrize("adapter", [None, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])], ids=["full", "lora"])
def test_one_forward_of_the_teachers_texts_alone(
    adapter, imitation, tiny_dir, teacher_dir, rows, settings, monkeypatch
):
    """No reference model is loaded, held or run, nor an adapter's start; the batch has one row a text."""
    loaded = []
    monkeypatch.setattr(
        dpo_trainer, "create_model_from_path", lambda *a, **k: loaded.append(a) or create_model_from_path(*a, **k)
    )
    more = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2}
    if imitation == "token":
        more |= {"imitation": "token", "teacher_model_name_or_path": teacher_dir}
    trainer = make(tiny_dir, rows, settings, adapter, **more)
    assert loaded == [(tiny_dir,)]
    assert trainer.ref_model is None
    if adapter is not None:
        assert list(trainer.model.peft_config) == ["default"]
    runs: Counter = Counter()
    models = {"student": trainer.model, **({"teacher": trainer.teacher.model} if trainer.teacher else {})}
    for name, model in models.items():
        backbone = next(module for module in model.modules() if isinstance(module, LlamaModel))
        backbone.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: runs.update([(name, len(kwargs["input_ids"]))]), with_kwargs=True
        )
    trainer.train()
    # six rows teach: 2 × 2 rows, and then the two that are left
    assert runs == {(name, 2): 3 for name in models}
    assert not any(isinstance(model, NoReference) for model in trainer.accelerator._models)


def test_nothing_of_the_preference_term_is_logged(tiny_dir, rows, settings):
    trainer = make(tiny_dir, rows, settings, eval_dataset=Dataset.from_list(rows))
    trainer.train()
    trainer.evaluate()
    for entry in trainer.state.log_history:
        assert not [name for name in entry if "rewards/" in name or "preference" in name or "dual" in name], entry
    expected = {f"pbkd/{name}" for name in ("imitation", "teacher_nll", "advantage", "rows_used", "q")}
    assert expected <= set(logs_of(trainer)[0])
    assert {f"eval_{name}" for name in expected} <= set(trainer.state.log_history[-1])
    first = logs_of(trainer)[0]
    assert first["pbkd/rows_used"] == 4
    assert first["loss"] == pytest.approx(first["pbkd/imitation"], rel=1e-5)


# ---- Checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sequence", "token", "accumulation", "stream"])
def test_resume_is_bit_equal_in_the_middle_of_the_warm_up(mode, tiny_dir, teacher_dir, rows, settings):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "imitation_q_warmup": 0.8}
    if mode == "token":
        options |= {"imitation": "token", "teacher_model_name_or_path": teacher_dir}
    elif mode == "accumulation":
        options |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    elif mode == "stream":
        options |= {
            "stream": True,
            "max_steps": 6,
            "per_device_train_batch_size": 1,
        }  # one epoch, as far as they resume
    whole = make(tiny_dir, rows, settings, **options)
    whole.train()
    checkpoint = Path(settings["output_dir"], "checkpoint-3")
    state = json.loads((checkpoint / "pbkd_imitation.json").read_text())
    assert state["mean_advantage"] == whole.mean_advantage
    resumed = make(tiny_dir, rows, {**settings, "output_dir": settings["output_dir"] + "-2"}, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for one, other in zip(weights_of(whole), weights_of(resumed), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(logs_of(whole), logs_of(resumed), strict=True):
        assert {**one, "num_tokens": 0} == {**other, "num_tokens": 0}  # TRL's count of tokens starts again
    if mode != "token":
        rising = [entry["pbkd/q"] for entry in logs_of(resumed)]
        steps = options["max_steps"]
        assert rising == pytest.approx([0.5 * min(1, step / (0.8 * steps)) for step in range(steps)])


def test_checkpoints_of_the_other_loss_are_refused(tiny_dir, rows, settings):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make(tiny_dir, rows, settings, **options).train()
    make(tiny_dir, rows, {**settings, "output_dir": settings["output_dir"] + "-2"}, **options, dual_init=0.5).train()
    without, with_term = (str(Path(settings["output_dir"] + end, "checkpoint-1")) for end in ("", "-2"))
    with pytest.raises(ValueError, match="was saved with the preference term, λ = 0.5, and that is off in this run"):
        make(tiny_dir, rows, settings, **options).train(resume_from_checkpoint=with_term)
    with pytest.raises(ValueError, match="was saved without the preference term, and this run has it"):
        make(tiny_dir, rows, settings, **options, dual_init=0.5).train(resume_from_checkpoint=without)


def test_changed_settings_are_told_on_resume_and_the_mean_advantage_is_that_of_the_weights(
    tiny_dir, rows, settings, caplog
):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    first = make(tiny_dir, rows, settings, **options)
    first.train()
    resumed = make(tiny_dir, rows, settings, **options, imitation_radius=0.3)
    assert resumed.mean_advantage != first.mean_advantage
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=str(Path(settings["output_dir"], "checkpoint-1")))
    assert "`imitation_radius` was 0.02 in the checkpoint and is now 0.3" in caplog.text
    assert resumed.mean_advantage != first.mean_advantage  # that of the weights as they are now
    again = make(tiny_dir, rows, settings, **options, imitation_weight=0.5)
    again.mean_advantage = 0.1
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=str(Path(settings["output_dir"], "checkpoint-1")))
    assert "`imitation_weight` was 1.0 in the checkpoint and is now 0.5" in caplog.text
    assert again.mean_advantage == first.mean_advantage


# ---- Students, data and evaluations --------------------------------------------------------------------------------------


ADAPTERS = {
    "lora": LoraConfig(target_modules=["q_proj", "v_proj"]),
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}
ALL_ROWS = {"max_steps": 8, "per_device_train_batch_size": 8}


@pytest.mark.parametrize("imitation", ["sequence", "token"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_learn_and_the_rest_stays(imitation, adapter, tiny_dir, teacher_dir, rows, settings):
    named = {"teacher_model_name_or_path": teacher_dir} if imitation == "token" else {}
    trainer = make(tiny_dir, rows, settings, ADAPTERS[adapter], **ALL_ROWS, imitation=imitation, **named)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    logged = [entry["pbkd/teacher_nll" if imitation == "sequence" else "pbkd/imitation"] for entry in logs_of(trainer)]
    assert logged[-1] < logged[0]


def test_virtual_tokens_in_front_change_no_position(tiny_dir, rows, settings):
    trainer = make(tiny_dir, rows, settings, ADAPTERS["prompt tuning"], imitation_radius="inf", imitation_q=0.0)
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    with torch.no_grad():
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    length, labels = batch["input_ids"].size(1), batch["labels"][:, 1:]
    logps = logits[:, -length:][:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    assert float(loss) == pytest.approx(-float(logps[labels != -100].mean()), rel=1e-4)


def test_qlora_student(tiny_dir, rows, settings):
    pytest.importorskip("bitsandbytes")
    quantized = BitsAndBytesConfig(load_in_4bit=True)
    trainer = make(tiny_dir, rows, settings, ADAPTERS["lora"], quantized, **ALL_ROWS)
    trainer.train()
    assert logs_of(trainer)[-1]["pbkd/teacher_nll"] < logs_of(trainer)[0]["pbkd/teacher_nll"]


def test_a_plain_stream_and_its_dataset_train_alike(tiny_dir, rows, settings):
    """But for ā, which a stream does not know."""
    exact = {
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "learning_rate": 0.1,
        "max_steps": 1,
    }
    exact["per_device_train_batch_size"] = 6
    streamed, whole = make(tiny_dir, rows, settings, stream=True, **exact), make(tiny_dir, rows, settings, **exact)
    for trainer in (streamed, whole):
        trainer.train()
    assert logs_of(streamed)[0]["loss"] == pytest.approx(whole.mean_advantage * logs_of(whole)[0]["loss"], rel=1e-5)


def test_the_routers_loss_is_added_once(experts_dir, rows, settings):  # noqa: F811
    losses = {}
    for coefficient in (0.0, COEFFICIENT):
        more = {"router_aux_loss_coef": coefficient, "per_device_train_batch_size": 3, "max_steps": 1}
        trainer = make(experts_dir, rows, settings, **more, gradient_accumulation_steps=2)
        trainer.train()
        losses[coefficient] = logs_of(trainer)[0]
    added = COEFFICIENT * losses[COEFFICIENT]["aux_loss"]
    assert losses[COEFFICIENT]["loss"] == pytest.approx(losses[0.0]["loss"] + added, rel=1e-5)


@pytest.mark.parametrize("other", [1, 3])
def test_an_evaluation_does_not_depend_on_its_batches(other, tiny_dir, rows, settings):
    found = []
    for size in (len(rows), other):
        sets = {"all": Dataset.from_list(rows), "some": Dataset.from_list(rows[2:6])}
        trainer = make(tiny_dir, rows, {**settings, "per_device_eval_batch_size": size}, eval_dataset=sets)
        trainer.train()
        found.append(trainer.evaluate() | trainer.evaluate(Dataset.from_list(rows), metric_key_prefix="given"))
        logged = trainer.state.log_history[-1]
        found[-1] |= {name: value for name, value in logged.items() if "pbkd/" in name}
    names = ["eval_all_loss", "eval_some_loss", "given_loss", *(name for name in found[0] if "pbkd/" in name)]
    assert len(names) == 8
    assert [found[0][name] for name in names] == pytest.approx([found[1][name] for name in names], rel=1e-5)
    assert found[0]["given_loss"] == pytest.approx(found[0]["eval_all_loss"], rel=1e-6)
    assert found[0]["eval_all_loss"] == pytest.approx(found[0]["eval_pbkd/imitation"], rel=1e-6)


def test_compute_metrics_sees_one_row_a_text(tiny_dir, rows, settings):
    seen = []

    def compute_metrics(prediction):
        seen.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {}

    trainer = make(tiny_dir, rows, settings, eval_dataset=Dataset.from_list(rows), compute_metrics=compute_metrics)
    trainer.evaluate()
    ((predictions, labels),) = seen
    assert (predictions[:2], predictions[0]) == (labels, len(rows))


def test_a_plain_dpo_config_is_taken(tiny_dir, rows, settings):
    trainer = PbKDTrainer(model=tiny_dir, args=DPOConfig(**settings), train_dataset=Dataset.from_list(rows))
    assert trainer.imitates_alone


def test_the_default_rate_of_a_plain_dpo_config_is_not_silently_another(tmp_path, caplog):
    other = DPOConfig(output_dir=str(tmp_path), use_cpu=True, learning_rate=3e-6)
    with caplog.at_level(logging.WARNING):
        assert settle_config(other, "model").learning_rate == 3e-6
        assert "learning_rate" not in caplog.text
        assert settle_config(DPOConfig(output_dir=str(tmp_path), use_cpu=True), "model").learning_rate == 2e-5
    assert "`learning_rate` is 2e-05, not the 1e-06 of `DPOConfig`" in caplog.text


def test_an_evaluation_without_scores_goes_by_its_labels(tiny_dir, rows, settings):
    scored = [{**row, "score_chosen": 1.0, "score_rejected": 1.0} for row in rows]
    trainer = make(tiny_dir, scored, settings, eval_dataset=Dataset.from_list(rows), imitation_min_score=0.5)
    alone = make(tiny_dir, rows, settings, eval_dataset=Dataset.from_list(rows))
    found, expected = (one.evaluate()["eval_loss"] * one.mean_advantage for one in (trainer, alone))
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("stream", [False, True])
def test_an_evaluation_in_which_nothing_teaches_is_said(stream, tiny_dir, rows, settings, caplog):
    lost = Dataset.from_list([{**row, "preference": 0.0, "teacher_side": "chosen"} for row in rows])
    with caplog.at_level(logging.WARNING):
        make(tiny_dir, rows, settings, eval_dataset=lost.to_iterable_dataset() if stream else lost)
    assert "its loss is 0." in caplog.text


@pytest.mark.parametrize("stream", [False, True])
def test_images_are_imitated_too(stream, llava_dir, pairs, settings):  # noqa: F811
    labels = {
        "preference": [None, 1.0, 0.5, 0.0, 1.0, 1.0, 1.0, 0.7],
        "teacher_side": ["chosen", "rejected", None, "chosen", "chosen", "chosen", "rejected", "chosen"],
        "chosen_finish_reason": ["length", *["stop"] * 7],
        "rejected_finish_reason": ["stop"] * 8,
    }
    rows = image_dataset(pairs, **labels)
    args = PbKDConfig(**{**settings, **OFF, "per_device_train_batch_size": 8, "max_steps": 2}, imitation_radius=0.05)
    args.train_sampling_strategy = "sequential"
    train = rows.to_iterable_dataset() if stream else rows
    trainer = PbKDTrainer(model=llava_dir, args=args, train_dataset=train, eval_dataset=rows)
    batch = next(iter(trainer.get_train_dataloader()))
    tokenizer = trainer._tokenizer
    learnt = [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    # The first was cut off; of the others those that the teacher wins or nobody compared
    kept = [0, 4, 5, 7]
    assert learnt == [pairs[0]["chosen"], *(f"{pairs[i]['chosen']}<eos>" for i in kept[1:])]
    assert batch["advantage"].tolist() == pytest.approx([row["imitation_advantage"] for row in trainer.train_dataset])
    if not stream:
        lengths = [len(pairs[i]["chosen"]) + (i > 0) for i in kept]
        expected = sum(a * n for a, n in zip(batch["advantage"].tolist(), lengths, strict=True)) / sum(lengths)
        assert trainer.mean_advantage == pytest.approx(expected)
    trainer.train()
    assert logs_of(trainer)[1]["pbkd/teacher_nll"] < logs_of(trainer)[0]["pbkd/teacher_nll"]
    metrics = trainer.evaluate()
    given = trainer.evaluate(image_dataset(pairs, **labels))
    assert given["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)


def test_pairs_of_one_text_and_one_image_are_merged(llava_dir, pairs, settings):  # noqa: F811
    rows = image_dataset([pairs[0], {**pairs[0], "rejected": "8"}])  # the images differ
    again = image_dataset([{**pairs[0], "rejected": "9"}])  # the first image
    data = Dataset.from_list([*rows.to_list(), *again.to_list()]).cast(rows.features)
    trainer = PbKDTrainer(model=llava_dir, args=PbKDConfig(**settings, **OFF), train_dataset=data)
    assert trainer.text_counts["train"].told == "3 of 3 rows teach (2 different texts)"


@pytest.mark.parametrize(("q", "warmup", "said"), [(1.0, 0.0, 1), (1.0, 0.5, 1), (0.2, 0.5, 0), (0.0, 0.0, 0)])
def test_a_gradient_of_next_to_nothing_is_said_once(q, warmup, said, tiny_dir, rows, settings, caplog):
    """A random student finds every token unlikely, whenever q has risen."""
    options = {"imitation_q": q, "imitation_q_warmup": warmup, "max_steps": 30, "learning_rate": 0.0}
    with caplog.at_level(logging.WARNING):
        make(tiny_dir, rows, settings, **options).train()
    assert caplog.text.count("Over 10 steps the mean of π^q is 0.") == said
