import math

import pytest
import torch

from trl_kd.losses.imitation import (
    CHOSEN,
    NO_TEACHER,
    REJECTED,
    generalized_cross_entropy,
    teacher_rows,
)


def test_gradient_reaches_the_teachers_response_alone():
    logps = torch.zeros(6, requires_grad=True)
    teacher_rows(logps, torch.tensor([CHOSEN, REJECTED, REJECTED])).sum().backward()
    assert logps.grad.tolist() == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]


def test_rows_keep_their_shape_whoever_wrote_them():
    values = torch.arange(24).view(4, 2, 3)
    for side in ([NO_TEACHER, NO_TEACHER], [CHOSEN, REJECTED], [REJECTED, REJECTED]):
        assert teacher_rows(values, torch.tensor(side)).shape == (2, 2, 3)
    assert torch.equal(teacher_rows(values, torch.tensor([CHOSEN, REJECTED])), torch.stack([values[0], values[3]]))


@pytest.mark.parametrize("q", [0.0, 1e-6, 0.3, 0.5, 1.0])
def test_generalized_cross_entropy_and_its_gradient(q):
    """Against the formula by itself, token by token, in float64."""
    probabilities = [1e-30, 1e-9, 0.01, 0.3, 0.999999, 1.0]
    logps = torch.tensor([math.log(p) for p in probabilities], dtype=torch.float64, requires_grad=True)
    losses = generalized_cross_entropy(logps, q)
    losses.sum().backward()
    for p, loss, gradient in zip(probabilities, losses.tolist(), logps.grad.tolist(), strict=True):
        expected = -math.log(p) if q == 0 else (1 - p**q) / q
        assert loss == pytest.approx(expected, rel=1e-5, abs=1e-9)
        assert gradient == pytest.approx(-(p**q), rel=1e-12)


def test_small_q_goes_over_into_the_log_likelihood():
    logps = -torch.rand(100, dtype=torch.float64) * 10
    torch.testing.assert_close(generalized_cross_entropy(logps, 1e-9), -logps, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_generalized_cross_entropy_is_finite_at_both_ends(dtype):
    logps = torch.tensor([0.0, -1e-8, -50.0, -1e4], dtype=dtype, requires_grad=True)
    for q in (0.0, 0.5, 1.0):
        (gradient,) = torch.autograd.grad(generalized_cross_entropy(logps, q).sum(), logps)
        assert gradient.isfinite().all()
        assert (generalized_cross_entropy(logps, q) >= 0).all()
