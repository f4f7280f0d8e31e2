"""Settings of the imitation term that the trainers share."""

import math
from dataclasses import dataclass, field
from typing import Any

from trl_kd.losses.confidence import imitation_advantage
from trl_kd.losses.dual import theory_radius
from trl_kd.trainers.fields import check_number, parse_radius


@dataclass
class ImitationConfig:
    """
    The imitation term Σ_i a_i Σ_t ℓ_q(π(y_t|s_t)) / (ā·Σ_{a_i>0} |y_i|) over the teacher's responses y_i
    ([Online Knowledge Distillation with Reward Guidance](https://huggingface.co/papers/2505.18952); docs/method.md).

    Parameters:
        imitation_radius (`float` or `str`, *optional*, defaults to `0.05`):
            ζ in [0, ∞], nats per pair: how far the adversary's reward may be from explaining a pair's label best. A teacher's
            response counts with the advantage a(p, ζ) that it has under the most adverse reward, p being P(teacher's
            response ≻ the other). `0.0`: (2p − 1)₊, so that ties and losses count nothing. `inf`: 1, plain imitation.
            `"theory"`: c·log(N/δ)/N with N the number of training rows with a known preference (not for streamed data).
        imitation_q (`float`, *optional*):
            q in [0, 1] of ℓ_q(π) = (1 − π^q)/q. `0.0` is −log π, `1.0` is 1 − π. End tokens keep −log π. `None`: 0.5 for
            `imitation="sequence"`, 0 for `"token"`.
        imitation_q_warmup (`float`, *optional*, defaults to `0.5`):
            In [0, 1], share of the training steps over which q rises linearly from 0. `0.0`: q is fixed.
        imitation_min_score (`float`, *optional*):
            Where `score_chosen` and `score_rejected` hold absolute scores: a is 1 if the teacher's reaches this, else 0. Labels
            decide where the score is missing.
    """

    imitation_radius: float | str | None = field(
        default=0.05,
        metadata={"help": "Slack ζ of each pair's confidence set in nats, 'inf' for plain imitation, or 'theory'."},
    )
    imitation_q: float | None = field(
        default=None,
        metadata={"help": "q in [0, 1] of the imitation loss (1 − π^q)/q: 0 is −log π, 1 is 1 − π; by default 0.5."},
    )
    imitation_q_warmup: float = field(
        default=0.5, metadata={"help": "Share of the training steps over which q rises from 0; 0 keeps it fixed."}
    )
    imitation_min_score: float | None = field(
        default=None,
        metadata={"help": "Imitate a teacher's response whose absolute score reaches this, whatever its label."},
    )

    def settle_imitation(self) -> None:
        """
        Raises:
            `ValueError`: a field outside its range.
        """
        self.imitation_radius = parse_radius(self.imitation_radius, "imitation_radius")
        if self.imitation_radius not in ("theory", math.inf):
            check_number(
                "imitation_radius",
                self.imitation_radius,
                lambda value: value >= 0,
                "at least 0, or 'inf', or 'theory'",
            )
        for name in ("imitation_q", "imitation_q_warmup"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), lambda value: 0 <= value <= 1, "between 0 and 1")
        if self.imitation_min_score is not None:
            check_number("imitation_min_score", self.imitation_min_score, lambda value: True, "in the scores' unit")


def radius_of(args: Any, known: int) -> float:
    """ζ of the settings, for so many known pairs."""
    if args.imitation_radius == "theory":
        return theory_radius(known, args.confidence_constant, args.confidence_delta)
    return args.imitation_radius


__all__ = ["ImitationConfig", "imitation_advantage", "radius_of"]
