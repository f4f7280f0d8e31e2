"""The reward model of `OnlinePbKDTrainer`: what it starts from, how it reads a row, and what is told of it."""

import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, OPTConfig, OPTForCausalLM

from tests.conftest import make_model, make_tokenizer
from tests.trainers.online_cases import PAIRS, ROWS, Teacher, digits, equal, make, unchecked, weights_of
from trl_kd import OnlinePbKDConfig
from trl_kd.rewards.reward_model import RewardModel, from_student
from trl_kd.trainers.online_pbkd.learner import WarmUpFailed
from trl_kd.trainers.online_pbkd.loading import load_reward_model
from trl_kd.trainers.online_pbkd.pool import PairPool
from trl_kd.trainers.online_pbkd.watch import HackingWatch


CHAT = [
    {"prompt": [{"role": "user", "content": row["prompt"]}], "completion": [{"role": "assistant", "content": "7"}]}
    for row in ROWS
]


# ---- What it starts from -------------------------------------------------------------------------------------------------


def starts_from(reward: RewardModel, student) -> bool:
    """With the weights of the student and a head that is zero."""
    return equal(weights_of(reward.model.model), weights_of(student.model)) and not reward.heads.mle.weight.any()


@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["embed_tokens"]}])
def test_with_adapters_it_starts_from_the_student(settings, more):
    """Which is in memory alone."""
    student, tokenizer = make_model(seed=5), make_tokenizer()
    adapters = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **more)
    trainer = make(
        student, settings, processing_class=tokenizer, peft_config=adapters, preference_function=digits, beta=0.0
    )
    assert starts_from(trainer.learner.model, make_model(seed=5))


def test_of_a_quantised_student_it_is_loaded_as_the_student_was(tiny_dir, tmp_path):
    student = AutoModelForCausalLM.from_pretrained(tiny_dir)
    student.is_quantized, student.config.quantization_config = True, None
    init = {"attn_implementation": "eager", "device_map": "auto"}
    args = OnlinePbKDConfig(str(tmp_path), use_cpu=True, bf16=False, rm_lora_r=0, model_init_kwargs=init)
    reward = load_reward_model(None, make_tokenizer(), student, args)
    assert starts_from(reward, student)
    assert reward.model.config._attn_implementation == "eager"


# ---- Its tokenizer -------------------------------------------------------------------------------------------------------


@pytest.fixture
def reward_dir(tmp_path):
    """A reward model whose tokenizer has no chat template."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    from_student(make_model(seed=3)).save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    return str(tmp_path / "reward")


def test_a_tokenizer_is_checked_before_weights_load(tiny_dir, settings, reward_dir, tmp_path, monkeypatch):
    bare = str(tmp_path / "bare")
    from_student(make_model()).save_pretrained(bare)
    in_memory = from_student(make_model())
    monkeypatch.setattr("trl.RLOOTrainer.__init__", None)
    last = "last in `reward_processing_classes`, one more than there are reward functions"
    for reward_model, rows, message in (
        (reward_dir, CHAT, f"train dataset holds messages, .*/reward', has no chat template: .*{last}"),
        (bare, ROWS, f"The tokenizer of `reward_model`, '.*bare', cannot be loaded: give it {last}"),
        (in_memory, ROWS, f"`reward_model` is a model of no checkpoint, .* unknown: give it {last}"),
    ):
        with pytest.raises(ValueError, match=message):
            make(tiny_dir, settings, rows, preference_function=digits, reward_model=reward_model)
    with pytest.raises(OSError, match=r"`reward_model` is './nowhere': no such folder\.$"):
        make(tiny_dir, settings, preference_function=digits, reward_model="./nowhere")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="`reward_model` is .*adapter', an adapter: merge it"):
        make(tiny_dir, settings, preference_function=digits, reward_model=str(tmp_path / "adapter"))


def test_a_language_models_checkpoint(tiny_dir, settings):
    """Such as the student's own: the same as without one."""
    trained = []
    for source in (tiny_dir, None):
        parts = {"preference_function": digits, "teacher": Teacher(), "reward_model": source}
        trainer = make(tiny_dir, settings, **parts, max_steps=2)
        assert starts_from(trainer.learner.model, trainer.model)
        trainer.train()
        trained.append(weights_of(trainer.learner.model))
    assert equal(*trained)


