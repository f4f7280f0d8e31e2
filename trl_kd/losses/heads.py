"""A model's output layer, and the settings that the losses over the whole vocabulary share."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch

from trl_kd.losses.tiles import Grid, OwnProjection, Projection, compute_dtype


@dataclass(frozen=True)
class Head:
    """
    A next-token distribution: hidden states and the output layer that they meet. Raw logits `logit_scale`·(h Wᵀ + b) become
    cap·tanh(raw / cap) where there is a cap, and the distribution is softmax(logits / temperature).

    Args:
        hidden_NH (`torch.Tensor` of shape `[N, H]`):
            Hidden states before the output layer.
        weight_VH (`torch.Tensor` of shape `[V, H]`):
            Weight of the output layer.
        bias_V (`torch.Tensor` of shape `[V]`, *optional*):
            Its bias.
        logit_scale (`float`, *optional*, defaults to `1.0`):
            Multiplier of the logits (Cohere, Granite).
        final_logit_softcapping (`float`, *optional*):
            Their cap (Gemma).
        own_logits (`Callable`, *optional*):
            For a model whose logits are none of this: gives them, `[n, V]`, of hidden states `[n, H]`, without a gradient.
            Only the number of rows of `weight_VH` counts then.
    """

    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None = None
    logit_scale: float = 1.0
    final_logit_softcapping: float | None = None
    own_logits: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.hidden_NH, self.weight_VH, self.bias_V

    @property
    def settings(self) -> "HeadSettings":
        return HeadSettings(self.logit_scale, self.final_logit_softcapping, self.own_logits)

    def logits(self) -> torch.Tensor:
        """The whole table `[N, V]`, in float32 (float64 if the hidden states are), as the losses make it in tiles."""
        precision = Precision.of(self.hidden_NH)
        projection = Spec((self.settings,), q_bound=1.0).model(0, self.tensors, precision)
        projection.load(slice(len(self.weight_VH)))
        out = self.hidden_NH.new_empty((len(self.hidden_NH), len(self.weight_VH)), dtype=precision.rest)
        return projection.project(slice(len(self.hidden_NH)), out)


class HeadSettings(NamedTuple):
    """What a [`Head`] has beside its tensors."""

    scale: float
    cap: float | None
    own_logits: Callable[[torch.Tensor], torch.Tensor] | None


class Precision(NamedTuple):
    """The dtype of each projection's operands, and of all the rest. Kept for the backward, where autocast is off."""

    operands: tuple[torch.dtype, ...]
    rest: torch.dtype

    @classmethod
    def of(cls, *hidden: torch.Tensor | None) -> "Precision":
        given = [h for h in hidden if h is not None]
        double = any(h.dtype == torch.float64 for h in given)
        return cls(tuple(compute_dtype(h) for h in given), torch.float64 if double else torch.float32)


class Spec(NamedTuple):
    """The settings of `moment_matching` and `advantages`. `heads`: those of each model."""

    heads: tuple[HeadSettings, ...]
    q_bound: float
    temperature: float = 1.0
    beta: float = 1.0
    vocab_size: int | None = None
    tile_bytes: int | None = None
    compile_tiles: bool = False
    gather: Callable[[], AbstractContextManager] = nullcontext

    def words(self, *weights: torch.Tensor | None) -> int:
        """V. To be called where the weights are whole."""
        rows = [len(weight) for weight in weights if weight is not None]
        if self.vocab_size is None and len(set(rows)) > 1:
            raise ValueError(
                f"The models and Q must have one vocabulary, but their weights have {rows} rows. If they pad the same words "
                "differently, give `vocab_size`, the number of words that they share."
            )
        if self.vocab_size is not None and self.vocab_size > min(rows):
            raise ValueError(
                f"`vocab_size={self.vocab_size}`, but the weights have {rows} rows: give at most {min(rows)}."
            )
        return self.vocab_size or rows[0]

    def model(self, index: int, tensors: Sequence, precision: Precision) -> Projection:
        hidden, weight, bias = tensors
        scale, cap, own = self.heads[index]
        if own is not None:
            return OwnProjection(hidden, own, precision.rest, self.temperature)
        return Projection(
            hidden, weight, bias, precision.operands[index], precision.rest, scale, cap, self.temperature
        )

    def q(self, features: torch.Tensor, embedding: torch.Tensor, precision: Precision) -> Projection:
        """B·tanh(⟨g, e⟩ / B) is a capped projection."""
        return Projection(features, embedding, None, precision.operands[-1], precision.rest, cap=self.q_bound)

    def grid(self, words: int, buffers: int, like: Projection) -> Grid:
        # A model's own logits come for all words at once
        whole_rows = any(head.own_logits is not None for head in self.heads)
        return Grid(len(like.hidden), words, buffers, like, self.tile_bytes, whole_rows)
