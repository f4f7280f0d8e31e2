"""The ways to distil that the demo compares: each with its trainer, its data and its own settings."""

import random
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from trl import DistillationConfig, DistillationTrainer, DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from trl_kd.tasks import Task
from trl_kd.trainers.mm_pbkd.config import MMPbKDConfig
from trl_kd.trainers.mm_pbkd.trainer import MMPbKDTrainer
from trl_kd.trainers.pbkd.config import PbKDConfig
from trl_kd.trainers.pbkd.trainer import PbKDTrainer


METHODS = {
    "seqkd": "SeqKD",
    "seqkd_dft": "SeqKD, dft",
    "sft_chosen": "SFT on chosen",
    "dpo": "DPO",
    "dpo_sft": "DPO + sft",
    "pbkd": "PbKD",
}
"""The ways to distil from texts, and their names for readers."""

LABELLED = ("sft_chosen", "dpo", "dpo_sft", "pbkd")
"""Those of them that read labels: wrong ones change them."""

FLIPPED = ("sft_chosen", "dpo_sft", "pbkd")
"""Those that learn from flipped labels too. DPO alone gains little from right ones."""

LEARNING_RATES = {"dpo": 1e-4, "dpo_sft": 1e-3}
"""Peak learning rates of methods that have their own, and β of DPO: the best of a grid on validation seeds
(`benchmarks/imitation_ablations.py --rates`). DPO + sft is best with TRL's β, 0.1."""
DPO_BETA = 5.0

VERIFIED = {
    "seqkd_verified": "SeqKD, verified answers",
    "pbkd_verified": "PbKD, verified answers",
}
"""Two of them again, imitating those of the teacher's answers that the verifier calls right: they read its scores."""

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
    settings: dict[str, Any] = {"max_length": 128}
    if method in ("pbkd", "pbkd_verified"):
        names = ["prompt", "chosen", "rejected", "preference", "teacher_side"]
        if method == "pbkd_verified":
            names += ["score_chosen", "score_rejected"]
            settings["imitation_min_score"] = 1.0
        pairs = [{name: row[name] for name in names} for row in rows]
        return Recipe(PbKDTrainer, PbKDConfig, Dataset.from_list(pairs), settings, {})
    strict = [_ordered(row) for row in rows if row["preference"] in (0, 1)]
    if method in ("dpo", "dpo_sft"):
        if method == "dpo":
            settings["beta"] = DPO_BETA
        else:
            settings |= {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}
        return Recipe(DPOTrainer, DPOConfig, Dataset.from_list(strict), settings, {})
    if method == "sft_chosen":
        texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in strict]
    else:
        taught = [row for row in rows if method != "seqkd_verified" or row[f"score_{row['teacher_side']}"] == 1]
        texts = [{"prompt": row["prompt"], "completion": row[row["teacher_side"]]} for row in taught]
    if method == "seqkd_dft":
        settings["loss_type"] = "dft"
    return Recipe(SFTTrainer, SFTConfig, Dataset.from_list(texts), settings, {})


def _ordered(row: dict[str, Any]) -> dict[str, str]:
    """A pair with a winner, which comes first."""
    chosen, rejected = ("chosen", "rejected") if row["preference"] == 1 else ("rejected", "chosen")
    return {"prompt": row["prompt"], "chosen": row[chosen], "rejected": row[rejected]}


def flip_labels(rows: list[dict[str, Any]], share: float, seed: int) -> list[dict[str, Any]]:
    """
    The pairs, with some labels that say the opposite. The texts stay as they are.

    Args:
        rows (`list[dict]`):
            Pairs as `load_pairs` gives them.
        share (`float`):
            Share of the pairs with a winner, in [0, 1], whose `preference` p becomes 1 − p.
        seed (`int`):
            Says which.
    """
    strict = [index for index, row in enumerate(rows) if row["preference"] in (0, 1)]
    wrong = set(random.Random(f"flipped/{seed}").sample(strict, round(share * len(strict))))
    return [row | {"preference": 1 - row["preference"]} if index in wrong else row for index, row in enumerate(rows)]


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