def test_a_head_that_was_trained_stays(reward_dir, tiny_dir, settings):
    """Whatever the configuration calls the model."""
    model = AutoModelForSequenceClassification.from_pretrained(reward_dir)
    torch.nn.init.ones_(model.score.weight)
    model.save_pretrained(reward_dir)
    path = Path(reward_dir, "config.json")
    path.write_text(path.read_text().replace("LlamaForSequenceClassification", "LlamaForCausalLM"))
    trainer = make(tiny_dir, settings, preference_function=digits, teacher=Teacher(), reward_model=reward_dir)
    assert (trainer.learner.model.heads.mle.weight == 1).all()


def test_a_classifier_without_its_head_is_refused(reward_dir, tiny_dir, settings):
    """A language model's checkpoint has none, but one that calls itself a classifier has lost what it has learnt."""
    path = Path(reward_dir, "model.safetensors")
    weights = load_file(path)
    weights["v_head.weight"] = weights.pop("score.weight")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"without its head: there is no `score.weight` .* but v_head.weight\. Give"):
        make(tiny_dir, settings, preference_function=digits, reward_model=reward_dir)


@pytest.mark.parametrize("functions", [[], [lambda completions, **columns: [0.0] * len(completions)]])
def test_a_tokenizer_may_be_given(tiny_dir, settings, reward_dir, functions):
    tokenizer = make_tokenizer()
    trainer = make(
        tiny_dir,
        settings,
        CHAT,
        preference_function=digits,
        reward_model=reward_dir,
        reward_funcs=functions,
        reward_processing_classes=[*[None] * len(functions), tokenizer],
        max_steps=1,
    )
    assert trainer.learner.tokenizer is tokenizer
    trainer.train()


# ---- How it reads a row --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [0, 1])
def test_a_row_is_read_at_its_last_token(pad):
    """The end token too, be it the padding or not."""
    student = make_model()
    reward = RewardModel(from_student(student), bound=5.0, lora_r=0, pad_token_id=pad)
    torch.nn.init.normal_(reward.heads.mle.weight)
    rows = [[3, 4, 5, 1], [3, 4, 5], [6, 7, 8, 9, 10, 1]]
    found = reward(rows)[:, 0]
    for row, value in zip(rows, found, strict=True):
        feature = student.model(torch.tensor([row])).last_hidden_state[0, -1]
        expected = 5 * torch.tanh(reward.heads.mle(feature)[0] / 5)
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    assert abs(found[0] - found[1]) > 1e-3


def make_opt(dropout: float) -> OPTForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=20, num_attention_heads=2, dropout=dropout, **sizes))


@pytest.mark.parametrize("student", [make_model(attention_dropout=0.5), make_opt(0.5)], ids=["Llama", "OPT"])
def test_gradient_checkpointing_recomputes_without_dropout(student):
    model = from_student(student)
    model.gradient_checkpointing_enable()
    reward = RewardModel(model, bound=5.0, lora_r=0, pad_token_id=0)
    torch.nn.init.normal_(reward.heads.mle.weight)
    attentions = [module for name, module in model.named_modules() if name.endswith("self_attn")]
    forwards = []
    for module in attentions:
        module.register_forward_hook(lambda *args: forwards.append(1))
    first, second = reward([[3, 4, 5]]), reward([[3, 4, 5]])
    assert torch.equal(first, second)
    assert len(forwards) == 4
    second.sum().backward()
    assert len(forwards) == 6


def test_in_bfloat16_the_backbone_alone(tiny_dir, settings):
    trainer = make(tiny_dir, settings, preference_function=digits, bf16=True, max_steps=1)
    reward, dtypes = trainer.learner.model, {}
    layers = {"backbone": reward.model.model.layers[0].self_attn.q_proj, "head": reward.heads.adversary}
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda _, args, output, name=name: dtypes.setdefault(name, set()).add(output.dtype)
        )
    trainer.train()
    assert dtypes == {"backbone": {torch.bfloat16}, "head": {torch.float32}}
    assert {p.dtype for p in reward.parameters()} == {torch.float32}


# ---- What is told --------------------------------------------------------------------------------------------------------

MANY = [{"prompt": f"{i}+{j}=", "chosen": "777", "rejected": "1"} for i in range(10) for j in range(10)]


def test_the_accuracy_on_held_out_pairs_is_logged(tiny_dir, settings):
    trainer = make(tiny_dir, settings, pairs=MANY, rm_held_out=0.3, logging_steps=2, max_steps=4)
    trainer.train()
    accuracies = [log.get("pbkd/rm_held_out_accuracy") for log in trainer.state.log_history]
    assert len(accuracies) == 3
    assert accuracies[1:] == [trainer.learner.held_out_accuracy(), None]  # nothing more at the end of the training


