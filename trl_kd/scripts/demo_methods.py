"""The ways to distil that the demo compares: each with its trainer, its data and its own settings."""

from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer, DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from trl_kd.tasks import Task
from trl_kd.trainers.mm_pbkd_config import MMPbKDConfig
from trl_kd.trainers.mm_pbkd_trainer import MMPbKDTrainer
from trl_kd.trainers.pbkd_config import PbKDConfig
from trl_kd.trainers.pbkd_trainer import PbKDTrainer


METHODS = {
    "seqkd": "SeqKD",
    "dpo": "DPO",
    "dpo_sft": "DPO + sft",
    "pbkd": "PbKD",
}
"""The four ways to distil from texts, and their names for readers."""

VERIFIED = {
    "seqkd_verified": "SeqKD, verified answers",
    "pbkd_verified": "PbKD, verified answers",
}
"""Two of them again, imitating only those of the teacher's answers that the verifier calls right."""

WHITE_BOX = {
    "reverse_kl": "On-policy reverse KL",
    "forward_kl": "Forward KL",
    "mm": "MM, no preferences",
    "mm_pbkd": "MM-PbKD",
}
"""Ways to distil that read the teacher's distributions."""


class Recipe(NamedTuple):
    """A method: `trainer(args=config(**settings), train_dataset=data, **arguments)`."""

    trainer: Any
    config: Any
    data: Dataset
    settings: dict[str, Any]
    arguments: dict[str, Any]


def recipe(method: str, rows: list[dict[str, Any]], teacher: Path, task: Task) -> Recipe:
    """
    Args:
        method (`str`):
            One of `METHODS`, `VERIFIED` and `WHITE_BOX`.
        rows (`list[dict]`):
            Pairs as `load_pairs` gives them.
        teacher (`Path`):
            Folder of the teacher, for white-box methods.
        task ([`~trl_kd.tasks.Task`]):
            Says how long an answer may be.
    """
    if method in WHITE_BOX:
        return _white_box(method, rows, teacher, task)
    verified = method in VERIFIED
    sides = [row["teacher_side"] if not verified or row[f"score_{row['teacher_side']}"] == 1 else None for row in rows]
    length = {"max_length": 128}
    if method in ("seqkd", "seqkd_verified"):
        texts = [
            {"prompt": row["prompt"], "completion": row[side]} for row, side in zip(rows, sides, strict=True) if side
        ]
        return Recipe(SFTTrainer, SFTConfig, Dataset.from_list(texts), length, {})
    if method in ("pbkd", "pbkd_verified"):
        names = ("prompt", "chosen", "rejected", "preference")
        pairs = [
            {name: row[name] for name in names} | {"teacher_side": side} for row, side in zip(rows, sides, strict=True)
        ]
        return Recipe(PbKDTrainer, PbKDConfig, Dataset.from_list(pairs), length, {})
    strict = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows if row["preference"] == 1]
    loss = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]} if method == "dpo_sft" else {}
    return Recipe(DPOTrainer, DPOConfig, Dataset.from_list(strict), length | loss, {})


def _white_box(method: str, rows: list[dict[str, Any]], teacher: Path, task: Task) -> Recipe:
    states = [{"prompt": row["prompt"], "completion": row[row["teacher_side"]]} for row in rows]
    settings: dict[str, Any] = {"max_completion_length": task.max_response_tokens}
    arguments: dict[str, Any] = {"teacher_model": str(teacher)}
    if method == "reverse_kl":
        return Recipe(DistillationTrainer, DistillationConfig, Dataset.from_list(states), settings, arguments)
    if method == "forward_kl":
        settings |= {"lmbda": 0.0, "moment_coef": 0.0}
    if method == "mm_pbkd":
        names = ("prompt", "chosen", "rejected", "preference")
        arguments["preference_dataset"] = Dataset.from_list([{name: row[name] for name in names} for row in rows])
    return Recipe(MMPbKDTrainer, MMPbKDConfig, Dataset.from_list(states), settings, arguments)
