"""Settings of the imitation term that the trainers share."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from trl_kd.losses.dual import theory_radius
from trl_kd.trainers.common.config_checks import check_number, parse_radius


_RADIUS = 0.02
"""Nats per pair: a tie has a weight of 0.2. Chosen on validation seeds (benchmarks/imitation_ablations.py)."""


@dataclass(kw_only=True)  # so that the first positional field stays `output_dir`
class ImitationConfig:
    """
    Settings of the imitation term

        L_imit = Σ_i a_i Σ_t ℓ_q(π(y_t|s_t)) / (ā · Σ_{a_i>0} |y_i|)

    over the teacher's responses y_i, with the advantage a(p, ζ) of [`~trl_kd.losses.confidence.imitation_advantage`] and the
    token loss ℓ_q of [`~trl_kd.losses.imitation.generalized_cross_entropy`]. A mixin, to be inherited after TRL's config.

    Parameters:
        imitation_radius (`float` or `str`, *optional*, defaults to `0.02`):
            ζ in [0, ∞], nats per pair: how far the adversary's reward may be from the best explanation of a pair's label.
            The teacher's response has the weight a(p, ζ), where p is P(teacher's response ≻ the other). `0.0`: (2p − 1)₊,
            so that ties and losses have the weight 0. `inf`: 1, plain imitation. `"theory"`: c·log(N/δ)/N with N the number
            of training rows with a known preference (not for streamed data).
        imitation_q (`float`, *optional*):
            q in [0, 1] of ℓ_q(π) = (1 − π^q)/q. `0.0` is −log π, `1.0` is 1 − π. End tokens keep −log π. With
            `PbKDConfig(imitation="token")` the share of the total variation in (1 − q)·KL(μ ‖ π) + q·TV(μ, π). By default
            0.5 for the teacher's texts and 0 for its distributions.
        imitation_q_warmup (`float`, *optional*, defaults to `0.5`):
            Share of the training steps, in [0, 1], over which q rises linearly from 0. `0.0`: q is fixed.
        imitation_min_score (`float`, *optional*):
            Where the columns `score_chosen` and `score_rejected` hold absolute scores: a = 1 if the score of the teacher's
            response is at least this, else 0. Where the score is missing, the label decides.
    """

    imitation_radius: float | str | None = field(
        default=_RADIUS,
        metadata={
            "help": "Radius ζ of each pair's confidence set in nats: 0 imitates the teacher's wins alone, 'inf' all of its "
            "responses; or 'theory' for c·log(N/δ)/N."
        },
    )
    imitation_q: float | None = field(
        default=None,
        metadata={
            "help": "q in [0, 1] of the token loss (1 − π^q)/q: 0 is −log π, 1 is 1 − π. With PbKDConfig's "
            "imitation='token' of (1 − q)·KL + q·TV. By default 0.5, and 0 with imitation='token'."
        },
    )
    imitation_q_warmup: float = field(
        default=0.5,
        metadata={"help": "Share of the training steps over which q rises linearly from 0; 0 keeps q fixed."},
    )
    imitation_min_score: float | None = field(
        default=None,
        metadata={
            "help": "Imitate the teacher's responses whose absolute score is at least this, whatever their labels."
        },
    )

    @property
    def final_imitation_q(self) -> float:
        """q of ℓ_q after its warm-up."""
        if self.imitation_q is not None:
            return self.imitation_q
        return 0.0 if getattr(self, "imitation", "sequence") == "token" else 0.5

    def check_imitation(self) -> None:
        """
        Reads and checks the fields above.

        Raises:
            `ValueError`: a field is outside its range. The message names the field, its value and the range.
        """
        # The command line and YAML hand over a union with `str` as a string
        self.imitation_radius = parse_radius(self.imitation_radius, "imitation_radius", default=_RADIUS)
        if self.imitation_radius not in ("theory", math.inf):
            allowed = "at least 0 (or 'inf', or 'theory')"
            check_number("imitation_radius", self.imitation_radius, lambda value: value >= 0, allowed)
        for name in ("imitation_q", "imitation_q_warmup"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), lambda value: 0 <= value <= 1, "between 0 and 1")
        if self.imitation_min_score is not None:
            check_number("imitation_min_score", self.imitation_min_score, lambda value: True, "in the scores' unit")

    def refuse_without_weight(self, weight: float) -> None:
        """Raises a `ValueError` for a field above that is changed though the term has no weight."""
        for found in fields(ImitationConfig):
            if weight == 0 and is_changed(self, found.name):
                raise ValueError(
                    f"`{found.name}` is {getattr(self, found.name)!r}, which only the imitation term reads, and "
                    f"`imitation_weight` is 0: set it above 0, or drop `{found.name}`."
                )


def is_changed(args: Any, name: str) -> bool:
    """Whether a field of a dataclass instance has another value than its default."""
    (found,) = (f for f in fields(args) if f.name == name)
    default = found.default_factory() if callable(found.default_factory) else found.default
    return getattr(args, name) != default


def imitation_radius(args: Any, known: int | None) -> float:
    """
    ζ of the imitation term in nats per pair.

    Args:
        args ([`ImitationConfig`]):
            Settings, with `confidence_constant` and `confidence_delta`.
        known (`int`, *optional*):
            Number of training rows with a known preference; `None` for a stream.

    Raises:
        `ValueError`: `imitation_radius` is 'theory' and there is no such number, or it is 0.
    """
    if args.imitation_radius != "theory":
        return args.imitation_radius
    if not known:
        raise ValueError(
            "`imitation_radius` is 'theory', which needs the number of training rows with a known preference, and "
            f"{'a stream has no length' if known is None else 'no preference is known'}: give a number of nats per pair."
        )
    return theory_radius(known, args.confidence_constant, args.confidence_delta)
