"""What `OnlinePbKDTrainer` is made of beside its models: rows, a teacher, a preference function, pairs."""

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import PreTrainedModel
from trl import maybe_extract_prompt

from trl_kd.pairs.batch_labelling import BatchPairs
from trl_kd.pairs.checks import check_asked_anew
from trl_kd.pairs.checks import check_parts as check_source
from trl_kd.pairs.prompts import PromptRow, prompt_key
from trl_kd.preferences import Preference
from trl_kd.preferences.tokens import encode_answer
from trl_kd.responses.nulls import without_nulls
from trl_kd.responses.rendering import CannotRender
from trl_kd.responses.special_tokens import set_end_token
from trl_kd.sampling import Answer, Sampler
from trl_kd.sampling.as_json import to_json
from trl_kd.sampling.column import ColumnSampler
from trl_kd.sampling.sampler import beginning
from trl_kd.trainers.common.pair_rows import has_images
from trl_kd.trainers.common.preference_pairs import known_pairs, read_pairs
from trl_kd.trainers.common.prompts import check_prompts
from trl_kd.trainers.common.response_rows import ResponseReader
from trl_kd.trainers.common.tokenizer import check_tokenizer, load_processing_class
from trl_kd.trainers.online_pbkd.config import OnlinePbKDConfig
from trl_kd.trainers.online_pbkd.pool import as_rows


logger = get_logger(__name__)

_CHECKED = 20


@dataclass
class PromptGroup:
    """
    What a generation batch has of one prompt, and of rows that are equal in their other columns too.

    Attributes:
        row (`PromptRow`):
            The prompt.
        places (`list[int]`):
            Its rows in the batch of all processes.
        student (`list[Answer]`):
            The student's answers, in the order of `places`.
        teacher (`Answer`):
            The teacher's.
        pairs (`list[dict]`):
            Teacher against student, as rows of D.
    """

    row: PromptRow
    places: list[int] = field(default_factory=list)
    student: list[Answer] = field(default_factory=list)
    teacher: Answer = field(default_factory=lambda: Answer(None))
    pairs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def wins(self) -> list[float]:
        """P(teacher ≻ student) of its pairs, as far as it is known."""
        known = [(pair["preference"], pair["teacher_side"]) for pair in self.pairs if pair["preference"] is not None]
        return [p if side == "chosen" else 1 - p for p, side in known]


def group_rows(rows: list[tuple[dict[str, Any], Answer]]) -> list[PromptGroup]:
    """A batch of `(row, the student's answer)` by prompts and the other columns of their rows, in the order of the first:
    equal prompts may have other teacher's answers, or other columns for the preference function."""
    groups: dict[str, PromptGroup] = {}
    for place, (row, answer) in enumerate(rows):
        columns = {name: value for name, value in row.items() if name != "prompt"}
        prompt = without_nulls(row["prompt"])  # a dataset fills up fields that other rows' messages have
        key = prompt_key(prompt, columns)
        group = groups.setdefault(f"{key}/{to_json(columns)}", PromptGroup(PromptRow(place, key, prompt, columns)))
        group.places.append(place)
        group.student.append(answer)
    return list(groups.values())


def fill_groups(groups: list[PromptGroup], asker: BatchPairs) -> None:
    """Gives each group the teacher's answer and its pairs."""
    rows = [group.row for group in groups]
    answers = asker.teacher_answers(rows)
    for group, answer in zip(groups, answers, strict=True):
        group.teacher = answer
    answered = [group for group in groups if group.teacher.text is not None]
    made = asker.pairs(
        [group.row for group in answered],
        [group.teacher for group in answered],
        [group.student for group in answered],
    )
    for group, pairs in zip(answered, made, strict=True):
        group.pairs = pairs


