"""How much an answer of the teacher's is imitated that stands in no pair itself, from the pairs that are known of it."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from datasets import Dataset
from trl import extract_prompt

from trl_kd.responses.nulls import without_nulls
from trl_kd.trainers.common.config import ImitationConfig, imitation_radius
from trl_kd.trainers.common.pair_rows import SCORE_COLUMNS
from trl_kd.trainers.common.student_answers import COUNT
from trl_kd.trainers.common.teacher_texts import OF_PROMPT, TeacherText, is_known, read_columns, text_key


_OF_PAIR = ("chosen", "rejected", "preference", COUNT, *SCORE_COLUMNS)


def weigh_answer(pairs: Iterable[dict[str, Any]], args: ImitationConfig, radius: float) -> tuple[float, bool]:
    """
    The weight of one answer.

    Args:
        pairs (`Iterable[dict]`):
            All that is known of it, as rows with `teacher_side`.
        args (`ImitationConfig`):
            Settings.
        radius (`float`):
            ζ in [0, ∞], nats per pair.

    Returns:
        a(p, ζ) with the mean p of its known pairs, 1 without one; and whether it was compared with another text.
    """
    text = TeacherText()
    for pair in pairs:
        text.add(pair)
    return text.advantage(args, radius), text.compared  # type: ignore[arg-type]


class AnswerCounts(NamedTuple):
    """How many completions a dataset has, how many of them stand in the pairs, and how many have the weight 0."""

    completions: int
    found: int
    lost: int

    @property
    def told(self) -> str:
        """A clause without its full stop."""
        if not self.found:
            return f"none of {self.completions:,} completions stands in the pairs, so that all are imitated alike"
        said = f"{self.found:,} of {self.completions:,} completions stand in the pairs; {self.lost:,} of weight 0"
        return f"{said}, so that nothing is imitated" if self.lost == self.completions else said


class PairWeights:
    """
    Weights of the teacher's completions of prompts, of which a dataset of pairs tells. Whoever wrote the responses there, a
    completion is found by its prompt and text.

    Args:
        pairs (`Dataset`, *optional*):
            Pairs. Without them every completion has the weight 1. Those without a known preference tell scores alone.
        args (`ImitationConfig`):
            Settings.

    Attributes:
        pairs (`int`):
            How many pairs have a known preference between different responses.

    Raises:
        `ValueError`: `args` ask for what the pairs do not tell.
    """

    def __init__(self, pairs: Dataset | None, args: Any):
        columns = [] if pairs is None else pairs.column_names
        if args.imitation_min_score is not None and not set(columns) & set(SCORE_COLUMNS):
            raise ValueError(
                f"`imitation_min_score` is {args.imitation_min_score}, but there is no `preference_dataset` with a column "
                "`score_chosen` or `score_rejected`: give the scores, or drop the setting."
            )
        self.pairs = 0
        self._args = args
        self._texts: dict[bytes, TeacherText] = {}
        for pair in [] if pairs is None else self._read(pairs):
            self.pairs += is_known(pair)
            for side in ("chosen", "rejected"):
                text = self._texts.setdefault(_of_text(pair, pair[side]), TeacherText())
                text.add({**pair, "teacher_side": side})
        self._radius = imitation_radius(args, self.pairs)

    def _read(self, pairs: Dataset) -> Iterator[dict[str, Any]]:
        if "prompt" not in pairs.column_names:
            pairs = pairs.map(extract_prompt)
        return read_columns(pairs, (*OF_PROMPT, *_OF_PAIR))

    def of(self, row: dict[str, Any]) -> tuple[float, bool]:
        """The weight of a row's `completion`, and whether it was compared with another text."""
        text = None
        if self._texts and row.get("completion") is not None:
            text = self._texts.get(_of_text(row, row["completion"]))
        return (1.0, False) if text is None else (text.advantage(self._args, self._radius), text.compared)

    def count(self, dataset: Dataset) -> AnswerCounts:
        """How many of a dataset's completions are known."""
        rows = read_columns(dataset, ("completion", *OF_PROMPT))
        keys = [_of_text(row, row["completion"]) for row in rows if row["completion"] is not None]
        found = [self._texts[key] for key in keys if key in self._texts]
        lost = sum(text.advantage(self._args, self._radius) == 0 for text in found)
        return AnswerCounts(len(keys), len(found), lost)

    def mean(self, dataset: Any, count_tokens: Callable[[dict[str, Any]], int]) -> float:
        """
        ā, the mean of the weights above 0 of a dataset's completions, each as often as it has tokens. 1 for a stream, and
        where there is none.

        Args:
            dataset (`Dataset` or `IterableDataset`):
                Rows with `prompt`, and `completion` where the teacher has answered.
            count_tokens (`Callable`):
                Of a row.
        """
        if not isinstance(dataset, Dataset) or "completion" not in dataset.column_names or not self._texts:
            return 1.0
        names = ("completion", "completion_finish_reason", *OF_PROMPT)
        rows = [row for row in read_columns(dataset, names) if row["completion"] is not None]
        used = [(weight, row) for weight, row in ((self.of(row)[0], row) for row in rows) if weight > 0]
        if len({weight for weight, _ in used}) < 2:
            return used[0][0] if used else 1.0
        lengths = [count_tokens(row) for _, row in used]
        return math.fsum(a * n for (a, _), n in zip(used, lengths, strict=True)) / max(sum(lengths), 1)


def _of_text(row: dict[str, Any], text: Any) -> bytes:
    """What a text of one dataset has in common with the same of another, for the prompt of `row`."""
    return text_key({**{name: row.get(name) for name in OF_PROMPT}, "chosen": without_nulls(text)}, "chosen")
