"""Settings of `OnlinePbKDTrainer`."""

from dataclasses import dataclass, field

from accelerate.logging import get_logger
from trl import RLOOConfig

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

ADVERSARIES = ("pbkd", "mle", "discriminator", "off")
IMITATION_WEIGHT = 4.0
"""Default of `imitation_weight` where there is an adversary."""


@dataclass
class OnlinePbKDConfig(RLOOConfig, ImitationConfig):
    r"""
    Configuration class for the [`OnlinePbKDTrainer`].

    It has every parameter of [`~trl.RLOOConfig`], with the same defaults but for `beta`, and those below. Student π and
    reward model r play

        min_π max_r  E[r(x, y_T)] − E_{y~π}[r(x, y)] + beta·KL(π ‖ π_ref) + w·L_imit(π)   s.t.  NLL_D(r) ≤ NLL* + ζ

    with y_T the teacher's answers, and D preferences, which grow with every batch (online form of
    [Online Knowledge Distillation with Reward Guidance](https://huggingface.co/papers/2505.18952); derivation in
    docs/method.md). L_imit is that of the teacher's answers to the prompts of a generation batch,

        L_imit = Σ_i a_i Σ_t ℓ_q(π(y_t|s_t)) / Σ_{a_i>0} |y_i|

    where the preferences of the batch weigh each answer.

    Unlike in TRL, `bf16` left unset is `False` where the run has no GPU that can do it; a line in the log says so.

    Parameters:
        > Parameters of the game

        adversary (`str`, *optional*, defaults to `"pbkd"`):
            What the student climbs. "pbkd": the adversarial head, held by λ. "mle": the head that explains the preferences
            best. "discriminator": a head that tells teacher from student, without preferences. "off": reward functions
            alone, which is `RLOOTrainer`.
        beta (`float`, *optional*):
            ≥ 0, the weight of KL(π ‖ π_ref), summed over tokens, in the reward. `None`: 0.3, since a reward model's rewards,
            in nats of preference, are larger than those of functions in [0, 1]; with `adversary="off"` 0.05, RLOO's default.
        imitation_weight (`float`, *optional*):
            w ≥ 0, the weight of L_imit, which is a mean over tokens. RLOO's own loss sums over tokens: an answer of |y|
            tokens has, at q = 0, the gradient of `num_generations` of the student's with the advantage w·a/|y|. π is, as in
            all of RLOO, the softmax of logits / `temperature`. `None`: 4, with `adversary="off"` 0.
        teacher_column (`str`, *optional*, defaults to `"completion"`):
            Column with the teacher's answers, where no `teacher` is given to the trainer.
        reasoning (`str`, *optional*):
            What is learnt and scored where the chat template changes an answer, as those of reasoning models do. By default
            the template's rendering, with a warning. `"keep"`: the generation prompt, the answer as it was sampled, and what
            the template ends a turn with. `"strip"`: the answer without `<think>` blocks. `"error"`: training stops.
        eos_token (`str`, *optional*):
            Token that ends a turn. It becomes the tokenizer's end token, and is saved in the student's generation config. By
            default the tokenizer's.

        > Parameters of the imitation term

        imitation_radius (`float` or `str`, *optional*, defaults to `0.02`):
            ζ in [0, ∞], nats per pair, of the weight a(p, ζ) of a teacher's answer. p is the mean preference for it over the
            student's answers to its prompt in the generation batch; equal ones are left out. `0.0`: (2p − 1)₊, so that ties
            and losses have the weight 0. `inf`: 1, as where no preference is known. `"theory"`: c·log(N/δ)/N with the N
            training pairs so far (not for `adversary="off"`).
        imitation_q (`float`, *optional*):
            q in [0, 1] of ℓ_q(π) = (1 − π^q)/q. `0.0` is −log π, `1.0` is 1 − π. End tokens keep −log π. By default 0.5.
        imitation_q_warmup (`float`, *optional*, defaults to `0.5`):
            Share of the training steps, in [0, 1], over which q rises linearly from 0. `0.0`: q is fixed.
        imitation_min_score (`float`, *optional*):
            Where the `preference_function` scores single answers: the weight is 1 if the score of the teacher's answer is at
            least this, else 0. Where the score is missing, the preferences decide.

        > Parameters of the reward model

        reward_bound (`float`, *optional*, defaults to `5.0`):
            B > 0: rewards are B·tanh(·/B), in nats of preference.
        rm_lora_r (`int`, *optional*, defaults to `16`):
            Rank of the reward model's LoRA adapters; `0` trains all its weights.
        rm_learning_rate (`float`, *optional*, defaults to `1e-4`):
            ≥ 0, of the reward model's Adam.
        rm_steps (`int`, *optional*, defaults to `1`):
            Steps of the reward model for each generation batch; at least 1.
        rm_batch_size (`int`, *optional*):
            Pairs of one step, over all processes, which must divide it. `None`: as many as the generation batch has rows.
        rm_fresh_share (`float`, *optional*, defaults to `0.5`):
            In [0, 1], share of a step's pairs that come from the newest batch; the rest are drawn from all of D.
        rm_max_length (`int` or `None`, *optional*, defaults to `1024`):
            Tokens of prompt and response that the reward model reads; a longer row loses the beginning of its prompt.
        rm_held_out (`float`, *optional*, defaults to `0.1`):
            In [0, 1), share of the prompts whose pairs the reward model never learns from. The newest 500 measure it.
        rm_warmup_accuracy (`float`, *optional*, defaults to `0.65`):
            In [0, 1]. The student does not move before the reward model orders this share of the strict held-out pairs
            rightly, at two looks in a row, for which at least 100 must be held out. `0.0`: no warm-up.
        rm_warmup_epochs (`int`, *optional*, defaults to `1`):
            How often the student answers each prompt anew for the warm-up, if it lasts so long; at least 1. The teacher is
            not asked again, the preference function is: pairs that it never saw keep a reward model from learning its own
            by heart.
        rm_warmup_steps (`int`, *optional*, defaults to `1000`):
            Steps of the reward model after which a warm-up that has not got there stops the run.

        > Parameters of the constraint

        dual_init (`float`, *optional*, defaults to `5.0`):
            λ at the start; in [0, `dual_max`]. Below 1/(1 − p), with p the share of pairs that the teacher wins, the
            constraint does not bind.
        dual_learning_rate (`float`, *optional*, defaults to `0.1`):
            η_λ ≥ 0: λ ← clip(λ + η_λ·violation, 0, `dual_max`) after each step of the reward model.
        dual_max (`float`, *optional*, defaults to `50.0`):
            λ's cap, ≥ 0.
        confidence_radius (`float` or `str`, *optional*, defaults to `0.05`):
            ζ ≥ 0 in nats per pair, by which the adversarial head's likelihood may fall short of the other's. `0.0`: the
            other head is the reward. `"theory"`: c·log(N/δ)/N with the N training pairs so far.
        confidence_constant (`float`, *optional*, defaults to `1.0`):
            c > 0, for a radius of `"theory"`.
        confidence_delta (`float`, *optional*, defaults to `0.05`):
            δ in (0, 1), for a radius of `"theory"`.

    Raises:
        `ValueError`: a field outside its range, or fields that do not go together. The message names the field, its
            value and the fix.
    """

    adversary: str = field(default="pbkd", metadata={"help": "What the student climbs.", "choices": list(ADVERSARIES)})
    beta: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Weight of KL(π ‖ π_ref) in the reward; by default 0.3, and 0.05 without an adversary."},
    )
    imitation_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the imitation term, a mean over tokens of the teacher's answers; by default 4, and 0 without "
            "an adversary."
        },
    )
    teacher_column: str = field(
        default="completion", metadata={"help": "Column with the teacher's answers, where no teacher is given."}
    )
    reasoning: str | None = field(default=None, metadata=REASONING_METADATA)
    eos_token: str | None = field(default=None, metadata=EOS_TOKEN_METADATA)
    reward_bound: float = field(default=5.0, metadata={"help": "Bound B of rewards, B·tanh(·/B); above 0."})
    rm_lora_r: int = field(
        default=16, metadata={"help": "Rank of the reward model's LoRA adapters; 0 trains all its weights."}
    )
    rm_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the reward model; at least 0."})
    rm_steps: int = field(
        default=1, metadata={"help": "Steps of the reward model for each generation batch; at least 1."}
    )
    rm_batch_size: int | None = field(
        default=None,
        metadata={"help": "Pairs of one step over all processes; by default the rows of a generation batch."},
    )
    rm_fresh_share: float = field(
        default=0.5, metadata={"help": "Share of a step's pairs that come from the newest batch, in [0, 1]."}
    )
    rm_max_length: int | None = field(
        default=1024, metadata={"help": "Tokens of prompt and response that the reward model reads."}
    )
    rm_held_out: float = field(
        default=0.1, metadata={"help": "Share of the prompts whose pairs are never learnt from, in [0, 1)."}
    )
    rm_warmup_accuracy: float = field(
        default=0.65,
        metadata={"help": "Held-out accuracy before which the student does not move, in [0, 1]; 0: no warm-up."},
    )
    rm_warmup_epochs: int = field(
        default=1, metadata={"help": "How often the student answers each prompt anew for the warm-up; at least 1."}
    )
    rm_warmup_steps: int = field(
        default=1000, metadata={"help": "Steps after which a warm-up that has not got there stops the run."}
    )
    dual_init: float = field(default=5.0, metadata={"help": "Dual variable λ at the start; at least 0."})
    dual_learning_rate: float = field(default=0.1, metadata={"help": "Step size of λ; 0 keeps λ fixed."})
    dual_max: float = field(default=50.0, metadata={"help": "Cap of λ; at least 0."})
    confidence_radius: float | str | None = field(
        default=0.05,
        metadata={
            "help": "Slack ζ of the constraint in nats per pair, or 'theory' for c·log(N/δ)/N; 0 is the MLE head."
        },
    )
    confidence_constant: float = field(default=1.0, metadata={"help": "Constant c of a radius of 'theory'; above 0."})
    confidence_delta: float = field(
        default=0.05, metadata={"help": "Failure probability δ of a radius of 'theory'; in (0, 1)."}
    )

    def __post_init__(self):
        self.confidence_radius = parse_radius(self.confidence_radius)
        if self.beta is None:
            self.beta = 0.05 if self.adversary == "off" else 0.3
        if self.imitation_weight is None:
            self.imitation_weight = 0.0 if self.adversary == "off" else IMITATION_WEIGHT
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

    @property
    def imitates(self) -> bool:
        """Whether the teacher's answers are rows of the policy's loss."""
        return bool(self.imitation_weight)

    @property
    def uses_preferences(self) -> bool:
        """Whether the reward model learns from D."""
        return self.adversary in ("pbkd", "mle")

    @property
    def warms_up(self) -> bool:
        """Whether the student waits for the reward model."""
        return self.uses_preferences and self.rm_warmup_accuracy > 0

    @property
    def follows_mle(self) -> bool:
        """Whether the student climbs the maximum-likelihood head: there is no adversarial one then."""
        return self.adversary == "mle" or (self.adversary == "pbkd" and self.confidence_radius == 0)

    def _check_ranges(self) -> None:
        check_reasoning(self.reasoning)
        if self.adversary not in ADVERSARIES:
            raise ValueError(f"`adversary` is {self.adversary!r}: use one of {', '.join(map(repr, ADVERSARIES))}.")
        for name in ("imitation_weight", "rm_learning_rate", "dual_init", "dual_learning_rate", "dual_max", "beta"):
            check_number(name, getattr(self, name), lambda value: value >= 0, "at least 0")
        for name in ("rm_fresh_share", "rm_warmup_accuracy"):
            check_number(name, getattr(self, name), lambda value: 0 <= value <= 1, "between 0 and 1")
        for name in ("reward_bound", "confidence_constant", "temperature"):
            check_number(name, getattr(self, name), lambda value: value > 0, "above 0")
        for name, least in (("rm_steps", 1), ("rm_lora_r", 0), ("rm_warmup_epochs", 1), ("rm_warmup_steps", 1)):
            check_integer(name, getattr(self, name), least)
        for name, least in (("num_generations", 2), ("num_iterations", 1)):  # two, since advantages compare answers
            check_integer(name, getattr(self, name), least)
        for name in ("rm_batch_size", "num_generations_eval", "generation_batch_size", "steps_per_generation"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)
        if self.rm_max_length is not None:
            check_integer("rm_max_length", self.rm_max_length, 2)
        check_number("rm_held_out", self.rm_held_out, lambda value: 0 <= value < 1, "at least 0 and below 1")
        check_number("confidence_delta", self.confidence_delta, lambda value: 0 < value < 1, "between 0 and 1")
        if self.confidence_radius != "theory":
            check_number("confidence_radius", self.confidence_radius, lambda v: v >= 0, "at least 0, or 'theory'")
        if self.dual_init > self.dual_max:
            raise ValueError(
                f"`dual_init` is {self.dual_init} but λ is capped at `dual_max` = {self.dual_max}: lower `dual_init` or "
                "raise `dual_max`."
            )

    def _check_combinations(self) -> None:
        self.refuse_without_weight(self.imitation_weight)  # type: ignore[arg-type]
        if self.imitation_radius == "theory" and self.adversary == "off":
            raise ValueError(
                "`imitation_radius` is 'theory', which counts the pairs of D, and `adversary` is 'off', without a D: give a "
                "number of nats per pair."
            )
        if self.rm_batch_size is not None and self.rm_batch_size % self.world_size:
            raise ValueError(
                f"`rm_batch_size` is {self.rm_batch_size}, which {self.world_size} processes do not divide: give a multiple "
                f"of {self.world_size}."
            )
        if self.warms_up and self.rm_held_out == 0:
            raise ValueError(
                f"`rm_warmup_accuracy` is {self.rm_warmup_accuracy} but `rm_held_out` is 0, so that there is nothing to "
                "measure it on: hold pairs out, or set `rm_warmup_accuracy=0`."
            )
        if self.adversary == "pbkd" and self.dual_learning_rate == 0 and self.confidence_radius != 0:
            logger.warning(
                f"`confidence_radius` is {self.confidence_radius}, which does nothing while λ is fixed "
                "(`dual_learning_rate` = 0)."
            )
