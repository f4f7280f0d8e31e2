"""The teacher's texts as tokens: rows of one text, and how many tokens are imitated."""

import math
from collections.abc import Iterator
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, Features, IterableDataset, Sequence, Value, concatenate_datasets

from trl_kd.responses.tokens import OWN
from trl_kd.trainers.common.response_rows import (
    KIND_COLUMNS,
    REASON_COLUMNS,
    NothingToLearn,
    PairReader,
    map_rows,
    tokenize_rows,
)
from trl_kd.trainers.common.teacher_texts import IMAGES, read_columns, side_of_teacher
from trl_kd.trainers.pbkd.config import PbKDConfig
from trl_kd.trainers.pbkd.data import ADVANTAGE, SHARE


logger = get_logger(__name__)

TEXT_COLUMNS = ("input_ids", "labels")
"""Columns of a row of one text, beside its weight."""
_TOKENIZED = ("teacher_side", "prompt_ids", "chosen_ids", "rejected_ids", *KIND_COLUMNS)
_PLACE = "place_of_row"
IGNORED = -100
"""Label of a token that is not predicted."""


def only_teachers_text(row: dict[str, Any]) -> dict[str, Any]:
    """What to change in a pair so that both of its texts are the teacher's. One without such a text keeps the chosen one."""
    side = side_of_teacher(row) or "chosen"
    changed = {"chosen": row[side], "rejected": row[side]}
    reason = f"{side}_finish_reason"
    if any(f"{other}_finish_reason" in row for other in changed):
        changed |= dict.fromkeys(("chosen_finish_reason", "rejected_finish_reason"), row.get(reason))
    return changed


def tokenize_texts(
    dataset: Dataset | IterableDataset, processing_class: Any, args: PbKDConfig, name: str, *, training: bool
) -> Dataset | IterableDataset:
    """
    Tokenizes the teacher's texts, as `DPOTrainer` tokenizes a pair, into `input_ids` and `labels`.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Pairs with their weights, from [`weigh_texts`].
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            The student's.
        args (`PbKDConfig`):
            Settings.
        name (`str`):
            Name of the dataset in messages.
        training (`bool`):
            Whether texts that have no token of the model's own within `max_length` are left out.

    Returns:
        The dataset. A label is the token itself where it is one of the model's own in a text of the teacher's, else −100.

    Raises:
        `ValueError`: as [`~trl_kd.trainers.common.response_rows.tokenize_rows`].
    """
    if isinstance(dataset, Dataset) and dataset.features["chosen"] != dataset.features["rejected"]:
        dataset = _tokenize_by_side(dataset, processing_class, args, name)
    else:
        kinds = {"features": _with_reasons(dataset.features)} if isinstance(dataset, Dataset) else {}
        doing = f"Taking the teacher's texts of the {name} dataset"
        dataset = map_rows(dataset, only_teachers_text, doing, args.dataset_num_proc, **kinds)
        dataset = tokenize_rows(dataset, processing_class, args, name)
    whole = _slice(args)

    def label(row: dict[str, Any]) -> dict[str, list[int]]:
        prompt, response = row["prompt_ids"], row["chosen_ids"]
        kinds = row.get(KIND_COLUMNS[0]) or [OWN] * len(response)
        if row[ADVANTAGE] is None:
            kinds = [None] * len(response)
        own = [token if kind == OWN else IGNORED for token, kind in zip(response, kinds, strict=True)]
        return {"input_ids": (prompt + response)[whole], "labels": ([IGNORED] * len(prompt) + own)[whole]}

    written = ["prompt_ids", "chosen_ids", "rejected_ids"]
    if not isinstance(dataset, Dataset):
        dataset = dataset.map(label, remove_columns=written)
        return dataset.filter(lambda row: count_labels(row["labels"]) > 0) if training else dataset
    written += [column for column in KIND_COLUMNS if column in dataset.column_names]
    ids = {"input_ids": Sequence(Value("int32")), "labels": Sequence(Value("int32"))}
    kept = {column: kind for column, kind in dataset.features.items() if column not in written}
    doing, kinds = f"Labelling the tokens of the {name} dataset", {"features": Features({**kept, **ids})}
    dataset = map_rows(dataset, label, doing, args.dataset_num_proc, remove_columns=written, **kinds)
    return _with_labels(dataset, name) if training else dataset


def _with_reasons(features: Features) -> Features:
    """With finish reasons of both responses, if there are any."""
    reasons = dict.fromkeys(REASON_COLUMNS, Value("string")) if any(c in features for c in REASON_COLUMNS) else {}
    return Features({**features, **reasons})


