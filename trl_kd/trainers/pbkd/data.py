"""Rows of `PbKDTrainer`: what its columns may hold, how they are read, and how they reach a batch.

Beside TRL's `prompt` (optional), `chosen` and `rejected`, a row may have

- `preference`: P(chosen ≻ rejected), 1 by default; a soft label, ½ for a tie, or null where nothing is known;
- `teacher_side`: "chosen" or "rejected", which of the two the teacher wrote, or null for neither;
- `teacher`: the teacher's response where it is neither of the two;
- `student_count`: how many of the student's answers the row stands for, 1 by default;
- `chosen_finish_reason`, `rejected_finish_reason`, `teacher_finish_reason`: why a response ended, see
  `trl_kd.responses.finish_reasons`. No end token is learnt behind one that was cut off.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

from trl_kd.responses.nulls import without_nulls
from trl_kd.responses.tokens import LEFT_OUT, OWN
from trl_kd.trainers.common.pair_rows import LABEL_COLUMNS, SIDES, RowCounts, prepare_pair_rows
from trl_kd.trainers.common.response_rows import KIND_COLUMNS, REASON_COLUMNS, PairReader
from trl_kd.trainers.pbkd.config import PbKDConfig


logger = get_logger(__name__)

ADVANTAGE, SHARE, COMPARED = "imitation_advantage", "imitation_share", "imitation_compared"
"""Columns of a row that `weigh_texts` adds: a(p, ζ) of the teacher's text, null where neither text is the teacher's; which
share of the text is this row's, 1/k where it stands in k rows; and whether the text was compared with another one."""
OUR_COLUMNS = (*LABEL_COLUMNS, *KIND_COLUMNS, *REASON_COLUMNS, ADVANTAGE, SHARE, COMPARED)
"""Columns of a row that are read here and unknown to TRL's collators."""
WEIGHT_KEYS = ("advantage", "weight", "compared")
BATCH_KEYS = (*LABEL_COLUMNS, "own_mask", *WEIGHT_KEYS)
"""What a batch has beside TRL's."""


