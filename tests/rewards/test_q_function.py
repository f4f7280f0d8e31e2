"""The Q-function's features: where it starts, how fast it learns at any width, and what it leaves alone."""

import math

import pytest
import torch
import torch.nn.functional as F

from trl_kd.rewards.q_function import ADAPTER_WIDTH, Q_HEADS, QFunction


def make(kind="linear", hidden=12, embedding=8, scale=0.5, count=2, seed=0, dtype=torch.float32) -> QFunction:
    return QFunction(kind, hidden, embedding, scale, count, torch.Generator().manual_seed(seed), dtype)


def stir(q: QFunction) -> QFunction:
    """With outputs that are not zero."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        q.outputs.copy_(torch.randn(q.outputs.shape, generator=generator))
    return q


@pytest.mark.parametrize("kind", Q_HEADS)
def test_it_starts_at_zero_and_is_linear_in_its_outputs(kind):
    q, hidden = make(kind, count=3), torch.randn(5, 12)
    found = q(hidden, [0, 2])
    assert found.shape == (2, 5, 8)
    assert not found.any()
    stir(q)
    found = q(hidden, [0, 1, 2])
    assert (q(hidden, [2, 0]) == found[[2, 0]]).all()
    assert len({float(row.sum()) for row in found}) == 3


def reference(q: QFunction, hidden: torch.Tensor, k: int) -> torch.Tensor:
    """Written out again, one state at a time."""
    rows = []
    for h in hidden.double():
        x = torch.cat([h / (h.square().mean() + torch.finfo(torch.float32).eps).sqrt(), torch.ones(1).double()])
        if q.trunk is not None:
            x = torch.cat([F.gelu(q.trunk.detach().double() @ x), torch.ones(1).double()])
        rows.append(q.outputs[k].detach().double() @ x * q.scale)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", Q_HEADS)
def test_values_equal_a_loop(kind):
    q, hidden = stir(make(kind)), 3 * torch.randn(4, 12)
    torch.testing.assert_close(q(hidden, [1])[0].double(), reference(q, hidden, 1), rtol=1e-5, atol=1e-6)


def test_the_hidden_layer_is_as_wide_as_its_kind_says():
    assert make("linear", hidden=200).trunk is None
    assert make("mlp", hidden=200).trunk.shape == (200, 201)
    assert make("adapter", hidden=200).trunk.shape == (ADAPTER_WIDTH, 201)
    assert make("adapter", hidden=200).outputs.shape == (2, 8, ADAPTER_WIDTH + 1)


def test_the_hidden_layer_comes_from_its_generator_alone():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, again, other = (make("mlp", seed=seed).trunk for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("kind", Q_HEADS)
def test_hidden_states_get_no_gradient_and_the_trunk_only_when_asked(kind):
    q, hidden = stir(make(kind)), torch.randn(5, 12, requires_grad=True)
    q(hidden, [0], train_trunk=False).sum().backward()
    assert hidden.grad is None
    assert q.outputs.grad[0].abs().sum() > 0
    assert not q.outputs.grad[1].any()
    if q.trunk is not None:
        assert q.trunk.grad is None
        q(hidden, [0]).sum().backward()
        assert q.trunk.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", Q_HEADS)
def test_the_scale_of_hidden_states_does_not_matter(kind):
    q, hidden = stir(make(kind)), torch.randn(5, 12)
    torch.testing.assert_close(q(1000 * hidden, [0]), q(hidden, [0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_are_rounded_last_to_the_dtype_of_the_hidden_states(dtype):
    q, hidden = stir(make("mlp")), torch.randn(5, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = q(hidden.to(dtype), [0])
    assert found.dtype == dtype
    assert torch.equal(found, q(hidden.to(dtype).float(), [0]).to(dtype))
    found.float().square().sum().backward()
    assert {p.grad.dtype for p in q.parameters()} == {torch.float32}


def test_double_precision():
    double, hidden = make("mlp", dtype=torch.float64), torch.randn(5, 12)
    assert double(hidden.double(), [0]).dtype == torch.float64
    assert {p.dtype for p in double.parameters()} == {torch.float64}


@pytest.mark.parametrize("kind", Q_HEADS)
@pytest.mark.parametrize(("width", "embedding_scale"), [(16, 1.0), (256, 0.02)])
def test_one_step_of_adam_moves_q_by_the_learning_rate_at_any_width(kind, width, embedding_scale):
    """At the state and word that it is about; at others by less."""
    torch.manual_seed(0)
    q = make(kind, width, width, embedding_scale)
    optimizer = torch.optim.Adam(q.parameter_groups(0.05))
    words, hidden = embedding_scale * torch.randn(50, width), torch.randn(20, width)
    (-q(hidden[:1], [0])[0] @ words[0]).sum().backward()
    optimizer.step()
    moved = (q(hidden, [0])[0] @ words.t()).detach()
    assert 0.2 * 0.05 < float(moved[0, 0]) <= 1.05 * 0.05
    assert float(moved.abs().mean()) < 0.4 * float(moved[0, 0])


def test_parameter_groups_hold_every_parameter_once():
    for kind in Q_HEADS:
        q = make(kind)
        groups = q.parameter_groups(1.0)
        assert [id(p) for group in groups for p in group["params"]] == [id(q.outputs), id(q.trunk)][: len(groups)]
        assert len(groups) == len(list(q.parameters()))
        assert groups[0]["lr"] == 1 / math.sqrt(q.outputs[0].numel())
