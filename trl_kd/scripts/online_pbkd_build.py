"""What `trl-kd online-pbkd` plays with: its arguments, and the teacher, preference function, rewards and data that they
name. Teacher and preference function are those of `trl-kd pairs`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import AutoConfig, AutoTokenizer
from trl import DatasetMixtureConfig, ModelConfig

from trl_kd.sampling.budget import BudgetExceeded
from trl_kd.sampling.server_errors import ServerError
from trl_kd.scripts.arguments import PreferenceScriptArguments
from trl_kd.scripts.checks import check_arguments, check_model_source, check_preference_dataset, read_model
from trl_kd.scripts.data import load_preferences, load_prompts
from trl_kd.scripts.errors import InputError, bad_input, one_line
from trl_kd.scripts.pairs_arguments import PairsArguments
from trl_kd.scripts.pairs_build import check_models, check_sampler, make_preference, make_sampler
from trl_kd.scripts.pairs_config import read_file
from trl_kd.trainers.online_pbkd.config import OnlinePbKDConfig


@dataclass
class OnlinePbKDScriptArguments(PreferenceScriptArguments):
    """
    Arguments of `trl-kd online-pbkd` beside those of its model and its trainer. `dataset_name` and its companions name the
    prompts.

    Parameters:
        pairs_config (`str`, *optional*):
            YAML or JSON of the arguments of `trl-kd pairs` that say who is the teacher and who is better. Without it the
            column `teacher_column` has the teacher's answers, and nobody compares.
        reward_model_name_or_path (`str`, *optional*):
            Checkpoint that the reward model starts from, a sequence-classification one or a causal language model's; by
            default the student.
        reward_funcs (`list[str]`, *optional*):
            Rewards beside the reward model's: names of TRL's functions, `module.function` or `file.py:function`, or
            checkpoints.
    """

    pairs_config: str | None = field(
        default=None,
        metadata={
            "help": "YAML or JSON of the arguments of trl-kd pairs that say who is the teacher and who is better."
        },
    )
    reward_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint, a classifier's or a language model's, to start the reward model from; default: the student."
        },
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards beside the reward model's: TRL's by name, module.function, file.py:function, or checkpoints."
        },
    )


TRL_REWARDS: tuple[str, ...] = (
    "accuracy_reward",
    "reasoning_accuracy_reward",
    "think_format_reward",
    "get_soft_overlong_punishment",
)
"""Names that `trl rloo` knows."""

_OF_STUDENT = (
    "the student is the one that is trained, and samples as `temperature` and its other settings say: drop it"
)
_OF_PROMPTS = "the prompts are those of the training's own `dataset_name`: drop it"
_OF_PAIRING = "each of the student's answers is compared with the teacher's: drop it"
_NOT_ONLINE = {
    **{f.name: _OF_STUDENT for f in fields(PairsArguments) if f.name.startswith("student")},
    "num_student_samples": "`num_generations` of the training says how many answers the student gives: drop it",
    "num_teacher_samples": "the teacher answers each prompt once: drop it",
    **{f.name: _OF_PROMPTS for f in fields(PairsArguments) if f.name.startswith("dataset_")},
    **dict.fromkeys(("prompt_column", "as_messages", "max_prompts"), _OF_PROMPTS),
    **dict.fromkeys(("policy", "max_pairs_per_prompt", "truncated", "pairing_seed"), _OF_PAIRING),
    "reasoning": "`reasoning` of the training says it: drop it",
    "output_dir": "the teacher's answers are kept in `output_dir` of the training: drop it",
    **dict.fromkeys(("shard", "merge", "relabel", "dry_run"), "it is for `trl-kd pairs` alone: drop it"),
    **dict.fromkeys(("push_to_hub", "hub_dataset_id", "hub_private_repo"), "the pairs are not pushed: drop it"),
}
"""Arguments of `trl-kd pairs` that `pairs_config` may not set, and why."""


def check(
    script_args: OnlinePbKDScriptArguments,
    training_args: OnlinePbKDConfig,
    model_args: ModelConfig,
    mixture: DatasetMixtureConfig,
) -> None:
    """Raises for arguments that are missing or do not go together, before anything is read."""
    check_arguments(script_args, training_args, model_args, mixture, rows="prompts")
    check_preference_dataset(script_args)
    if script_args.reward_model_name_or_path is not None:
        check_model_source("reward_model_name_or_path", script_args.reward_model_name_or_path)
    if training_args.uses_preferences and script_args.pairs_config is None and script_args.preference_dataset is None:
        raise InputError(
            f"`adversary` is {training_args.adversary!r}, which is held by preferences, and there are none: give "
            "`pairs_config`, a YAML of `trl-kd pairs` that says who is better, or `preference_dataset`, or both."
        )
    if script_args.pairs_config is not None:
        read_config(script_args, training_args, model_args)


def read_config(
    script_args: OnlinePbKDScriptArguments, training_args: OnlinePbKDConfig, model_args: ModelConfig
) -> PairsArguments:
    """The arguments of `trl-kd pairs` that `pairs_config` holds, with what the training knows itself, checked."""
    column = training_args.teacher_column
    is_named = column != OnlinePbKDConfig.teacher_column

    def complete(args: PairsArguments) -> None:
        if is_named and args.teacher is not None:
            raise InputError(
                f"`teacher_column` is {column!r}, but the teacher is `teacher` = {args.teacher!r}: drop one of them."
            )
        if is_named and args.teacher_column not in (None, column):
            raise InputError(
                f"`teacher_column` is {args.teacher_column!r} here, and {column!r} there: drop one of them."
            )
        if args.teacher is None and args.teacher_column is None:
            args.teacher_column = column
        args.reasoning = training_args.reasoning  # type: ignore[assignment]
        args.student = model_args.model_name_or_path
        args.dataset_name = script_args.dataset_name or "datasets"  # a mixture has no name
        args.output_dir = teacher_folder(training_args)

    assert script_args.pairs_config is not None
    return read_file(script_args.pairs_config, _NOT_ONLINE, complete)


def teacher_folder(training_args: OnlinePbKDConfig) -> str:
    """Where the trainer keeps the teacher's answers."""
    assert training_args.output_dir is not None
    return str(Path(training_args.output_dir) / "_online" / "teacher")


