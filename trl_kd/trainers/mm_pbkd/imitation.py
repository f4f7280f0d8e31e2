"""Imitation of the teacher's completions at their states: each by what preferences say of it."""

from collections import defaultdict
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset

from trl_kd.trainers.common.imitation_schedule import ImitationSchedule
from trl_kd.trainers.common.imitation_weights import AnswerCounts, PairWeights
from trl_kd.trainers.mm_pbkd.data import tokenize_completion
from trl_kd.trainers.mm_pbkd.step import Imitated, Played


logger = get_logger(__name__)


class ImitatedStates(ImitationSchedule):
    """
    Mixin before [`~trl_kd.trainers.mm_pbkd.generation.MixedStates`]. Where `args.imitation_weight` is above 0, a generation
    batch gets three entries more, lists of one value a row:

    - `advantage`: a(p, ζ) of the teacher's completion, 0 for the student's;
    - `imitated_tokens`: how many tokens the completions with an advantage above 0 have in the global batch;
    - `imitated_share`: the teacher's share of the global batch's rows.

    Attributes:
        pair_weights ([`~trl_kd.trainers.common.imitation_weights.PairWeights`], *optional*):
            The weights; `None` where nothing is imitated.
        mean_advantage (`float`):
            ā.
        answer_counts ([`~trl_kd.trainers.common.imitation_weights.AnswerCounts`], *optional*):
            How many of the training data's completions the pairs know.
    """

    accelerator: Any
    chat_template: Any
    chat_template_kwargs: dict[str, Any]
    eos_token_ids: list[int]
    max_completion_length: int | None
    _metrics: dict[str, defaultdict[str, list[float]]]
    _teacher_rows: dict[int, dict[str, Any]]

    pair_weights: PairWeights | None = None
    mean_advantage = 1.0
    answer_counts: AnswerCounts | None = None
    _imitation_2: torch.Tensor | None = None
    """Of the micro-batch under way: L_imit and the mean of −log π. `None` where its global batch imitates nothing."""

    def _settle_imitation(self, dataset: Any) -> None:
        if self.pair_weights is None or dataset is None:
            return
        if self.pair_weights.pairs and isinstance(dataset, Dataset) and "completion" in dataset.column_names:
            self.answer_counts = self.pair_weights.count(dataset)
            logger.warning(f"Of the teacher's completions: {self.answer_counts.told}.")
        self.mean_advantage = self.pair_weights.mean(dataset, self._count_tokens)

    def _count_tokens(self, row: dict[str, Any]) -> int:
        template = {"chat_template": self.chat_template, **self.chat_template_kwargs}
        _, _, own = tokenize_completion(
            row, self.processing_class, self.eos_token_ids, self.args.reasoning, **template
        )
        return sum(own[: self.max_completion_length])

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if self.pair_weights is None:
            return output
        tokens_B = (output["completion_mask"] * output.get("tool_mask", 1)).sum(1)
        found = {i: self.pair_weights.of(row) for i, row in self._teacher_rows.items()}
        advantages = [found[i][0] if i in found else 0.0 for i in range(len(inputs))]
        imitated = sum(int(tokens_B[i]) for i, advantage in enumerate(advantages) if advantage > 0)
        seen = [advantage for advantage, compared in found.values() if compared]
        counts = [float(imitated), float(len(found)), float(len(seen)), float(sum(seen))]
        counts_4 = torch.tensor(counts, device=tokens_B.device)  # floats: all ranks must send one dtype
        imitated, rows, compared, total = self.accelerator.reduce(counts_4, reduction="sum").tolist()
        if compared:
            self._record_imitation({"advantage": total / compared})
        share = rows / (len(inputs) * self.accelerator.num_processes)
        return output | {
            "advantage": advantages,
            "imitated_tokens": [int(imitated)] * len(inputs),
            "imitated_share": [share] * len(inputs),
        }

    def _imitated(self, inputs: dict[str, Any], mask_RT: torch.Tensor, rows: list[int]) -> Imitated | None:
        """What imitates the `rows` of a micro-batch, which are the teacher's; `mask_RT` says where their tokens are."""
        tokens = 0 if self.pair_weights is None else inputs["imitated_tokens"][rows[0]]
        if not tokens:
            return None
        advantages_R = torch.tensor([inputs["advantage"][row] for row in rows], device=mask_RT.device)
        return Imitated(
            advantage_N=advantages_R.unsqueeze(1).expand(mask_RT.shape)[mask_RT],
            tokens=tokens,
            mean_advantage=self.mean_advantage,
            is_end_N=self._is_end(inputs["completion_ids"][rows].to(mask_RT.device)[mask_RT]),
            q=self.imitation_q,
            share=inputs["imitated_share"][rows[0]],
        )

    def _keep_imitation(self, inputs: dict[str, Any], played: list[Played]) -> None:
        imitates = self.pair_weights is not None and inputs["imitated_tokens"][0]
        start = torch.zeros(2, device=inputs["completion_ids"].device)
        self._imitation_2 = sum((part.imitation_2 for part in played), start) if imitates else None

    def _log_imitation(self, micro_batches: int) -> None:
        """After a micro-batch, whose share of its global batch's means it adds."""
        if self._imitation_2 is None:
            return
        imitation, nll = (self.accelerator.reduce(self._imitation_2, reduction="sum") * micro_batches).tolist()
        self._record_imitation({"imitation": imitation, "teacher_nll": nll, "q": self.imitation_q})

    def _record_imitation(self, values: dict[str, float]) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in values.items():
            metrics[f"mmpbkd/{name}"].append(value)
