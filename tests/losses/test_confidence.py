"""The adversary over one row, against a search over a grid, at its limits, and in its order."""

import math
from itertools import pairwise

import pytest

from trl_kd.losses.confidence import imitation_advantage, optimistic_preference


LABELS = [0.0, 1e-6, 0.01, 0.2, 0.37, 0.5, 0.63, 0.8, 0.99, 1 - 1e-6, 1.0]
RADII = [0.0, 1e-12, 1e-4, 0.02, 0.05, 0.3, math.log(2), 1.0, 5.0, math.inf]


def nll(p: float, s: float) -> float:
    """Cross-entropy of a label p under the probability s, by its definition."""
    total = 0.0
    for weight, probability in ((p, s), (1 - p, 1 - s)):
        if weight > 0:
            total += math.inf if probability == 0 else -weight * math.log(probability)
    return total


@pytest.mark.parametrize("radius", [0.02, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("p", [0.0, 0.01, 0.2, 0.37, 0.5, 0.63, 0.8, 0.99, 1.0])
def test_it_is_the_largest_probability_of_a_grid_that_explains_the_label(p, radius):
    """The reward with margin Δ has s = σ(Δ); the set holds those whose NLL exceeds the label's entropy by ζ at most."""
    steps = 200_000
    grid = [i / steps for i in range(steps + 1)]
    allowed = [s for s in grid if nll(p, s) <= nll(p, p) + radius + 1e-15]
    assert optimistic_preference(p, radius) == pytest.approx(max(allowed), abs=1.5 / steps)


@pytest.mark.parametrize("radius", [r for r in RADII if 0 < r < math.inf])
@pytest.mark.parametrize("p", LABELS)
def test_the_constraint_binds(p, radius):
    s = optimistic_preference(p, radius)
    assert p <= s <= 1
    assert nll(p, max(s - 1e-9, p)) - nll(p, p) <= radius + 1e-15
    if s < 1 - 1e-9:
        assert nll(p, s + 1e-9) - nll(p, p) >= radius - 1e-15


@pytest.mark.parametrize("p", LABELS)
def test_limits(p):
    assert imitation_advantage(p, 0.0) == max(0.0, 2 * p - 1)
    assert imitation_advantage(p, math.inf) == 1.0
    assert imitation_advantage(None, 0.0) == 1.0


@pytest.mark.parametrize("radius", RADII)
def test_closed_forms(radius):
    assert imitation_advantage(1.0, radius) == 1.0
    assert imitation_advantage(0.0, radius) == pytest.approx(max(0.0, 1 - 2 * math.exp(-radius)), abs=1e-12)
    assert imitation_advantage(0.5, radius) == pytest.approx(math.sqrt(1 - math.exp(-2 * radius)), abs=1e-9)
    near = optimistic_preference(0.5 + 1e-9, radius)  # by bisection
    assert near == pytest.approx(optimistic_preference(0.5, radius), abs=1e-6)


def test_it_rises_in_the_label_and_in_the_radius():
    table = [[imitation_advantage(p, radius) for p in LABELS] for radius in RADII]
    for row in table:
        assert all(b >= a - 1e-9 for a, b in pairwise(row))
        assert all(0 <= a <= 1 for a in row)
    for column in zip(*table, strict=True):
        assert all(b >= a - 1e-9 for a, b in pairwise(column))
