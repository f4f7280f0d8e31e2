"""The answers of a generation batch beside the teacher's, by prompt."""

from dataclasses import dataclass, field
from typing import Any

from accelerate.logging import get_logger

from trl_kd.pairs.batch_labelling import BatchPairs
from trl_kd.pairs.prompts import PromptRow, prompt_key
from trl_kd.preferences.tokens import encode_answer
from trl_kd.responses.nulls import without_nulls
from trl_kd.responses.rendering import CannotRender
from trl_kd.sampling import Answer
from trl_kd.sampling.as_json import to_json
from trl_kd.sampling.sampler import beginning
from trl_kd.trainers.online_pbkd.config import OnlinePbKDConfig


logger = get_logger(__name__)


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
