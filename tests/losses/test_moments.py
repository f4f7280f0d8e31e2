"""The chunked pass against plain loops over tokens and words, and what it promises of memory."""

import contextlib
import itertools
import shutil

import pytest
import torch
from trl.trainer.distillation_trainer import _chunked_divergence_loss as chunked_divergence_loss

from tests.losses.moment_cases import BOUND, SHAPED, Case, Recorder, assert_near
from trl_kd.losses.advantages import advantages
from trl_kd.losses.heads import Head
from trl_kd.losses.moments import MomentOutput, moment_matching


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    ("settings", "temperature"),
    [
        ({}, 1.0),
        ({"student": SHAPED, "bias": True}, 0.7),
        ({"teacher": SHAPED, "bias": True}, 1.9),
        ({"student": SHAPED, "teacher": (0.6, 2.5)}, 1.0),
        ({"tokens": 1, "words": 2, "widths": (1, 1, 1)}, 1.0),
    ],
    ids=["plain", "student-cap", "teacher-cap", "both-caps", "smallest"],
)
def test_values_and_gradients_equal_plain_loops(settings, temperature, beta, dtype):
    case = Case(dtype=dtype, **settings)
    exact = case.doubles()
    got = case.run(beta=beta, temperature=temperature)
    want = exact.run_reference(beta=beta, temperature=temperature)
    assert got.divergence_N.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, a, b in zip(MomentOutput._fields, got, want, strict=True):
        # The values are of float32's precision whatever the inputs': only a gradient is rounded to their dtype
        assert_near(a, b, torch.float32 if dtype == torch.bfloat16 else dtype, factor=2)
        assert a.requires_grad == (name in ("divergence_N", "gap_N", "q_gap_N"))
    gradients = torch.autograd.grad(case.total(got), case.leaves)
    for leaf, a, b in zip(case.leaves, gradients, torch.autograd.grad(exact.total(want), exact.leaves), strict=True):
        assert a.dtype == leaf.dtype
        assert_near(a, b, dtype)


def shares(tokens: int) -> torch.Tensor:
    """Total variation's share at each state, 0 and 1 among them."""
    return torch.linspace(0, 1, tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("settings", [{}, {"student": SHAPED, "teacher": (0.6, 2.5), "bias": True}])
@pytest.mark.parametrize("with_q", [False, True])
def test_total_variation_takes_its_share_of_the_divergence(with_q, settings, beta, dtype):
    case = Case(dtype=dtype, **settings)
    exact, share = case.doubles(), shares(6)
    got = case.run(with_q, beta=beta, temperature=0.8, variation_N=share)
    want = exact.run_reference(with_q, beta=beta, temperature=0.8, variation=share)
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, torch.float32 if dtype == torch.bfloat16 else dtype, factor=2)
    leaves, doubles = (x.leaves if with_q else x.leaves[:-1] for x in (case, exact))
    gradients = torch.autograd.grad(case.total(got), leaves)
    for a, b in zip(gradients, torch.autograd.grad(exact.total(want), doubles), strict=True):
        assert_near(a, b, dtype)
    plain = case.run(with_q, beta=beta, temperature=0.8)
    assert torch.equal(got.divergence_N[0], plain.divergence_N[0])
    assert 0 <= got.divergence_N[-1] <= 1


