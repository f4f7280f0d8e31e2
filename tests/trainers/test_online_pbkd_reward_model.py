"""The reward model of `OnlinePbKDTrainer`: what it starts from, how it reads a row, and what is told of it."""

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from tests.conftest import make_model
from trl_kd.rewards.reward_model import RewardModel, from_student


# ---- How it reads a row --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [0, 1])
def test_a_row_is_read_at_its_last_token(pad):
    """The end token too, be it the padding or not."""
    student = make_model()
    reward = RewardModel(from_student(student), bound=5.0, lora_r=0, pad_token_id=pad)
    torch.nn.init.normal_(reward.heads.mle.weight)
    rows = [[3, 4, 5, 1], [3, 4, 5], [6, 7, 8, 9, 10, 1]]
    found = reward(rows)[:, 0]
    for row, value in zip(rows, found, strict=True):
        feature = student.model(torch.tensor([row])).last_hidden_state[0, -1]
        expected = 5 * torch.tanh(reward.heads.mle(feature)[0] / 5)
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    assert abs(found[0] - found[1]) > 1e-3


def make_opt(dropout: float) -> OPTForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=20, num_attention_heads=2, dropout=dropout, **sizes))


@pytest.mark.parametrize("student", [make_model(attention_dropout=0.5), make_opt(0.5)], ids=["Llama", "OPT"])
def test_gradient_checkpointing_recomputes_without_dropout(student):
    model = from_student(student)
    model.gradient_checkpointing_enable()
    reward = RewardModel(model, bound=5.0, lora_r=0, pad_token_id=0)
    torch.nn.init.normal_(reward.heads.mle.weight)
    attentions = [module for name, module in model.named_modules() if name.endswith("self_attn")]
    forwards = []
    for module in attentions:
        module.register_forward_hook(lambda *args: forwards.append(1))
    first, second = reward([[3, 4, 5]]), reward([[3, 4, 5]])
    assert torch.equal(first, second)
    assert len(forwards) == 4
    second.sum().backward()
    assert len(forwards) == 6
