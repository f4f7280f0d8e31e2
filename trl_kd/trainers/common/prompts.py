"""Prompts that are trained on: their checks, and their order."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler

from trl_kd.pairs.checks import check_template_columns
from trl_kd.responses.finish_reasons import check_finish_reason
from trl_kd.trainers.common.pair_rows import check_text, has_images


logger = get_logger(__name__)


def check_prompts(dataset: Any, name: str, lmbda: float = 1.0, tools: Any = None) -> Any:
    """
    Args:
        dataset (`Dataset` or `IterableDataset`):
            Prompts, with `completion` or without. A stream is checked by its first row, and then as it is read.
        name (`str`):
            What it is called in messages.
        lmbda (`float`, *optional*, defaults to `1.0`):
            Share of on-policy states; below 1 completions are read too.
        tools (*optional*):
            Tools of the student's, if it has any.

    Returns:
        The dataset.

    Raises:
        `ValueError`: it has no prompts, or its rows cannot give off-policy states.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        hint = f": give one of them, such as dataset[{next(iter(dataset))!r}]" if isinstance(dataset, dict) else ""
        raise ValueError(f"The {name} dataset is a {type(dataset).__name__}, not a `datasets.Dataset`{hint}.")
    first: dict[str, Any] | None = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {name} dataset is empty: it needs at least one row.")
    if "prompt" not in first:
        raise ValueError(f"The {name} dataset has no column 'prompt'; it has {', '.join(sorted(first))}.")
    mixed = lmbda < 1
    if mixed and (has_images(first) or tools):
        raise ValueError(
            f"`lmbda` is {lmbda}, but {'tools' if tools else 'images'} are supported on-policy only: set `lmbda=1`."
        )
    unread = [column for column in ("tools", "chat_template_kwargs") if first.get(column)]
    if mixed and unread and lmbda > 0:
        logger.warning(
            f"The {name} dataset has a column {unread[0]!r}, which the student's own prompts are made without: they are "
            "another context than the one that the teacher answered in. Give what holds for all rows as "
            "`chat_template_kwargs` or `tools` of the trainer."
        )
    if mixed and "completion" not in first:
        logger.info(
            f"The {name} dataset has no column 'completion': the teacher's states are sampled from the teacher."
        )
    read = [column for column in ("prompt", "completion", "completion_finish_reason") if column in first]
    rows: Iterable[dict[str, Any]] = [first]
    if isinstance(dataset, Dataset):
        batches = dataset.select_columns(read).with_format(None).iter(batch_size=1000)  # much faster than row by row
        values = (row for batch in batches for row in zip(*(batch[column] for column in read), strict=True))
        rows = (dict(zip(read, row, strict=True)) for row in values)
    for index, row in enumerate(rows):
        check_row(row, f"Row {index} of the {name} dataset", mixed)
    return dataset


def check_row(row: dict[str, Any], where: str, mixed: bool) -> None:
    """Raises a `ValueError` for a prompt that is empty or no prompt, or a completion of another format."""
    if row["prompt"] in (None, ""):
        raise ValueError(f"{where}: `prompt` is {row['prompt']!r}. Give a text, or drop the row.")
    check_text(row["prompt"], f"{where}: `prompt`")
    check_template_columns(row, where)
    completion = row.get("completion") if mixed else None
    if completion is None:
        return
    check_text(completion, f"{where}: `completion`")
    check_finish_reason(row.get("completion_finish_reason"), f"{where}: `completion_finish_reason`")
    if isinstance(completion, str) != isinstance(row["prompt"], str):
        kind = "text" if isinstance(row["prompt"], str) else "messages"
        raise ValueError(
            f"{where}: `prompt` is {kind} but `completion` is not: give both as text or both as messages."
        )


class EpochOrder(Sampler[int]):
    """
    TRL's order of the prompts, also where a training goes on in a later epoch: its generator would begin anew there.

    Args:
        sampler (`RepeatSampler`):
            TRL's.
        epoch (`Callable`):
            Returns the epoch that begins or goes on.
    """

    def __init__(self, sampler: Any, epoch: Callable[[], int]):
        self._sampler, self._epoch = sampler, epoch

    def __iter__(self) -> Iterator[int]:
        sampler = self._sampler
        if sampler.shuffle:
            sampler.generator.manual_seed(sampler.seed)
            for _ in range(self._epoch()):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        return iter(sampler)

    def __len__(self) -> int:
        return len(self._sampler)
