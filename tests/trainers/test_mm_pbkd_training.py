"""Whole trainings with `MMPbKDTrainer`: checkpoints, adapters, quantisation, tools, the card."""

import json
import logging
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.conftest import make_tokenizer
from tests.trainers.mm_cases import PAIRS, PROMPTS, ROWS, Recording, equal, logs_of, make, weights_of
from trl_kd import MMPbKDConfig
from trl_kd.losses.tiles import Projection


LORA = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": "gaussian"}


# ---- Checkpoints ----------------------------------------------------------------------------------------------------

RESUMED = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 3,
    "lr_scheduler_type": "cosine",
    "lmbda": 0.5,
    "pairs": PAIRS,
    "q_warmup_steps": 2,
    "eval_rows": ROWS[:4],
    "eval_strategy": "steps",
    "eval_steps": 2,
}
CASES = {
    "linear": {},
    "mlp, accumulation, two steps of Q": {
        "q_head": "mlp",
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "q_steps": 2,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_resume_is_bit_equal(case, tiny_dir, teacher_dir, settings):
    options = {**RESUMED, **CASES[case]}
    rows = [*ROWS[:6], *PROMPTS[6:]]  # the teacher is asked for the last two; in an epoch there are two steps
    whole = make(tiny_dir, teacher_dir, settings, rows, **options)
    whole.train()
    checkpoint = Path(settings["output_dir"], "checkpoint-3")
    steps_of_q = 3 * options.get("q_steps", 1)
    dual = json.loads((checkpoint / "pbkd_dual.json").read_text())
    assert dual["history"] == whole.dual.history[:steps_of_q]
    state = json.loads((checkpoint / "q_state.json").read_text())
    assert state == {"warmed_up": True, "pairs_seen": (2 + steps_of_q) * 4}

    torch.manual_seed(999)
    resumed = make(tiny_dir, teacher_dir, {**settings, "output_dir": settings["output_dir"] + "-2"}, rows, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.completions == whole.completions[3:]
    assert equal(weights_of(resumed.model), weights_of(whole.model))
    assert equal(weights_of(resumed.adversary.q), weights_of(whole.adversary.q))
    assert resumed.dual.state_dict() == whole.dual.state_dict()
    assert resumed.adversary.pairs.seen == whole.adversary.pairs.seen
    for ours, theirs in (
        (resumed.optimizer, whole.optimizer),
        (resumed.adversary.optimizer, whole.adversary.optimizer),
    ):
        assert len(ours.state) == len(theirs.state) > 0
        for a, b in zip(ours.state.values(), theirs.state.values(), strict=True):
            assert all(torch.equal(a[name], b[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    logs = [[e for e in t.state.log_history[:-1] if e["step"] > 3] for t in (whole, resumed)]
    assert len(logs[0]) == 5
    for a, b in zip(*logs, strict=True):
        times = {name for name in a if name.endswith(("step_time", "runtime", "per_second"))}
        assert {name: a[name] for name in a.keys() - times} == {name: b[name] for name in b.keys() - times}


@pytest.fixture
def checkpoint(tiny_dir, teacher_dir, settings) -> str:
    trainer = make(tiny_dir, teacher_dir, settings, pairs=PAIRS, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    return str(Path(settings["output_dir"], "checkpoint-1"))


def test_a_checkpoint_of_another_q_is_refused(checkpoint, tiny_dir, teacher_dir, settings):
    for options in ({"pairs": PAIRS, "q_head": "mlp"}, {"pairs": PAIRS, "lmbda": 0.5}, {"pairs": None}):
        trainer = make(tiny_dir, teacher_dir, settings, **options)
        with pytest.raises(
            ValueError, match=r"The checkpoint's Q has other layers than `q_head` = '(linear|mlp)' gives"
        ):
            trainer.train(resume_from_checkpoint=checkpoint)


def test_a_checkpoint_without_q_starts_it_anew_and_says_so(checkpoint, tiny_dir, teacher_dir, settings, caplog):
    for name in ("q_state.json", "q_function.safetensors", "q_optimizer.pt", "pbkd_dual.json"):
        Path(checkpoint, name).unlink()
    trainer = make(tiny_dir, teacher_dir, settings, pairs=PAIRS, max_steps=2)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=checkpoint)
    assert "No q_state.json in the checkpoint: Q starts anew." in caplog.text
    assert "No pbkd_dual.json in the checkpoint: λ starts again at dual_init=5.0" in caplog.text
    assert len(trainer.dual.history) == 1


def test_a_run_without_moments_has_no_q_to_save(tiny_dir, teacher_dir, settings):
    trainer = make(tiny_dir, teacher_dir, settings, moment_coef=0.0, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    assert trainer.adversary is None
    names = {path.name for path in Path(settings["output_dir"], "checkpoint-1").iterdir()}
    assert not any(name.startswith("q_") for name in names)
    assert "model.safetensors" in names
    assert "mmpbkd/kl" in logs_of(trainer)[0]
    assert "mmpbkd/q_abs_mean" not in logs_of(trainer)[0]
    make(tiny_dir, teacher_dir, settings, moment_coef=0.0).train(
        resume_from_checkpoint=str(Path(settings["output_dir"], "checkpoint-1"))
    )


# ---- Students and teachers of other kinds ---------------------------------------------------------------------------


def test_lora_student(tiny_dir, teacher_dir, settings):
    options = {"pairs": PAIRS, "lmbda": 0.5, "q_head": "adapter", "save_strategy": "steps", "save_steps": 2}
    trainer = make(tiny_dir, teacher_dir, settings, peft=LoraConfig(**LORA), max_steps=4, **options)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    folder = Path(settings["output_dir"], "checkpoint-2")
    assert {"adapter_model.safetensors", "q_function.safetensors"} <= {path.name for path in folder.iterdir()}
    other = {**settings, "output_dir": settings["output_dir"] + "-2"}
    resumed = make(tiny_dir, teacher_dir, other, peft=LoraConfig(**LORA), max_steps=4, **options)
    resumed.train(resume_from_checkpoint=str(folder))
    assert equal(weights_of(resumed.model), weights_of(trainer.model))
    assert equal(weights_of(resumed.adversary.q), weights_of(trainer.adversary.q))


@pytest.mark.parametrize("bits", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_a_quantised_teacher(bits, tiny_dir, teacher_dir, settings):
    """Its distribution is nearly the whole teacher's; it answers where the data does not."""
    pytest.importorskip("bitsandbytes")
    kl = []
    for kwargs in (None, bits):
        options = {"pairs": PAIRS, "lmbda": 0.5, "max_steps": 2, "teacher_model_init_kwargs": kwargs}
        trainer = make(tiny_dir, teacher_dir, settings, [*ROWS[:4], *PROMPTS[4:]], **options)
        assert getattr(trainer.teacher_model, "is_quantized", False) == (kwargs is not None)
        trainer.train()
        kl.append(logs_of(trainer)[0]["mmpbkd/kl"])
    assert kl[1] != kl[0]
    assert kl[1] == pytest.approx(kl[0], rel=0.3)


def test_qlora_student(tiny_dir, teacher_dir, settings, monkeypatch):
    """Which has answered in an evaluation: on some CPUs bitsandbytes then packs layers, and they learn no more."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    trainer = Recording(
        model=tiny_dir,
        teacher_model=teacher_dir,
        args=MMPbKDConfig(**{**settings, "lmbda": 0.5, "max_completion_length": 6, "q_warmup_steps": 2}),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:4]),
        preference_dataset=Dataset.from_list(PAIRS),
        peft_config=LoraConfig(**LORA),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
    )
    assert trainer.model.get_base_model().is_loaded_in_4bit
    trainer.evaluate()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert all(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)
    assert logs_of(trainer)[-1]["mmpbkd/q_abs_mean"] > 0


def test_bf16_is_a_matter_of_generation_where_weights_are_in_float32(tiny_dir, teacher_dir, settings):
    """As in TRL: the dtype of weights decides, in the states, in the pairs and for Q."""
    found = []
    for bf16 in (False, True):
        options = {"bf16": bf16, "pairs": PAIRS, "lmbda": 0.0, "q_warmup_steps": 2, "q_steps": 2}
        trainer = make(tiny_dir, teacher_dir, settings, **options)
        trainer.train()
        found.append(weights_of(trainer.model) + weights_of(trainer.adversary.q))
    assert {weight.dtype for weight in found[1]} == {torch.float32}
    assert equal(*found)


def test_a_student_and_a_teacher_in_bf16(tiny_dir, teacher_dir, settings):
    """Loaded so, without a copy in float32."""
    kwargs = {"model_init_kwargs": {"dtype": "bfloat16"}, "teacher_model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = make(tiny_dir, teacher_dir, settings, pairs=PAIRS, lmbda=0.5, bf16=True, **kwargs)
    trainer.train()
    assert {p.dtype for m in (trainer.model, trainer.teacher_model) for p in m.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(p).all() for p in trainer.adversary.q.parameters())
    assert logs_of(trainer)[-1]["mmpbkd/q_abs_mean"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_q_is_projected_in_the_students_dtype(dtype, tiny_dir, teacher_dir, settings, monkeypatch):
    found, load = set(), Projection.load
    monkeypatch.setattr(Projection, "load", lambda self, words: (found.add(self.rounded), load(self, words))[1])
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=dtype) for folder in (tiny_dir, teacher_dir)]
    options = {"pairs": PAIRS, "lmbda": 0.5, "q_warmup_steps": 1, "q_steps": 2}
    make(*models, settings, processing_class=make_tokenizer(), **options).train()
    assert found == {dtype}


def test_q_learns_in_bf16_what_it_learns_in_float32(tiny_dir, teacher_dir, settings):
    """From the same bf16 student: but for the rounding of its features."""

    def gradients(rounded: bool) -> torch.Tensor:
        models = [AutoModelForCausalLM.from_pretrained(folder).bfloat16() for folder in (tiny_dir, teacher_dir)]
        options = {"pairs": PAIRS, "lmbda": 0.5, "max_steps": 1, "q_steps": 2, "pair_batch_size": 16}
        trainer = make(*models, settings, processing_class=make_tokenizer(), **options)
        q, seen = trainer.adversary.q, []
        with torch.no_grad():
            q.outputs.normal_(generator=torch.Generator().manual_seed(0))
        if not rounded:
            q.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(), *inputs[1:]))
        trainer.adversary.optimizer = torch.optim.SGD(q.parameters(), lr=0.0)
        trainer.adversary.optimizer.register_step_pre_hook(lambda *_: seen.append(q.outputs.grad.clone()))
        trainer.train()
        return torch.stack(seen)

    expected = gradients(rounded=False)
    assert 0 < (gradients(rounded=True) - expected).norm() < 0.01 * expected.norm()


HALF = {"model_init_kwargs": {"dtype": "float16"}, "teacher_model_init_kwargs": {"dtype": "float16"}}


def test_the_loss_in_fp16_is_finite(tiny_dir, teacher_dir, settings):
    """Where the sum of all hidden states is not."""
    trainer = make(tiny_dir, teacher_dir, settings, lmbda=0.5, max_steps=1, learning_rate=0.0, **HALF)
    norm, overflows = trainer.model.model.norm, []
    norm.register_forward_hook(lambda module, inputs, hidden: hidden + 3e4)
    norm.register_forward_hook(lambda module, inputs, hidden: overflows.append(bool(hidden.sum().isinf())))
    with torch.no_grad():  # so that the shift changes no logit
        trainer.model.lm_head.weight.zero_()
    trainer.train()
    assert any(overflows)
    assert logs_of(trainer)[0]["loss"] == pytest.approx(logs_of(trainer)[0]["mmpbkd/kl"], rel=1e-3)


def test_a_step_without_a_token_in_fp16_has_a_loss_of_zero(tiny_dir, teacher_dir, settings):
    """Where the sum of the output layer is infinite; what tools have cut short may have no state."""

    class Nothing(Recording):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            return output | {"completion_mask": torch.zeros_like(output["completion_mask"])}

    args = {**settings, "lmbda": 0.5, "max_completion_length": 6, "q_warmup_steps": 0, "max_steps": 1, **HALF}
    args["logging_nan_inf_filter"] = False  # which would log zero for no number
    data = {"train_dataset": Dataset.from_list(ROWS), "preference_dataset": Dataset.from_list(PAIRS)}
    trainer = Nothing(tiny_dir, teacher_dir, args=MMPbKDConfig(**args), **data)
    with torch.no_grad():
        trainer.model.lm_head.weight.add_(100.0)
    assert trainer.model.lm_head.weight.sum().isinf()
    before = weights_of(trainer.model)
    trainer.train()
    assert logs_of(trainer)[0]["loss"] == 0
    assert equal(weights_of(trainer.model), before)
    assert logs_of(trainer)[0]["mmpbkd/preference_nll"] > 0  # Q has learnt from the pairs
    assert trainer.adversary.q.outputs.any()


def test_the_teacher_stays_as_it_is(tiny_dir, teacher_dir, settings):
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir)
    before = weights_of(teacher)
    trainer = make(tiny_dir, teacher, settings, PROMPTS, pairs=PAIRS, lmbda=0.5, q_warmup_steps=2)
    trainer.train()
    assert equal(weights_of(teacher), before)
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not teacher.training


# ---- What is left behind --------------------------------------------------------------------------------------------


def test_model_card(tiny_dir, teacher_dir, settings):
    options = {"pairs": PAIRS, "lmbda": 0.5, "eval_rows": ROWS[:4], "eval_strategy": "steps", "eval_steps": 3}
    trainer = make(tiny_dir, teacher_dir, settings, **options, q_head="mlp")
    trainer.train()
    trainer.create_model_card(dataset_name="org/prompts")
    card = ModelCard.load(Path(settings["output_dir"], "README.md"))
    assert {"trl", "distillation", "trl-kd", "mm-pbkd", "knowledge-distillation"} <= set(card.data.tags)
    evaluation = next(e for e in trainer.state.log_history if "eval_loss" in e)
    for text in (
        f"Teacher: {Path(teacher_dir).name}, by its distribution at each token.",
        "20 preference pairs held the Q-function.",
        "| `lmbda` | 0.5 |",
        "| `q_head` | mlp |",
        f"| λ (dual variable), last value | {trainer.dual.value:.6g} |",
        "| ζ (radius of the confidence set) | 0.05 |",
        "| optimizer steps | 3 |",
        f"| eval_loss | {evaluation['eval_loss']:.6g} |",
        f"| eval_mmpbkd/kl | {evaluation['eval_mmpbkd/kl']:.6g} |",
        "Online Knowledge Distillation with Reward Guidance",
        "@article{jia2025online",
        "- trl-kd: ",
    ):
        assert text in card.text, text
    assert str(Path(teacher_dir).parent) not in card.text  # names, not this machine's folders
    trainer.card_results = {"exact match": 0.75}
    trainer.create_model_card()
    assert "| exact match | 0.75 |" in Path(settings["output_dir"], "README.md").read_text()


def test_model_card_without_preferences(tiny_dir, teacher_dir, settings):
    trainer = make(tiny_dir, teacher_dir, settings)
    trainer.create_model_card()
    card = Path(settings["output_dir"], "README.md").read_text()
    assert "No preferences: moment matching alone." in card
    assert "No evaluation was run in this training." in card
    assert "imitation_radius" not in card


def test_model_card_of_pairs_that_weigh_completions_alone(tiny_dir, teacher_dir, settings):
    options = {"pairs": PAIRS, "lmbda": 0.0, "moment_coef": 0.0, "imitation_weight": 1.0, "imitation_radius": 0.1}
    make(tiny_dir, teacher_dir, settings, **options).create_model_card()
    card = Path(settings["output_dir"], "README.md").read_text()
    assert "20 preference pairs weighed the teacher's completions" in card
    assert "held the Q-function" not in card
    assert "| `imitation_radius` | 0.1 |" in card


def test_the_hub_token_is_written_nowhere(tiny_dir, teacher_dir, settings):
    token = "hf_" + "x" * 34
    options = {"pairs": PAIRS, "hub_token": token, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make(tiny_dir, teacher_dir, settings, **options)
    trainer.train()
    trainer.save_model()
    files = [path for path in Path(settings["output_dir"]).rglob("*") if path.is_file()]
    assert {"training_args.bin", "q_function.safetensors"} <= {path.name for path in files}
    assert not any(token.encode() in path.read_bytes() for path in files)
    assert trainer.args.hub_token == token
    assert AutoModelForCausalLM.from_pretrained(settings["output_dir"]).num_parameters() > 0
    shutil.rmtree(settings["output_dir"])


@pytest.mark.parametrize(
    ("options", "uses"),
    [({"moment_coef": 0.0}, 2), ({}, 2), ({"q_steps": 2}, 4), ({"q_steps": 2, "pairs": PAIRS}, 8)],
    ids=["no Q", "Q", "two steps of Q", "two steps of Q with pairs"],
)
def test_output_layers_are_made_whole_wherever_they_are_used(
    options, uses, tiny_dir, teacher_dir, settings, monkeypatch
):
    """Forwards and backwards, for weights that are split (ZeRO-3)."""
    entered = []
    monkeypatch.setattr(Recording, "_whole_heads", lambda self: nullcontext(entered.append(1)))
    make(tiny_dir, teacher_dir, settings, max_steps=1, **options).train()
    assert len(entered) == uses