def _tokenize_by_side(dataset: Dataset, processing_class: Any, args: PbKDConfig, name: str) -> Dataset:
    """Tokenizes the teacher's texts of two columns that differ in type, each column by itself: in the other's place a call
    of a tool would get the other's arguments, as nulls."""
    sides = [side_of_teacher(row) or "chosen" for row in read_columns(dataset, ("chosen", "teacher_side"))]
    found, failed = [], None
    for side in ("chosen", "rejected"):
        places = [place for place, of_row in enumerate(sides) if of_row == side]
        if not places:
            continue
        part = _take(dataset.select(places), side).add_column(_PLACE, places)  # type: ignore[arg-type]
        try:
            part = tokenize_rows(part, processing_class, args, name)
        except NothingToLearn as error:
            failed = failed or error
            continue
        found.append(part.remove_columns(["chosen", "rejected"]))
    if failed is not None and not found:
        raise failed
    dataset = concatenate_datasets(found)
    order = sorted(range(len(dataset)), key=list(dataset[_PLACE]).__getitem__)
    return dataset.select(order).remove_columns(_PLACE)


def _take(dataset: Dataset, side: str) -> Dataset:
    """Pairs of which both texts are those of one side, and so are their finish reasons."""
    other = "rejected" if side == "chosen" else "chosen"
    dataset = dataset.remove_columns([c for c in (other, f"{other}_finish_reason") if c in dataset.column_names])
    copies = {
        f"{side}{kind}": f"{other}{kind}" for kind in ("", "_finish_reason") if f"{side}{kind}" in dataset.features
    }

    def copy(table: Any) -> Any:
        for column, target in copies.items():
            table = table.append_column(target, table.column(column))
        return table

    features = Features(
        {**dataset.features, **{target: dataset.features[column] for column, target in copies.items()}}
    )
    return dataset.with_format("arrow").map(copy, batched=True, features=features).with_format(None)


def _slice(args: PbKDConfig) -> slice:
    """What `max_length` leaves of a row's tokens."""
    if args.max_length is None:
        return slice(None)
    return slice(-args.max_length, None) if args.truncation_mode == "keep_end" else slice(args.max_length)


def _with_labels(dataset: Dataset, name: str) -> Dataset:
    kept = [index for index, labels in enumerate(_labels(dataset)) if count_labels(labels)]
    if len(kept) == len(dataset):
        return dataset
    said = f"{len(dataset) - len(kept)} of {len(dataset)} texts of the {name} dataset have no token of the model's own"
    if not kept:
        raise ValueError(f"{said} within `max_length`: raise it, or check the texts.")
    logger.warning(f"{said} within `max_length`, and are left out.")
    return dataset.select(kept)


def _labels(dataset: Dataset) -> Iterator[list[int]]:
    for batch in dataset.select_columns(["labels"]).with_format(None).iter(batch_size=1000):
        yield from batch["labels"]


def count_labels(labels: list[int]) -> int:
    """|y|: how many tokens are predicted. The first one of a sequence is not."""
    return sum(label != IGNORED for label in labels[1:])


def mean_advantage(dataset: Dataset | IterableDataset, args: PbKDConfig, reader: PairReader | None = None) -> float:
    """
    ā, the mean of the weights of training rows that are imitated, each as often as its text has tokens. 1 for a stream, and
    where nothing is imitated.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Training rows, of one text each, or pairs.
        args (`PbKDConfig`):
            Settings.
        reader (`PairReader`, *optional*):
            Counts the tokens of rows with images, which are not tokenized yet (whatever `max_length` is).
    """
    if not isinstance(dataset, Dataset):
        return 1.0
    weights = [(a or 0.0) * share for a, share in zip(dataset[ADVANTAGE], dataset[SHARE], strict=True)]
    if reader is not None:
        rows = _without_images(dataset)
        counted = (
            reader.count_own({**row, **only_teachers_text(row)}) if a else 0
            for a, row in zip(weights, rows, strict=True)
        )
    elif not args.has_preference_term:
        counted = (count_labels(labels) for labels in _labels(dataset))
    else:
        counted = (_count_own(row, _slice(args)) for row in read_columns(dataset, _TOKENIZED))
    lengths = [n if a else 0 for a, n in zip(weights, counted, strict=True)]
    return math.fsum(a * n for a, n in zip(weights, lengths, strict=True)) / sum(lengths) if any(lengths) else 1.0


def _count_own(row: dict[str, Any], whole: slice) -> int:
    """The same of a tokenized pair's text of the teacher's."""
    side = side_of_teacher(row)
    if side is None:
        return 0
    prompt, response = row["prompt_ids"], row[f"{side}_ids"]
    kinds = row.get(f"{side}_kinds") or [OWN] * len(response)
    return sum(kind == OWN for kind in ([None] * len(prompt) + kinds)[whole][1:])


def _without_images(dataset: Dataset) -> Dataset:
    return dataset.remove_columns([column for column in IMAGES if column in dataset.column_names])
