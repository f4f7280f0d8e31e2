"""Bad settings and data of `MMPbKDTrainer`: a sentence that names the field, its value and the fix, before weights load."""

import math
from dataclasses import dataclass

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM
from trl import DistillationConfig

from tests.conftest import make_tokenizer, save_tiny
from tests.trainers.mm_cases import PAIRS, PROMPTS, ROWS, make
from trl_kd import MMPbKDConfig, MMPbKDTrainer, PbKDConfig


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were about to load")

    monkeypatch.setattr("trl.DistillationTrainer.__init__", refuse)


IMITATION = {"imitation_radius": 0.1, "imitation_q": 0.5, "imitation_q_warmup": 0.0, "imitation_min_score": 1.0}
SETTINGS = [
    ({"lmbda": 1.5}, "`lmbda` is 1.5: .* between 0 and 1"),
    ({"lmbda": -0.1}, "`lmbda` is -0.1"),
    ({"lmbda": math.nan}, "`lmbda` is nan"),
    ({"lmbda": "half"}, "`lmbda` is 'half'"),
    ({"beta": 1.2}, "`beta` is 1.2"),
    ({"off_policy_beta": -1}, "`off_policy_beta` is -1"),
    ({"kl_coef": -1.0}, "`kl_coef` is -1.0: .* at least 0"),
    ({"moment_coef": math.inf}, "`moment_coef` is inf"),
    ({"kl_coef": 0, "moment_coef": 0}, "are all 0: there is nothing to learn"),
    ({"imitation_weight": -0.1}, "`imitation_weight` is -0.1"),
    ({"imitation_weight": 0.1}, "`imitation_weight` is 0.1 but `lmbda` is 1"),
    *(
        ({name: value}, f"`{name}` is {value}, which only the imitation term reads, and `imitation_weight` is 0")
        for name, value in IMITATION.items()
    ),
    ({"imitation_weight": 1.0, "lmbda": 0.0, "imitation_q": 1.5}, "`imitation_q` is 1.5: .* between 0 and 1"),
    ({"state_gradient": True, "lmbda": 0.0}, "`state_gradient` is on but `lmbda` is 0"),
    ({"q_head": "tree"}, "`q_head` is 'tree': use one of 'linear', 'mlp', 'adapter'"),
    ({"q_bound": 0.0}, "`q_bound` is 0.0: .* above 0"),
    ({"q_learning_rate": -1e-3}, "`q_learning_rate` is -0.001"),
    ({"q_steps": 0}, "`q_steps` is 0: .* at least 1"),
    ({"q_warmup_steps": -1}, "`q_warmup_steps` is -1"),
    ({"dual_init": -1.0}, "`dual_init` is -1.0"),
    ({"dual_init": 51.0}, "`dual_init` is 51.0 but λ is capped at `dual_max` = 50.0"),
    ({"dual_learning_rate": -0.1}, "`dual_learning_rate` is -0.1"),
    ({"dual_max": -1.0}, "`dual_max` is -1.0"),
    ({"confidence_radius": "wide"}, "`confidence_radius` is 'wide'"),
    ({"confidence_radius": -0.1}, "`confidence_radius` is -0.1"),
    ({"confidence_radius": None}, "`confidence_radius` is None: give a number .* or 'theory'; 0 is the max"),
    ({"top_p": 0.0}, "`top_p` is 0.0: .* above 0 and at most 1"),
    ({"top_p": 1.5}, "`top_p` is 1.5"),
    ({"confidence_constant": 0.0}, "`confidence_constant` is 0.0"),
    ({"confidence_delta": 1.0}, "`confidence_delta` is 1.0"),
    ({"pair_max_length": 1}, "`pair_max_length` is 1: .* at least 2"),
    ({"pair_batch_size": 0}, "`pair_batch_size` is 0"),
    ({"pair_held_out": 1.0}, "`pair_held_out` is 1.0: .* below 1"),
    ({"temperature": 0.0}, "`temperature` is 0.0: .* above 0"),
    ({"max_completion_length": 0}, "`max_completion_length` is 0"),
    ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` is 0"),
    ({"learning_rate": -1.0}, "`learning_rate` is -1.0"),
    ({"q_steps": 1.5}, "`q_steps` is 1.5: .* whole number, at least 1"),
    ({"q_warmup_steps": 2.5}, "`q_warmup_steps` is 2.5: .* whole number, at least 0"),
    ({"pair_batch_size": 4.0}, "`pair_batch_size` is 4.0: .* whole number"),
    ({"pair_max_length": 64.5}, "`pair_max_length` is 64.5: .* whole number, at least 2"),
    ({"state_gradient": "no"}, "`state_gradient` is 'no': .* True or False"),
    (
        {"model_init_kwargs": "{bad"},
        "`model_init_kwargs` must be a JSON object, and is none: Expecting property name .*, at character 2",
    ),
    (
        {"teacher_model_init_kwargs": "[1]"},
        "`teacher_model_init_kwargs` must be a JSON object, and is none: it is a list",
    ),
]


@pytest.mark.parametrize(("options", "message"), SETTINGS)
def test_bad_settings(options, message, settings):
    with pytest.raises(ValueError, match=message):
        MMPbKDConfig(**{**settings, **options})


@pytest.mark.parametrize(("text", "value"), [("theory", "theory"), ("0.02", 0.02), ("1e-3", 1e-3)])
def test_radius_from_the_command_line(text, value, settings):
    assert MMPbKDConfig(**settings, confidence_radius=text).confidence_radius == value


def test_defaults_are_distillations(settings):
    ours, theirs = MMPbKDConfig(**settings), DistillationConfig(**settings)
    for name in ("beta", "temperature", "top_p", "top_k", "max_completion_length", "max_steps"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert (ours.dual_init, ours.dual_learning_rate, ours.confidence_radius) == (5.0, 0.1, 0.05)  # METHOD's for §5


def test_fields_of_a_users_own_config_are_not_lost_without_a_word(tiny_dir, teacher_dir, settings):
    @dataclass
    class MyConfig(DistillationConfig):
        mine: int = 1

    with pytest.raises(ValueError, match="is a MyConfig, whose mine `MMPbKDConfig` does not have"):
        MMPbKDTrainer(tiny_dir, teacher_dir, args=MyConfig(**settings), train_dataset=Dataset.from_list(ROWS))


def test_arguments_of_another_trainer_are_refused(tiny_dir, teacher_dir, settings):
    args = PbKDConfig(**settings)
    with pytest.raises(ValueError, match="class PbKDConfig: pass one of MMPbKDConfig, or of DistillationConfig"):
        MMPbKDTrainer(tiny_dir, teacher_dir, args=args, train_dataset=Dataset.from_list(ROWS))


# ---- The teacher ----------------------------------------------------------------------------------------------------


def test_the_teacher_is_given_once(tiny_dir, teacher_dir, settings):
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir)
    cases = [
        (None, {}, "There is no teacher: give `teacher_model`, or `args.teacher_model_name_or_path`"),
        (teacher_dir, {"teacher_model_name_or_path": tiny_dir}, "The teacher is given twice"),
        (teacher, {"teacher_model_name_or_path": tiny_dir}, "so is `teacher_model_name_or_path` = "),
        (teacher, {"teacher_model_init_kwargs": {"dtype": "float32"}}, "so is `teacher_model_init_kwargs` = "),
    ]
    for given, options, message in cases:
        with pytest.raises(ValueError, match=message):
            make(tiny_dir, given, settings, **options)
    with pytest.raises(ValueError, match="`teacher_model` and `model` are the same object"):
        make(teacher, teacher, settings)


def test_a_student_that_is_nowhere_is_named(teacher_dir, settings):
    with pytest.raises(OSError, match="`model` is 'nosuch/model', which cannot be loaded: We"):
        make("nosuch/model", teacher_dir, settings)


def test_a_teacher_that_is_nowhere_is_named(tiny_dir, settings):
    """The library's own sentence, of a lost connection, names none."""
    with pytest.raises(OSError, match="`teacher_model_name_or_path` is 'nosuch/model', which cannot be loaded: We"):
        make(tiny_dir, "nosuch/model", settings)


def test_a_teacher_that_is_an_adapter_is_refused(tiny_dir, settings, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    message = "`teacher_model_name_or_path` is '.*', an adapter: merge it into its base model .* or pass .*`PeftModel`"
    with pytest.raises(ValueError, match=message):
        make(tiny_dir, str(tmp_path), settings)


# ---- Data -----------------------------------------------------------------------------------------------------------

USER, ANSWER = [{"role": "user", "content": "1+1="}], [{"role": "assistant", "content": "2"}]
PLAIN = Dataset.from_list(ROWS)
IMAGES = [{"prompt": USER, "image": 1}]
SPLITS = DatasetDict({"train": PLAIN, "test": PLAIN})

DATA = {
    "no rows": ({"rows": PLAIN.select([])}, "The train dataset is empty"),
    "no prompts": (
        {"rows": [{"text": "x", "answer": "y"}]},
        "The train dataset has no column 'prompt'; it has answer, text",
    ),
    "no prompts to evaluate": ({"eval_rows": [{"text": "x"}]}, "The eval dataset has no column 'prompt'"),
    "an empty set among several": ({"eval_rows": {"a": PLAIN, "b": PLAIN.select([])}}, "The eval/b dataset is empty"),
    "no prompts in a stream": (
        {"rows": Dataset.from_list([{"text": "x"}]).to_iterable_dataset()},
        "The train dataset has no column 'prompt'",
    ),
    "a later prompt that is empty": (
        {"rows": [*ROWS[:5], {"prompt": "", "completion": "2"}]},
        "Row 5 of the train dataset: `prompt` is ''",
    ),
    "no messages": ({"rows": [{"prompt": USER}, {"prompt": []}]}, r"Row 1 of the train dataset: `prompt` is \[\]"),
    "fewer rows than a step": (
        {"rows": PROMPTS[:3]},
        "The train dataset has 3 prompts, and one step takes 4 .*`per_device_train_batch_size` = 4, 1 processes",
    ),
    "a null prompt to evaluate": (
        {"eval_rows": [PROMPTS[0], {"prompt": None}]},
        "Row 1 of the eval dataset: `prompt` is None",
    ),
    "splits to train on": (
        {"rows": SPLITS},
        r"The train dataset is a DatasetDict, not a `datasets.Dataset`: .* dataset\['train'\]",
    ),
    "splits of pairs": (
        {"pairs": DatasetDict({"train": Dataset.from_list(PAIRS)})},
        r"`preference_dataset` is a DatasetDict; .* preference_dataset\['train'\]",
    ),
    "a later completion of another format": (
        {"rows": [{"prompt": "1", "completion": None}, {"prompt": "1", "completion": ANSWER}], "lmbda": 0.5},
        "Row 1 of the train dataset: `prompt` is text but `completion` is not",
    ),
    "text to messages": (
        {"rows": [{"prompt": USER, "completion": "2"}], "lmbda": 0.5},
        "`prompt` is messages but `completion` is not",
    ),
    "messages to text": (
        {"rows": [{"prompt": "1+1=", "completion": ANSWER}], "lmbda": 0.5},
        "`prompt` is text but `completion` is not",
    ),
    "no messages in a completion": (
        {"rows": [{"prompt": USER, "completion": ANSWER}, {"prompt": USER, "completion": []}], "lmbda": 0.5},
        r"Row 1 of the train dataset: `completion` is \[\] \(list\); it must be text or a list of messages",
    ),
    "a completion that is a number": (
        {"rows": [{"prompt": "1+1=", "completion": 2}], "lmbda": 0.5},
        r"Row 0 of the train dataset: `completion` is 2 \(int\); .* A column of numbers must be cast to text",
    ),
    "prompts that are numbers": (
        {"rows": [{"prompt": 3}] * 4},
        r"Row 0 of the train dataset: `prompt` is 3 \(int\); .* A column of numbers must be cast to text",
    ),
    "prompts that are lists of texts": (
        {"eval_rows": [{"prompt": ["1+1=", "2"]}]},
        r"Row 0 of the eval dataset: `prompt` is \['1\+1=', '2'\] \(list\); it must be text or a list of messages",
    ),
    "messages without a role": (
        {"rows": [{"prompt": USER}, {"prompt": [{"role": None, "content": "1"}]}] * 2},
        "Row 1 of the train dataset: `prompt` is .*a list of messages with a role",
    ),
    "messages without content": (
        {"rows": [{"prompt": USER}, {"prompt": [*USER, {"role": "assistant", "content": None}]}] * 2},
        "Row 1 of the train dataset: `prompt`: message 1, of the assistant, has no `content`",
    ),
    "messages without any content": (
        {"rows": [{"prompt": [{"role": "user"}]}] * 4},
        "Row 0 of the train dataset: `prompt`: message 0, of the user, has no `content`",
    ),
    "pairs' messages without content": (
        {"pairs": [{"prompt": [{"role": "user"}], "chosen": ANSWER, "rejected": USER}]},
        "Row 0 of the preference dataset: `prompt`: message 0, of the user, has no `content`",
    ),
    "pairs of equal responses": (
        {"pairs": [{**row, "rejected": row["chosen"]} for row in PAIRS]},
        "no row with a known `preference` between two different responses",
    ),
    "images off-policy": ({"rows": IMAGES, "lmbda": 0.5}, "`lmbda` is 0.5, but images are supported on-policy only"),
    "images to evaluate": ({"eval_rows": IMAGES, "lmbda": 0.0}, "`lmbda` is 0.0, but images are supported"),
    "tools off-policy": (
        {"tools": [math.sqrt], "lmbda": 0.5},
        "`lmbda` is 0.5, but tools are supported on-policy only",
    ),
    "a stream of pairs": (
        {"pairs": Dataset.from_list(PAIRS).to_iterable_dataset()},
        "`preference_dataset` is a IterableDataset; give a `datasets.Dataset`",
    ),
    "no scores": (
        {"lmbda": 0.0, "imitation_weight": 1.0, "imitation_min_score": 0.5, "pairs": PAIRS},
        "`imitation_min_score` is 0.5, but there is no `preference_dataset` with a column `score_chosen`",
    ),
    "no pairs to count": (
        {"lmbda": 0.0, "imitation_weight": 1.0, "imitation_radius": "theory"},
        "`imitation_radius` is 'theory', .* no preference is known",
    ),
    "no moments for the pairs": ({"pairs": PAIRS, "moment_coef": 0.0}, "`moment_coef` is 0, .* `preference_dataset`"),
    "pairs without a rejected response": (
        {"pairs": [{"prompt": "1", "chosen": "2"}]},
        "The preference dataset lacks the column 'rejected'",
    ),
    "no pairs": ({"pairs": Dataset.from_list(PAIRS).select([])}, "The preference dataset is empty"),
    "images in pairs": ({"pairs": [{**PAIRS[0], "image": 1}]}, "`preference_dataset` has images"),
    "no known preference": (
        {"pairs": [{**row, "preference": p} for row, p in zip(PAIRS, [None, math.nan], strict=False)]},
        "no row with a known `preference`",
    ),
    "a preference above 1": (
        {"pairs": [{**row, "preference": 1.0 + i} for i, row in enumerate(PAIRS)]},
        r"Row 1 of the preference dataset: `preference` is 2.0; .*\[0, 1\]",
    ),
    "a null response": (
        {"pairs": [*PAIRS[:3], {**PAIRS[3], "chosen": None}]},
        "Row 3 of the preference dataset: `chosen` is null",
    ),
    "messages for pairs": (
        {"pairs": [{"prompt": USER, "chosen": ANSWER, "rejected": [{**ANSWER[0], "content": "3"}]}]},
        "`preference_dataset` is messages, but the prompts of the train dataset are text: give both as text or both as",
    ),
    "no room for a response": ({"pairs": PAIRS, "pair_max_length": 3}, "`pair_max_length` = 3"),
}


@pytest.mark.parametrize("case", DATA)
def test_bad_data(case, tiny_dir, teacher_dir, settings):
    options, message = DATA[case]
    with pytest.raises(ValueError, match=message):
        make(tiny_dir, teacher_dir, settings, **options)


@pytest.mark.parametrize(
    ("tokenizer", "rows", "message"),
    [
        ({"chat_template": None}, [{"prompt": USER}] * 4, "no chat template"),
        ({"eos_token": None}, PROMPTS, "no end-of-sequence token"),
    ],
)
def test_a_tokenizer_that_cannot_render_the_data(tokenizer, rows, message, tmp_path, settings):
    bare = make_tokenizer()
    for name, value in tokenizer.items():
        setattr(bare, name, value)
    folder = save_tiny(tmp_path / "bare", tokenizer=bare)
    with pytest.raises(ValueError, match=message):
        make(folder, folder, settings, rows)


def test_good_input_passes_the_checks(tiny_dir, teacher_dir, settings):
    """So that the tests above fail for what they say."""
    rows = [{"prompt": USER, "completion": ANSWER}, {"prompt": USER, "completion": None}] * 2
    called = [{"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}]
    tools = {"rows": [{"prompt": [*USER, *called, {"role": "tool", "name": "f", "content": "2"}]}] * 4}
    for options in (
        {"rows": rows, "lmbda": 0.5},
        {"rows": IMAGES * 4},
        {"pairs": PAIRS},
        {"tools": [math.sqrt]},
        tools,
    ):
        with pytest.raises(AssertionError, match="weights were about to load"):
            make(tiny_dir, teacher_dir, settings, **options)