def test_a_student_that_is_its_teacher_gets_no_gradient_of_total_variation():
    case = Case(widths=(3, 3, 4))
    same = Head(case.hidden, case.weight), Head(case.hidden.detach(), case.weight.detach())
    out = moment_matching(*same, beta=0.0, variation_N=torch.ones(6))
    assert torch.equal(out.divergence_N, torch.zeros(6, dtype=torch.float64))
    gradients = torch.autograd.grad(out.divergence_N.sum(), [case.hidden, case.weight])
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@pytest.mark.parametrize("shift", [0.0, 18.0, -18.0])
@pytest.mark.parametrize("cap", [None, 40.0])
def test_the_gradient_of_total_variation_where_both_are_certain(cap, shift):
    """Of logits at other levels, as two models have them: in float32 π > μ is a matter of rounding for the certain word."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(400, 50, generator=generator, dtype=torch.float64)
    base[:, 0] += torch.linspace(11, 23, 400)
    ours, theirs = base + 0.01 * torch.randn(400, 50, generator=generator), base + shift

    def gradient(dtype):
        logits = ours.to(dtype).requires_grad_()
        student = Head(logits, torch.eye(50, dtype=dtype), None, 1.0, cap)
        teacher = Head(theirs.to(dtype), torch.eye(50, dtype=dtype), None, 1.0, cap)
        out = moment_matching(student, teacher, beta=0.0, variation_N=torch.ones(400), tile_bytes=9000)
        return torch.autograd.grad(out.divergence_N.sum(), logits)[0].double()

    assert (gradient(torch.float32) - gradient(torch.float64)).abs().max() < 0.02


def test_each_output_reaches_its_player_alone():
    case = Case()
    for name, expected in (
        ("divergence_N", [True, True, False]),
        ("gap_N", [True, True, False]),
        ("q_gap_N", [False, False, True]),
    ):
        gradients = torch.autograd.grad(
            getattr(case.run(), name).sum(), [case.hidden, case.weight, case.features], allow_unused=True
        )
        assert [g is not None and bool(g.abs().sum() > 0) for g in gradients] == expected


def test_the_teacher_and_the_embeddings_get_no_gradient():
    case = Case(bias=True)
    frozen = [case.t_hidden, case.t_weight, case.t_bias, case.embedding]
    for tensor in frozen:
        tensor.requires_grad_()
    case.total(case.run()).backward()
    assert [tensor.grad for tensor in frozen] == [None] * 4
    tied = moment_matching(*case.heads, case.features[0], case.weight[:, :4].detach(), q_bound=BOUND)
    assert torch.autograd.grad(tied.q_gap_N.sum(), case.weight, allow_unused=True) == (None,)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_two_backwards_equal_one(beta):
    case = Case(student=SHAPED)
    out = case.run(beta=beta)
    together = torch.autograd.grad(case.total(out), case.leaves, retain_graph=True)
    student = (case.upstream[0] * out.divergence_N + case.upstream[1] * out.gap_N).sum()
    apart = torch.autograd.grad(student, case.leaves[:2], retain_graph=True)
    adversary = torch.autograd.grad(-(case.upstream[2] * out.q_gap_N).sum(), case.leaves[2:])
    for a, b in zip(together, (*apart, *adversary), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gradcheck(beta):
    case = Case(tokens=2, words=5, student=SHAPED, bias=True)
    heads = case.heads

    def student(hidden, weight, bias):
        out = moment_matching(
            Head(hidden, weight, bias, *SHAPED),
            heads[1],
            case.features[0].detach(),
            case.embedding,
            q_bound=BOUND,
            beta=beta,
        )
        return out.divergence_N, out.gap_N

    def adversary(features):
        return moment_matching(*heads, features, case.embedding, q_bound=BOUND, beta=beta).q_gap_N

    assert torch.autograd.gradcheck(student, (case.hidden, case.weight, case.bias))
    assert torch.autograd.gradcheck(adversary, (case.features[0].detach().requires_grad_(),))


@pytest.mark.parametrize(("beta", "settings"), [(0.0, {}), (0.3, {"student": SHAPED}), (1.0, {"bias": True})])
@pytest.mark.parametrize("variation", [None, shares(9)], ids=["plain", "variation"])
def test_the_tiles_size_changes_only_the_rounding(variation, beta, settings):
    case = Case(tokens=9, words=300, **settings)
    whole = case.run(beta=beta, variation_N=variation)
    expected = torch.autograd.grad(case.total(whole), case.leaves)
    for tile_bytes in (1, 9000, 30_000, 2**30):
        out = case.run(beta=beta, variation_N=variation, tile_bytes=tile_bytes)
        for a, b in zip(out, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        for a, b in zip(torch.autograd.grad(case.total(out), case.leaves), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_masked_tokens_leave_no_trace(beta):
    """A token that no loss counts is the same as one that is not there."""
    case = Case(tokens=7, dtype=torch.float32)
    kept = torch.tensor([True, False, True, True, False, False, True])
    out = case.run(beta=beta)
    whole = torch.autograd.grad((case.total([o * kept for o in out[:3]])), case.leaves)
    short = moment_matching(
        Head(case.hidden[kept], case.weight),
        Head(case.t_hidden[kept], case.t_weight),
        case.features[0, kept],
        case.embedding,
        q_bound=BOUND,
        beta=beta,
    )
    total = sum(
        (sign * u[kept] * o).sum() for sign, u, o in zip((1, 1, -1), case.upstream[:3], short[:3], strict=True)
    )
    for a, b in zip(whole, torch.autograd.grad(total, case.leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("with_q", [False, True])
def test_the_divergence_is_trls(beta, with_q):
    case = Case(tokens=11, words=53, dtype=torch.float32, student=SHAPED, teacher=(0.8, 3.0), bias=True)
    expected, entropy, _ = chunked_divergence_loss(
        case.hidden.unsqueeze(0),
        case.t_hidden.unsqueeze(0),
        case.weight,
        case.t_weight,
        torch.ones(1, 11),
        beta=beta,
        num_items_in_batch=1,
        student_lm_head_bias=case.bias,
        teacher_lm_head_bias=case.t_bias,
        student_logit_scale=case.student[0],
        teacher_logit_scale=case.teacher[0],
        student_final_logit_softcapping=case.student[1],
        teacher_final_logit_softcapping=case.teacher[1],
        temperature=0.9,
    )
    q = (case.features[0], case.embedding) if with_q else ()
    out = moment_matching(*case.heads, *q, q_bound=BOUND, beta=beta, temperature=0.9)
    torch.testing.assert_close(out.divergence_N.sum(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy_N.sum(), entropy, rtol=1e-5, atol=1e-5)
    leaves = case.leaves[:3]
    for a, b in zip(
        torch.autograd.grad(out.divergence_N.sum(), leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_no_q_and_a_zero_q_give_no_gap():
    case = Case()
    absent = moment_matching(*case.heads, beta=1.0)
    zero = moment_matching(*case.heads, torch.zeros_like(case.features[0]), case.embedding, q_bound=BOUND)
    for out in (absent, zero):
        for name in ("gap_N", "q_gap_N", "q_abs_N", "q_saturation_N"):
            assert torch.equal(getattr(out, name), torch.zeros(6, dtype=torch.float64))
        torch.testing.assert_close(out.divergence_N, case.run().divergence_N, rtol=0, atol=1e-13)
    gradient = torch.autograd.grad(zero.gap_N.sum() + absent.gap_N.sum(), case.weight)[0]
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize(
    ("beta", "with_q", "variation", "products"),
    [
        (1.0, True, False, 9),
        (0.0, True, False, 9),
        (0.3, True, False, 11),
        (1.0, False, False, 6),
        (0.0, False, True, 8),
    ],
)
@pytest.mark.parametrize(("tokens", "words"), [(3000, 200), (30, 20_000)])
def test_nothing_of_tokens_times_words_and_no_product_too_many(tokens, words, beta, with_q, variation, products):
    case = Case(tokens, words, torch.float32, widths=(4, 4, 4))
    q = (case.features[0], case.embedding) if with_q else ()
    with Recorder() as recorder:
        share = shares(tokens) if variation else None
        out = moment_matching(*case.heads, *q, variation_N=share, q_bound=BOUND, beta=beta, tile_bytes=400_000)
        (out.divergence_N + out.gap_N - out.q_gap_N).sum().backward()
    assert recorder.elements <= max(100_000, 4 * max(tokens, words))
    assert recorder.elements < tokens * words / 4
    assert recorder.products == products * tokens * words * 4


@pytest.mark.parametrize(
    ("names", "products"), [(["divergence_N"], 7), (["gap_N"], 8), (["q_gap_N"], 7), (["divergence_N", "q_gap_N"], 9)]
)
def test_a_backward_projects_what_it_needs(names, products):
    """Three products forwards; then those of the models, that of Q where it counts, and one for each gradient."""
    case = Case(8, 100, torch.float32, widths=(4, 4, 4))
    with Recorder() as recorder:
        out = case.run()
        sum(getattr(out, name).sum() for name in names).backward()
    assert recorder.products == products * 8 * 100 * 4


def test_gradients_are_summed_in_float32_under_bfloat16():
    """With one tile and with thousands the weight's gradient is rounded to bfloat16 once."""
    case = Case(tokens=400, words=64, dtype=torch.bfloat16)
    many, one = (
        torch.autograd.grad(case.run(tile_bytes=size).divergence_N.sum(), [case.hidden, case.weight])
        for size in (5 * 64 * 4, 2**30)
    )
    exact = case.doubles()
    wanted = torch.autograd.grad(exact.run().divergence_N.sum(), [exact.hidden, exact.weight])
    for a, b, c in zip(many, one, wanted, strict=True):
        assert (a != b).float().mean() < 0.01
        torch.testing.assert_close(a.double(), c, rtol=2**-8, atol=1e-3)


