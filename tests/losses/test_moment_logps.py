"""Log-probabilities of the words taken, which come with the chunked pass over the vocabulary."""

import shutil

import pytest
import torch

from tests.losses.moment_cases import BOUND, SHAPED, Case, Recorder, assert_near
from trl_kd.losses.heads import Head
from trl_kd.losses.moments import MomentOutput, moment_matching


BETAS = pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])


def assert_equal_to_plain_loops(case, dtype, **settings):
    """Values; gradients of all outputs together, and of the log-probabilities alone."""
    exact = case.doubles()
    got = case.run(actions_N=case.actions, **settings)
    settings.pop("tile_bytes", None)
    want = exact.run_reference(actions=case.actions, **settings)
    for name, a, b in zip(MomentOutput._fields, got, want, strict=True):
        assert_near(a, b, torch.float32 if dtype == torch.bfloat16 else dtype, factor=2)
        assert a.requires_grad == (name in ("divergence_N", "gap_N", "q_gap_N", "logps_N"))
    for total in (case.total, lambda out: (case.upstream[3] * out[6].double()).sum()):
        ours = torch.autograd.grad(total(got), case.leaves, retain_graph=True, materialize_grads=True)
        exacts = torch.autograd.grad(total(want), exact.leaves, retain_graph=True, materialize_grads=True)
        for leaf, a, b in zip(case.leaves, ours, exacts, strict=True):
            assert a.dtype == leaf.dtype
            assert_near(a, b, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@BETAS
@pytest.mark.parametrize(
    ("settings", "temperature", "with_q"),
    [
        ({}, 1.0, True),
        ({"bias": True}, 1.3, False),
        ({"student": SHAPED, "teacher": (0.6, 2.5), "bias": True}, 0.7, True),
        ({"student": SHAPED}, 1.9, False),
        ({"tokens": 1, "words": 2, "widths": (1, 1, 1)}, 1.0, True),
    ],
    ids=["plain", "bias-no-q", "caps", "cap-no-q", "smallest"],
)
def test_values_and_gradients_equal_plain_loops(settings, temperature, with_q, beta, dtype):
    case = Case(dtype=dtype, **settings)
    assert_equal_to_plain_loops(case, dtype, beta=beta, temperature=temperature, with_q=with_q)


@BETAS
def test_the_word_is_found_in_whichever_tile_it_is(beta):
    """The first and the last word, and those on both sides of a border of tiles of 64 words."""
    case = Case(tokens=5, words=130, student=SHAPED, bias=True)
    case.actions = torch.tensor([0, 63, 64, 128, 129])
    assert_equal_to_plain_loops(case, torch.float64, beta=beta, tile_bytes=1)


@BETAS
def test_padded_rows_take_no_part(beta):
    case = Case(student=SHAPED, bias=True)
    exact = case.doubles()
    case.weight = torch.cat([case.weight, case.weight[:2]]).detach().requires_grad_()
    case.bias = torch.cat([case.bias, case.bias[:2]]).detach().requires_grad_()
    case.actions.clamp_(max=16)[0] = 16
    got = case.run(beta=beta, vocab_size=17, actions_N=case.actions)
    want = exact.run_reference(beta=beta, words=17, actions=case.actions)
    assert_near(got.logps_N, want[6], torch.float64)
    ours = torch.autograd.grad(case.total(got), case.leaves)
    for a, b in zip(ours, torch.autograd.grad(exact.total(want), exact.leaves), strict=True):
        assert_near(a[: len(b)], b, torch.float64)
    assert torch.equal(ours[1][17:], torch.zeros(4, 5, dtype=torch.float64))


@BETAS
def test_gradcheck(beta):
    case = Case(tokens=3, words=5, student=SHAPED, bias=True)
    teacher, features = case.heads[1], case.features[0].detach()

    def student(hidden, weight, bias):
        head = Head(hidden, weight, bias, *SHAPED)
        settings = {"actions_N": case.actions, "q_bound": BOUND, "beta": beta, "temperature": 0.8}
        out = moment_matching(head, teacher, features, case.embedding, **settings)
        return out.divergence_N, out.gap_N, out.logps_N

    assert torch.autograd.gradcheck(student, (case.hidden, case.weight, case.bias))


@BETAS
def test_two_backwards_equal_one(beta):
    case = Case(student=SHAPED)
    out = case.run(beta=beta, actions_N=case.actions)
    together = torch.autograd.grad(case.total(out), case.leaves, retain_graph=True)
    first = torch.autograd.grad(case.total(out[:3]), case.leaves, retain_graph=True)
    second = torch.autograd.grad((case.upstream[3] * out.logps_N).sum(), case.leaves, materialize_grads=True)
    assert torch.equal(second[-1], torch.zeros_like(second[-1]))
    for a, b, c in zip(together, first, second, strict=True):
        torch.testing.assert_close(a, b + c, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("names", "with_q", "products"),
    [
        (["logps_N"], True, 7),
        (["divergence_N", "logps_N"], True, 7),
        (["divergence_N", "gap_N", "q_gap_N", "logps_N"], True, 9),
        (["divergence_N", "logps_N"], False, 6),
    ],
)
def test_no_product_more_and_nothing_of_tokens_times_words(names, with_q, products):
    case = Case(3000, 200, torch.float32, widths=(4, 4, 4))
    with Recorder() as recorder:
        out = case.run(with_q, actions_N=case.actions, tile_bytes=400_000)
        sum(getattr(out, name).sum() for name in names).backward()
    assert recorder.elements <= 100_000
    assert recorder.products == products * 3000 * 200 * 4


def test_who_does_not_ask_pays_nothing():
    """Without words the forward looks for none; without the gradient of their log-probabilities the backward neither."""
    case = Case(8, 100, torch.float32)
    with Recorder() as recorder:
        case.total(case.run()).backward()
    assert not {"gather", "scatter_add_", "clamp"} & set(recorder.calls)
    out = case.run(actions_N=case.actions)
    with Recorder() as recorder:
        case.total(out[:3]).backward()
    assert not {"gather", "scatter_add_", "clamp"} & set(recorder.calls)
    expected = {x: x.grad for x in case.leaves}
    for leaf in case.leaves:
        leaf.grad = None
    with Recorder() as recorder:
        case.total(case.run(actions_N=case.actions)).backward()
    assert recorder.calls["gather"] == recorder.calls["scatter_add_"] == 1
    assert not torch.equal(case.weight.grad, expected[case.weight])


def test_without_words_the_log_probabilities_are_zero_and_have_no_gradient():
    case = Case()
    for out in (case.run(), case.run(with_q=False)):
        assert torch.equal(out.logps_N, torch.zeros(6, dtype=torch.float64))
        assert not out.logps_N.requires_grad


@pytest.mark.parametrize("frozen", ["hidden", "weight", "all"])
def test_only_what_trains_gets_a_gradient(frozen):
    case = Case()
    leaves = [case.hidden, case.weight, case.features]
    expected = torch.autograd.grad(case.total(case.run(actions_N=case.actions)), leaves)
    still = [case.hidden, case.weight] if frozen == "all" else [getattr(case, frozen)]
    for leaf in still:
        leaf.requires_grad_(False)
    case.total(case.run(actions_N=case.actions)).backward()
    for leaf, want in zip(leaves, expected, strict=True):
        if any(leaf is x for x in still):
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, want, rtol=0, atol=1e-14)


