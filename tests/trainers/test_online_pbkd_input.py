"""Bad settings, data and parts of `OnlinePbKDTrainer`: a sentence with field, value and fix, before weights load."""

import logging
import math

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, RLOOConfig

from tests.trainers.online_cases import PAIRS, PROMPTS, ROWS, Teacher, digits, make
from trl_kd import OnlinePbKDConfig, OnlinePbKDTrainer
from trl_kd.preferences.simple import LabelColumn


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were about to load")

    monkeypatch.setattr("trl.RLOOTrainer.__init__", refuse)


IMITATION = {"imitation_radius": 0.1, "imitation_q": 0.5, "imitation_q_warmup": 0.0, "imitation_min_score": 1.0}
SETTINGS = [
    ({"adversary": "gan"}, "`adversary` is 'gan': use one of 'pbkd', 'mle', 'discriminator', 'off'"),
    ({"imitation_weight": -0.1}, "`imitation_weight` is -0.1: .* at least 0"),
    *(
        ({name: value}, f"`{name}` is {value}, which only the imitation term reads, and `imitation_weight` is 0")
        for name, value in IMITATION.items()
    ),
    ({"imitation_weight": 1.0, "imitation_radius": "wide"}, "`imitation_radius` is 'wide'"),
    ({"imitation_weight": 1.0, "imitation_q": 1.5}, "`imitation_q` is 1.5: .* between 0 and 1"),
    (
        {"imitation_weight": 1.0, "imitation_radius": "theory", "adversary": "off", "reward_funcs": len},
        "`imitation_radius` is 'theory', which counts the pairs of D, and `adversary` is 'off'",
    ),
    ({"reward_bound": 0.0}, "`reward_bound` is 0.0: .* above 0"),
    ({"rm_lora_r": -1}, "`rm_lora_r` is -1: .* at least 0"),
    ({"rm_learning_rate": math.nan}, "`rm_learning_rate` is nan"),
    ({"rm_steps": 0}, "`rm_steps` is 0: .* at least 1"),
    ({"rm_batch_size": 0}, "`rm_batch_size` is 0: .* at least 1"),
    ({"rm_fresh_share": 1.5}, "`rm_fresh_share` is 1.5: .* between 0 and 1"),
    ({"rm_max_length": 1}, "`rm_max_length` is 1: .* at least 2"),
    ({"rm_held_out": 1.0}, "`rm_held_out` is 1.0: .* below 1"),
    ({"rm_held_out": 0.0, "rm_warmup_accuracy": 0.6}, "`rm_warmup_accuracy` is 0.6 but `rm_held_out` is 0"),
    ({"rm_warmup_accuracy": 2.0}, "`rm_warmup_accuracy` is 2.0"),
    ({"rm_warmup_steps": 0}, "`rm_warmup_steps` is 0"),
    ({"rm_warmup_epochs": 0}, "`rm_warmup_epochs` is 0"),
    ({"dual_init": 51.0}, "`dual_init` is 51.0 but λ is capped at `dual_max` = 50.0"),
    ({"dual_learning_rate": -1.0}, "`dual_learning_rate` is -1.0"),
    ({"confidence_radius": "wide"}, "`confidence_radius` is 'wide'"),
    ({"confidence_delta": 1.0}, "`confidence_delta` is 1.0"),
    ({"beta": -1.0}, "`beta` is -1.0"),
    ({"temperature": 0.0}, "`temperature` is 0.0"),
]


@pytest.mark.parametrize(("more", "message"), SETTINGS)
def test_bad_settings(tiny_dir, settings, more, message):
    with pytest.raises(ValueError, match=message):
        make(tiny_dir, settings, preference_function=digits, **more)


