import math

import pytest
import torch

from tests.reference import pbkd as reference
from trl_kd.losses.preference import bradley_terry_nll, label_entropy, sequence_logps


MARGINS = torch.tensor([-30.0, -2.5, -1e-3, 0.0, 0.7, 4.0, 30.0], dtype=torch.float64)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_nll_and_gradient_equal_the_definition(p):
    z = MARGINS.clone().requires_grad_()
    other = MARGINS.clone().requires_grad_()
    nll = bradley_terry_nll(z, torch.full_like(z, p))
    expected = torch.stack([reference.bradley_terry(value, p) for value in other[1:-1]])
    torch.testing.assert_close(nll[1:-1], expected)
    torch.testing.assert_close(
        torch.autograd.grad(nll[1:-1].sum(), z)[0], torch.autograd.grad(expected.sum(), other)[0]
    )
    assert nll.isfinite().all()  # where the logistic function itself has no digits left


def test_swapping_a_pair_and_its_label_changes_nothing():
    p = torch.linspace(0, 1, len(MARGINS), dtype=torch.float64)
    torch.testing.assert_close(bradley_terry_nll(MARGINS, p), bradley_terry_nll(-MARGINS, 1 - p))


def test_no_reward_explains_labels_better_than_their_entropy():
    for p in (0.0, 0.3, 0.5, 1.0):
        label = torch.tensor([p], dtype=torch.float64)
        best = torch.tensor([math.log(p / (1 - p)) if 0 < p < 1 else 700.0 * (2 * p - 1)], dtype=torch.float64)
        torch.testing.assert_close(bradley_terry_nll(best, label), label_entropy(label))
        assert (bradley_terry_nll(MARGINS, label.expand_as(MARGINS)) >= label_entropy(label) - 1e-12).all()


@pytest.mark.parametrize("ld_alpha", [None, 0.0, 0.4, 1.0])
def test_sequence_logps_weigh_the_tokens_past_the_shorter_response(ld_alpha):
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 1, 1]])
    logps = -torch.rand(4, 5, generator=generator, dtype=torch.float64) * mask
    chosen, rejected = sequence_logps(logps, mask, ld_alpha)
    for row, (a, b) in enumerate(((0, 2), (1, 3))):
        shared = min(int(mask[a].sum()), int(mask[b].sum()))
        for got, index in ((chosen[row], a), (rejected[row], b)):
            tokens = [logps[index, t] for t in range(5) if mask[index, t]]
            torch.testing.assert_close(got, reference.weighted_sum(tokens, shared, ld_alpha))