def test_a_discriminator_holds_nothing_out(tiny_dir, settings):
    """It learns from all prompts: an accuracy would be of what it has seen."""
    options = {"adversary": "discriminator", "rm_held_out": 0.5, "max_steps": 1, "eval_rows": ROWS}
    trainer = make(tiny_dir, settings, preference_function=digits, teacher=Teacher(), **options)
    trainer.train()
    trainer.evaluate()
    assert trainer.learner.pool.strict
    assert not [name for entry in trainer.state.log_history for name in entry if "held_out" in name]
    trainer.create_model_card()
    card = Path(settings["output_dir"], "README.md").read_text(encoding="utf-8")
    assert f"there were {len(trainer.learner.pool)} preference pairs." in card


def test_the_newest_pairs_are_those_held_out():
    pool = PairPool(0.5, 0)
    pool.add([{"prompt": str(i), "chosen": "1", "rejected": "2", "preference": 1.0} for i in range(1500)])
    held = [i for i, row in enumerate(pool.rows) if pool.holds_out(row["prompt"])]
    assert len(held) > 600
    assert pool.held_out == held[-500:]
    assert not set(held) & set(pool.train)


def test_a_warm_up_that_cannot_succeed_ends(tiny_dir, settings, monkeypatch):
    """After its last prompt, or after as many steps as are allowed."""
    unchecked(monkeypatch)
    answered, more = "all prompts have been answered", "Give more prompts or pairs"
    for allowed, epochs, done, message, fix in (
        (1000, 1, 2, answered, more),
        (1000, 3, 6, answered, more),
        (1, 1, 1, "`rm_warmup_steps` = 1", "Raise `rm_warmup_steps` or the batch"),
    ):
        trainer = make(
            tiny_dir,
            settings,
            teacher=Teacher(),
            preference_function=digits,
            rm_warmup_accuracy=0.9,
            rm_held_out=0.3,
            rm_warmup_steps=allowed,
            rm_warmup_epochs=epochs,
        )
        steps = []
        trainer.learner.step = lambda *args, steps=steps, **kwargs: steps.append(1)
        with pytest.raises(WarmUpFailed, match=f"After {message} there are .*{fix}"):
            trainer.train()
        assert len(steps) == done


def test_each_evaluation_dataset_is_watched_by_itself(tiny_dir, settings):
    data = Dataset.from_list(ROWS[:4])
    trainer = make(tiny_dir, settings, eval_rows=data, preference_function=digits)
    trainer.eval_dataset = {"a": data, "b": data}
    trainer.evaluate()
    trainer.predict(data)
    assert {name: len(looks) for name, looks in trainer._watch.history.items()} == {"eval_a": 1, "eval_b": 1}
    assert not trainer._metrics["eval"]


def test_datasets_are_not_compared_with_each_other(caplog):
    watch = HackingWatch()
    with caplog.at_level(logging.WARNING):
        for reward in range(3):
            watch.look("eval_a", reward, 1 - 0.2 * reward)
            watch.look("eval_b", reward + 0.5, 0.9 - 0.2 * reward)
    assert not caplog.records


def test_a_resumed_run_warns_no_second_time(tiny_dir, settings):
    settings |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    first, second = (make(tiny_dir, settings, preference_function=digits, pairs=PAIRS) for _ in range(2))
    first._watch.look("eval", 1.0, 0.5)
    first._watch.warned = True
    first.train()
    second.train(resume_from_checkpoint=True)
    assert second._watch.warned
    assert second._watch.history == {"eval": [(1.0, 0.5)]}


def test_another_share_held_out_is_refused_on_resume(tiny_dir, settings, caplog):
    """Or pairs that have been learnt from would tell how well it has learnt."""
    settings |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make(tiny_dir, settings, pairs=PAIRS, rm_held_out=0.2).train()
    with pytest.raises(
        ValueError, match=r"`rm_held_out` was 0.2 in the checkpoint and is now 0.5: .*`rm_held_out=0.2`"
    ):
        make(tiny_dir, settings, pairs=PAIRS, rm_held_out=0.5).train(resume_from_checkpoint=True)
    with caplog.at_level(logging.WARNING):
        other = {"adversary": "mle", "reward_bound": 4.0}
        make(tiny_dir, settings, pairs=PAIRS, rm_held_out=0.2, **other).train(resume_from_checkpoint=True)
    assert "`adversary` was 'pbkd' in the checkpoint and is now 'mle'" in caplog.text
    assert "`reward_bound` was 5.0 in the checkpoint and is now 4.0" in caplog.text
