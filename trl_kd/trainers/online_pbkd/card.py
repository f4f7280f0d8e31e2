"""Sections of the model card for a student of `OnlinePbKDTrainer`."""

from typing import TYPE_CHECKING

from trl_kd._trl.models import get_config_model_id
from trl_kd.pairs.card import code
from trl_kd.pairs.labels import describe_preference
from trl_kd.trainers.common.card import OF_IMITATION, add_sections, comparer, plain, public_name


if TYPE_CHECKING:
    from trl_kd.trainers.online_pbkd.trainer import OnlinePbKDTrainer


_SETTINGS = (
    "adversary",
    "imitation_weight",
    "beta",
    "temperature",
    "num_generations",
    "reward_bound",
    "rm_lora_r",
    "rm_learning_rate",
    "rm_steps",
    "rm_fresh_share",
    "dual_init",
    "dual_learning_rate",
    "dual_max",
    "confidence_radius",
    "learning_rate",
    "generation_batch_size",
    "max_completion_length",
    "seed",
)


def add_online_sections(path: str, trainer: "OnlinePbKDTrainer") -> None:
    """As `add_pbkd_sections`, for a student that climbed a reward model."""
    parts, learner = trainer.parts, trainer.learner
    if parts.teacher is None:
        teacher = f"the column {code(trainer.args.teacher_column)}" if parts.needs_teacher else "none"
    else:
        described = parts.teacher.describe()
        named = public_name(described.get("model")) if described.get("model") else str(described.get("sampler"))
        teacher = plain(named)
    lines = [f"Teacher: {teacher}.", ""]
    if parts.preference is not None:
        lines += [
            f"Its answers were compared with the student's by {comparer(describe_preference(parts.preference))}.",
            "",
        ]
    if learner is not None:
        start = parts.reward_model
        name = start if start is None or isinstance(start, str) else get_config_model_id(start.config)
        lines += [
            f"The reward model started from {'the student' if start is None else plain(public_name(name))}.",
            "",
        ]
        held_out = f", {len(learner.pool.held_out)} of them held out" if learner.holds_out else ""
        lines += [f"In the end there were {len(learner.pool)} preference pairs{held_out}.", ""]
        logged = [entry for entry in trainer.state.log_history if "pbkd/rm_held_out_accuracy" in entry]
        if logged:
            rate = f"{100 * logged[-1]['pbkd/rm_held_out_accuracy']:.1f} %"
            lines += [f"At the last log it ordered {rate} of the newest held-out ones rightly.", ""]
    add_sections(path, trainer, lines, _SETTINGS + (OF_IMITATION if trainer.args.imitates else ()))
