"""Counting in bounded memory, and intervals that say how far to trust a share."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping


_Z = 1.959964
_QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9}


def wilson_interval(share: float, count: float, z: float = _Z) -> tuple[float, float]:
    """Wilson's score interval of a binomial share, which stays inside [0, 1] and is sound near its ends.

    Args:
        share (`float`):
            Observed share, in [0, 1].
        count (`float`):
            Number of independent trials, above 0; not whole where it is an effective number.
        z (`float`, *optional*, defaults to `1.959964`):
            Quantile of the normal distribution; the default gives 95 %.

    Returns:
        `tuple[float, float]`: lower and upper end.
    """
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def clustered_interval(sums: Mapping[str, float], z: float = _Z) -> tuple[float, float]:
    """
    95 % interval of the mean of values in [0, 1], of which those of one prompt may depend on each other.

    It is Wilson's interval at an effective number of trials n. With one hard label (0 or 1) a prompt, n is the number of
    prompts, exactly. Ties and soft labels vary less than hard ones, which raises n; rows of one prompt that go the same
    way lower it: n = m(1 − m)/v − z², where v is the variance of the mean m over whole prompts (a ratio estimate). Both
    are taken as if z²/2 ≈ 2 further prompts had been all won and as many all lost (Agresti & Coull, 1998), so that a few
    rows that happen to agree are not taken for certainty.

    Args:
        sums (`Mapping[str, float]`):
            Sums over prompts with nₖ rows that add up to Sₖ: `prompts` (Σ1, at least 1), `rows` (Σnₖ), `won` (ΣSₖ),
            `rows_squared` (Σnₖ²), `won_squared` (ΣSₖ²) and `rows_won` (ΣnₖSₖ).
        z (`float`, *optional*, defaults to `1.959964`):
            Quantile of the normal distribution.

    Returns:
        `tuple[float, float]`: lower and upper end.
    """
    size = sums["rows"] / sums["prompts"]  # of each prompt that is added
    rows = sums["rows"] + z * z * size
    mean = (sums["won"] + z * z / 2 * size) / rows
    squares = sums["won_squared"] - 2 * mean * sums["rows_won"] + mean * mean * sums["rows_squared"]
    squares += z * z / 2 * size * size * ((1 - mean) ** 2 + mean**2)
    count = mean * (1 - mean) * rows * rows / squares - z * z
    # A few prompts with most of the rows can be worth less than nothing by this count
    return wilson_interval(sums["won"] / sums["rows"], max(count, 1.0), z)


class DistinctCounter:
    """
    Counts distinct values in bounded memory: exactly up to `2 * size`, beyond that by the `size` smallest of their hashes
    (k minimum values), with a relative standard error of 1/√size. The count depends on the values alone, not on their
    order or on how they were spread over counters that are merged.
    """

    def __init__(self, size: int = 1 << 16):
        self.size = size
        self.hashes: set[int] = set()
        self.limit = 1 << 64

    def add(self, value: str) -> None:
        hashed = hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        number = int.from_bytes(hashed, "big")
        if number < self.limit:
            self.hashes.add(number)
            if len(self.hashes) > 2 * self.size:
                self._shrink()

    def _shrink(self) -> None:
        self.hashes = set(sorted(self.hashes)[: self.size])
        self.limit = max(self.hashes) + 1

    def merge(self, other: "DistinctCounter") -> None:
        self.limit = min(self.limit, other.limit)
        self.hashes = {number for number in self.hashes | other.hashes if number < self.limit}
        if len(self.hashes) > 2 * self.size:
            self._shrink()

    @property
    def exact(self) -> bool:
        return self.limit == 1 << 64

    def __len__(self) -> int:
        if self.exact:
            return len(self.hashes)
        largest = sorted(self.hashes)[self.size - 1]
        return round((self.size - 1) * (1 << 64) / largest)


class Lengths:
    """A histogram of lengths, with the mean exact and quantiles within 1 %: a bucket keeps a length's seven highest bits."""

    def __init__(self):
        self.total = 0
        self.buckets: Counter[int] = Counter()

    def add(self, lengths: list[int]) -> None:
        self.total += sum(lengths)
        self.buckets.update([n if n < 128 else n >> (n.bit_length() - 7) << (n.bit_length() - 7) for n in lengths])

    def merge(self, other: "Lengths") -> None:
        self.total += other.total
        self.buckets.update(other.buckets)

    def summary(self) -> dict[str, float] | None:
        """`mean`, `p10`, `median` and `p90`; `None` without any length."""
        count = self.buckets.total()
        return (
            {"mean": self.total / count} | {k: self._quantile(q, count) for k, q in _QUANTILES.items()}
            if count
            else None
        )

    def _quantile(self, share: float, count: int) -> float:
        seen = 0
        for low in sorted(self.buckets):
            seen += self.buckets[low]
            if seen >= share * count:
                break
        return low + ((1 << max(low.bit_length() - 7, 0)) - 1) / 2  # the middle of the bucket's whole numbers
