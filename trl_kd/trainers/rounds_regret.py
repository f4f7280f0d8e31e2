"""The regret view of rounds: how far the students that came into them were behind their teacher, summed."""

import math
from collections.abc import Sequence

from datasets import Dataset


def count_equal(pairs: Dataset) -> int:
    """Rows of pairs in which teacher and student gave the same answer, so that there was nothing to ask a preference."""
    names = ("chosen", "rejected", "preference", "chosen_source", "rejected_source")
    columns = pairs.select_columns(list(names)).with_format(None)
    return sum(
        preference is None and chosen == rejected and one != other
        for batch in columns.iter(batch_size=1000)
        for chosen, rejected, preference, one, other in zip(*(batch[name] for name in names), strict=True)
    )


def with_ties(rate: float | None, known: int, equal: int) -> float | None:
    """Mean P(teacher ≻ student) of all comparisons, from the `rate` of the `known` ones: P of two equal answers is ½."""
    return ((rate or 0.0) * known + 0.5 * equal) / (known + equal) if known + equal else None


def cumulative_regret(rates: Sequence[float | None]) -> float:
    """Σ_k (P(teacher ≻ student_k) − ½) over the rounds whose mean P is known."""
    return math.fsum(rate - 0.5 for rate in rates if rate is not None)


def regret_coefficient(regrets: Sequence[float]) -> float | None:
    """The c of c·√k that is closest, in the least squares, to the cumulative regrets of rounds k = 1, 2, …"""
    if not regrets:
        return None
    ks = range(1, len(regrets) + 1)
    return math.fsum(regret * math.sqrt(k) for k, regret in zip(ks, regrets, strict=True)) / math.fsum(ks)
