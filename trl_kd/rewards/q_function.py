"""The Q-function of white-box PbKD: a small map from the student's hidden states to the space of its words' embeddings."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


Q_HEADS = ("linear", "mlp", "adapter")
ADAPTER_WIDTH = 64


class QFunction(nn.Module):
    """
    Features g(s) with Q(s, a) = B·tanh(⟨g(s), e_a⟩ / B), e_a the embedding of word a (docs/method.md). Several Q-functions
    (an adversary and its maximum-likelihood twins) share a trunk and have an output layer each.

    Every output layer starts at zero, so that Q is zero and the student's first step is one of plain distillation. Inputs,
    embeddings and learning rates are scaled by the widths: a step of Adam with learning rate η changes Q at one (s, a) by at
    most about η, whatever the model's size.

    Args:
        kind (`str`):
            "linear": the output layer alone. "mlp": a hidden layer as wide as the student before it. "adapter": a hidden
            layer of 64 units, which for a wide student is far smaller than "linear".
        hidden_size (`int`):
            H, width of the student's hidden states.
        embedding_size (`int`):
            E, width of the words' embeddings.
        embedding_scale (`float`):
            Root mean square of the embeddings' entries, > 0.
        count (`int`):
            K, the number of Q-functions.
        generator (`torch.Generator`):
            Draws the hidden layer's weights, on the CPU, so that no other random stream is touched.
    """

    def __init__(
        self,
        kind: str,
        hidden_size: int,
        embedding_size: int,
        embedding_scale: float,
        count: int,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        width = {"linear": None, "mlp": hidden_size, "adapter": min(ADAPTER_WIDTH, hidden_size)}[kind]
        inputs = hidden_size + 1  # and a constant
        self.trunk: nn.Parameter | None = None
        if width is not None:
            weight = torch.randn(width, inputs, generator=generator, dtype=torch.float32) / math.sqrt(inputs)
            self.trunk = nn.Parameter(weight.to(dtype))
            inputs = width + 1
        self.outputs = nn.Parameter(torch.zeros(count, embedding_size, inputs, dtype=dtype))
        self.scale = 1 / (embedding_scale * math.sqrt(embedding_size * inputs))

    def forward(self, hidden_NH: torch.Tensor, which: Sequence[int], *, train_trunk: bool = True) -> torch.Tensor:
        """
        Args:
            hidden_NH (`torch.Tensor` of shape `[N, H]`):
                The student's last hidden states. They get no gradient.
            which (`Sequence[int]`):
                Of which Q-functions.
            train_trunk (`bool`, *optional*, defaults to `True`):
                Whether the trunk gets a gradient.

        Returns:
            `torch.Tensor` of shape `[len(which), N, E]`, in the dtype of `hidden_NH`, in which they meet the embeddings;
            what leads to them is computed in the parameters' dtype.
        """
        with torch.autocast(hidden_NH.device.type, enabled=False):
            x = hidden_NH.detach().to(self.outputs.dtype)
            x = _with_constant(F.rms_norm(x, x.shape[-1:]))
            if self.trunk is not None:
                trunk = self.trunk if train_trunk else self.trunk.detach()
                x = _with_constant(F.gelu(x @ trunk.t()))
            features = torch.stack([x @ self.outputs[k].t() for k in which]) * self.scale
            return features.to(hidden_NH.dtype)

    def parameter_groups(self, learning_rate: float) -> list[dict]:
        """For Adam: each layer's share of the learning rate, see above."""
        groups = [{"params": [self.outputs], "lr": learning_rate / math.sqrt(self.outputs[0].numel())}]
        if self.trunk is not None:
            groups.append({"params": [self.trunk], "lr": learning_rate / self.trunk.shape[1]})
        return groups


def _with_constant(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, 1), value=1.0)
