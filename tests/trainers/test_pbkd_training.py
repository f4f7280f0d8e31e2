"""Whole trainings: λ, checkpoints, adapters, quantisation, the card."""

import json
import logging
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from trl_kd import PbKDConfig, PbKDTrainer
from trl_kd.trainers.common.config_checks import as_config


ON = {"dual_init": 1.0}
LABELS = [(1.0, "chosen"), (0.6, "chosen"), (None, "rejected"), (1.0, None), (0.5, "chosen"), (None, "chosen")]


@pytest.fixture
def rows(pairs) -> list[dict]:
    labels = [LABELS[i % len(LABELS)] for i in range(len(pairs))]
    return [{**row, "preference": p, "teacher_side": s} for row, (p, s) in zip(pairs, labels, strict=True)]


def make(folder, rows, settings, peft_config=None, quantization_config=None, model=None, **more) -> PbKDTrainer:
    return PbKDTrainer(
        model=folder if model is None else model,
        args=PbKDConfig(**{**settings, **ON, **more}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        peft_config=peft_config,
        quantization_config=quantization_config,
    )


MOVING = {"dual_learning_rate": 0.5, "preference_nll_target": 0.1, "confidence_radius": 0.05}


def test_a_moving_dual_follows_the_violation(tiny_dir, rows, settings):
    trainer = make(tiny_dir, rows, settings, **MOVING, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    trainer.train()
    dual = 1.0
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == len(trainer.dual.history) == 3  # once per optimizer step, not per micro-batch
    for entry, after in zip(logs, trainer.dual.history, strict=True):
        assert entry["pbkd/dual"] == pytest.approx(dual)
        assert entry["pbkd/violation"] == pytest.approx(entry["pbkd/preference_nll"] - 0.15, abs=1e-6)
        expected = entry["loss"] - dual * 0.15
        assert entry["pbkd/lagrangian"] == pytest.approx(expected, rel=1e-4)
        dual = dual + 0.5 * entry["pbkd/violation"]
        assert after == pytest.approx(dual, rel=1e-6)


def test_evaluation_does_not_move_the_dual(tiny_dir, rows, settings):
    trainer = make(tiny_dir, rows, settings, **MOVING)
    trainer.train()
    before = trainer.dual.state_dict()
    metrics = trainer.evaluate(Dataset.from_list(rows))
    assert trainer.dual.state_dict() == before
    assert {"eval_pbkd/imitation", "eval_pbkd/preference_nll", "eval_pbkd/dual"} <= set(trainer.state.log_history[-1])
    assert "eval_loss" in metrics


@pytest.mark.parametrize("other", [1, 3])
def test_an_evaluation_does_not_depend_on_its_batches(other, tiny_dir, rows, settings):
    """Nor does it with null rows, or rows without a teacher, unevenly spread over them."""
    rows = sorted(rows, key=lambda row: (row["preference"] is None, row["teacher_side"] is None))
    found = []
    for size in (len(rows), other):
        trainer = make(tiny_dir, rows, {**settings, "per_device_eval_batch_size": size})
        trainer.train()
        found.append(trainer.evaluate())
        logged = trainer.state.log_history[-1]
        found[-1] |= {name: value for name, value in logged.items() if "pbkd/" in name}
    names = [
        "eval_loss",
        *(f"eval_pbkd/{name}" for name in ("imitation", "preference_nll", "lagrangian", "violation")),
    ]
    assert [found[0][name] for name in names] == pytest.approx([found[1][name] for name in names], rel=1e-5)
    assert found[0]["eval_loss"] == pytest.approx(found[0]["eval_pbkd/lagrangian"], rel=1e-6)


def test_a_changed_dual_is_told_on_resume_and_stays_under_the_cap(tiny_dir, rows, settings, caplog):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make(tiny_dir, rows, settings, **options, dual_init=8.0).train()
    resumed = make(tiny_dir, rows, settings, **options, dual_init=2.0, dual_max=4.0)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=str(Path(settings["output_dir"], "checkpoint-1")))
    assert "λ's initial was 8.0 in the checkpoint and is now 2.0" in caplog.text
    assert "λ's maximum was 10.0 in the checkpoint and is now 4.0" in caplog.text
    assert resumed.dual.value == 4.0


def test_another_number_of_processes_is_told_on_resume(tiny_dir, rows, settings, caplog):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make(tiny_dir, rows, settings, **options).train()
    checkpoint = Path(settings["output_dir"], "checkpoint-1")
    with caplog.at_level(logging.WARNING):
        make(tiny_dir, rows, settings, **options).train(resume_from_checkpoint=str(checkpoint))
        assert "processes" not in caplog.text
        dual = json.loads((checkpoint / "pbkd_dual.json").read_text())
        assert dual["num_processes"] == 1
        (checkpoint / "pbkd_dual.json").write_text(json.dumps(dual | {"num_processes": 2}))
        make(tiny_dir, rows, settings, **options).train(resume_from_checkpoint=str(checkpoint))
    assert caplog.text.count("was saved by a run of 2 processes, and this run has 1. Its steps use") == 1


def test_a_dual_at_its_cap_is_reported_once(tiny_dir, pairs, settings, caplog):
    options = {**MOVING, "dual_max": 1.1, "max_steps": 120, "learning_rate": 0.0, "logging_steps": 60}
    trainer = make(tiny_dir, pairs, settings, **options)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.dual.value == 1.1
    assert caplog.text.count("has been at its cap, dual_max=1.1") == 1


@pytest.mark.parametrize("mode", ["sequence", "token", "accumulation"])
def test_resume_is_bit_equal(mode, tiny_dir, teacher_dir, rows, settings):
    options = {**MOVING, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}
    if mode == "token":
        options |= {"imitation": "token", "teacher_model_name_or_path": teacher_dir}
    elif mode == "accumulation":
        options |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    whole = make(tiny_dir, rows, settings, **options)
    whole.train()
    checkpoint = Path(settings["output_dir"], "checkpoint-3")
    state = json.loads((checkpoint / "pbkd_dual.json").read_text())
    assert state["history"] == whole.dual.history[:3]
    assert state["target"] == 0.1

    resumed = make(tiny_dir, rows, {**settings, "output_dir": settings["output_dir"] + "-2"}, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.dual.state_dict() == whole.dual.state_dict()
    for a, b in zip(whole.optimizer.state.values(), resumed.optimizer.state.values(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in ("exp_avg", "exp_avg_sq"))
    for a, b in zip(*(t.state.log_history[:-1] for t in (whole, resumed)), strict=True):
        # TRL's count of tokens starts again
        assert {**a, "num_tokens": 0} == {**b, "num_tokens": 0}


@pytest.mark.parametrize("imitation", ["sequence", "token"])
@pytest.mark.parametrize(
    "peft_config",
    [LoraConfig(target_modules=["q_proj", "v_proj"]), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")],
    ids=["lora", "prompt tuning"],
)
def test_adapters_learn_and_the_rest_stays(imitation, peft_config, tiny_dir, teacher_dir, rows, settings):
    named = {"teacher_model_name_or_path": teacher_dir} if imitation == "token" else {}
    trainer = make(tiny_dir, rows, settings, peft_config, max_steps=8, imitation=imitation, **named, dual_init=1e-12)
    trainer.evaluate()
    at_start = trainer.state.log_history[-1]["eval_pbkd/imitation"]
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    trainer.evaluate()
    assert trainer.state.log_history[-1]["eval_pbkd/imitation"] < at_start


def test_prompt_learning_scores_the_responses_themselves(tiny_dir, teacher_dir, rows, settings):
    """With virtual tokens in front, the imitation term still reads the positions of the teacher's response."""
    config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    named = {"imitation": "token", "teacher_model_name_or_path": teacher_dir, "imitation_radius": "inf"}
    trainer = make(tiny_dir, rows, settings, config, **named, dual_init=1e-12)
    batch = trainer.data_collator(list(trainer.train_dataset.select(range(2))))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    with torch.no_grad():
        length = batch["input_ids"].size(1)
        ours = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        theirs = trainer.teacher.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        log_pi = ours[:, -length:][:2, :-1].log_softmax(-1)
        log_mu = theirs[:2, :-1].log_softmax(-1)
        kl = ((log_mu.exp() * (log_mu - log_pi)).sum(-1) * batch["completion_mask"][:2, 1:]).sum()
        tokens = int(batch["completion_mask"][:2, 1:].sum())
    assert float(loss) == pytest.approx(float(kl) / tokens, rel=1e-4)


@pytest.mark.parametrize("bits", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_a_quantised_teacher_gives_its_distribution(bits, tiny_dir, teacher_dir, rows, settings):
    pytest.importorskip("bitsandbytes")
    options = {"imitation": "token", "teacher_model_name_or_path": teacher_dir, "max_steps": 2}
    trainer = make(tiny_dir, rows, settings, **options, teacher_model_init_kwargs=bits)
    assert trainer.teacher.model.is_quantized
    trainer.train()
    assert trainer.state.log_history[0]["pbkd/imitation"] > 0


@pytest.mark.parametrize("precompute", [False, True])
def test_qlora_student(precompute, tiny_dir, rows, settings, monkeypatch):
    """Which has answered in an evaluation: on some CPUs bitsandbytes then packs layers, and they learn no more."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    trainer = make(
        tiny_dir,
        rows,
        settings,
        LoraConfig(target_modules=["q_proj", "v_proj"]),
        BitsAndBytesConfig(load_in_4bit=True),
        max_steps=6,
        precompute_ref_log_probs=precompute,
    )
    trainer.evaluate()
    trainer.train()
    logs = [entry["loss"] for entry in trainer.state.log_history if "pbkd/imitation" in entry]
    assert len(logs) == 6
    assert trainer.model.is_loaded_in_4bit or trainer.model.get_base_model().is_loaded_in_4bit


def test_teacher_given_as_a_model(tiny_dir, teacher_dir, rows, settings):
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir)
    args = PbKDConfig(**settings, imitation="token")
    trainer = PbKDTrainer(model=tiny_dir, args=args, train_dataset=Dataset.from_list(rows), teacher_model=teacher)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    trainer.train()
    assert all(torch.equal(p, before[name]) and not p.requires_grad for name, p in teacher.named_parameters())
    with pytest.raises(ValueError, match="`teacher_model` is given but `imitation` is 'sequence'"):
        PbKDTrainer(
            model=tiny_dir, args=PbKDConfig(**settings), train_dataset=Dataset.from_list(rows), teacher_model=teacher
        )


def test_streams_with_third_texts(tiny_dir, pairs, settings):
    rows = [{**row, "teacher": "7" if i % 2 else row["rejected"]} for i, row in enumerate(pairs)]
    trainer = PbKDTrainer(
        model=tiny_dir,
        args=PbKDConfig(**settings, **ON),
        train_dataset=IterableDataset.from_generator(lambda: iter(rows)),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert sum(entry["pbkd/known_preferences"] for entry in logs) == 8  # of the twelve rows


def test_args_may_be_left_out():
    args = as_config(None, "org/student", PbKDConfig, "PbKD")
    assert args == PbKDConfig("student-PbKD")


def test_model_card(tiny_dir, teacher_dir, rows, settings):
    trainer = make(tiny_dir, rows, settings, imitation="token", teacher_model_name_or_path=teacher_dir, **MOVING)
    trainer.train()
    trainer.card_results = {"exact match, sampled": 0.75}
    trainer.create_model_card(dataset_name="org/pairs")
    card = ModelCard.load(Path(settings["output_dir"], "README.md"))
    assert {"trl", "dpo", "trl-kd", "pbkd", "knowledge-distillation"} <= set(card.data.tags)
    assert card.data.datasets == "org/pairs"
    for text in (
        "8 rows, of which 7 with a response of the teacher's",
        f"| λ (dual variable), last value | {trainer.dual.value:.6g} |",
        "| exact match, sampled | 0.75 |",
        "Online Knowledge Distillation with Reward Guidance",
        "@article{jia2025online",
        "- trl-kd: ",
        "| `dual_learning_rate` | 0.5 |",
    ):
        assert text in card.text, text
    assert str(Path(teacher_dir).parent) not in card.text  # names, not this machine's folders
    assert "None" not in card.text.split("## Distillation")[0]


def test_model_card_names_a_teacher_and_says_that_data_was_streamed(tiny_dir, pairs, settings):
    stream = IterableDataset.from_generator(lambda: iter(pairs))
    trainer = PbKDTrainer(model=tiny_dir, args=PbKDConfig(**settings), train_dataset=stream)
    trainer.card_teacher = "gpt-x"
    trainer.create_model_card()
    card = Path(settings["output_dir"], "README.md").read_text()
    for text in ("Teacher: gpt-x, known by", "The data was streamed", "- peft: "):
        assert text in card


def test_model_card_shows_the_last_evaluation_of_every_set(tiny_dir, pairs, settings):
    sets = {name: Dataset.from_list(pairs[:2]) for name in ("easy", "hard")}
    trainer = PbKDTrainer(
        model=tiny_dir,
        args=PbKDConfig(**settings, eval_strategy="steps", eval_steps=1),
        train_dataset=Dataset.from_list(pairs),
        eval_dataset=sets,
    )
    trainer.train()
    trainer.create_model_card()
    card = Path(settings["output_dir"], "README.md").read_text()
    for name in sets:
        last = [entry for entry in trainer.state.log_history if f"eval_{name}_loss" in entry][-1]
        assert f"| eval_{name}_loss | {last[f'eval_{name}_loss']:.6g} |" in card


def test_an_empty_evaluation_set_is_refused_by_a_sentence(tiny_dir, pairs, settings):
    trainer = make(tiny_dir, pairs, settings)
    with pytest.raises(ValueError, match="eval dataset is empty"):
        trainer.evaluate(Dataset.from_list(pairs).select([]))


def test_the_saved_student_loads(tiny_dir, rows, settings):
    trainer = make(tiny_dir, rows, settings)
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(settings["output_dir"])
    for a, b in zip(loaded.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert AutoTokenizer.from_pretrained(settings["output_dir"]).eos_token == "<eos>"


def test_push_to_hub_sends_weights_and_card(tiny_dir, rows, settings):
    token = "hf_" + "x" * 34
    with patch("transformers.trainer.hf_api") as hf_api:
        hf_api().create_repo.return_value.repo_id = "someone/student"
        hub = {"push_to_hub": True, "hub_model_id": "someone/student", "hub_token": token, "hub_strategy": "end"}
        trainer = make(tiny_dir, rows, settings, **hub)
        trainer.train()
        trainer.push_to_hub(dataset_name="someone/pairs")
    upload = hf_api().upload_folder.call_args.kwargs
    assert upload["repo_id"] == "someone/student"
    folder = Path(upload["folder_path"])
    assert {"model.safetensors", "README.md", "config.json", "tokenizer.json"} <= {p.name for p in folder.iterdir()}
    card = (folder / "README.md").read_text()
    assert "pbkd" in card
    assert not any(token in path.read_text(errors="ignore") for path in folder.rglob("*") if path.is_file())
