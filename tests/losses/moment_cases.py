"""Random models and Q-functions for the tests of moment matching and of advantages."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.reference import moments as reference
from trl_kd.losses.heads import Head
from trl_kd.losses.moments import MomentOutput, moment_matching


PLAIN = (1.0, None)
SHAPED = (1.7, 4.0)
BOUND = 1.5
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}


class Case:
    """Random tensors of a student, a teacher and K = 2 Q-functions. All widths differ."""

    def __init__(
        self, tokens=6, words=19, dtype=torch.float64, student=PLAIN, teacher=PLAIN, bias=False, widths=(5, 3, 4)
    ):
        generator = torch.Generator().manual_seed(tokens * 1000 + words)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        ours, theirs, q = widths
        self.hidden, self.weight = normal(tokens, ours).requires_grad_(), normal(words, ours).requires_grad_()
        self.bias = normal(words).requires_grad_() if bias else None
        self.t_hidden, self.t_weight = normal(tokens, theirs), normal(words, theirs)
        self.t_bias = normal(words) if bias else None
        self.features, self.embedding = normal(2, tokens, q).requires_grad_(), normal(words, q)
        self.actions = torch.randint(0, words, (tokens,), generator=generator)
        self.student, self.teacher = student, teacher
        self.upstream = torch.randn(4, tokens, generator=generator, dtype=torch.float64)

    @property
    def heads(self) -> tuple[Head, Head]:
        return (
            Head(self.hidden, self.weight, self.bias, *self.student),
            Head(self.t_hidden, self.t_weight, self.t_bias, *self.teacher),
        )

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias, self.features) if x is not None]

    def run(self, with_q=True, **settings) -> MomentOutput:
        q = (self.features[0], self.embedding) if with_q else ()
        return moment_matching(*self.heads, *q, q_bound=BOUND, **settings)

    def doubles(self) -> "Case":
        """The same numbers in float64, on leaves of their own."""
        other = object.__new__(Case)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value = value.detach().double().requires_grad_(value.requires_grad)
            setattr(other, name, value)
        return other

    def run_reference(self, with_q=True, **settings) -> list[torch.Tensor]:
        models = (
            (self.hidden, self.weight, self.bias, *self.student),
            (self.t_hidden, self.t_weight, self.t_bias, *self.teacher),
        )
        features = self.features[0] if with_q else None
        return reference.moments(*models, features, self.embedding, bound=BOUND, **settings)

    def total(self, outputs) -> torch.Tensor:
        """Every token with a weight of its own, the third output with the other sign, and `logps_N` where it is."""
        outputs = *outputs[:3], *outputs[6:]
        signs = (1, 1, -1, 1)[: len(outputs)]
        weighted = (s * u * o.double() for s, u, o in zip(signs, self.upstream, outputs, strict=False))
        return sum(weighted).sum()


def assert_near(got, want, dtype, factor=1.0):
    tolerance = factor * TOLERANCE[dtype]
    assert got.shape == want.shape
    torch.testing.assert_close(
        got.double(), want.double(), rtol=tolerance, atol=tolerance * max(1.0, float(want.detach().abs().max()))
    )


class Recorder(TorchDispatchMode):
    """Remembers the most elements of any tensor, and counts calls and the multiplications of all products."""

    def __init__(self):
        super().__init__()
        self.elements, self.products, self.calls = 0, 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        if name in ("mm", "addmm_", "addmm"):
            left, right = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.products += left.shape[0] * left.shape[1] * right.shape[1]
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result