def leave_out_unreadable(groups: list[PromptGroup], tokenizers: list[Any], args: OnlinePbKDConfig) -> None:
    """Takes the teacher's answer away where a tokenizer cannot render it, with the pairs of it, and says how many."""
    unreadable = 0
    for group in groups:
        answer = group.teacher
        if answer.text is None:
            continue
        try:
            for tokenizer in tokenizers:
                encoded = encode_answer(
                    tokenizer,
                    group.row.prompt,
                    answer.text,
                    answer.finish_reason,
                    args.chat_template_kwargs,  # type: ignore[arg-type]
                    args.reasoning,
                )
                if encoded.altered is not None:
                    logger.warning_once(
                        f"What is learnt of the teacher's answers is not what was sampled: {encoded.altered}. See the "
                        "setting `reasoning`."
                    )
        except CannotRender as error:
            unreadable += 1
            group.teacher, group.pairs = Answer(None, "cannot_be_rendered"), []
            said = f"The teacher's answer to the prompt {beginning(group.row.prompt)!r} is not used: {error}"
    if unreadable:
        logger.warning(f"{said}. So it is with {unreadable} of {len(groups)} answers of a batch.")


@dataclass
class OnlineParts:
    """
    The parts of an `OnlinePbKDTrainer`, whatever is missing being `None`.

    Attributes:
        args (`OnlinePbKDConfig`), teacher (`Sampler`), preference (`Preference`), pairs (`Dataset`), \
reward_model (`str` or `PreTrainedModel`):
            See the trainer.
    """

    args: OnlinePbKDConfig
    teacher: Sampler | None
    preference: Preference | None
    pairs: Dataset | None
    reward_model: str | PreTrainedModel | None

    @property
    def asks(self) -> bool:
        """Whether the teacher's answers are needed at all."""
        return self.needs_teacher or self.args.adversary != "off"

    @property
    def needs_teacher(self) -> bool:
        args = self.args
        climbs_gap = args.adversary in ("pbkd", "discriminator") and not args.follows_mle
        return climbs_gap or args.imitates or self.preference is not None

    def sampler(self) -> Sampler:
        """The teacher, or the column that stands for it."""
        return self.teacher if self.teacher is not None else ColumnSampler(self.args.teacher_column)

    def asker(self, folder: str, accelerator: Accelerator) -> BatchPairs | None:
        """On the process that asks."""
        if not self.needs_teacher or not accelerator.is_main_process:
            return None
        checkpoints = sorted(Path(self.args.output_dir).glob("checkpoint-*"))
        return BatchPairs(self.sampler(), self.preference, Path(folder), self.args.reasoning, checkpoints)

    def warn_of_nothing(self, groups: list[PromptGroup], wins: list[float], known: list[int]) -> None:
        """Says so if in the first batch the teacher answered nothing, or nothing is known, no pair before either."""
        if self.needs_teacher and all(group.teacher.text is None for group in groups):
            reasons = Counter(group.teacher.finish_reason for group in groups)
            told = ", ".join(f"{reason} ({count})" for reason, count in reasons.items() if reason is not None)
            logger.warning(
                f"The teacher answered none of the {len(groups)} prompts of the first generation batch"
                f"{f', with the finish reasons {told}' if told else ''}: without its answers no pair is made, and "
                "nothing is learnt from it. Look at `teacher`, or at the column `teacher_column`."
            )
        elif self.args.uses_preferences and not wins and not known:
            logger.warning(
                f"Of none of the {sum(len(group.pairs) for group in groups)} pairs of the first generation batch a "
                "preference is known: until there are some the reward model learns nothing. Look at what "
                "`preference_function` returns; of equal answers it is not asked."
            )

    def look_at_answers(self, dataset: Any, processing_class: Any) -> Any:
        """What the chat template makes of the teacher's answers, where a column holds them: see
        [`~trl_kd.trainers.common.response_rows.ResponseReader.look`]. Without the rows that cannot be rendered."""
        column = self.args.teacher_column
        if self.teacher is not None or not self.needs_teacher:
            return dataset
        answer = next(iter(dataset)).get(column)
        if isinstance(answer, list) and not isinstance(answer[0], dict):  # several answers a row
            return dataset
        return ResponseReader(processing_class, self.args, "train", (column,), self.args.chat_template_kwargs).look(
            dataset
        )

    def given_pairs(self, processing_class: Any, prompts: Any) -> list[dict[str, Any]]:
        """D at the start, without the pairs that the reward model's `processing_class` cannot render.

        Raises:
            `ValueError`: `preference_dataset` is not what it should be, or could not grow by pairs of the `prompts`.
        """
        if self.pairs is None:
            return []
        pairs = known_pairs(read_pairs(self.pairs, prompts))
        if "prompt" not in pairs.column_names:
            pairs = pairs.map(maybe_extract_prompt)
        if self.preference is not None:
            _check_contents(pairs[0], next(iter(prompts)))
        settings: Any = self.args
        pairs = ResponseReader(processing_class, settings, "preference", options=settings.chat_template_kwargs).look(
            pairs
        )
        return as_rows(pairs)


