"""The teacher's texts of a dataset of pairs: how much each is imitated, and which rows are learnt from.

Where the preference term is off, `PbKDTrainer` trains on these alone. Pairs with one and the same teacher's text for one
prompt become one row. Where it is on, rows stay pairs, and such pairs share the text's weight. Training rows from which
nothing is learnt leave the data before batches are made.
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, Image, IterableDataset, Sequence, Value, concatenate_datasets
from trl import extract_prompt

from trl_kd.trainers.common.pair_rows import SCORE_COLUMNS
from trl_kd.trainers.common.response_rows import REASON_COLUMNS, map_rows
from trl_kd.trainers.common.student_answers import COUNT, LEAST_COMPARISONS, StudentWins, Win, student_count
from trl_kd.trainers.common.teacher_texts import (
    IMAGES,
    OF_PROMPT,
    TeacherText,
    known_number,
    preference_of_teacher,
    read_columns,
    side_of_teacher,
    text_key,
)
from trl_kd.trainers.pbkd.config import PbKDConfig
from trl_kd.trainers.pbkd.counts import TextCounts, nothing_known
from trl_kd.trainers.pbkd.data import ADVANTAGE, COMPARED, SHARE


logger = get_logger(__name__)


def weigh_texts(
    dataset: Dataset | IterableDataset, name: str, args: PbKDConfig, radius: float, *, training: bool
) -> tuple[Dataset | IterableDataset, TextCounts | None]:
    """
    Adds the columns [`ADVANTAGE`], [`SHARE`] and [`COMPARED`]. Training rows from which nothing is learnt are left out: they
    are not imitated and, where the preference term is on, have no known preference. Where it is off, training pairs with one
    text of the teacher's for one prompt are merged into one row.

    The probability p of a text is the mean over its pairs with a known preference and different texts, each as often as the
    student gave that answer. Rows of a stream are taken each for itself.

    With `student_wins="gated"` the student's winning answers become further rows of training data, with `teacher_side` on
    their side.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Pairs, as [`~trl_kd.trainers.pbkd.data.prepare_rows`] returns them.
        name (`str`):
            Name of the dataset in messages.
        args (`PbKDConfig`):
            Settings.
        radius (`float`):
            ζ in [0, ∞], nats per pair.
        training (`bool`):
            Whether rows may be merged and left out. An evaluation keeps all of them.

    Returns:
        The dataset, with a `prompt` column, and its `TextCounts` (`None` for a stream, and where nothing is imitated).

    Raises:
        `ValueError`: no row of training data is left, there are no scores for `imitation_min_score`, or a stream is to tell
        the student's winning answers.
    """
    first: dict[str, Any] = next(iter(dataset))
    if training and args.imitation_min_score is not None and not any(column in first for column in SCORE_COLUMNS):
        raise ValueError(
            f"`imitation_min_score` is {args.imitation_min_score}, but the {name} dataset has no column `score_chosen` or "
            "`score_rejected`: give the scores, or drop the setting."
        )
    if "prompt" not in first:
        doing = f"Extracting the prompts of the {name} dataset"
        dataset = map_rows(dataset, extract_prompt, doing, args.dataset_num_proc)
    if not isinstance(dataset, Dataset):
        if training and args.student_wins == "gated":
            raise ValueError(
                f"`student_wins` is 'gated', which compares all pairs of a prompt, and the {name} dataset is a stream: load "
                "it whole, or use 'off'."
            )
        return _weigh_stream(dataset, name, args, radius, training), None
    texts: dict[bytes, TeacherText] = {}
    keys: list[bytes | None] = []
    wins = StudentWins()
    for index, row in enumerate(_read(dataset)):
        side = side_of_teacher(row)
        key = None if side is None else text_key(row, side)
        if key is not None:
            text = texts.setdefault(key, TeacherText())
            text.add(row)
            text.stand(index, row)
            if training and args.student_wins == "gated":
                _compare(wins, key, index, row, args)
        keys.append(key)
    weights = {key: text.advantage(args, radius) for key, text in texts.items()}
    advantages = [None if key is None else weights[key] for key in keys]
    unequal = [weights[key] for key, text in texts.items() if text.compared]
    found = wins.found()
    kept = _paired(dataset, advantages, args) if args.has_preference_term else _merged(texts, weights)
    counts = TextCounts(
        rows=len(keys),
        used=sum(bool(advantage) for advantage in advantages),
        lost=sum(advantage == 0 for advantage in advantages),
        texts=sum(weight > 0 for weight in weights.values()),
        scored=args.imitation_min_score is not None and any(text.scores for text in texts.values()),
        training=training,
        unused=len(keys) - len(kept) if args.has_preference_term else None,
        advantage=math.fsum(unequal) / len(unequal) if unequal else None,
        student=len(found),
    )
    of_text = Counter(keys) if args.has_preference_term else {}
    for column, values, kind in (
        (ADVANTAGE, advantages, "float64"),
        (SHARE, [1 / of_text.get(key, 1) for key in keys], "float64"),
        (COMPARED, [key is not None and texts[key].compared for key in keys], "bool"),
    ):
        dataset = dataset.add_column(column, values, feature=Value(kind))  # type: ignore[arg-type]
    if not args.imitation_weight:
        return (_known_alone(dataset, kept, name) if training else dataset), None
    if training:
        _warn_of_idle(name, args, wins, texts)
        counts.check(name, args)
        dataset = _with_wins(dataset, kept, found)
        if len(kept) < len(keys) or found or not counts.used:
            logger.warning(f"Of the {name} dataset {counts.told}.")
    elif not counts.used:
        logger.warning(
            f"Of the {name} dataset {counts.told}: its {'imitation' if args.has_preference_term else 'loss'} is 0."
        )
    return dataset, counts


def _warn_of_idle(name: str, args: PbKDConfig, wins: StudentWins, texts: dict[bytes, TeacherText]) -> None:
    """Warns of settings that the rows give nothing to do."""
    if args.student_wins == "gated" and not wins.can_win:
        logger.warning(
            f"`student_wins` is 'gated', but no text of the teacher's in the {name} dataset was compared with "
            f"{LEAST_COMPARISONS} different answers of the student's: none of these can win."
        )
    if args.imitation_min_score is not None and not any(text.scores for text in texts.values()):
        logger.warning(
            f"`imitation_min_score` is {args.imitation_min_score}, but no text of the teacher's in the {name} dataset has a "
            "score: its labels decide."
        )


def _compare(wins: StudentWins, key: bytes, index: int, row: dict[str, Any], args: PbKDConfig) -> None:
    """Adds the student's text of a row. That of another teacher is none."""
    side = "rejected" if side_of_teacher(row) == "chosen" else "chosen"
    if row.get(f"{side}_source") == "teacher" or not student_count(row):
        wins.know(key)
        return
    score, least = known_number(row.get(f"score_{side}")), args.imitation_min_score
    is_good = score is None or least is None or score >= least
    wins.add(key, text_key(row, side), index, side, preference_of_teacher(row), student_count(row), is_good)


