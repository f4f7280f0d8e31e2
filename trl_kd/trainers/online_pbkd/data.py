"""What `OnlinePbKDTrainer` is made of beside its models: rows, a teacher, a preference function, pairs."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import PreTrainedModel
from trl import maybe_extract_prompt

from trl_kd.pairs.batch_labelling import BatchPairs
from trl_kd.preferences import Preference
from trl_kd.sampling import Sampler
from trl_kd.sampling.column import ColumnSampler
from trl_kd.trainers.common.preference_pairs import known_pairs, read_pairs
from trl_kd.trainers.common.response_rows import ResponseReader
from trl_kd.trainers.online_pbkd.asking import PromptGroup
from trl_kd.trainers.online_pbkd.config import OnlinePbKDConfig
from trl_kd.trainers.online_pbkd.pool import as_rows


logger = get_logger(__name__)


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
