"""Bradley–Terry likelihood of preference labels, hard or soft."""

import torch
import torch.nn.functional as F


def bradley_terry_nll(margin_B: torch.Tensor, preference_B: torch.Tensor) -> torch.Tensor:
    """
    Negative log-likelihood of preference labels under Bradley–Terry, in nats.

        −p·log σ(z) − (1−p)·log σ(−z) = −log σ(z) + (1−p)·z

    with z = r(x, y⁺) − r(x, y⁻); for DPO's implicit reward z = β·(log π/π_ref(y⁺) − log π/π_ref(y⁻))
    (https://huggingface.co/papers/2305.18290, eq. 7; soft labels as in its eq. 1).

    Args:
        margin_B (`torch.Tensor` of shape `[B]`):
            z, the reward of the chosen response less that of the rejected one.
        preference_B (`torch.Tensor` of shape `[B]`):
            p in [0, 1], the probability that the chosen response is preferred.

    Returns:
        `torch.Tensor` of shape `[B]`, each ≥ the label's entropy.
    """
    return -F.logsigmoid(margin_B) + (1 - preference_B) * margin_B


def label_entropy(preference_B: torch.Tensor) -> torch.Tensor:
    """Entropy of the labels p in nats, shape `[B]`: 0 for hard labels, log 2 for ties. The least NLL any reward can have."""
    return -torch.xlogy(preference_B, preference_B) - torch.xlogy(1 - preference_B, 1 - preference_B)


def sequence_logps(
    logps_2BT: torch.Tensor, mask_2BT: torch.Tensor, ld_alpha: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probabilities of whole responses.

    Args:
        logps_2BT (`torch.Tensor` of shape `[2B, T]`):
            Log-probability of each token, zero outside the response.
        mask_2BT (`torch.Tensor` of shape `[2B, T]`):
            1 at response tokens.
        ld_alpha (`float`, *optional*):
            Weight of the tokens past the shorter response's length, in [0, 1]
            (LD-DPO, https://huggingface.co/papers/2409.06411). `None` weighs all tokens alike.

    Returns:
        Two `torch.Tensor` of shape `[B]`: chosen, rejected.
    """
    if ld_alpha is not None:
        chosen_B, rejected_B = mask_2BT.sum(1).chunk(2)
        shared_2B1 = torch.minimum(chosen_B, rejected_B).repeat(2).unsqueeze(1)
        weight_2BT = torch.where(mask_2BT.cumsum(1) <= shared_2B1, 1.0, ld_alpha)
        logps_2BT = logps_2BT * weight_2BT * mask_2BT
    chosen_B, rejected_B = logps_2BT.sum(1).chunk(2)
    return chosen_B, rejected_B
