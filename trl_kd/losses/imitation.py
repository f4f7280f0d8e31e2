"""The imitation term: which rows of a batch of pairs hold the teacher's text, and the loss of its tokens."""

import torch


NO_TEACHER, CHOSEN, REJECTED = 0, 1, 2
"""Codes of `side_B`: which response of a pair the teacher wrote."""


def teacher_rows(values_2B: torch.Tensor, side_B: torch.Tensor) -> torch.Tensor:
    """
    The values of the teacher's response in each pair.

    Args:
        values_2B (`torch.Tensor` of shape `[2B, ...]`):
            One value for each response, chosen ones first.
        side_B (`torch.Tensor` of shape `[B]`):
            `NO_TEACHER`, `CHOSEN` or `REJECTED`.

    Returns:
        `torch.Tensor` of shape `[B, ...]`. A pair without a teacher's text has its chosen response's value, to be masked:
        the shape must not depend on the data, since ranks run in step.
    """
    chosen, rejected = values_2B.chunk(2)
    is_rejected = (side_B == REJECTED).view(-1, *[1] * (chosen.dim() - 1))
    return torch.where(is_rejected, rejected, chosen)


def generalized_cross_entropy(logps: torch.Tensor, q: float) -> torch.Tensor:
    """
    Generalised cross-entropy ℓ_q(π) = (1 − π^q)/q of each token (https://huggingface.co/papers/1805.07836, eq. 6): the
    adversary over one state with a bounded Q, on a sample of the teacher (docs/method.md, "The adversary over one state").

    Its gradient is −π^q·∇log π: the nearer q is to 1, the less a token counts that the student finds unlikely.

    Args:
        logps (`torch.Tensor`):
            log π of the tokens, at most 0, of any shape.
        q (`float`):
            In [0, 1]. 0 is −log π in nats, 1 is 1 − π (total variation).

    Returns:
        `torch.Tensor` of the same shape, in [0, 1/q].
    """
    return -logps if q == 0 else -torch.expm1(q * logps) / q


def imitation_losses(logps_BT: torch.Tensor, is_end_BT: torch.Tensor, q: float) -> torch.Tensor:
    """
    ℓ_q of each token, but −log π of end tokens: with q > 0 a rare one, such as the end of an answer, would hardly be learnt.

    Args:
        logps_BT (`torch.Tensor` of shape `[B, T]`):
            log π of the tokens, at most 0. Zero has no loss.
        is_end_BT (`torch.Tensor` of shape `[B, T]`):
            Whether it is an end token.
        q (`float`):
            In [0, 1], see [`generalized_cross_entropy`].

    Returns:
        `torch.Tensor` of shape `[B, T]`.
    """
    if q == 0:
        return -logps_BT
    return torch.where(is_end_BT, -logps_BT, generalized_cross_entropy(logps_BT, q))