def _with_wins(dataset: Dataset, kept: list[int], found: list[Win]) -> Dataset:
    """Of the rows with their weights those that are kept, and one for each winning answer of the student's."""
    if found and "teacher_side" not in dataset.column_names:
        dataset = dataset.add_column("teacher_side", ["chosen"] * len(dataset))  # type: ignore[arg-type]
    texts = dataset if len(kept) == len(dataset) else dataset.select(kept)
    if not found:
        return texts
    answers = dataset.select([win.row for win in found])
    for column, values in (
        ("teacher_side", [win.side for win in found]),
        (ADVANTAGE, [win.weight for win in found]),
        (COMPARED, [False] * len(found)),  # not among what is said of the teacher's texts
    ):
        kind = texts.features[column]
        answers = answers.remove_columns([column]).add_column(column, values, feature=kind)  # type: ignore[arg-type]
    return concatenate_datasets([texts, answers])


def _known_alone(dataset: Dataset, kept: list[int], name: str) -> Dataset:
    """The rows with a known preference, which alone teach where nothing is imitated."""
    if not kept:
        raise nothing_known(name)
    if len(kept) == len(dataset):
        return dataset
    logger.warning(
        f"{len(dataset) - len(kept)} of {len(dataset)} rows of the {name} dataset are left out: no known preference."
    )
    return dataset.select(kept)


def _paired(dataset: Dataset, advantages: list[float | None], args: PbKDConfig) -> list[int]:
    """Which rows something is learnt from where rows are pairs."""
    labels = dataset["preference"] if "preference" in dataset.column_names else [1.0] * len(dataset)
    imitated = args.imitation_weight > 0
    rows = zip(advantages, labels, strict=True)
    return [index for index, (weight, p) in enumerate(rows) if (imitated and weight) or known_number(p) is not None]


def _merged(texts: dict[bytes, TeacherText], weights: dict[bytes, float]) -> list[int]:
    """The rows that stand for the texts that are imitated."""
    return sorted(text.row for key, text in texts.items() if weights[key] and text.row is not None)


def _read(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """The columns that matter of each row, images as they are stored."""
    for column in IMAGES:
        kind = dataset.features.get(column)
        if isinstance(kind, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
        elif isinstance(getattr(kind, "feature", None), Image):
            dataset = dataset.cast_column(column, Sequence(Image(decode=False)))
    labels = ("preference", "teacher_side", COUNT, "chosen_source", "rejected_source", *REASON_COLUMNS, *SCORE_COLUMNS)
    yield from read_columns(dataset, (*OF_PROMPT, *IMAGES, "chosen", "rejected", *labels))


def _weigh_stream(
    dataset: IterableDataset, name: str, args: PbKDConfig, radius: float, training: bool
) -> IterableDataset:
    def weigh(row: dict[str, Any]) -> dict[str, Any]:
        if side_of_teacher(row) is None:
            return {ADVANTAGE: None, SHARE: 1.0, COMPARED: False}
        text = TeacherText()
        text.add(row)
        return {ADVANTAGE: text.advantage(args, radius), SHARE: 1.0, COMPARED: text.compared}

    def teaches(row: dict[str, Any]) -> bool:
        prefers = args.has_preference_term and known_number(row.get("preference", 1.0)) is not None
        return prefers or bool(args.imitation_weight and row[ADVANTAGE])

    dataset = dataset.map(weigh)
    taught = dataset.filter(teaches)
    empty = next(iter(taught), None) is None
    if not training:
        if empty:
            logger.warning(f"No row of the {name} dataset teaches: its loss is 0.")
        return dataset
    if empty:
        if not args.imitation_weight:
            raise nothing_known(name)
        lost = sum(row[ADVANTAGE] is not None for row in dataset.take(1000))
        TextCounts(rows=lost, used=0, lost=lost, texts=0).check(
            name if lost < 1000 else f"{name} (first 1,000 rows)", args
        )
    return taught