IMAGES = [{**row, "image": 1} for row in ROWS]
USER = [{"role": "user", "content": "1+1="}]
ASKED = [{"prompt": USER, "completion": "2"}] * 8
MESSAGES = [
    {"prompt": USER, **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}}
    for row in PAIRS
]
IN_PARTS = [
    {
        column: [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        for column, messages in row.items()
    }
    for row in MESSAGES
]
PARTS = {
    "nothing to climb": ({"adversary": "off"}, "`adversary` is 'off' and there are no `reward_funcs`"),
    "pairs for nobody": (
        {"adversary": "off", "reward_funcs": len, "pairs": PAIRS},
        "`preference_dataset` is given, but `adversary` is 'off'",
    ),
    "a reward model for nobody": (
        {"adversary": "off", "reward_funcs": len, "reward_model": "x"},
        "`reward_model` is given, but `adversary` is 'off'",
    ),
    "pairs for a discriminator": (
        {"adversary": "discriminator", "pairs": PAIRS},
        "`preference_dataset` is given, but `adversary` is 'discriminator'",
    ),
    "no preferences": ({}, "`adversary` is 'pbkd', which is held by preferences, and there are none"),
    "nobody who scores": (
        {"imitation_weight": 1.0, "imitation_min_score": 0.5, "preference_function": digits},
        "`imitation_min_score` is 0.5, but the `preference_function` compares answers, and scores none",
    ),
    "no preference function": (
        {"imitation_weight": 1.0, "imitation_min_score": 0.5, "adversary": "off", "reward_funcs": len},
        "`imitation_min_score` is 0.5, but the `preference_function` is none: give one that scores answers",
    ),
    "no teacher": (
        {"rows": PROMPTS, "preference_function": digits},
        "The train dataset has no column 'completion' .*`teacher_column`.*give a `teacher`",
    ),
    "no teacher to evaluate": (
        {"eval_rows": PROMPTS, "preference_function": digits},
        "The eval dataset has no column 'completion'",
    ),
    "few prompts": (
        {"rows": ROWS[:3], "preference_function": digits},
        "has 3 prompts, and one generation batch takes 4 .*`generation_batch_size` = 8, `num_generations` = 2",
    ),
    "no prompt": ({"rows": [{"text": "x"}], "preference_function": digits}, "no column 'prompt'"),
    "images": ({"rows": IMAGES, "preference_function": digits}, "has images, which the reward model"),
    "weights": (
        {"preference_function": digits, "reward_weights": [1.0, 1.0]},
        "`reward_weights` has 2 numbers, and there are 1 rewards",
    ),
    "few pairs that stay": (
        {"pairs": PAIRS, "rm_warmup_accuracy": 0.6},
        "`rm_held_out` is 0.1, which holds out . pairs that are no ties, and the warm-up needs 100 of them",
    ),
    "few held-out prompts": (
        {"preference_function": digits, "rm_warmup_accuracy": 0.6},
        "`rm_held_out` is 0.1, which holds out at most .* and the warm-up needs 100 of them",
    ),
    "labels of other answers": (
        {"preference_function": LabelColumn("label")},
        "`preference_function` reads the column 'label', whose labels belong to answers that are there already",
    ),
    "a stream of pairs": (
        {"pairs": Dataset.from_list(PAIRS).to_iterable_dataset()},
        "`preference_dataset` is a IterableDataset",
    ),
    "pairs without a rejected response": ({"pairs": [{"prompt": "1", "chosen": "2"}]}, "lacks the column 'rejected'"),
    "text for prompts and messages for pairs": (
        {"pairs": MESSAGES, "preference_function": digits},
        "`preference_dataset` is messages, but the prompts of the train dataset are text: give both as text",
    ),
    "messages for prompts and text for pairs": (
        {"rows": ASKED, "pairs": PAIRS},
        "`preference_dataset` is text, but the prompts of the train dataset are messages: give both as text",
    ),
    "contents in parts": (
        {"rows": ASKED, "pairs": IN_PARTS, "preference_function": digits},
        "The messages in the column 'prompt' of `preference_dataset` have a list of parts as `content`, and .* text: give",
    ),
    "answers in parts": (
        {"rows": ASKED, "pairs": [{**row, "prompt": USER} for row in IN_PARTS], "preference_function": digits},
        "The messages in the column 'chosen' of `preference_dataset` have a list of parts as `content`",
    ),
    "a preference that cannot be called": (
        {"preference_function": lambda prompts: [1.0]},
        "cannot be called",
    ),
}


@pytest.mark.parametrize("case", PARTS)
def test_bad_parts(tiny_dir, settings, case):
    options, message = PARTS[case]
    with pytest.raises(ValueError, match=message):
        make(tiny_dir, settings, **options)


def test_a_language_model_in_memory_is_no_reward_model(tiny_dir, settings):
    model = AutoModelForCausalLM.from_pretrained(tiny_dir)
    with pytest.raises(
        ValueError, match="`reward_model` is .*give a sequence-classification checkpoint with one label"
    ):
        make(tiny_dir, settings, preference_function=digits, reward_model=model)


def test_a_classifier_in_memory_is_known_by_its_class(tiny_dir, settings):
    """Its configuration is still that of the language model that it began as."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_dir, num_labels=1)
    assert model.config.architectures == ["LlamaForCausalLM"]
    with pytest.raises(AssertionError, match="weights were about to load"):
        make(tiny_dir, settings, preference_function=digits, reward_model=model)


def test_messages_without_a_template(tiny_dir, settings):
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    tokenizer.chat_template = None
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    with pytest.raises(
        ValueError, match="The train dataset holds messages, but the tokenizer of .* has no chat template"
    ):
        make(tiny_dir, settings, rows, teacher=Teacher(), preference_function=digits, processing_class=tokenizer)


def test_a_reward_model_that_is_nowhere_is_named(tiny_dir, settings):
    with pytest.raises(OSError, match="`reward_model` is 'nosuch/model', which cannot be loaded"):
        make(tiny_dir, settings, preference_function=digits, reward_model="nosuch/model")


def test_a_name_is_no_teacher(tiny_dir, settings):
    with pytest.raises(TypeError, match="`teacher` is the text 'gpt'"):
        make(tiny_dir, settings, teacher="gpt", preference_function=digits)


def test_another_trainers_settings(tiny_dir, settings):
    args = DPOConfig(**{name: value for name, value in settings.items() if name != "max_steps"})
    with pytest.raises(ValueError, match="class DPOConfig: pass one of OnlinePbKDConfig, or of RLOOConfig"):
        OnlinePbKDTrainer(tiny_dir, args=args, train_dataset=Dataset.from_list(ROWS), preference_function=digits)


def test_a_radius_that_does_nothing_is_said(settings, caplog):
    with caplog.at_level(logging.WARNING):
        OnlinePbKDConfig(**settings, num_generations=2, dual_learning_rate=0.0)
    assert "does nothing while λ is fixed" in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"preference_function": digits},
        {"rows": PROMPTS, "teacher": Teacher(), "preference_function": digits},
        {"pairs": PAIRS},
        {"rows": PROMPTS, "pairs": PAIRS, "adversary": "mle"},
        {"adversary": "discriminator"},
        {"rows": IMAGES, "adversary": "off", "reward_funcs": len},
    ],
)
def test_good_input_passes_the_checks(tiny_dir, settings, options):
    """So that the tests above fail for what they say."""
    with pytest.raises(AssertionError, match="weights were about to load"):
        make(tiny_dir, settings, **options)


@pytest.mark.parametrize(
    ("adversary", "beta", "imitation"), [("pbkd", 0.3, 4.0), ("mle", 0.3, 4.0), ("off", 0.05, 0.0)]
)
def test_defaults_of_an_adversary_and_without(adversary, beta, imitation, settings):
    """Without one they are RLOO's."""
    args = OnlinePbKDConfig(**settings, num_generations=2, adversary=adversary)
    assert (args.beta, args.imitation_weight, args.imitates) == (beta, imitation, imitation > 0)
    assert (args.imitation_radius, args.final_imitation_q, args.imitation_q_warmup) == (0.02, 0.5, 0.5)
    if adversary == "off":
        assert beta == RLOOConfig(**settings, num_generations=2).beta


def test_zero3_would_split_the_reward_model(tiny_dir, settings, monkeypatch):
    monkeypatch.setattr("trl_kd.trainers.online_pbkd.loading.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3, which splits every model.*use ZeRO-2"):
        make(tiny_dir, settings, preference_function=digits)
