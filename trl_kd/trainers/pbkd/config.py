"""Settings of `PbKDTrainer`."""

import math
from dataclasses import dataclass, field
from typing import Any

from accelerate.logging import get_logger
from trl import DPOConfig

from trl_kd.trainers.common.config import ImitationConfig, is_changed
from trl_kd.trainers.common.config_checks import (
    EOS_TOKEN_METADATA,
    REASONING_METADATA,
    as_config,
    check_json,
    check_number,
    check_reasoning,
    parse_radius,
    settle_bf16,
    without_keys,
)


logger = get_logger(__name__)

# TRL refuses another one in the middle of the first step
_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_LOSS_TYPES = {
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
}
_OF_PREFERENCE_TERM = (
    *("beta", "loss_type", "loss_weights", "ld_alpha", "f_divergence_type", "label_smoothing", "use_weighting"),
    *("f_alpha_divergence_coef", "discopop_tau", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    *(
        "precompute_ref_log_probs",
        "precompute_ref_batch_size",
        "preference_nll_target",
        "confidence_radius",
        "dual_max",
    ),
)
"""What nothing but the preference term reads."""


_LEARNING_RATE = 2e-5
"""That of `SFTConfig`, since the loss is one of that size."""


@dataclass
class PbKDConfig(DPOConfig, ImitationConfig):
    r"""
    Configuration class for the [`PbKDTrainer`].

    It has every parameter of [`~trl.DPOConfig`], with the same defaults but for the learning rate, and those below. The loss
    is

        L(θ, λ) = w · Σ_i a_i Σ_t ℓ_q(π(y_t|s_t)) / (ā · Σ_{a_i>0} |y_i|) + λ·L_DPO(θ)

    with sums over the teacher's responses y_i of a global batch, w = `imitation_weight`, and λ the dual variable of the
    constraint `L_DPO ≤ L* + ζ` (offline form of [Online Knowledge Distillation with Reward
    Guidance](https://huggingface.co/papers/2505.18952); derivation in docs/method.md). Preferences weigh the teacher's
    responses with a_i; ā is the mean of the weights.

    By default `dual_init` and `dual_learning_rate` are 0: the preference term is off. Then no reference model and no other
    response is run.

    Unlike in TRL, `bf16` left unset is `False` where the run has no GPU that can do it; a line in the log says so.

    Parameters:
        learning_rate (`float`, *optional*, defaults to `2e-5`):
            Peak learning rate of AdamW, as in [`~trl.SFTConfig`].

        > Parameters of the imitation term

        imitation_weight (`float`, *optional*, defaults to `1.0`):
            w ≥ 0, the weight of the imitation term. `0.0` leaves the preference loss alone.
        imitation (`str`, *optional*, defaults to `"sequence"`):
            `"sequence"`: ℓ_q of the tokens of the teacher's response (black-box). `"token"`: a divergence from the teacher's
            distribution at each of those tokens (white-box: needs the teacher's weights and its vocabulary).
        teacher_model_name_or_path (`str`, *optional*):
            Teacher, a Hub id or a folder. Only for `imitation="token"`.
        teacher_model_revision (`str`, *optional*):
            Branch, tag or commit of the teacher.
        teacher_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for the teacher's `from_pretrained`. `{"load_in_4bit": true}` and the other fields of
            [`~transformers.BitsAndBytesConfig`] load a quantised teacher.

        imitation_radius (`float` or `str`, *optional*, defaults to `0.02`):
            ζ in [0, ∞], nats per pair, of the weight a(p, ζ) of a teacher's response that is preferred with the probability
            p. `0.0`: (2p − 1)₊, so that ties and losses have the weight 0. `inf`: 1, plain imitation. `"theory"`:
            c·log(N/δ)/N with N the number of training rows with a known preference (not for streamed data).
        imitation_q (`float`, *optional*):
            q in [0, 1] of ℓ_q(π) = (1 − π^q)/q. `0.0` is −log π, `1.0` is 1 − π. End tokens keep −log π. With
            `imitation="token"` the share of the total variation in (1 − q)·KL(μ ‖ π) + q·TV(μ, π), but where texts end. By
            default 0.5 for `"sequence"` and 0 for `"token"`.
        imitation_q_warmup (`float`, *optional*, defaults to `0.5`):
            Share of the training steps, in [0, 1], over which q rises linearly from 0. `0.0`: q is fixed.
        imitation_min_score (`float`, *optional*):
            Where the columns `score_chosen` and `score_rejected` hold absolute scores: the weight is 1 if the score of the
            teacher's response is at least this, else 0. Where the score is missing, the label decides.

        student_wins (`str`, *optional*, defaults to `"off"`):
            `"gated"`: the student's own winning answers are imitated too, so that the expert of a prompt is the better of
            teacher and student. Their weight is (1 − 2p̄)₊, where p̄ is P(teacher's response ≻ student's) over at least
            three different answers of the student's to the prompt, equal ones counting ½. For pairs with several such
            answers, and rounds. Not for streamed data, nor with the preference term. `"off"`: the teacher's responses
            alone.

        > Parameters of the data

        reasoning (`str`, *optional*):
            What is learnt where the chat template changes a response, as those of reasoning models do. By default the
            template's rendering, with a warning. `"keep"`: the generation prompt, the response as it was sampled, and what
            the template ends a turn with. `"strip"`: the response without `<think>` blocks. `"error"`: training stops.
        eos_token (`str`, *optional*):
            Token that ends a turn. It becomes the tokenizer's end token, and is saved in the student's generation config. By
            default the tokenizer's.

        > Parameters of the constraint

        dual_init (`float`, *optional*, defaults to `0.0`):
            λ at the start; in [0, `dual_max`]. The preference term is off if this and `dual_learning_rate` are 0.
        dual_learning_rate (`float`, *optional*, defaults to `0.0`):
            η_λ ≥ 0: λ ← clip(λ + η_λ·violation, 0, `dual_max`) after each optimizer step. `0.0` keeps λ fixed. Above
            zero it needs `loss_type="sigmoid"` and `preference_nll_target`.
        dual_max (`float`, *optional*, defaults to `10.0`):
            λ's cap, > 0. After 50 steps in a row at the cap a moving λ warns, once, that the constraint is not met.
        confidence_radius (`float` or `str`, *optional*, defaults to `0.0`):
            ζ ≥ 0 in nats per pair, the slack of the constraint; or `"theory"` for c·log(N/δ)/N with N the number of
            training rows with a known preference (not for streamed data).
        confidence_constant (`float`, *optional*, defaults to `1.0`):
            c > 0, for a radius of `"theory"`.
        confidence_delta (`float`, *optional*, defaults to `0.05`):
            δ in (0, 1), for a radius of `"theory"`.
        preference_nll_target (`float`, *optional*):
            L* ≥ 0 in nats per pair, the best reachable preference NLL, in excess of the labels' own entropy (which is
            zero for hard labels). Measure it: the final `pbkd/preference_nll` of a run with fixed λ.

    Raises:
        `ValueError`: a field outside its range, or fields that do not go together. The message names the field, its
            value and the fix.
    """

    _VALID_DICT_FIELDS = [*DPOConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    learning_rate: float = field(default=_LEARNING_RATE, metadata={"help": "The initial learning rate for AdamW."})
    imitation_weight: float = field(
        default=1.0,
        metadata={"help": "Weight w of the imitation term in L = w·L_imit + λ·L_DPO; at least 0."},
    )
    imitation: str = field(
        default="sequence",
        metadata={
            "help": "Imitation term: 'sequence' (loss of the tokens of the teacher's response) or 'token' (divergence "
            "from the teacher's distribution at each of them, needs the teacher's weights).",
            "choices": ["sequence", "token"],
        },
    )
    student_wins: str = field(
        default="off",
        metadata={
            "help": "Whether the student's own winning answers are imitated too, where at least three of its answers to a "
            "prompt were compared with the teacher's ('gated').",
            "choices": ["off", "gated"],
        },
    )
    dual_init: float = field(
        default=0.0,
        metadata={
            "help": "Dual variable λ at the start; at least 0. At 0, with dual_learning_rate 0, there is no DPO term."
        },
    )
    dual_learning_rate: float = field(
        default=0.0,
        metadata={
            "help": "Step size of λ per optimizer step; 0 keeps λ fixed. Above 0 only with loss_type='sigmoid'."
        },
    )
    dual_max: float = field(default=10.0, metadata={"help": "Cap of λ; above 0."})
    confidence_radius: float | str | None = field(
        default=0.0,
        metadata={"help": "Slack ζ of the constraint in nats per pair, or 'theory' for c·log(N/δ)/N."},
    )
    confidence_constant: float = field(default=1.0, metadata={"help": "Constant c of a radius of 'theory'; above 0."})
    confidence_delta: float = field(
        default=0.05, metadata={"help": "Failure probability δ of a radius of 'theory'; in (0, 1)."}
    )
    preference_nll_target: float | None = field(
        default=None,
        metadata={
            "help": "Best reachable preference NLL L* in nats per pair, in excess of the labels' entropy. Measure it: "
            "the final 'pbkd/preference_nll' of a run with fixed λ."
        },
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Teacher, a Hub id or a folder; for imitation='token' only."}
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the teacher."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for the teacher's from_pretrained; load_in_4bit and the other fields of "
            "BitsAndBytesConfig are accepted."
        },
    )

    reasoning: str | None = field(default=None, metadata=REASONING_METADATA)
    eos_token: str | None = field(default=None, metadata=EOS_TOKEN_METADATA)

    def __post_init__(self):
        # The command line and YAML hand over a union with `str` as a string
        self.confidence_radius = parse_radius(self.confidence_radius)
        for name in self._VALID_DICT_FIELDS:
            check_json(name, getattr(self, name))
        self.check_imitation()
        self._check_ranges()
        settle_bf16(self)
        super().__post_init__()  # `loss_type` is a list from here on
        self._check_combinations()
        self._check_terms()

    def to_dict(self):
        """As TRL's, which trackers log, without what may be a key."""
        settings = super().to_dict()
        return settings | without_keys(settings)

    @property
    def has_preference_term(self) -> bool:
        """Whether the loss has the term λ·L_DPO: λ is above 0, or can come to be."""
        return self.dual_init > 0 or self.dual_learning_rate > 0

    def _check_ranges(self) -> None:
        check_reasoning(self.reasoning)
        if self.imitation not in ("sequence", "token"):
            raise ValueError(f"`imitation` is {self.imitation!r}: use 'sequence' or 'token'.")
        if self.student_wins not in ("off", "gated"):
            raise ValueError(f"`student_wins` is {self.student_wins!r}: use 'off' or 'gated'.")
        for name in ("imitation_weight", "dual_init", "dual_learning_rate", "learning_rate"):
            check_number(name, getattr(self, name), lambda value: value >= 0, "at least 0")
        if self.f_divergence_type not in _DIVERGENCES:
            raise ValueError(
                f"`f_divergence_type` is {self.f_divergence_type!r}: use one of {', '.join(_DIVERGENCES)}."
            )
        for name in ("gradient_accumulation_steps", "max_length"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), lambda value: value >= 1, "at least 1")
        check_number("num_train_epochs", self.num_train_epochs, lambda value: value >= 0, "at least 0")
        if not isinstance(self.max_grad_norm, int | float) or math.isnan(self.max_grad_norm):
            raise ValueError(f"`max_grad_norm` is {self.max_grad_norm!r}: it must be a number.")
        for weight in self.loss_weights or []:
            check_number("loss_weights", weight, lambda value: value >= 0, "at least 0")
        if self.ld_alpha is not None:
            check_number("ld_alpha", self.ld_alpha, lambda value: 0 <= value <= 1, "between 0 and 1")
        check_number(
            "label_smoothing", self.label_smoothing, lambda value: 0 <= value < 0.5, "at least 0 and below 0.5"
        )
        for name in ("dual_max", "confidence_constant"):
            check_number(name, getattr(self, name), lambda value: value > 0, "above 0")
        check_number("beta", self.beta, lambda value: value > 0, "above 0")
        check_number("confidence_delta", self.confidence_delta, lambda value: 0 < value < 1, "between 0 and 1")
        if self.confidence_radius != "theory":
            check_number(
                "confidence_radius", self.confidence_radius, lambda value: value >= 0, "at least 0, or 'theory'"
            )
        if self.preference_nll_target is not None:
            check_number("preference_nll_target", self.preference_nll_target, lambda value: value >= 0, "at least 0")
        if self.dual_init > self.dual_max:
            raise ValueError(
                f"`dual_init` is {self.dual_init} but λ is capped at `dual_max` = {self.dual_max}: lower `dual_init` or "
                "raise `dual_max`."
            )

    def _check_combinations(self) -> None:
        unknown = sorted(set(self.loss_type) - _LOSS_TYPES)
        if unknown:
            raise ValueError(f"`loss_type` is {unknown[0]!r}: use one of {', '.join(sorted(_LOSS_TYPES))}.")
        if self.dual_learning_rate > 0:
            if self.loss_type != ["sigmoid"] or self.f_divergence_type != "reverse_kl":
                raise ValueError(
                    f"`dual_learning_rate` is {self.dual_learning_rate}, but the constraint is on the Bradley–Terry "
                    f"likelihood and `loss_type` is {self.loss_type}, `f_divergence_type` {self.f_divergence_type!r}: "
                    "use `loss_type='sigmoid'` with 'reverse_kl', or keep λ fixed with `dual_learning_rate=0`."
                )
            if self.preference_nll_target is None:
                raise ValueError(
                    f"`dual_learning_rate` is {self.dual_learning_rate} but `preference_nll_target` is not set, and "
                    "since a preference NLL is always above 0, λ could only rise: set it to the final "
                    "`pbkd/preference_nll` of a run with fixed λ (`dual_learning_rate=0`)."
                )
            if self.precompute_ref_log_probs and self.ld_alpha is not None:
                raise ValueError(
                    f"`dual_learning_rate` is {self.dual_learning_rate}, but with `ld_alpha` = {self.ld_alpha} the "
                    "precomputed reference log-probabilities are length-weighted and the preference NLL cannot be "
                    "measured: set `precompute_ref_log_probs=False`, `ld_alpha=None` or `dual_learning_rate=0`."
                )
        if self.imitation == "token" and self.imitation_weight == 0:
            raise ValueError(
                "`imitation_weight` is 0 and `imitation` 'token': the teacher would run for a term without weight. Use "
                "`imitation='sequence'`, or a weight above 0."
            )
        if self.imitation == "sequence":
            for name in ("teacher_model_name_or_path", "teacher_model_revision", "teacher_model_init_kwargs"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` is set but `imitation='sequence'` reads the teacher's texts, not its weights: set "
                        f"`imitation='token'` or drop `{name}`."
                    )

    def _check_terms(self) -> None:
        """Refuses fields of a term that is not in the loss."""
        if self.student_wins == "gated":
            if self.has_preference_term:
                raise ValueError(
                    f"`student_wins` is 'gated', which adds texts that are no pairs, and `dual_init` is {self.dual_init}, "
                    f"`dual_learning_rate` {self.dual_learning_rate}, so that rows stay pairs: use 'off', or set both to 0."
                )
            if self.imitation == "token":
                raise ValueError(
                    "`student_wins` is 'gated' and `imitation` 'token', which learns the teacher's distribution, also along "
                    "the student's texts: use 'off', or `imitation='sequence'`."
                )
        if self.imitation_weight == 0 and not self.has_preference_term:
            raise ValueError(
                "`imitation_weight` is 0 and so are `dual_init` and `dual_learning_rate`: the loss has no term. Set one of "
                "them above 0."
            )
        self.refuse_without_weight(self.imitation_weight)
        if not self.has_preference_term:
            for name in _OF_PREFERENCE_TERM:
                if is_changed(self, name):
                    raise ValueError(
                        f"`{name}` is {getattr(self, name)!r}, which only the preference term reads, and that is off, since "
                        f"`dual_init` and `dual_learning_rate` are 0: drop `{name}`, or set `dual_init` above 0."
                    )


def settle_config(args: DPOConfig | None, model: Any) -> PbKDConfig:
    """
    The settings of a run. A plain [`~trl.DPOConfig`] is taken with our defaults. Its learning rate stays, unless it is TRL's
    own default.

    Args:
        args (`DPOConfig`, *optional*):
            A [`PbKDConfig`], or a plain one.
        model (`str` or `PreTrainedModel`):
            The student, after which the output folder is named where there are no `args`.

    Raises:
        `ValueError`: settings of another class, or that do not go together.
    """
    changed = {}
    if isinstance(args, DPOConfig) and not isinstance(args, PbKDConfig) and not is_changed(args, "learning_rate"):
        changed["learning_rate"] = _LEARNING_RATE
        logger.warning(
            f"`learning_rate` is {_LEARNING_RATE:g}, not the {args.learning_rate:g} of `DPOConfig`, since the loss is of "
            "the size of SFT's. Pass a `PbKDConfig` to set another one."
        )
    return as_config(args, model, PbKDConfig, "PbKD", **changed)
