import json
import math

import pytest

from trl_kd.losses.dual import DualVariable, theory_radius


def test_dual_follows_the_violation_and_stays_in_its_bounds():
    dual = DualVariable(value=1.0, learning_rate=0.5, maximum=2.0, target=0.3, radius=0.1)
    assert dual.violation(0.6) == pytest.approx(0.2)
    dual.step(dual.violation(0.6))
    assert dual.value == pytest.approx(1.1)
    dual.step(100.0)
    assert dual.value == 2.0
    dual.step(-100.0)
    assert dual.value == 0.0
    assert dual.history == [pytest.approx(1.1), 2.0, 0.0]


def test_fixed_dual_does_not_move_nor_warn():
    dual = DualVariable(value=10.0, learning_rate=0.0, maximum=10.0)
    assert not any(dual.step(5.0) for _ in range(200))
    assert dual.value == 10.0


def test_cap_is_reported_once_and_only_after_fifty_steps_in_a_row():
    dual = DualVariable(value=0.0, learning_rate=1.0, maximum=1.0)
    said = [dual.step(1.0) for _ in range(49)]
    said.append(dual.step(-1.0))  # leaves the cap: the count starts again
    said += [dual.step(1.0) for _ in range(150)]
    assert said.count(True) == 1
    assert said.index(True) == 50 + 49


def test_state_survives_json_exactly():
    dual = DualVariable(value=1 / 3, learning_rate=0.1)
    for violation in (0.1, 0.7, -1e-9):
        dual.step(violation)
    other = DualVariable(value=0.0, learning_rate=0.1)
    other.load_state_dict(json.loads(json.dumps(dual.state_dict())))
    assert (other.value, other.history, other.steps_at_cap) == (dual.value, dual.history, dual.steps_at_cap)


def test_theory_radius():
    assert theory_radius(1300) == pytest.approx(math.log(1300 / 0.05) / 1300)
    assert theory_radius(1300) == pytest.approx(0.008, abs=5e-4)
