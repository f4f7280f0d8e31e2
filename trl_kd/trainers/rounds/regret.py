"""The regret view of rounds: how far the students that came into them were behind their teacher, summed."""

import math
from collections.abc import Sequence

from datasets import Dataset

from trl_kd.trainers.common.student_answers import COUNT, student_count
from trl_kd.trainers.common.teacher_texts import read_columns


def count_equal(pairs: Dataset) -> int:
    """Rows of pairs in which teacher and student gave the same answer, so that there was nothing to ask a preference."""
    names = ("chosen", "rejected", "preference", "chosen_source", "rejected_source")
    columns = pairs.select_columns(list(names)).with_format(None)
    return sum(
        preference is None and chosen == rejected and one != other
        for batch in columns.iter(batch_size=1000)
        for chosen, rejected, preference, one, other in zip(*(batch[name] for name in names), strict=True)
    )


def teacher_preferred(pairs: Dataset) -> float | None:
    """Mean P(teacher ≻ student) over the student's answers, each as often as it was given (`student_count`). P of an answer
    that is the teacher's too is ½. `None` where nothing is known."""
    names = ("chosen", "rejected", "preference", "teacher_side", "chosen_source", "rejected_source", COUNT)
    won, answers = 0.0, 0
    for row in read_columns(pairs, names):
        if row["chosen_source"] == row["rejected_source"]:
            continue
        if row["preference"] is None and row["chosen"] != row["rejected"]:
            continue
        p = 0.5 if row["preference"] is None else row["preference"]
        count = student_count(row)
        won += count * (p if row["teacher_side"] == "chosen" else 1 - p)
        answers += count
    return won / answers if answers else None


def cumulative_regret(rates: Sequence[float | None]) -> float:
    """Σ_k (P(teacher ≻ student_k) − ½) over the rounds whose mean P is known."""
    return math.fsum(rate - 0.5 for rate in rates if rate is not None)


def regret_coefficient(regrets: Sequence[float]) -> float | None:
    """The c of c·√k that is closest, in the least squares, to the cumulative regrets of rounds k = 1, 2, …"""
    if not regrets:
        return None
    ks = range(1, len(regrets) + 1)
    return math.fsum(regret * math.sqrt(k) for k, regret in zip(ks, regrets, strict=True)) / math.fsum(ks)