def test_autocast_rounds_the_operands_and_nothing_else():
    case = Case(dtype=torch.float32, bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.run()
    gradients = torch.autograd.grad(case.total(got), case.leaves)
    rounded = Case(dtype=torch.bfloat16, bias=True)
    rounded.bias, rounded.t_bias = case.bias, case.t_bias
    want = rounded.run()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    for a, b in zip(gradients, torch.autograd.grad(rounded.total(want), rounded.leaves), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b.float(), rtol=2**-7, atol=1e-4)


def test_no_tokens_give_empty_outputs_and_zero_gradients():
    case = Case(tokens=0, bias=True)
    out = case.run(beta=0.3)
    assert all(o.shape == (0,) for o in out)
    for leaf, gradient in zip(case.leaves, torch.autograd.grad(case.total(out), case.leaves), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_padded_rows_take_no_part(beta):
    """Student, teacher and Q of 19, 23 and 25 rows for 17 words: as if the rows were not there."""
    case = Case(student=SHAPED, bias=True)
    exact = case.doubles()
    case.t_weight, case.t_bias = (torch.cat([x, 99 * torch.ones_like(x[:4])]) for x in (case.t_weight, case.t_bias))
    case.embedding = torch.cat([case.embedding, case.embedding[:6]])
    with pytest.raises(ValueError, match=r"vocabulary.*\[19, 23, 25\].*vocab_size"):
        case.run(beta=beta)
    with pytest.raises(ValueError, match="vocab_size=20.*19"):
        case.run(beta=beta, vocab_size=20)
    got = case.run(beta=beta, vocab_size=17, tile_bytes=3000)
    want = exact.run_reference(beta=beta, words=17)
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, torch.float64)
    gradients = torch.autograd.grad(case.total(got), case.leaves)
    for a, b in zip(gradients, torch.autograd.grad(exact.total(want), exact.leaves), strict=True):
        assert_near(a, b, torch.float64)
    assert torch.equal(gradients[1][17:], torch.zeros(2, 5, dtype=torch.float64))


def test_weights_may_be_whole_only_inside_gather():
    """As under ZeRO-3, where outside of it a parameter holds nothing."""
    case = Case(bias=True)
    expected = torch.autograd.grad(case.total(case.run()), case.leaves)
    baseline, other = case.heads[1], case.features
    expected_advantages = advantages(baseline, other, case.embedding, case.actions, q_bound=BOUND)
    # As DeepSpeed does: autograd notes a parameter's shape when its node is made, while it is whole, and a hook takes the
    # gradient away before autograd would add it to the empty parameter
    nodes = [x.expand_as(x).grad_fn for x in (case.weight, case.bias)]
    shared = {x: x.data for x in (case.weight, case.bias, case.t_weight, case.t_bias, case.embedding)}

    def part():
        for x in shared:
            x.data = torch.empty(0, dtype=x.dtype)

    entered = []

    @contextlib.contextmanager
    def gather():
        entered.append(True)
        for x, whole in shared.items():
            x.data = whole
        yield
        part()

    for x in (case.weight, case.bias):
        x.register_hook(lambda _, x=x: setattr(x, "data", shared[x]))
    part()
    case.total(case.run(gather=gather)).backward()
    a = advantages(baseline, other, case.embedding, case.actions, q_bound=BOUND, gather=gather)
    assert len(entered) == 3
    assert len(nodes) == 2
    for leaf, want in zip(case.leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, want, rtol=0, atol=1e-14)
    torch.testing.assert_close(a, expected_advantages, rtol=0, atol=1e-14)


@pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=3))[1:])
def test_only_what_trains_gets_a_gradient(frozen):
    """LoRA freezes the student's output layer; a step of one player leaves out the other."""
    case = Case()
    leaves = [case.hidden, case.weight, case.features]
    expected = torch.autograd.grad(case.total(case.run()), leaves)
    for leaf, still in zip(leaves, frozen, strict=True):
        leaf.requires_grad_(not still)
    out = case.run()
    if all(frozen):
        assert not out.divergence_N.requires_grad
        return
    case.total(out).backward()
    for leaf, still, want in zip(leaves, frozen, expected, strict=True):
        if still:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, want, rtol=0, atol=1e-14)


def test_torch_compile_traces_it_whole():
    torch._dynamo.reset()
    case = Case(dtype=torch.float32)
    expected = torch.autograd.grad(case.total(case.run(beta=0.3)), case.leaves)

    @torch.compile(fullgraph=True, backend="eager")
    def step(hidden, weight, features):
        student, teacher = Head(hidden, weight), Head(case.t_hidden, case.t_weight)
        return moment_matching(student, teacher, features, case.embedding, q_bound=BOUND, beta=0.3)[:3]

    out = step(case.hidden, case.weight, case.features[0])
    for a, b in zip(torch.autograd.grad(case.total(out), case.leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_tiles_equal_plain_ones():
    torch._dynamo.reset()
    case = Case(tokens=9, words=300, dtype=torch.float32, student=SHAPED, bias=True)
    outs = [case.run(tile_bytes=9000, compile_tiles=compiled) for compiled in (False, True)]
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(case.total(out), case.leaves) for out in outs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
