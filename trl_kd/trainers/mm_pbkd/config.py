"""Settings of `MMPbKDTrainer`."""

from dataclasses import dataclass, field
from typing import Any

from accelerate.logging import get_logger
from trl import DistillationConfig

from trl_kd.rewards.q_function import Q_HEADS
from trl_kd.trainers.common.config import ImitationConfig
from trl_kd.trainers.common.config_checks import (
    EOS_TOKEN_METADATA,
    REASONING_METADATA,
    check_integer,
    check_json,
    check_number,
    check_reasoning,
    parse_radius,
    settle_bf16,
    without_keys,
)


logger = get_logger(__name__)


@dataclass
class MMPbKDConfig(DistillationConfig, ImitationConfig):
    r"""
    Configuration class for the [`MMPbKDTrainer`].

    It has every parameter of [`~trl.DistillationConfig`], with the same defaults, and those below. Student π and adversary
    Q play

        min_π max_Q  moment_coef·E_s⟨μ − π, Q⟩ + kl_coef·E_s D(π, μ)   s.t.  NLL(r_Q) ≤ NLL* + ζ

    with μ the teacher, D the divergence that `beta` selects, and r_Q(x, y) the sum of Q's advantages over the tokens of y
    (white-box form of [Online Knowledge Distillation with Reward Guidance](https://huggingface.co/papers/2505.18952);
    derivation in docs/method.md).

    As in TRL, `bf16` serves generation and leaves weights as they are: student and teacher learn in the dtype that they are
    loaded in, float32 unless `model_init_kwargs` and `teacher_model_init_kwargs` say otherwise.

    Unlike in TRL, `bf16` left unset is `False` where the run has no GPU that can do it; a line in the log says so.

    Parameters:
        > Parameters of the states

        lmbda (`float`, *optional*, defaults to `1.0`):
            In [0, 1], the share of on-policy states: completions that the student samples. The rest are the teacher's: the
            column `completion` of the training rows where it has a text, else sampled from the teacher.

        > Parameters of the student's loss

        kl_coef (`float`, *optional*, defaults to `1.0`):
            τ ≥ 0, the weight of the divergence, a mean over tokens. On-policy it is the one that `beta` selects.
        off_policy_beta (`float`, *optional*, defaults to `0.0`):
            In [0, 1], in place of `beta` on the teacher's states. `0.0` is the forward KL divergence.
        moment_coef (`float`, *optional*, defaults to `1.0`):
            ≥ 0, the weight of the moment gap ⟨μ − π, Q⟩, a mean over tokens. `0.0` leaves Q out altogether.
        state_gradient (`bool`, *optional*, defaults to `False`):
            Adds the gradient through the distribution of on-policy states: REINFORCE on what the loss will be at later
            tokens. Unbiased, and of high variance.
        imitation_weight (`float`, *optional*, defaults to `0.0`):
            w ≥ 0, the weight of the imitation term

                L_imit = Σ_i a_i Σ_t ℓ_q(π(y_t|s_t)) / (ā · Σ_{a_i>0} |y_i|)

            over the teacher's completions y_i of a step. Like their divergence and moment gap it enters the loss by their
            share 1 − `lmbda`. ā is the mean of a over the tokens of the training rows with a > 0; 1 for a stream.

        > Parameters of the imitation term

        imitation_radius (`float` or `str`, *optional*, defaults to `0.02`):
            ζ in [0, ∞], nats per pair, of the weight a(p, ζ) of a completion. p is the mean preference for it over the pairs
            of `preference_dataset` that have its prompt and text; where there is none, and for completions that are sampled
            in training, a is 1. `0.0`: (2p − 1)₊, so that ties and losses have the weight 0. `inf`: 1. `"theory"`:
            c·log(N/δ)/N with N the known pairs of `preference_dataset`.
        imitation_q (`float`, *optional*):
            q in [0, 1] of ℓ_q(π) = (1 − π^q)/q. `0.0` is −log π, `1.0` is 1 − π. End tokens keep −log π. By default 0.5.
        imitation_q_warmup (`float`, *optional*, defaults to `0.5`):
            Share of the training steps, in [0, 1], over which q rises linearly from 0. `0.0`: q is fixed.
        imitation_min_score (`float`, *optional*):
            Where the columns `score_chosen` and `score_rejected` of `preference_dataset` hold absolute scores: the weight is
            1 if a completion's score is at least this, else 0. Where the score is missing, the preference decides.

        > Parameters of Q and its constraint

        q_head (`str`, *optional*, defaults to `"linear"`):
            "linear", "mlp" (a hidden layer as wide as the student) or "adapter" (a hidden layer of 64 units).
        q_bound (`float`, *optional*, defaults to `5.0`):
            B > 0: Q lies in [−B, B], in nats of preference a token.
        q_learning_rate (`float`, *optional*, defaults to `0.5`):
            ≥ 0. In units of Q: about the most that one step changes Q at one state and word, whatever the model's width.
        q_steps (`int`, *optional*, defaults to `1`):
            Steps of Q, each with pairs of its own, for a step of the student; at least 1.
        q_warmup_steps (`int`, *optional*, defaults to `100`):
            At most so many steps of Q on the preferences alone come first. They end sooner once the accuracy on pairs held
            out is above chance (one-sided, at 5 % over all looks at it, which come after 10, 20, 40, … steps), for which at
            least 100 strict pairs must be held out. No preferences: no warm-up.
        dual_init (`float`, *optional*, defaults to `5.0`):
            λ at the start; in [0, `dual_max`]. Below 1/(1 − p), with p the share of pairs that the teacher wins, the
            constraint does not bind.
        dual_learning_rate (`float`, *optional*, defaults to `0.1`):
            η_λ ≥ 0: λ ← clip(λ + η_λ·violation, 0, `dual_max`) after each step of Q.
        dual_max (`float`, *optional*, defaults to `50.0`):
            λ's cap, ≥ 0. `0.0` is moment matching without preferences.
        confidence_radius (`float` or `str`, *optional*, defaults to `0.05`):
            ζ ≥ 0 in nats per pair, by which the adversary's likelihood may fall short of its maximum-likelihood twin's.
            `0.0`: that twin is Q. `"theory"`: c·log(N/δ)/N with N training pairs.
        confidence_constant (`float`, *optional*, defaults to `1.0`):
            c > 0, for a radius of `"theory"`.
        confidence_delta (`float`, *optional*, defaults to `0.05`):
            δ in (0, 1), for a radius of `"theory"`.

        > Parameters of the data

        reasoning (`str`, *optional*):
            What is learnt where the chat template changes a response, as those of reasoning models do. By default the
            template's rendering, with a warning. `"keep"`: the generation prompt, the response as it was sampled, and what
            the template ends a turn with. `"strip"`: the completion without `<think>` blocks. `"error"`: training stops.
        eos_token (`str`, *optional*):
            Token that ends a turn. It becomes the tokenizer's end token, and is saved in the student's generation config. By
            default the tokenizer's.

        > Parameters of the preference pairs

        pair_max_length (`int` or `None`, *optional*, defaults to `1024`):
            Tokens of prompt and response of a pair, at least 2; responses are cut there. `None`: no cut.
        pair_batch_size (`int`, *optional*):
            Pairs of one step of Q, over all processes, which must divide it. `None`: as many as the student's global batch
            has rows.
        pair_held_out (`float`, *optional*, defaults to `0.1`):
            In [0, 1), share of the pairs (500 at most) that Q never learns from and its accuracy is measured on: all pairs
            of some prompts, as many as fit.

    Raises:
        `ValueError`: a field outside its range, or fields that do not go together. The message names the field, its
            value and the fix.
    """

    lmbda: float = field(
        default=1.0,
        metadata={"help": "Share of on-policy states, in [0, 1]; the rest are the teacher's completions."},
    )
    kl_coef: float = field(default=1.0, metadata={"help": "Weight τ of the divergence; at least 0."})
    off_policy_beta: float = field(
        default=0.0, metadata={"help": "`beta` on the teacher's states, in [0, 1]; 0 is forward KL."}
    )
    moment_coef: float = field(
        default=1.0, metadata={"help": "Weight of the moment gap ⟨μ − π, Q⟩; at least 0. 0 leaves Q out."}
    )
    state_gradient: bool = field(
        default=False,
        metadata={"help": "Whether to add the gradient through the distribution of on-policy states (REINFORCE)."},
    )
    imitation_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the imitation term, a mean over the tokens of the teacher's completions; at least 0."
        },
    )
    q_head: str = field(default="linear", metadata={"help": "Form of Q.", "choices": list(Q_HEADS)})
    q_bound: float = field(default=5.0, metadata={"help": "Bound B of |Q|; above 0."})
    q_learning_rate: float = field(
        default=0.5, metadata={"help": "About the most that one step changes Q at a state and word; at least 0."}
    )
    q_steps: int = field(default=1, metadata={"help": "Steps of Q for a step of the student; at least 1."})
    q_warmup_steps: int = field(
        default=100, metadata={"help": "At most so many steps of Q on the preferences alone come first."}
    )
    dual_init: float = field(default=5.0, metadata={"help": "Dual variable λ at the start; at least 0."})
    dual_learning_rate: float = field(default=0.1, metadata={"help": "Step size of λ; 0 keeps λ fixed."})
    dual_max: float = field(default=50.0, metadata={"help": "Cap of λ; 0 is moment matching without preferences."})
    confidence_radius: float | str | None = field(  # None, which is refused, makes the command line take 'theory'
        default=0.05,
        metadata={
            "help": "Slack ζ of the constraint in nats per pair, or 'theory' for c·log(N/δ)/N; 0 is the MLE head."
        },
    )
    confidence_constant: float = field(default=1.0, metadata={"help": "Constant c of a radius of 'theory'; above 0."})
    confidence_delta: float = field(
        default=0.05, metadata={"help": "Failure probability δ of a radius of 'theory'; in (0, 1)."}
    )
    pair_max_length: int | None = field(
        default=1024, metadata={"help": "Tokens of prompt and response of a pair; responses are cut there."}
    )
    pair_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Pairs of one step of Q over all processes; by default the rows of the student's global batch."
        },
    )
    pair_held_out: float = field(
        default=0.1, metadata={"help": "Share of the pairs (500 at most) on which Q's accuracy is measured."}
    )

    reasoning: str | None = field(default=None, metadata=REASONING_METADATA)
    eos_token: str | None = field(default=None, metadata=EOS_TOKEN_METADATA)

    def __post_init__(self):
        if self.confidence_radius is None:
            raise ValueError(
                "`confidence_radius` is None: give a number of nats per pair, at least 0, or 'theory'; 0 is the "
                "maximum-likelihood head."
            )
        self.confidence_radius = parse_radius(self.confidence_radius)
        for name in self._VALID_DICT_FIELDS:
            check_json(name, getattr(self, name))
        self.check_imitation()
        self._check_ranges()
        settle_bf16(self)
        super().__post_init__()
        self._check_combinations()

    def to_dict(self):
        """As TRL's, which trackers log, without what may be a key."""
        settings = super().to_dict()
        return settings | without_keys(settings)

    def _check_ranges(self) -> None:
        check_reasoning(self.reasoning)
        at_least_zero = (
            "kl_coef",
            "moment_coef",
            "imitation_weight",
            "q_learning_rate",
            "dual_init",
        )
        for name in (*at_least_zero, "dual_learning_rate", "dual_max", "learning_rate"):
            check_number(name, getattr(self, name), lambda value: value >= 0, "at least 0")
        for name in ("lmbda", "beta", "off_policy_beta"):
            check_number(name, getattr(self, name), lambda value: 0 <= value <= 1, "between 0 and 1")
        for name in ("q_bound", "confidence_constant", "temperature"):
            check_number(name, getattr(self, name), lambda value: value > 0, "above 0")
        for name, least in (("q_steps", 1), ("gradient_accumulation_steps", 1), ("q_warmup_steps", 0)):
            check_integer(name, getattr(self, name), least)
        for name in ("pair_batch_size", "max_completion_length"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        check_number("top_p", self.top_p, lambda value: 0 < value <= 1, "above 0 and at most 1")
        if self.pair_max_length is not None:
            check_integer("pair_max_length", self.pair_max_length, 2)
        if not isinstance(self.state_gradient, bool):
            raise ValueError(f"`state_gradient` is {self.state_gradient!r}: it must be True or False.")
        check_number("pair_held_out", self.pair_held_out, lambda value: 0 <= value < 1, "at least 0 and below 1")
        check_number("confidence_delta", self.confidence_delta, lambda value: 0 < value < 1, "between 0 and 1")
        if self.confidence_radius != "theory":
            check_number("confidence_radius", self.confidence_radius, lambda v: v >= 0, "at least 0, or 'theory'")
        if self.q_head not in Q_HEADS:
            raise ValueError(f"`q_head` is {self.q_head!r}: use one of {', '.join(map(repr, Q_HEADS))}.")
        if self.dual_init > self.dual_max > 0:
            raise ValueError(
                f"`dual_init` is {self.dual_init} but λ is capped at `dual_max` = {self.dual_max}: lower `dual_init` or "
                "raise `dual_max`."
            )

    def _check_combinations(self) -> None:
        if self.kl_coef == self.moment_coef == self.imitation_weight == 0:
            raise ValueError(
                "`kl_coef`, `moment_coef` and `imitation_weight` are all 0: there is nothing to learn. Set one above 0."
            )
        if self.imitation_weight > 0 and self.lmbda == 1:
            raise ValueError(
                f"`imitation_weight` is {self.imitation_weight} but `lmbda` is 1, so that no state is the teacher's: lower "
                "`lmbda`, or set `imitation_weight=0`."
            )
        self.refuse_without_weight(self.imitation_weight)
        if self.state_gradient and self.lmbda == 0:
            raise ValueError(
                "`state_gradient` is on but `lmbda` is 0: the states are the teacher's, whose distribution does not depend "
                "on the student. Raise `lmbda`, or turn it off."
            )


def warn_if_approximate(args: MMPbKDConfig) -> None:
    """On-policy, the moments are expectations over what softmax(logits / temperature) samples."""
    neutral = {"top_p": (1.0,), "top_k": (0,), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}
    given: Any = {name: getattr(args, name) for name in neutral} | dict(args.generation_kwargs or {})  # type: ignore
    changed = [f"{name}={given[name]}" for name, values in neutral.items() if given[name] not in values]
    if changed and args.lmbda > 0:
        logger.warning(
            f"With {' and '.join(changed)} the student samples otherwise than from softmax(logits / temperature), "
            "which the losses are about: on-policy, their expectations are approximate."
        )