def test_no_tokens():
    case = Case(tokens=0, bias=True)
    out = case.run(beta=0.3, actions_N=case.actions)
    assert out.logps_N.shape == (0,)
    for leaf, gradient in zip(case.leaves, torch.autograd.grad(case.total(out), case.leaves), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@BETAS
def test_autocast_rounds_the_operands_and_nothing_else(beta):
    case = Case(dtype=torch.float32, bias=True, student=SHAPED)
    rounded = Case(dtype=torch.bfloat16, bias=True, student=SHAPED)
    rounded.bias, rounded.t_bias = case.bias, case.t_bias
    settings = {"beta": beta, "temperature": 0.7}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.run(actions_N=case.actions, **settings)
    want = rounded.run(actions_N=case.actions, **settings)
    assert got.logps_N.dtype == torch.float32
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    exact = rounded.doubles()
    assert_near(got.logps_N, exact.run_reference(actions=case.actions, **settings)[6], torch.float32)
    ours = torch.autograd.grad(case.total(got), case.leaves)
    for a, b in zip(ours, torch.autograd.grad(rounded.total(want), rounded.leaves), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b.float(), rtol=2**-7, atol=1e-4)


def test_torch_compile_traces_it_whole():
    torch._dynamo.reset()
    case = Case(dtype=torch.float32)
    expected = torch.autograd.grad(case.total(case.run(beta=0.3, actions_N=case.actions)), case.leaves)

    @torch.compile(fullgraph=True, backend="eager")
    def step(hidden, weight, features, actions):
        student, teacher = Head(hidden, weight), Head(case.t_hidden, case.t_weight)
        settings = {"actions_N": actions, "q_bound": BOUND, "beta": 0.3}
        return tuple(moment_matching(student, teacher, features, case.embedding, **settings))

    out = step(case.hidden, case.weight, case.features[0], case.actions)
    for a, b in zip(torch.autograd.grad(case.total(out), case.leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_compiled_tiles_equal_plain_ones(beta):
    torch._dynamo.reset()
    case = Case(tokens=9, words=300, dtype=torch.float32, student=SHAPED, bias=True)
    case.actions[:4] = torch.tensor([0, 63, 64, 299])
    settings = {"beta": beta, "tile_bytes": 9000, "actions_N": case.actions}
    outs = [case.run(compile_tiles=compiled, **settings) for compiled in (False, True)]
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(case.total(out), case.leaves) for out in outs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