# ---- Parts -------------------------------------------------------------------------------------------------------------


@dataclass
class Parts:
    """
    Arguments of `OnlinePbKDTrainer`, beside its model and settings, and `pairs`, the arguments of `trl-kd pairs` that some
    of them come from.
    """

    pairs: PairsArguments | None
    train_dataset: Dataset | IterableDataset
    eval_dataset: Dataset | IterableDataset | None
    preference_dataset: Dataset | None
    reward_funcs: list[str | Callable]
    teacher: Any
    preference_function: Any
    reward_model: str | None

    def arguments(self) -> dict[str, Any]:
        """By the names that the trainer gives them."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "pairs"}


def make_parts(
    script_args: OnlinePbKDScriptArguments,
    training_args: OnlinePbKDConfig,
    model_args: ModelConfig,
    mixture: DatasetMixtureConfig,
) -> Parts:
    """The parts that the arguments name; no weights are loaded for them. A column that `pairs_config` names becomes the
    `teacher_column` of `training_args`."""
    reward_funcs = [reward_function(name) for name in script_args.reward_funcs or []]
    pairs, teacher, preference = None, None, None
    if script_args.pairs_config is not None:
        pairs = read_config(script_args, training_args, model_args)
        if pairs.teacher is not None:
            teacher = make_sampler(pairs, "teacher")
            check_models(pairs, {"teacher": teacher})
        else:
            assert pairs.teacher_column is not None
            training_args.teacher_column = pairs.teacher_column
        preference = make_preference(pairs, _student(pairs, training_args, model_args))
    # Of a folder of pairs, what the teacher wrote in it
    with_completions = teacher is None and training_args.teacher_column == "completion"
    datasets = load_prompts(script_args, mixture, training_args.eval_strategy != "no", with_completions)
    return Parts(
        pairs,
        *datasets,
        load_preferences(script_args),
        reward_funcs,
        teacher,
        preference,
        script_args.reward_model_name_or_path,
    )


def _student(pairs: PairsArguments, training_args: OnlinePbKDConfig, model_args: ModelConfig) -> Any:
    """The student as a sampler that is never asked: a verifier reads completions by its tokenizer."""
    name = model_args.model_name_or_path
    assert name is not None
    options = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    changed: dict[str, Any] = {"student_model_init_kwargs": options}
    check_model_source("model_name_or_path", name)
    sampler = make_sampler(replace(pairs, **changed), "student")
    check_sampler("model_name_or_path", name, sampler)
    return sampler


def reward_function(name: str) -> str | Callable:
    """
    A reward beside the reward model's: a function, or the name of a checkpoint.

    Raises:
        `InputError`: there is none of this name.
    """
    from trl_kd.preferences.reward_function import load_function

    if name in TRL_REWARDS:
        from trl import rewards

        function = getattr(rewards, name)
        # As `trl rloo` calls it
        return function(max_completion_len=1280, soft_punish_cache=256) if name == TRL_REWARDS[-1] else function
    if Path(name).is_dir() or ("/" in name and ":" not in name):
        check_model_source("reward_funcs", name)
        if Path(name).is_dir():
            read_model("reward_funcs", name, {}, lambda: AutoTokenizer.from_pretrained(name))
            classes = AutoConfig.from_pretrained(name).architectures
            if not any("SequenceClassification" in each for each in classes):
                raise InputError(
                    f"`reward_funcs` names {name!r}, of the class {' or '.join(classes)}, whose scores would be random: "
                    "give a sequence-classification checkpoint."
                )
        return name
    if "." not in name and ":" not in name:
        raise InputError(
            f"`reward_funcs` names {name!r}, which is none of TRL's rewards ({', '.join(TRL_REWARDS)}): give one of them, "
            "'module.function', 'file.py:function', or a checkpoint."
        )
    try:
        return load_function(name)
    except ValueError as error:
        raise InputError(f"`reward_funcs` names {name!r}: {one_line(error)}") from error


# ---- Errors ------------------------------------------------------------------------------------------------------------

_WORDS = {
    "`preference_function`": "`pairs_config`",
    "`reward_model`": "`reward_model_name_or_path`",
    "give a `teacher`": "give a `teacher` in `pairs_config`",
}
"""What the trainer says in Python's words, and how the command says it."""


@contextmanager
def said() -> Iterator[None]:
    """What the parts refuse is one line, in the command's words."""
    try:
        with bad_input():
            yield
    except (BudgetExceeded, ServerError) as error:
        raise InputError(one_line(error)) from error
    except InputError as error:
        raise InputError(in_our_words(str(error))) from error


@contextmanager
def fit_rewards() -> Iterator[None]:
    """Around the training: what stops it from outside, or since the reward model is not fit to be climbed or another than
    that of the checkpoint, is one line."""
    from trl_kd.rewards.reward_model import OtherRewardModel
    from trl_kd.trainers.online_pbkd.learner import WarmUpFailed

    try:
        yield
    except (WarmUpFailed, OtherRewardModel, BudgetExceeded, ServerError) as error:
        raise InputError(in_our_words(one_line(error))) from error


def in_our_words(text: str) -> str:
    for theirs, ours in _WORDS.items():
        text = text.replace(theirs, ours)
    return text
