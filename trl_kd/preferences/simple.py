"""Preferences that nobody has to compute: the teacher always wins, or a person has said who does."""

import math
from numbers import Real
from typing import Any

from trl_kd.sampling import Text


_TEACHER_WINS = {("teacher", "student"): 1.0, ("student", "teacher"): 0.0}
_NOT_COLUMNS = {f"{side}_{what}" for side in ("first", "second") for what in ("source", "finish_reason")}


class TeacherWins:
    """
    The teacher's response is preferred to the student's, always (PLaD, https://huggingface.co/papers/2406.02886).

    Returns:
        `list[float | None]`: 1 where the first is the teacher's and the second the student's, 0 the other way round, and
        `None` for two responses of one source, of which it knows nothing.
    """

    is_lookup = True  # so that nobody stores the labels

    def __call__(
        self, prompts: list[Text], first: list[Text], second: list[Text], **columns: list[Any]
    ) -> list[float | None]:
        sources = zip(columns["first_source"], columns["second_source"], strict=True)
        return [_TEACHER_WINS.get(pair) for pair in sources]

    def describe(self) -> dict[str, Any]:
        return {"preference": "teacher_wins"}


class LabelColumn:
    """
    Labels from a column of the row, by people or from elsewhere.

    Args:
        column (`str`):
            Name of the column. Its values are `"teacher"`, `"student"` or `"tie"`, or a number, P(teacher ≻ student) in
            [0, 1]; null (or NaN) where nobody knows. The label is about the teacher and the student of its row: with
            several samples of either it holds for each pair of them, and for two of the same source nothing is known.

    Raises:
        `ValueError`: no such column, or a value that is none of these.
    """

    is_lookup = True

    _WORDS = {"teacher": 1.0, "tie": 0.5, "student": 0.0}

    def __init__(self, column: str):
        self.column = column

    def __call__(
        self, prompts: list[Text], first: list[Text], second: list[Text], **columns: list[Any]
    ) -> list[float | None]:
        labels = []
        rows = zip(self._values(columns), columns["first_source"], columns["second_source"], strict=True)
        for value, *sources in rows:
            label = self._read(value)
            teacher_first = _TEACHER_WINS.get(tuple(sources))
            labels.append(None if label is None or teacher_first is None else label if teacher_first else 1 - label)
        return labels

    def check_rows(self, prompts: list[Text], **columns: list[Any]) -> None:
        """Raises a `ValueError` if such rows have no such column, or no labels there."""
        for value in self._values(columns):
            self._read(value)

    def _values(self, columns: dict[str, list[Any]]) -> list[Any]:
        if self.column not in columns:
            found = ", ".join(sorted(set(columns) - _NOT_COLUMNS)) or "no other columns"
            raise ValueError(f"There is no column {self.column!r} to read labels from: the rows have {found}.")
        return columns[self.column]

    def _read(self, value: Any) -> float | None:
        if value is None:
            return None
        if isinstance(value, str) and value in self._WORDS:
            return self._WORDS[value]
        if isinstance(value, Real):
            number = float(value)
            if math.isnan(number):
                return None
            if 0 <= number <= 1:
                return number
        raise ValueError(
            f"The column {self.column!r} holds {value!r}: a label is 'teacher', 'student', 'tie', a number P(teacher ≻ "
            "student) in [0, 1], or null."
        )

    def describe(self) -> dict[str, Any]:
        return {"preference": "label_column", "column": self.column}
