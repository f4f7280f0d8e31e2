"""The white-box term never holds the logits of all tokens at once."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import make_model
from trl_kd._trl import chunked_divergence_loss


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor made while it is on."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def divergence(hidden, head, teacher_hidden, teacher_head):
    mask = torch.ones(hidden.shape[:2])
    total, _, _ = chunked_divergence_loss(
        hidden, teacher_hidden, head, teacher_head, mask, beta=0.0, num_items_in_batch=1
    )
    return total


@pytest.mark.parametrize(("tokens", "vocabulary"), [(9000, 50), (40, 100_000)])
def test_no_tensor_of_tokens_times_vocabulary(tokens, vocabulary):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, tokens, 4, generator=generator, requires_grad=True)
    head = torch.randn(vocabulary, 4, generator=generator, requires_grad=True)
    other = torch.randn(1, tokens, 4, generator=generator), torch.randn(vocabulary, 4, generator=generator)
    with LargestTensor() as largest:
        divergence(hidden, head, *other).backward()
    # The tile's size is fixed: at most 4,096 tokens by 32,768 words, whatever the batch
    tile = min(tokens, 4096) * 32768
    assert largest.elements <= tile
    if vocabulary > 32768:
        assert largest.elements < tokens * vocabulary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 7), (33, 50), (5, 40_000)])
def test_value_and_gradient_equal_the_whole_logits(dtype, tokens, vocabulary):
    generator = torch.Generator().manual_seed(1)
    hidden, other = (torch.randn(1, tokens, 8, generator=generator).to(dtype) for _ in range(2))
    head, other_head = (torch.randn(vocabulary, 8, generator=generator).to(dtype) for _ in range(2))
    leaves = [t.clone().requires_grad_() for t in (hidden, head)]
    loss = divergence(*leaves, other, other_head)
    doubles = [t.double().clone().requires_grad_() for t in (hidden, head)]
    log_pi = (doubles[0] @ doubles[1].T).log_softmax(-1)
    log_mu = (other.double() @ other_head.double().T).log_softmax(-1)
    expected = (log_mu.exp() * (log_mu - log_pi)).sum()
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    for got, want in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, doubles), strict=True):
        torch.testing.assert_close(
            got.double(), want, rtol=5 * tolerance, atol=5 * tolerance * float(want.abs().max())
        )


def test_no_teacher_text_in_the_batch_is_a_zero_with_a_gradient():
    """Under FSDP a rank without a teacher's text must still take part in the backward."""
    hidden = torch.randn(1, 0, 8, requires_grad=True)
    head = make_model().lm_head.weight[:, :8].detach().clone().requires_grad_()
    loss = divergence(hidden, head, torch.randn(1, 0, 8), torch.randn(len(head), 8))
    loss.backward()
    assert float(loss) == 0.0
    assert hidden.grad is not None
