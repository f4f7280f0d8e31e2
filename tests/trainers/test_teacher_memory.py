"""The white-box term never holds the logits of all tokens at once."""

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from trl.trainer.distillation_trainer import _chunked_divergence_loss as chunked_divergence_loss

from tests.conftest import make_model, save_tiny
from trl_kd import PbKDConfig, PbKDTrainer


TILE_WORDS = 32768
"""Words that TRL projects at once."""

WORDS = 4 * TILE_WORDS
LONG = "every word of it is scored"
ROWS = [
    row
    for number in range(4)
    for row in (
        {"prompt": f"1{number}", "chosen": LONG, "rejected": LONG[2:], "preference": 1.0, "teacher_side": "chosen"},
        {
            "prompt": f"{number}",
            "chosen": LONG[3:],
            "rejected": LONG[1:],
            "preference": None,
            "teacher_side": "rejected",
        },
        {"prompt": f"3{number}", "chosen": LONG[5:], "rejected": LONG[9:], "preference": 0.3, "teacher_side": None},
    )
]
"""Of different lengths, a third without a teacher: the masks have zeros in front, behind, and all along a row."""


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor made while it is on."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def divergence(hidden, head, teacher_hidden, teacher_head, mask=None):
    mask = torch.ones(hidden.shape[:2]) if mask is None else mask
    total, _, _ = chunked_divergence_loss(
        hidden, teacher_hidden, head, teacher_head, mask, beta=0.0, num_items_in_batch=1
    )
    return total


@pytest.fixture(scope="module")
def many_words(tmp_path_factory) -> tuple[str, str]:
    """A student and a teacher with four tiles of words and next to no hidden units."""
    folders = tmp_path_factory.mktemp("many_words")
    tiny = {"vocab_size": WORDS, "num_hidden_layers": 1, "tie_word_embeddings": True, "intermediate_size": 8}
    sizes = {"student": 4, "teacher": 8}
    student, teacher = (
        save_tiny(folders / name, seed=seed, hidden_size=size, **tiny)
        for seed, (name, size) in enumerate(sizes.items())
    )
    return student, teacher


@pytest.fixture
def trainer(many_words, settings):
    student, teacher = many_words
    args = PbKDConfig(**settings, imitation="token", teacher_model_name_or_path=teacher, dual_init=1.0)
    return PbKDTrainer(model=student, args=args, train_dataset=Dataset.from_list(ROWS))


def test_no_logits_of_all_tokens_in_a_step_of_the_trainer(trainer):
    """Forward, loss and backward of token imitation, with the forwards of the reference and of the preference loss."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    sequences, length = batch["input_ids"].shape
    chosen_BT, rejected_BT = batch["completion_mask"].chunk(2)
    taught = chosen_BT[::3].sum() + rejected_BT[1::3].sum()
    trainer.model.train()
    with LargestTensor() as largest:
        trainer.compute_loss(trainer.model, batch).backward()
    assert trainer._metrics["train"]["entropy"]  # TRL's loss was there
    # Of all sequences TRL projects a tile of words at a time; the teacher's responses alone, by all words, are more
    assert largest.elements <= sequences * (length - 1) * TILE_WORDS < int(taught) * WORDS


@pytest.mark.parametrize(("tokens", "vocabulary"), [(9000, 50), (40, 100_000)])
def test_no_tensor_of_tokens_times_vocabulary(tokens, vocabulary):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, tokens, 4, generator=generator, requires_grad=True)
    head = torch.randn(vocabulary, 4, generator=generator, requires_grad=True)
    other = torch.randn(1, tokens, 4, generator=generator), torch.randn(vocabulary, 4, generator=generator)
    with LargestTensor() as largest:
        divergence(hidden, head, *other).backward()
    # The tile's size is fixed: at most 4,096 tokens by 32,768 words, whatever the batch
    tile = min(tokens, 4096) * TILE_WORDS
    assert largest.elements <= tile
    if vocabulary > TILE_WORDS:
        assert largest.elements < tokens * vocabulary


@pytest.mark.parametrize("masked", ["none", "some", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 7), (33, 50), (5, 40_000)])
def test_value_and_gradient_equal_the_whole_logits(dtype, tokens, vocabulary, masked):
    generator = torch.Generator().manual_seed(1)
    hidden, other = (torch.randn(1, tokens, 8, generator=generator).to(dtype) for _ in range(2))
    head, other_head = (torch.randn(vocabulary, 8, generator=generator).to(dtype) for _ in range(2))
    keep = {"none": torch.ones(1, tokens), "all": torch.zeros(1, tokens)}
    mask = keep[masked] if masked in keep else (torch.rand(1, tokens, generator=generator) < 0.5).float()
    leaves = [t.clone().requires_grad_() for t in (hidden, head)]
    loss = divergence(*leaves, other, other_head, mask)
    doubles = [t.double().clone().requires_grad_() for t in (hidden, head)]
    log_pi = (doubles[0] @ doubles[1].T).log_softmax(-1)
    log_mu = (other.double() @ other_head.double().T).log_softmax(-1)
    expected = ((log_mu.exp() * (log_mu - log_pi)).sum(-1) * mask).sum()
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
