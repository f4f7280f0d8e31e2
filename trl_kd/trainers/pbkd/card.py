"""Sections of the model card for a student of `PbKDTrainer`."""

from typing import TYPE_CHECKING

from trl_kd.trainers.common.card import OF_IMITATION, OF_TRAINING, add_sections, plain, public_name


if TYPE_CHECKING:
    from trl_kd.trainers.pbkd.trainer import PbKDTrainer


_IMITATION_SETTINGS = (
    *("imitation_weight", "imitation", *OF_IMITATION, "student_wins"),
    *OF_TRAINING,
)
"""Of a run without the preference term."""
_PAIR_SETTINGS = (
    *("beta", "loss_type", "loss_weights", "dual_init", "dual_learning_rate", "dual_max", "confidence_radius"),
    "preference_nll_target",
    *_IMITATION_SETTINGS,
)


def add_pbkd_sections(path: str, trainer: "PbKDTrainer") -> None:
    """Adds to the card that TRL wrote at `path`: teacher, preference data, settings, results and versions."""
    settings = _IMITATION_SETTINGS if trainer.imitates_alone else _PAIR_SETTINGS
    add_sections(path, trainer, _data_lines(trainer), settings)


def _data_lines(trainer: "PbKDTrainer") -> list[str]:
    """Who taught the student, and on what."""
    lines, teacher = [], trainer.teacher
    if teacher is not None:
        lines += [f"Teacher: {plain(public_name(teacher.name))}, by its distribution at each token.", ""]
    else:
        name = f"{plain(trainer.card_teacher)}, " if trainer.card_teacher else ""
        lines += [f"Teacher: {name}known by its responses in the preference data.", ""]
    if not trainer.row_counts:
        lines += ["The data was streamed, and not counted.", ""]
    for name, counts in trainer.row_counts.items():
        named = f", of which {counts.teacher} with a response of the teacher's"
        lines += [
            f"{plain(name.capitalize())} data: {counts.rows} rows{'' if name in trainer.unnamed_teacher else named}; "
            f"preference known for {counts.known} ({counts.soft} soft labels or ties), unknown for {counts.null}.",
            "",
        ]
    for name, texts in trainer.text_counts.items():
        lines += [f"Of the {plain(name)} data {texts.told}.", ""]
    if trainer.unnamed_teacher and trainer.args.imitation_weight:
        told = " and ".join(map(plain, trainer.unnamed_teacher))
        lines += [
            f"No column of the {told} data names the teacher: every chosen answer was taken as the teacher's.",
            "",
        ]
    return lines
