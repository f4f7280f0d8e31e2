"""How much an answer of the teacher's is imitated that stands in no pair itself, from the pairs that are known of it."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from datasets import Dataset
from trl import extract_prompt

from trl_kd.responses.nulls import without_nulls
from trl_kd.trainers.imitation_config import ImitationConfig, imitation_radius
from trl_kd.trainers.imitation_texts import TeacherText, text_key
from trl_kd.trainers.pbkd_data import SCORE_COLUMNS
from trl_kd.trainers.student_answers import COUNT


_OF_PROMPT = ("prompt", "tools", "chat_template_kwargs")
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


class PairWeights:
    """
    Weights of the teacher's completions of prompts, of which a dataset of pairs tells. Whoever wrote the responses there, a
    completion is found by its prompt and text.

    Args:
        pairs (`Dataset`, *optional*):
            Pairs with a known preference between different responses. Without them every completion has the weight 1.
        args (`ImitationConfig`):
            Settings.

    Attributes:
        pairs (`int`):
            How many pairs there are.

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
        self.pairs = 0 if pairs is None else len(pairs)
        self._args = args
        self._radius = imitation_radius(args, self.pairs)
        self._texts: dict[bytes, TeacherText] = {}
        if pairs is None:
            return
        if "prompt" not in columns:
            pairs = pairs.map(extract_prompt)
        for pair in _rows(pairs, (*_OF_PROMPT, *_OF_PAIR)):
            for side in ("chosen", "rejected"):
                text = self._texts.setdefault(_of_text(pair, pair[side]), TeacherText())
                text.add({**pair, "teacher_side": side})

    def of(self, row: dict[str, Any]) -> tuple[float, bool]:
        """The weight of a row's `completion`, and whether it was compared with another text."""
        text = None
        if self._texts and row.get("completion") is not None:
            text = self._texts.get(_of_text(row, row["completion"]))
        return (1.0, False) if text is None else (text.advantage(self._args, self._radius), text.compared)

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
        names = ("completion", "completion_finish_reason", *_OF_PROMPT)
        rows = [row for row in _rows(dataset, names) if row["completion"] is not None]
        used = [(weight, row) for weight, row in ((self.of(row)[0], row) for row in rows) if weight > 0]
        if len({weight for weight, _ in used}) < 2:
            return used[0][0] if used else 1.0
        lengths = [count_tokens(row) for _, row in used]
        return math.fsum(a * n for (a, _), n in zip(used, lengths, strict=True)) / max(sum(lengths), 1)


def _of_text(row: dict[str, Any], text: Any) -> bytes:
    """What a text of one dataset has in common with the same of another, for the prompt of `row`."""
    return text_key({**{name: row.get(name) for name in _OF_PROMPT}, "chosen": without_nulls(text)}, "chosen")


def _rows(dataset: Dataset, names: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The columns `names` of each row, as far as there are such."""
    dataset = dataset.select_columns([name for name in names if name in dataset.column_names]).with_format(None)
    for batch in dataset.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))
