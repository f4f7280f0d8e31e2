"""The imitation term of `PbKDTrainer`, with and without the preference term: its loss, its metrics, and what of it is saved.

L_imit = Σ_i a_i Σ_t ℓ_q(π(y_t|s_t)) / (ā · Σ_{a_i>0} |y_i|)
"""

import json
import os
from collections import defaultdict, deque
from typing import Any

import torch
from accelerate.logging import get_logger

from trl_kd.losses.imitation import imitation_losses
from trl_kd.trainers.common.dual import DUAL_FILE
from trl_kd.trainers.common.imitation_schedule import ImitationSchedule
from trl_kd.trainers.pbkd.step import ImitationWindow


logger = get_logger(__name__)

IMITATION_FILE = "pbkd_imitation.json"
_OF_WEIGHTS = {"imitation_radius", "imitation_min_score", "student_wins"}
"""Settings on which the weights depend, and so their mean ā."""
STEPS = 10
"""Training steps over which it is looked at how much of the gradient ℓ_q leaves."""
LITTLE_LEFT = 0.3
"""Mean of π^q below which it is said that the student learns little but end tokens (benchmarks/README.md)."""


class ImitationTerm(ImitationSchedule):
    """
    Mixin before `DPOTrainer`.

    Attributes:
        imitates_alone (`bool`):
            Whether the preference term is off. Settled at construction.
        mean_advantage (`float`):
            ā. It is saved in checkpoints, and taken from them unless a setting of the weights has changed.
        imitation_radius (`float`):
            ζ of a(p, ζ), nats per pair.
    """

    accelerator: Any
    text_counts: dict[str, Any]
    _metrics: dict[str, defaultdict[str, list[float]]]

    imitates_alone = False
    mean_advantage = 1.0
    imitation_radius = 0.0
    _left: deque[float]
    """Mean of π^q in each of the last steps."""
    _said_little = False

    # ---- The loss --------------------------------------------------------------------------------------------------

    def _imitation(self, logps_BT: torch.Tensor, tokens_BT: torch.Tensor, weight_B: torch.Tensor) -> torch.Tensor:
        """Σ weight × Σ_t ℓ_q over texts `[B]`, of whose tokens those that are not imitated have a log-probability of 0."""
        losses_BT = imitation_losses(logps_BT, self._is_end(tokens_BT), self.imitation_q)
        return (weight_B * losses_BT.sum(1)).sum()

    def _variation(self, tokens_BT: torch.Tensor) -> torch.Tensor | None:
        """The share of TV(μ, π) in the divergence from the teacher's distribution: q, and 0 where a text ends. `None` if q
        is 0."""
        return self.imitation_q * ~self._is_end(tokens_BT) if self.imitation_q else None

    def _count_imitation(
        self,
        window: ImitationWindow,
        imitation: torch.Tensor,
        logps_BT: torch.Tensor,
        tokens_BT: torch.Tensor,
        imitated_BT: torch.Tensor,
        advantage_B: torch.Tensor,
        compared_B: torch.Tensor,
    ) -> None:
        """Adds what is logged of a micro-batch. Arguments as in `_imitation`, and which tokens are imitated."""
        logps_BT = logps_BT.detach()
        inner_BT = imitated_BT & ~self._is_end(tokens_BT) & (advantage_B > 0).unsqueeze(1)
        window.add(
            imitation=imitation,
            nll=-logps_BT.sum(),
            left=(torch.exp(self.imitation_q * logps_BT) * inner_BT).sum(),
            inner=inner_BT.sum(),
            advantage=(advantage_B * compared_B).sum(),
        )

    # ---- A global batch --------------------------------------------------------------------------------------------

    def _imitation_scale(self, window: ImitationWindow) -> float:
        """What the sum over the global batch is divided by."""
        return window.used_tokens * self.mean_advantage

    def _mean_imitation(self, window: ImitationWindow, sums: dict[str, float]) -> float:
        """w·L_imit of a whole window."""
        return self.args.imitation_weight * sums["imitation"] / (self._imitation_scale(window) or 1)

    def _log_imitation(self, window: ImitationWindow, sums: dict[str, float]) -> None:
        if not self.args.imitation_weight:
            return
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["pbkd/rows_used"].append(float(window.used))
        metrics["pbkd/q"].append(self.imitation_q)
        if window.tokens:
            metrics["pbkd/teacher_nll"].append(sums["nll"] / window.tokens)
        advantage = self._mean_of_texts() if self.model.training else None
        if advantage is None and window.compared:
            advantage = sums["advantage"] / window.compared
        if advantage is not None:
            metrics["pbkd/advantage"].append(advantage)
        if window.used_tokens:
            metrics["pbkd/imitation"].append(sums["imitation"] / self._imitation_scale(window))
            if self.model.training and sums["inner"] and self.args.imitation == "sequence":
                self._look_at_gradient(sums["left"] / sums["inner"])

    def _mean_of_texts(self) -> float | None:
        """Mean a of the training data's texts that were compared with another one. Where those of weight 0 have left, no
        batch can tell."""
        counts = self.text_counts.get("train") if self.imitates_alone else None
        return None if counts is None else counts.advantage

    def _look_at_gradient(self, left: float) -> None:
        """Says once if little is left of the gradient: that of ℓ_q is π^q times that of −log π."""
        if self._said_little:
            return
        self._left.append(left)
        mean = sum(self._left) / len(self._left)
        if len(self._left) == STEPS and mean < LITTLE_LEFT:
            self._said_little = True
            logger.warning(
                f"Over {STEPS} steps the mean of π^q is {mean:.2g}, with q = {self.imitation_q:g}: the student finds the "
                "teacher's tokens so unlikely that it learns little but where answers end. Raise `imitation_q_warmup`, or "
                "lower `imitation_q`."
            )

    # ---- Checkpoints -----------------------------------------------------------------------------------------------

    def _imitation_state(self) -> dict[str, Any]:
        names = ("imitation", "imitation_weight", "imitation_q_warmup", "imitation_min_score", "student_wins")
        return {
            "mean_advantage": self.mean_advantage,
            "imitation_radius": self.imitation_radius,
            "imitation_q": self.args.final_imitation_q,
            **{name: getattr(self.args, name) for name in names},
        }

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.args.should_save:
            state = self._imitation_state() | {"alone": self.imitates_alone}
            with open(os.path.join(output_dir, IMITATION_FILE), "w", encoding="utf-8") as file:
                json.dump(state, file)

    def _load_optimizer_and_scheduler(self, checkpoint):
        saved = _read_json(checkpoint, IMITATION_FILE)
        if checkpoint is not None:
            self._check_checkpoint(checkpoint, saved)
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if saved is None:
            return
        now = self._imitation_state()
        changed = [name for name in now if name in saved and saved[name] != now[name] and name != "mean_advantage"]
        for name in changed:
            logger.warning(f"`{name}` was {saved[name]} in the checkpoint and is now {now[name]}.")
        if not _OF_WEIGHTS.intersection(changed):
            self.mean_advantage = saved["mean_advantage"]

    def _check_checkpoint(self, checkpoint: str, saved: dict[str, Any] | None) -> None:
        """Raises a `ValueError` for a checkpoint of the other loss."""
        dual = (_read_json(checkpoint, DUAL_FILE) or {}).get("value", 0.0)
        # Earlier checkpoints have the file only without the preference term
        was_alone = dual == 0 if saved is None else saved.get("alone", True)
        if self.imitates_alone and not was_alone:
            raise ValueError(
                f"The checkpoint {checkpoint!r} was saved with the preference term, λ = {dual}, and that is off in this "
                "run, since `dual_init` and `dual_learning_rate` are 0: give them as they were, or begin anew."
            )
        if not self.imitates_alone and saved is not None and was_alone:
            raise ValueError(
                f"The checkpoint {checkpoint!r} was saved without the preference term, and this run has it, with "
                f"`dual_init` = {self.args.dual_init}: set `dual_init=0` and `dual_learning_rate=0`, or begin anew."
            )


def _read_json(folder: str | None, name: str) -> dict[str, Any] | None:
    path = None if folder is None else os.path.join(folder, name)
    if path is None or not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)
