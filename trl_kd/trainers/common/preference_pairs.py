"""Preference pairs that a learnt reward is held by: how they are read, and which of them say something."""

import math
from types import SimpleNamespace
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset

from trl_kd.preferences.tokens import is_conversational
from trl_kd.trainers.common.pair_rows import has_images, prepare_pair_rows


logger = get_logger(__name__)


def pair_settings(max_length: int | None, reasoning: str | None = None) -> Any:
    """What the readers of pairs ask of a `PbKDConfig`: Q's likelihood is Bradley–Terry's, so every label will do."""
    return SimpleNamespace(
        loss_type=["sigmoid"],
        use_weighting=False,
        f_divergence_type="reverse_kl",
        max_length=max_length,
        truncation_mode="keep_start",
        dataset_num_proc=None,
        reasoning=reasoning,
    )


def read_pairs(dataset: Any, prompts: Any) -> Dataset:
    """
    Checks preference pairs as `PbKDTrainer` does.

    Args:
        dataset (`Dataset`):
            Pairs in TRL's preference format, `preference` being P(chosen ≻ rejected), by default 1.
        prompts (`Dataset` or `IterableDataset`, *optional*):
            What is trained on, of the same format as the pairs.

    Returns:
        All pairs, with a column `preference`.

    Raises:
        `ValueError`: a stream, images, a wrong label, or text beside messages.
    """
    if not isinstance(dataset, Dataset):
        hint = ""
        if isinstance(dataset, dict) and dataset:
            hint = f", for example preference_dataset[{next(iter(dataset))!r}]"
        elif isinstance(dataset, list):
            hint = ", for example `Dataset.from_list(pairs)`"
        elif isinstance(dataset, IterableDataset):
            hint = ": a stream cannot be drawn from in a new order again and again, as Q does"
        raise ValueError(f"`preference_dataset` is a {type(dataset).__name__}; give a `datasets.Dataset`{hint}.")
    if has_images(next(iter(dataset), {})):
        raise ValueError("`preference_dataset` has images, which Q does not read: drop their columns, or those rows.")
    unused = [c for c in ("teacher", "teacher_side") if c in dataset.column_names]  # who wrote what is nothing to Q
    dataset = dataset.remove_columns(unused)
    dataset, _ = prepare_pair_rows(dataset, "preference", imitated=False)
    if prompts is not None:
        _check_same_format(next(iter(dataset)), next(iter(prompts)))
    if "preference" not in dataset.column_names:
        dataset = dataset.add_column("preference", [1.0] * len(dataset))
    return dataset


def known_pairs(dataset: Dataset) -> Dataset:
    """
    Those of the pairs that Q learns from: with a known preference. Two equal responses have none, whatever their label says.

    Args:
        dataset (`Dataset`):
            What `read_pairs` returned.

    Raises:
        `ValueError`: no pair is left.
    """
    read = dataset.select_columns(["chosen", "rejected", "preference"]).with_format(None).iter(batch_size=1000)
    rows = (row for b in read for row in zip(b["chosen"], b["rejected"], b["preference"], strict=True))
    differ = [None if p is None or math.isnan(p) else chosen != rejected for chosen, rejected, p in rows]
    if False in differ:
        logger.warning(
            f"In {differ.count(False)} of {len(dataset)} rows of the preference dataset both responses are equal, so that "
            "none is preferred: they are left out."
        )
    dataset = dataset.select([i for i, use in enumerate(differ) if use])
    if not len(dataset):
        raise ValueError(
            "`preference_dataset` has no row with a known `preference` between two different responses: Q would learn "
            "nothing from it."
        )
    return dataset


def _check_same_format(pair: dict[str, Any], row: dict[str, Any]) -> None:
    ours, theirs = ("messages" if is_conversational(first) else "text" for first in (pair, row))
    if ours != theirs:
        raise ValueError(
            f"`preference_dataset` is {ours}, but the prompts of the train dataset are {theirs}: give both as text or both "
            "as messages (`trl-kd pairs --as_messages` makes pairs of messages from prompts of text)."
        )