def _check_contents(pair: dict[str, Any], row: dict[str, Any]) -> None:
    """Raises a `ValueError` for messages that could not be stored in one column with those of the pairs to come."""
    made = {"prompt": _has_parts(row["prompt"]), "chosen": False}
    for column, has_parts in made.items():
        if _has_parts(pair[column]) != has_parts:
            told = ("a list of parts", "text") if has_parts else ("text", "a list of parts")
            raise ValueError(
                f"The messages in the column {column!r} of `preference_dataset` have {told[1]} as `content`, and those of "
                f"the pairs that are made in training {told[0]}: give all contents as text."
            )


def _has_parts(messages: Any) -> bool:
    return isinstance(messages, list) and any(isinstance(message.get("content"), list) for message in messages)


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


def reward_model(prompts: list, **kwargs: Any) -> list[float]:
    """In the reward model's place among the reward functions: its rewards come when D has grown."""
    return [0.0] * len(prompts)


def reward_columns(args: OnlinePbKDConfig, reward_funcs: list, classes: Any) -> tuple[list, list | None, Any]:
    """TRL's reward functions and their tokenizers, with a place for the reward model at the end; and its tokenizer, where
    `classes` end in it.

    Raises:
        `ValueError`: another number of `reward_weights`.
    """
    classes = classes if classes is None or isinstance(classes, list) else [classes]
    if args.adversary == "off":
        return reward_funcs, classes, None
    functions = [*reward_funcs, reward_model]
    if args.reward_weights is not None and len(args.reward_weights) != len(functions):
        raise ValueError(
            f"`reward_weights` has {len(args.reward_weights)} numbers, and there are {len(functions)} rewards: those of "
            "`reward_funcs`, and last the reward model's. Give one each."
        )
    if classes is None or len(classes) != len(functions):
        return functions, None if classes is None else [*classes, None], None
    return functions, [*classes[:-1], None], classes[-1]


class HackingWatch:
    """
    Looks whether the reward rises while the student loses more and more.

    Attributes:
        history (`dict[str, list[tuple[float, float]]]`):
            Mean reward and win rate at each look, for each evaluation dataset.
        warned (`bool`):
            Whether it has been said: it is once.
    """

    PATIENCE = 3

    def __init__(self):
        self.history: dict[str, list[tuple[float, float]]] = {}
        self.warned = False

    def look(self, name: str, reward: float, win_rate: float) -> None:
        """After an evaluation on the dataset that `name` tells: mean reward, and the student's win rate against its
        teacher."""
        looks = self.history.setdefault(name, [])
        looks.append((reward, win_rate))
        last = looks[-self.PATIENCE - 1 :]
        steps = list(pairwise(last))
        hacked = len(steps) == self.PATIENCE and all(b[0] > a[0] and b[1] < a[1] for a, b in steps)
        if hacked and not self.warned:
            self.warned = True
            logger.warning(
                f"Over the last {self.PATIENCE} evaluations the reward rose from {last[0][0]:.3g} to {last[-1][0]:.3g} "
                f"while the student's win rate fell from {last[0][1]:.1%} to {last[-1][1]:.1%}: it exploits the reward "
                "model. Raise `beta` or `rm_steps`, lower `confidence_radius` or `learning_rate`, or use an earlier "
                "checkpoint."
            )
