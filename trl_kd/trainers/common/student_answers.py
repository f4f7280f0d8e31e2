"""The student's answers in pairs: how often each was given, and those that win, which can be imitated too.

With `student_wins="gated"` the expert of a prompt is the better of teacher and student. p̄ is P(teacher's text ≻ student's)
over several different answers of the student's to the prompt, each as often as it was given. Where it is below ½ the
student's winning answers have the weight 1 − 2p̄: what a(1 − p̄, 0) of [`~trl_kd.losses.confidence.imitation_advantage`] is
with the roles exchanged.
"""

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any


COUNT = "student_count"
"""Column of a row: how often the student gave its answer. 0 where a third text stands for itself."""
LEAST_COMPARISONS = 3
"""Different answers of the student's that a text of the teacher's was compared with, for p̄ to be told from chance. One label
is one judgement, however often the student gave the answer. With single answers and wrong labels the student collapses."""


def check_count(value: Any, where: str) -> None:
    """Raises a `ValueError` that begins with `where`, unless the value is a whole number of answers, or null."""
    if _is_null(value):
        return
    if isinstance(value, bool) or not isinstance(value, Real) or value < 1 or value % 1 != 0:
        raise ValueError(
            f"{where}: `{COUNT}` is {value!r}; it is how often the student gave its answer, a whole number, at least 1, or "
            "null for 1."
        )


def student_count(row: dict[str, Any]) -> int:
    """How often the student gave its answer of a row that has been checked."""
    value = row.get(COUNT)
    return 1 if value is None or _is_null(value) else int(value)


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


@dataclass
class _Answer:
    """An answer of the student's beside one text of the teacher's. `row` is the first row that has it, on `side`."""

    row: int
    side: str
    lost: float = 0.0
    known: int = 0

    @property
    def wins(self) -> bool:
        """Whether P(teacher's ≻ it) is below ½, in the mean of its labels."""
        return 2 * self.lost < self.known


@dataclass
class _Comparisons:
    """One text of the teacher's against the student: Σ P(teacher's ≻ student's), equal texts counting ½, of how many; which
    texts were compared; and the student's answers."""

    won: float = 0.0
    count: int = 0
    compared: set[bytes] = field(default_factory=set)
    answers: dict[bytes, _Answer] = field(default_factory=dict)

    @property
    def weight(self) -> float:
        """(1 − 2p̄)₊, and 0 for fewer than [`LEAST_COMPARISONS`]."""
        return max(0.0, 1 - 2 * self.won / self.count) if self.is_enough else 0.0

    @property
    def is_enough(self) -> bool:
        return len(self.compared) >= LEAST_COMPARISONS


@dataclass
class Win:
    """An answer of the student's to imitate: the text on `side` of `row`, with its weight in (0, 1]."""

    row: int
    side: str
    weight: float


class StudentWins:
    """
    Finds the student's winning answers in pairs, which are added one by one.

    Example:

    ```python
    >>> from trl_kd.trainers.common.student_answers import StudentWins

    >>> wins = StudentWins()
    >>> for row, (answer, preference) in enumerate([(b"a", 0.0), (b"b", 0.0), (b"c", 0.0), (b"d", 1.0)]):
    ...     wins.add(b"teacher", answer, row, "rejected", preference)
    >>> [(win.row, win.weight) for win in wins.found()]
    [(0, 0.5), (1, 0.5), (2, 0.5)]
    ```
    """

    def __init__(self) -> None:
        self._texts: dict[bytes, _Comparisons] = {}

    def know(self, teacher: bytes) -> None:
        """Takes a text as one of the teacher's, which is no answer of the student's."""
        self._texts.setdefault(teacher, _Comparisons())

    def add(
        self,
        teacher: bytes,
        student: bytes,
        row: int,
        side: str,
        preference: float | None,
        count: int = 1,
        is_good: bool = True,
    ) -> None:
        """
        Adds a pair.

        Args:
            teacher, student (`bytes`):
                Keys of prompt and text, equal for equal texts.
            row (`int`), side (`str`):
                Where the student's text is.
            preference (`float`, *optional*):
                P(teacher's ≻ student's) in [0, 1]; `None` where it is not known.
            count (`int`, *optional*, defaults to `1`):
                How often the student gave the answer.
            is_good (`bool`, *optional*, defaults to `True`):
                Whether the answer may be imitated.
        """
        text = self._texts.setdefault(teacher, _Comparisons())
        if teacher == student:
            preference = 0.5
        if preference is None:
            return
        text.won += count * preference
        text.count += count
        text.compared.add(student)
        if teacher != student and is_good:
            answer = text.answers.setdefault(student, _Answer(row, side))
            answer.lost += count * preference
            answer.known += count

    @property
    def can_win(self) -> bool:
        """Whether any text of the teacher's was compared often enough."""
        return any(text.is_enough for text in self._texts.values())

    def found(self) -> list[Win]:
        """
        The answers to imitate, each once, in the order in which they came. The weight of one that was compared with several
        texts of the teacher's is the mean over these, 0 for those that it did not win against. What the teacher said too is
        the teacher's.
        """
        weights: dict[bytes, list[float]] = {}
        places: dict[bytes, _Answer] = {}
        for text in self._texts.values():
            for key, answer in text.answers.items():
                weights.setdefault(key, []).append(text.weight if answer.wins else 0.0)
                places.setdefault(key, answer)
        found = []
        for key, answer in places.items():
            weight = sum(weights[key]) / len(weights[key])
            if weight > 0 and key not in self._texts:
                found.append(Win(answer.row, answer.side, weight))
        return found
