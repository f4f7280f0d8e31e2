"""What docs/method.md claims of the moment gap and the advantage, for every text of a small world, in float64."""

import itertools
import math

import pytest
import torch

from trl_kd.losses.advantages import advantages
from trl_kd.losses.heads import Head
from trl_kd.losses.moments import moment_matching


WORDS, BOUND = 3, 2.0


def table(logits_SV: torch.Tensor) -> Head:
    """A distribution for each state that is given by its logits."""
    return Head(logits_SV, torch.eye(WORDS, dtype=logits_SV.dtype))


def features(q_SV: torch.Tensor) -> torch.Tensor:
    """Features whose Q-function is the table, in (−B, B)."""
    return BOUND * torch.atanh(q_SV / BOUND)


class World:
    """Every state of texts of at most `horizon` words, where word 0 ends a text or does not, with random π, μ and Q."""

    def __init__(self, horizon: int, ends: bool, seed: int):
        generator = torch.Generator().manual_seed(seed)
        prefixes = [p for t in range(horizon) for p in itertools.product(range(WORDS), repeat=t)]
        states = [p for p in prefixes if not (ends and 0 in p)]
        self.index = {state: i for i, state in enumerate(states)}
        texts = [
            (*state, word)
            for state in states
            for word in range(WORDS)
            if len(state) == horizon - 1 or (ends and word == 0)
        ]
        self.texts = texts
        shape = len(states), WORDS
        self.pi, self.mu = (2 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        self.q = (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * 0.95 * BOUND

    def states_of(self, text: tuple[int, ...]) -> list[int]:
        return [self.index[text[:t]] for t in range(len(text))]

    def probability(self, text: tuple[int, ...], logits_SV: torch.Tensor) -> float:
        return math.prod(
            float(logits_SV[s].softmax(-1)[word]) for s, word in zip(self.states_of(text), text, strict=True)
        )

    def value(self, logits_SV: torch.Tensor, reward) -> float:
        """E of a function of the text, over all texts."""
        return sum(self.probability(text, logits_SV) * reward(text) for text in self.texts)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("horizon", "ends"), [(3, False), (4, False), (4, True)])
@pytest.mark.parametrize("policy", ["on", "off"])
def test_the_gap_of_returns_is_the_expected_moment_gap(policy, horizon, ends, seed):
    """On-policy with b = μ: J(μ; r) − J(π; r) = E_{y~π} Σ m. Off-policy with b = π: the same with E_{y~μ}."""
    world = World(horizon, ends, seed)
    student, teacher = table(world.pi), table(world.mu)
    gap = moment_matching(student, teacher, features(world.q), torch.eye(WORDS).double(), q_bound=BOUND).gap_N
    states = torch.arange(len(world.pi)).repeat_interleave(WORDS)
    everything = torch.arange(WORDS).repeat(len(world.pi))
    a = advantages(
        table((world.mu if policy == "on" else world.pi)[states]),
        features(world.q)[states].unsqueeze(0),
        torch.eye(WORDS).double(),
        everything,
        q_bound=BOUND,
    )[0].view(-1, WORDS)

    def reward(text):
        return sum(float(a[s, word]) for s, word in zip(world.states_of(text), text, strict=True))

    def moments(text):
        return sum(float(gap[s]) for s in world.states_of(text))

    assert sum(world.probability(text, world.pi) for text in world.texts) == pytest.approx(1, abs=1e-12)
    left = world.value(world.mu, reward) - world.value(world.pi, reward)
    right = world.value(world.pi if policy == "on" else world.mu, moments)
    assert abs(left) > 0.05
    assert left == pytest.approx(right, abs=1e-10)
    # The pairing matters: the other states do not give this gap
    other = world.value(world.mu if policy == "on" else world.pi, moments)
    assert abs(left - other) > 1e-3


def random_states(count: int = 40):
    generator = torch.Generator().manual_seed(0)
    pi, mu = (torch.randn(count, WORDS, generator=generator, dtype=torch.float64) for _ in range(2))
    q = (torch.rand(count, WORDS, generator=generator, dtype=torch.float64) - 0.5) * BOUND
    return pi, mu, q


def all_advantages(baseline, q):
    count = len(q)
    states, words = torch.arange(count).repeat_interleave(WORDS), torch.arange(WORDS).repeat(count)
    eye = torch.eye(WORDS, dtype=q.dtype)
    a = advantages(table(baseline[states]), features(q)[states].unsqueeze(0), eye, words, q_bound=BOUND)
    return a.view(count, WORDS)


def outputs(pi, mu, q, **settings):
    return moment_matching(
        table(pi), table(mu), features(q), torch.eye(WORDS, dtype=q.dtype), q_bound=BOUND, **settings
    )


def test_the_expected_advantage_under_its_baseline_is_zero():
    pi, _, q = random_states()
    expected = (pi.softmax(-1) * all_advantages(pi, q)).sum(-1)
    torch.testing.assert_close(expected, torch.zeros_like(expected), rtol=0, atol=1e-14)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_constant_added_to_a_states_logits_changes_nothing(beta):
    pi, mu, q = random_states()
    shift = torch.linspace(-300, 300, len(pi), dtype=torch.float64).unsqueeze(-1)
    for before, after in zip(
        outputs(pi, mu, q, beta=beta), outputs(pi + shift, mu - 2 * shift, q, beta=beta), strict=True
    ):
        torch.testing.assert_close(before, after, rtol=0, atol=1e-11)
    torch.testing.assert_close(all_advantages(pi, q), all_advantages(pi + shift, q), rtol=0, atol=1e-12)


def test_a_constant_added_to_a_states_q_changes_neither_gap_nor_advantage():
    """Exact for the values of Q. Its features do not shift so: B·tanh(·/B) lies between."""
    pi, mu, q = random_states()
    shift = torch.linspace(-0.4, 0.4, len(q), dtype=torch.float64).unsqueeze(-1) * BOUND
    assert float((q + shift).abs().max()) < BOUND
    before, after = outputs(pi, mu, q), outputs(pi, mu, q + shift)
    torch.testing.assert_close(before.gap_N, after.gap_N, rtol=0, atol=1e-12)
    torch.testing.assert_close(all_advantages(pi, q), all_advantages(pi, q + shift), rtol=0, atol=1e-12)
    assert float((before.q_abs_N - after.q_abs_N).abs().max()) > 0.1


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_student_that_is_its_teacher(beta):
    pi, _, q = random_states()
    logits = pi.clone().requires_grad_()
    out = outputs(logits, pi.clone(), q, beta=beta)
    assert out.gap_N.abs().max() == 0
    assert out.divergence_N.abs().max() < 1e-14
    gradient = torch.autograd.grad(out.divergence_N.sum(), logits)[0]
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)


def test_the_students_gradient_of_the_gap_is_that_of_the_expected_advantage():
    """−∇⟨π, Q⟩ = −π(a)·(Q(a) − ⟨π, Q⟩) for logits: the exact policy gradient within the state."""
    pi, mu, q = random_states()
    logits = pi.clone().requires_grad_()
    gradient = torch.autograd.grad(outputs(logits, mu, q).gap_N.sum(), logits)[0]
    torch.testing.assert_close(gradient, -pi.softmax(-1) * all_advantages(pi, q), rtol=0, atol=1e-13)


def test_bounds():
    pi, _, q = random_states()
    eye = torch.eye(WORDS, dtype=torch.float64)
    out = moment_matching(table(8 * pi), table(-8 * pi), 100 * torch.sign(q), eye, q_bound=BOUND)
    assert out.gap_N.abs().max() <= 2 * BOUND
    torch.testing.assert_close(out.q_saturation_N, torch.ones_like(out.q_saturation_N))
    torch.testing.assert_close(out.q_abs_N, torch.full_like(out.q_abs_N, BOUND))
