"""What `OnlinePbKDTrainer` refuses before any weight is loaded."""

from typing import Any

from datasets import Dataset

from trl_kd.pairs.checks import check_asked_anew
from trl_kd.pairs.checks import check_parts as check_source
from trl_kd.pairs.prompts import PromptRow, prompt_key
from trl_kd.responses.special_tokens import set_end_token
from trl_kd.trainers.common.pair_rows import has_images
from trl_kd.trainers.common.prompts import check_prompts
from trl_kd.trainers.common.tokenizer import check_tokenizer, load_processing_class
from trl_kd.trainers.online_pbkd.config import OnlinePbKDConfig
from trl_kd.trainers.online_pbkd.data import OnlineParts


_CHECKED = 20


def check_parts(parts: OnlineParts, reward_funcs: list, dataset: Any, name: str) -> None:
    """
    Checks that settings, rows and parts go together.

    Raises:
        `ValueError` or `TypeError`: they do not; the message names what to change.
    """
    args = parts.args
    _check_adversary(parts, reward_funcs)
    _check_scores(parts)
    check_prompts(dataset, name)
    first = next(iter(dataset))
    if name == "train" and isinstance(dataset, Dataset):
        prompts = args.generation_batch_size // args.num_generations  # type: ignore[operator]
        if len(dataset) < prompts:
            raise ValueError(
                f"The train dataset has {len(dataset)} prompts, and one generation batch takes {prompts} "
                f"(`generation_batch_size` = {args.generation_batch_size}, `num_generations` = {args.num_generations}): "
                "give more prompts, or lower the batch."
            )
    if not parts.asks:
        return
    if has_images(first):
        raise ValueError(
            f"The {name} dataset has images, which the reward model and the teacher's answers are not made for: drop their "
            "columns, or use `adversary='off'`."
        )
    unseen = [column for column in ("tools", "chat_template_kwargs") if column in first]
    if unseen:
        raise ValueError(
            f"The {name} dataset has a column {unseen[0]!r}, which the student's prompts are made without, so that a "
            "teacher would answer other ones: drop or rename it. What holds for all rows goes into "
            "`args.chat_template_kwargs`, and into the `chat_template_kwargs` of a teacher that has them."
        )
    if not parts.needs_teacher:
        return
    if parts.teacher is None and args.teacher_column not in first:
        only_imitated = parts.preference is None and args.follows_mle
        raise ValueError(
            f"The {name} dataset has no column {args.teacher_column!r} with the teacher's answers (`teacher_column`): it "
            f"has {', '.join(map(repr, sorted(first)))}. Name the column, or give a `teacher`"
            f"{', or do without imitation by `imitation_weight=0`' if only_imitated else ''}."
        )
    rows = []
    for index, row in zip(range(_CHECKED), dataset, strict=False):
        columns = {column: value for column, value in row.items() if column != "prompt"}
        rows.append(PromptRow(index, prompt_key(row["prompt"], columns), row["prompt"], columns))
    preference: Any = parts.preference or _nobody
    check_source(rows, {"teacher": (parts.sampler(), 1)}, preference)


def check_student_template(model: Any, processing_class: Any, dataset: Any, args: OnlinePbKDConfig) -> Any:
    """
    Returns:
        The student's tokenizer or processor, loaded if it is not given, with `args.eos_token`.

    Raises:
        `ValueError`: it cannot render the dataset, or does not know `args.eos_token`.
    """
    if processing_class is None:
        processing_class = load_processing_class(model, args, truncation_side="left", padding_side="left")
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    check_tokenizer(tokenizer, dataset, "train")
    set_end_token(tokenizer, args.eos_token)
    return processing_class


def _nobody(prompts: list, first: list, second: list, **columns: Any) -> list[None]:
    return [None] * len(prompts)


def _check_scores(parts: OnlineParts) -> None:
    least = parts.args.imitation_min_score
    if least is not None and not callable(getattr(parts.preference, "score", None)):
        given = "is none" if parts.preference is None else "compares answers, and scores none"
        raise ValueError(
            f"`imitation_min_score` is {least}, but the `preference_function` {given}: give one that scores answers, such "
            "as `RewardFunctionPreference`, or drop the setting."
        )


def _check_adversary(parts: OnlineParts, reward_funcs: list) -> None:
    args, kind = parts.args, parts.args.adversary
    check_asked_anew(parts.preference, "preference_function")
    given = {
        "preference_function": parts.preference,
        "preference_dataset": parts.pairs,
        "reward_model": parts.reward_model,
    }
    if kind == "off":
        idle = [name for name in ("preference_dataset", "reward_model") if given[name] is not None]
        if idle:
            raise ValueError(f"`{idle[0]}` is given, but `adversary` is 'off', which has no reward model: drop one.")
        if not reward_funcs:
            raise ValueError(
                "`adversary` is 'off' and there are no `reward_funcs`: there is nothing to climb. Give one."
            )
    if kind == "discriminator" and parts.pairs is not None:
        raise ValueError(
            "`preference_dataset` is given, but `adversary` is 'discriminator', which learns from no preferences: drop it, "
            "or use 'pbkd'."
        )
    if args.uses_preferences and parts.preference is None and parts.pairs is None:
        raise ValueError(
            f"`adversary` is {kind!r}, which is held by preferences, and there are none: give a `preference_function`, a "
            "`preference_dataset`, or both."
        )
    if isinstance(parts.reward_model, str) and not parts.reward_model:
        raise ValueError("`reward_model` is '': give a checkpoint, or None to start from the student.")