def _without_weights(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Without the weights of another trainer's dataset, or columns of the same names; and without `completion`, which is no
    text of a pair, and by which TRL may tell text from messages."""
    found = [column for column in (ADVANTAGE, SHARE, COMPARED, "completion") if column in (dataset.column_names or ())]
    return dataset.remove_columns(found) if found else dataset


def prepare_rows(
    dataset: Dataset | IterableDataset, name: str, args: PbKDConfig
) -> tuple[Dataset | IterableDataset, RowCounts | None]:
    """[`~trl_kd.trainers.common.pair_rows.prepare_pair_rows`] for these settings.

    Raises:
        `ValueError`: besides, labels that `args` cannot serve.
    """
    return prepare_pair_rows(
        _without_weights(dataset),
        name,
        imitated=bool(args.imitation_weight),
        check=lambda counts: check_labels(args, soft=counts.soft > 0, null=counts.null > 0, name=name),
    )


def check_labels(args: PbKDConfig, *, soft: bool, null: bool, name: str) -> None:
    """Raises a `ValueError` where the losses of `args` cannot serve soft or null labels (they would be taken for 1)."""
    if soft:
        sigmoid = "sigmoid" in args.loss_type and set(args.loss_type) <= {"sigmoid", "sft"}
        if args.use_weighting or not sigmoid or args.f_divergence_type != "reverse_kl":
            raise ValueError(
                f"The {name} dataset has soft labels (`preference` other than 1 and null), which only the 'sigmoid' loss "
                f"with reverse KL and without weighting can use, and `loss_type` is {args.loss_type}, `use_weighting` "
                f"{args.use_weighting}, `f_divergence_type` {args.f_divergence_type!r}: use `loss_type='sigmoid'`, or drop "
                "those rows."
            )
    refused = sorted({"aot", "aot_unpaired", "sft"} & set(args.loss_type))
    if null and refused:
        raise ValueError(
            f"The {name} dataset has rows without a known preference (`preference` null, or a third `teacher` text), which "
            f"the loss {' and '.join(map(repr, refused))} cannot leave out: drop those rows or that loss (the imitation "
            "term does what 'sft' does)."
        )


def imitation_weights(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What the imitation term needs to know of each example of a batch, by [`WEIGHT_KEYS`]."""
    advantage_B = torch.tensor([example[ADVANTAGE] or 0.0 for example in examples], dtype=torch.float32)
    share_B = torch.tensor([example[SHARE] for example in examples], dtype=torch.float32)
    compared_B = torch.tensor([example[COMPARED] for example in examples], dtype=torch.bool)
    return dict(zip(WEIGHT_KEYS, (advantage_B, advantage_B * share_B, compared_B), strict=True))


@dataclass
class PbKDCollator:
    """
    Adds to what another collator makes of a list of examples, B of them:

    - `preference`, `[B]`, float32, NaN where unknown;
    - `teacher_side`, `[B]`, int64, see `trl_kd.losses.imitation`;
    - `advantage`, `[B]`, float32, a(p, ζ) of the teacher's text, 0 where there is none;
    - `weight`, `[B]`, float32, the row's weight in the imitation term, a/k of a text in k rows;
    - `compared`, `[B]`, bool, whether the text was compared with another one;
    - `own_mask`, `[2B, T]`, the model's own tokens among those of `completion_mask`, where there are others.

    End tokens behind answers that were cut off are taken out of `completion_mask`.

    Parameters:
        inner (`Callable`): The other collator.
        reader (`PairReader`, *optional*): Reads examples with images, which the other collator tokenizes.
    """

    inner: Callable[[list[dict[str, Any]]], dict[str, Any]]
    reader: PairReader | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        # Read first: the inner collator may change its examples, and need not know these columns
        preferences = [example.get("preference", 1.0) for example in examples]
        sides = [example.get("teacher_side", "chosen") for example in examples]
        weights = imitation_weights(examples)
        kinds = [self._kinds(example) for example in examples]
        rest = [self._theirs(example) for example in examples]
        batch = self.inner(rest)
        batch["preference"] = torch.tensor([math.nan if p is None else p for p in preferences], dtype=torch.float32)
        batch["teacher_side"] = torch.tensor([SIDES[side] for side in sides])
        batch.update(weights)
        if any(of_side is not None for both in kinds for of_side in both):
            self._apply(batch, [chosen for chosen, _ in kinds] + [rejected for _, rejected in kinds])
        return batch

    @staticmethod
    def _theirs(example: dict[str, Any]) -> dict[str, Any]:
        """What the inner collator gets. A null variable of the chat template is left out, as it was when the row was
        built."""
        kept = {k: v for k, v in example.items() if k not in OUR_COLUMNS}
        if "chat_template_kwargs" in kept:
            kept["chat_template_kwargs"] = without_nulls(kept["chat_template_kwargs"] or {})
        return kept

    def _kinds(self, example: dict[str, Any]) -> list[list[int] | None]:
        if self.reader is not None:
            return self.reader.kinds_alone(example)
        return [example.get(column) for column in KIND_COLUMNS]

    def _apply(self, batch: dict[str, Any], kinds_2B: list[list[int] | None]) -> None:
        mask_2BT = batch["completion_mask"].clone()
        own_2BT = mask_2BT.clone()
        keeps_end = getattr(self.inner, "truncation_mode", "keep_start") == "keep_end"
        for row, kinds in enumerate(kinds_2B):
            if kinds is None:
                continue
            places = mask_2BT[row].nonzero().squeeze(1)  # `max_length` may have taken some
            left = torch.tensor(kinds[len(kinds) - len(places) :] if keeps_end else kinds[: len(places)])
            mask_2BT[row, places[left == LEFT_OUT]] = 0
            own_2BT[row, places[left != OWN]] = 0
        batch["completion_mask"] = mask_2BT
        if not torch.equal(own_2BT, mask_2BT):
            batch["own_mask"] = own_2BT
