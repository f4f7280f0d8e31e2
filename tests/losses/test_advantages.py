"""Advantages against plain loops over tokens and words."""

import pytest
import torch

from tests.losses.moment_cases import BOUND, PLAIN, SHAPED, Case, Recorder, assert_near
from tests.reference import moments as reference
from trl_kd.losses.advantages import advantages


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile_bytes", [None, 1000])
@pytest.mark.parametrize(("teacher", "temperature"), [(PLAIN, 1.0), (SHAPED, 0.7)])
def test_advantages_equal_plain_loops(teacher, temperature, tile_bytes, dtype):
    case = Case(tokens=4, words=130 if tile_bytes else 20, dtype=dtype, teacher=teacher, bias=True)
    case.actions[:2] = torch.tensor([0, len(case.weight) - 1])
    exact = case.doubles()
    got = advantages(
        case.heads[1],
        case.features,
        case.embedding,
        case.actions,
        q_bound=BOUND,
        temperature=temperature,
        tile_bytes=tile_bytes,
    )
    baseline = exact.t_hidden, exact.t_weight, exact.t_bias, *exact.teacher
    want = reference.advantages(
        baseline, exact.features, exact.embedding, case.actions, bound=BOUND, temperature=temperature
    )
    assert_near(got, want, torch.float32 if dtype == torch.bfloat16 else dtype)
    upstream = case.upstream[:2]
    a = torch.autograd.grad((upstream * got).sum(), case.features)[0]
    b = torch.autograd.grad((upstream * want).sum(), exact.features)[0]
    assert a.dtype == dtype
    assert_near(a, b, dtype)


def test_the_advantages_baseline_gets_no_gradient():
    case = Case()
    a = advantages(case.heads[0], case.features, case.embedding, case.actions, q_bound=BOUND)
    a.sum().backward()
    assert case.hidden.grad is None
    assert case.weight.grad is None
    assert case.features.grad.abs().sum() > 0


def test_the_advantages_hold_nothing_of_tokens_times_words_either():
    case = Case(3000, 200, torch.float32, widths=(4, 4, 4))
    with Recorder() as recorder:
        advantages(
            case.heads[1], case.features, case.embedding, case.actions, q_bound=BOUND, tile_bytes=400_000
        ).sum().backward()
    assert recorder.elements <= 100_000
    assert recorder.products == (3 + 5) * 3000 * 200 * 4


def test_padded_rows_take_no_part():
    case = Case(bias=True)
    exact = case.doubles()
    case.embedding = torch.cat([case.embedding, case.embedding[:6]])
    case.actions.clamp_(max=16)
    with pytest.raises(ValueError, match=r"vocabulary.*\[19, 25\].*vocab_size"):
        advantages(case.heads[1], case.features, case.embedding, case.actions, q_bound=BOUND)
    got = advantages(case.heads[1], case.features, case.embedding, case.actions, q_bound=BOUND, vocab_size=17)
    baseline = exact.t_hidden, exact.t_weight, exact.t_bias, *exact.teacher
    want = reference.advantages(baseline, exact.features, exact.embedding, case.actions, bound=BOUND, words=17)
    assert_near(got, want, torch.float64)


def test_no_tokens():
    case = Case(tokens=0, bias=True)
    a = advantages(case.heads[1], case.features, case.embedding, case.actions, q_bound=BOUND)
    assert a.shape == (2, 0)
    assert torch.autograd.grad(a.sum(), case.features)[0].shape == case.features.shape
