"""Sections of the model card for a student of `MMPbKDTrainer`."""

from typing import TYPE_CHECKING

from trl_kd.trainers.common.card import OF_IMITATION, add_sections, plain, public_name


if TYPE_CHECKING:
    from trl_kd.trainers.mm_pbkd.trainer import MMPbKDTrainer


_SETTINGS = (
    "lmbda",
    "beta",
    "off_policy_beta",
    "kl_coef",
    "moment_coef",
    "state_gradient",
    "imitation_weight",
    "temperature",
    "q_head",
    "q_bound",
    "q_learning_rate",
    "q_steps",
    "q_warmup_steps",
    "dual_init",
    "dual_learning_rate",
    "dual_max",
    "confidence_radius",
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_completion_length",
    "seed",
)


def add_mm_pbkd_sections(path: str, trainer: "MMPbKDTrainer") -> None:
    """As `add_pbkd_sections`, for a student matched to its teacher's distributions."""
    pairs = trainer.preference_rows
    said = f"{pairs} preference pairs held the Q-function." if pairs else "No preferences: moment matching alone."
    lines = [f"Teacher: {plain(public_name(trainer.teacher.name))}, by its distribution at each token. {said}", ""]
    weights = trainer.pair_weights
    if weights is not None and weights.pairs:
        counts = "" if trainer.answer_counts is None else f": {trainer.answer_counts.told}"
        lines += [
            f"{weights.pairs} preference pairs weighed the teacher's completions, which were imitated{counts}.",
            "",
        ]
    add_sections(path, trainer, lines, _SETTINGS + (() if weights is None else OF_IMITATION))
