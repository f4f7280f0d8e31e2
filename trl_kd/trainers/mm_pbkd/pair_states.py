"""The states of pairs that Q reads, and what is summed over them."""

from typing import NamedTuple

import torch

from trl_kd.losses.heads import Head


class Baseline(NamedTuple):
    """A policy b under which advantages A(s, a) = Q(s, a) − ⟨b, Q(s, ·)⟩ are taken: "teacher" for on-policy states,
    "student" for the teacher's. `weight` is the share of its states."""

    who: str
    weight: float


class PairStates(NamedTuple):
    """
    The states of a micro-batch of pairs.

    Attributes:
        hidden_NH (`torch.Tensor` of shape `[N, H]`):
            The student's hidden states at the tokens of the responses.
        baselines (`list[Head]`):
            Each baseline at the same states.
        embedding_VE (`torch.Tensor` of shape `[V, E]`):
            The words' embeddings.
        actions_N, row_N (`torch.Tensor` of shape `[N]`):
            The words taken, and in which of the 2b responses.
        preference_b (`torch.Tensor` of shape `[b]`):
            P(chosen ≻ rejected). The chosen responses are the first b.
    """

    hidden_NH: torch.Tensor
    baselines: list[Head]
    embedding_VE: torch.Tensor
    actions_N: torch.Tensor
    row_N: torch.Tensor
    preference_b: torch.Tensor


class PairSums(NamedTuple):
    """
    Sums over pairs, each a scalar; over all processes, numbers. From `right` on of the Q that the student meets.

    Attributes:
        nll, nll_mle (`torch.Tensor`):
            Negative log-likelihoods of the labels in nats, under the adversary and under its twin.
        right, strict (`torch.Tensor`):
            Strict pairs that are ordered rightly, and all strict ones.
        words (`torch.Tensor`):
            Words of both responses.
        advantage, advantage_squared (`torch.Tensor`):
            Sums over those words.
    """

    nll: torch.Tensor
    nll_mle: torch.Tensor
    right: torch.Tensor
    strict: torch.Tensor
    words: torch.Tensor
    advantage: torch.Tensor
    advantage_squared: torch.Tensor
