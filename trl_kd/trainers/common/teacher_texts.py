"""A text of the teacher's in pairs: what makes two of them one, and what is known of it from all of its pairs."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from trl_kd.losses.confidence import imitation_advantage
from trl_kd.responses.finish_reasons import has_end
from trl_kd.responses.nulls import without_nulls
from trl_kd.trainers.common.config import ImitationConfig
from trl_kd.trainers.common.student_answers import student_count


IMAGES = ("image", "images")
OF_PROMPT = ("prompt", "tools", "chat_template_kwargs")


@dataclass
class TeacherText:
    """One text of the teacher's for one prompt, and what is known of it from all of its pairs: Σ p over the student's
    answers with a known preference, and how many these are."""

    won: float = 0.0
    known: int = 0
    scores: list[float] = field(default_factory=list)
    compared: bool = False
    row: int | None = None
    """The row that stands for it: the first in which it has its end, or the first."""
    ends: bool = False

    def advantage(self, args: ImitationConfig, radius: float) -> float:
        if args.imitation_min_score is not None and self.scores:
            return float(sum(self.scores) / len(self.scores) >= args.imitation_min_score)
        return imitation_advantage(self.won / self.known if self.known else None, radius)

    def stand(self, index: int, row: dict[str, Any]) -> None:
        """Lets the row stand for the text, unless another one does better."""
        ends = has_end(row.get(f"{side_of_teacher(row)}_finish_reason"))
        if self.row is None or (ends and not self.ends):
            self.row, self.ends = index, ends

    def add(self, row: dict[str, Any]) -> None:
        score = known_number(row.get(f"score_{side_of_teacher(row)}"))
        if score is not None:
            self.scores.append(score)
        if without_nulls(row["chosen"]) == without_nulls(row["rejected"]):
            return  # a label of equal texts says nothing
        self.compared = True
        preference = preference_of_teacher(row)
        if preference is not None:
            self.won += student_count(row) * preference
            self.known += student_count(row)


def known_number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def side_of_teacher(row: dict[str, Any]) -> str | None:
    return row.get("teacher_side", "chosen")


def preference_of_teacher(row: dict[str, Any]) -> float | None:
    """P(teacher's text ≻ the other)."""
    preference = known_number(row.get("preference", 1.0))
    return preference if preference is None or side_of_teacher(row) == "chosen" else 1 - preference


def is_known(row: dict[str, Any]) -> bool:
    """Whether a pair has a known preference between different responses."""
    differs = without_nulls(row["chosen"]) != without_nulls(row["rejected"])
    return differs and known_number(row.get("preference", 1.0)) is not None


def text_key(row: dict[str, Any], side: str) -> bytes:
    """What two rows have in common whose texts on these sides are one text to imitate."""
    parts = [without_nulls(row.get(column)) or None for column in (*OF_PROMPT, *IMAGES)]
    text = json.dumps([*parts, without_nulls(row[side])], sort_keys=True, default=_digest)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _digest(value: Any) -> str:
    """Stands for what JSON cannot hold: the bytes of an image."""
    return hashlib.sha256(value if isinstance(value, bytes) else repr(value).encode()).hexdigest()


def read_columns(dataset: Dataset, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Rows with those of the columns that there are. One by one they would take thirty times as long."""
    dataset = dataset.select_columns([column for column in columns if column in dataset.column_names])
    for batch in dataset.with_format(None).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))
