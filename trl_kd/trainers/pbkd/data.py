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
from numbers import Real
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset, Value
from transformers import AutoProcessor

from trl_kd._trl.models import get_config_model_id
from trl_kd.losses.imitation import CHOSEN, NO_TEACHER, REJECTED
from trl_kd.pairs.checks import check_template_columns
from trl_kd.preferences.tokens import is_conversational
from trl_kd.responses.finish_reasons import check_finish_reason
from trl_kd.responses.nulls import without_nulls
from trl_kd.responses.special_tokens import begins_twice
from trl_kd.responses.tokens import LEFT_OUT, OWN
from trl_kd.sampling.model_errors import named
from trl_kd.sampling.model_files import reading_tokenizer
from trl_kd.trainers.common.response_rows import KIND_COLUMNS, REASON_COLUMNS, PairReader
from trl_kd.trainers.common.student_answers import COUNT, check_count, student_count
from trl_kd.trainers.pbkd.config import PbKDConfig


logger = get_logger(__name__)

LABEL_COLUMNS = ("preference", "teacher_side")
_THIRD_REASON = "teacher_finish_reason"
ADVANTAGE, SHARE, COMPARED = "imitation_advantage", "imitation_share", "imitation_compared"
"""Columns of a row that `weigh_texts` adds: a(p, ζ) of the teacher's text, null where neither text is the teacher's; which
share of the text is this row's, 1/k where it stands in k rows; and whether the text was compared with another one."""
OUR_COLUMNS = (*LABEL_COLUMNS, *KIND_COLUMNS, *REASON_COLUMNS, ADVANTAGE, SHARE, COMPARED)
"""Columns of a row that are read here and unknown to TRL's collators."""
WEIGHT_KEYS = ("advantage", "weight", "compared")
BATCH_KEYS = (*LABEL_COLUMNS, "own_mask", *WEIGHT_KEYS)
"""What a batch has beside TRL's."""
SCORE_COLUMNS = ("score_chosen", "score_rejected")
SOURCE_COLUMNS = ("chosen_source", "rejected_source")
SIDES: dict[str | None, int] = {None: NO_TEACHER, "chosen": CHOSEN, "rejected": REJECTED}


@dataclass
class RowCounts:
    """Statistics of a dataset of pairs: `rows` in all (a `teacher` text adds one), those with a `known` preference, with a
    `soft` one (neither 1 nor null), with none (`null`), with a text of the `teacher`, and with an `empty` response."""

    rows: int = 0
    known: int = 0
    soft: int = 0
    null: int = 0
    teacher: int = 0
    empty: int = 0

    @classmethod
    def of_labels(cls, dataset: Dataset, empty: int) -> "RowCounts":
        """Counts of a dataset whose rows have been read, from its label columns."""
        columns = dataset.column_names
        preferences = dataset["preference"] if "preference" in columns else [1.0] * len(dataset)
        sides = dataset["teacher_side"] if "teacher_side" in columns else ["chosen"] * len(dataset)
        known = [p for p in preferences if p is not None and not math.isnan(p)]
        return cls(
            rows=len(dataset),
            known=len(known),
            soft=sum(p != 1 for p in known),
            null=len(dataset) - len(known),
            teacher=sum(side is not None for side in sides),
            empty=empty,
        )

    def check(self, name: str) -> None:
        """Raises a `ValueError` if there is nothing to learn."""
        if not self.known and not self.teacher:
            raise ValueError(
                f"The {name} dataset teaches nothing: no row has a known `preference` or a text "
                "of the teacher's. Say who wrote what in `teacher_side`, or what is preferred in `preference`."
            )


def names_teacher(row: dict[str, Any]) -> bool:
    """Whether rows of such columns say who wrote what. Where they do not, every chosen answer is taken as the teacher's."""
    return "teacher_side" in row or "teacher" in row


def _without_weights(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Without the weights of another trainer's dataset, or columns of the same names; and without `completion`, which is no
    text of a pair, and by which TRL may tell text from messages."""
    found = [column for column in (ADVANTAGE, SHARE, COMPARED, "completion") if column in (dataset.column_names or ())]
    return dataset.remove_columns(found) if found else dataset


def prepare_rows(
    dataset: Dataset | IterableDataset, name: str, args: PbKDConfig, *, imitated: bool = True
) -> tuple[Dataset | IterableDataset, RowCounts | None]:
    """
    Checks every row, resolves `teacher` texts to `teacher_side`, and gives a third text a row of its own.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Pairs in TRL's preference format. A stream is checked row by row as it is read.
        name (`str`):
            Name of the dataset in messages.
        args (`PbKDConfig`):
            Settings, which must be able to serve the labels found.
        imitated (`bool`, *optional*, defaults to `True`):
            Whether anything follows from who wrote what.

    Returns:
        The dataset, and its `RowCounts` (`None` for a stream).

    Raises:
        `ValueError`: no rows, a missing column, a value outside its range, or labels that `args` cannot serve.
    """
    if isinstance(dataset, Dataset):
        dataset = dataset.with_format(None)  # rows are read as Python objects
    dataset = _without_weights(dataset)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {name} dataset is empty: it needs at least one row.")
    missing = [column for column in ("chosen", "rejected") if column not in first]
    if missing:
        raise ValueError(
            f"The {name} dataset lacks the column {' and '.join(map(repr, missing))}: it has {', '.join(sorted(first))}. "
            "Preference data needs 'chosen' and 'rejected' (and 'prompt', unless both begin with it)."
        )
    if imitated and args.imitation_weight and not names_teacher(first):
        logger.warning(
            f"The {name} dataset has no column `teacher_side` or `teacher`: every chosen answer is taken as the teacher's."
        )

    reader = _RowReader(name, set(first), "prompt" not in first)
    counts = None
    if isinstance(dataset, Dataset):
        counts = reader.count(dataset)
        check_labels(args, soft=counts.soft > 0, null=counts.null > 0, name=name)
        counts.check(name)
        if counts.empty:
            logger.warning(
                f"{counts.empty} rows of the {name} dataset have an empty response, which trains the end token alone."
            )
    else:
        reader.read(first, 0)
    if reader.third:
        dataset = reader.expand_all(dataset)
    elif counts is None:
        dataset = dataset.map(reader.label, with_indices=True)  # nothing but the check of each row
    return dataset, counts


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


class _RowReader:
    """Reads the label columns of one dataset; every message names the dataset, the row and the value."""

    def __init__(self, name: str, columns: set[str], implicit_prompt: bool):
        self.name = name
        self.third = "teacher" in columns
        self.has_side = "teacher_side" in columns
        self.implicit_prompt = implicit_prompt

    def read(self, row: dict[str, Any], index: int) -> tuple[float | None, str | None, Any]:
        """Returns the preference, the teacher's side, and the teacher's text where it is neither chosen nor rejected."""
        where = f"Row {index} of the {self.name} dataset"
        texts = ("chosen", "rejected") if self.implicit_prompt else ("prompt", "chosen", "rejected")
        for column in texts:
            if row[column] is None:
                raise ValueError(f"{where}: `{column}` is null. Give a text, or drop the row.")
            check_text(row[column], f"{where}: `{column}`")
        if len({isinstance(row[column], str) for column in texts}) > 1:
            raise ValueError(f"{where}: {' and '.join(texts)} must be all text or all messages.")
        if (
            self.implicit_prompt
            and isinstance(row["chosen"], str)
            and (self.third or row["chosen"] == row["rejected"])
        ):
            raise ValueError(
                f"{where}: without a 'prompt' column the prompt is what 'chosen' and 'rejected' have in common, which "
                "fails for equal texts and for a third one. Give the prompt in a column of its own."
            )
        for column in (*REASON_COLUMNS, _THIRD_REASON):
            check_finish_reason(row.get(column), f"{where}: `{column}`")
        check_count(row.get(COUNT), where)
        check_template_columns(row, where)
        for column in SOURCE_COLUMNS:
            if row.get(column) not in (None, "teacher", "student"):
                raise ValueError(f"{where}: `{column}` is {row[column]!r}; it must be 'teacher', 'student' or null.")
        for column in SCORE_COLUMNS:
            if not isinstance(row.get(column), Real | None):
                raise ValueError(
                    f"{where}: `{column}` is {row[column]!r}; it must be a number, or null where unknown."
                )
        preference = self._preference(row.get("preference", 1.0), where)
        side = row.get("teacher_side") if self.has_side else None if self.third else "chosen"
        if not isinstance(side, str | None) or side not in SIDES:
            raise ValueError(f"{where}: `teacher_side` is {side!r}; it may be 'chosen', 'rejected' or null.")
        text = row.get("teacher")
        if text is None:
            return preference, side, None
        if type(text) is not type(row["chosen"]):
            raise ValueError(
                f"{where}: `teacher` is a {type(text).__name__} but `chosen` a {type(row['chosen']).__name__}: give both "
                "as text or both as messages."
            )
        if self.implicit_prompt and text[:1] != row["chosen"][:1]:
            raise ValueError(
                f"{where}: without a 'prompt' column `teacher` must be a whole conversation, as `chosen` is, and it begins "
                "with another message. Put the prompt's messages before it, or give them in a 'prompt' column."
            )
        sides = [column for column in ("chosen", "rejected") if without_nulls(text) == without_nulls(row[column])]
        if side is not None and side not in sides:
            raise ValueError(
                f"{where}: `teacher_side` is {side!r} but `teacher` is another text. Give one of the two, or null."
            )
        if sides:
            return preference, side or sides[0], None
        return preference, None, text

    def _preference(self, value: Any, where: str) -> float | None:
        if value is None:
            return None
        if isinstance(value, Real):
            number = float(value)
            if math.isnan(number):
                return None
            if 0 <= number <= 1:
                return number
        raise ValueError(
            f"{where}: `preference` is {value!r}; it is P(chosen ≻ rejected), a number in [0, 1], or null where unknown."
        )

    def count(self, dataset: Dataset) -> RowCounts:
        counts = RowCounts()
        read = {"prompt", "chosen", "rejected", "teacher", *LABEL_COLUMNS, *REASON_COLUMNS, *SCORE_COLUMNS}
        read |= {_THIRD_REASON, COUNT, *SOURCE_COLUMNS, "tools", "chat_template_kwargs"}
        dataset = dataset.select_columns([column for column in dataset.column_names if column in read])
        batches = dataset.with_format(None).iter(batch_size=1000)  # row by row it takes thirty times as long
        rows = (
            dict(zip(batch, values, strict=True)) for batch in batches for values in zip(*batch.values(), strict=True)
        )
        for index, row in enumerate(rows):
            preference, side, text = self.read(row, index)
            counts.rows += 1 + (text is not None)
            counts.known += preference is not None
            counts.soft += preference is not None and preference != 1
            counts.null += (preference is None) + (text is not None)
            counts.teacher += side is not None or text is not None
            counts.empty += any(_is_empty(response) for response in (row["chosen"], row["rejected"], text))
        return counts

    def label(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        preference, side, _ = self.read(row, index)
        return {"preference": preference, "teacher_side": side}

    def expand_all(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """A third text becomes a row whose responses both are that text, with no preference: imitation alone."""
        features = dataset.features
        if features is not None:  # said outright, since the first rows may hold nothing but nulls
            features = features.copy()
            del features["teacher"]
            features |= {"preference": Value("float64"), "teacher_side": Value("string"), COUNT: Value("int64")}
            if _THIRD_REASON in features:
                features |= dict.fromkeys(REASON_COLUMNS, Value("string"))
        mapping = {"desc": f"Reading the labels of the {self.name} dataset"} if isinstance(dataset, Dataset) else {}
        return dataset.map(
            self.expand, batched=True, with_indices=True, remove_columns=["teacher"], features=features, **mapping
        )

    def expand(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        expanded = []
        for index, *values in zip(indices, *batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            preference, side, text = self.read(row, index)
            del row["teacher"]
            reason = row.get(_THIRD_REASON)
            if _THIRD_REASON in row:
                row |= {column: row.get(column) for column in REASON_COLUMNS}
                if text is None and side is not None:  # the teacher's text is one of the two
                    row[f"{side}_finish_reason"] = row[f"{side}_finish_reason"] or reason
            row[COUNT] = student_count(row)
            expanded.append({**row, "preference": preference, "teacher_side": side})
            if text is not None:
                third = {"chosen": text, "rejected": text, "preference": None, "teacher_side": "chosen"}
                third[COUNT] = 0
                reasons = {column: reason for column in REASON_COLUMNS if column in row}
                scores = dict.fromkeys(column for column in SCORE_COLUMNS if column in row)  # which are of the others
                expanded.append({**row, **third, **reasons, **scores})
        return {column: [row[column] for row in expanded] for column in expanded[0]}


def check_text(value: Any, where: str) -> None:
    """Raises a `ValueError` that begins with `where`, unless the value is text, or messages with a role and content each."""
    if isinstance(value, str):
        return
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) and m.get("role") for m in value):
        hint = ". A column of numbers must be cast to text" if isinstance(value, Real) else ""
        raise ValueError(
            f"{where} is {repr(value)[:60]} ({type(value).__name__}); it must be text or a list of messages with a role "
            f"each{hint}."
        )
    for index, message in enumerate(value):
        check_message(message, f"{where}: message {index}")
        if message.get("content") is None and not message.get("tool_calls"):
            raise ValueError(
                f"{where}: message {index}, of the {message['role']}, has no `content`. Give a text, or drop the row."
            )


def check_message(message: dict[str, Any], where: str) -> None:
    """Raises a `ValueError` that begins with `where` for a part of a message that is of another kind than templates take."""
    content, calls = message.get("content"), message.get("tool_calls")
    if not isinstance(message["role"], str):
        raise ValueError(f"{where} has the `role` {message['role']!r}; it must be text, such as 'user'.")
    is_parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
    if not isinstance(content, str | None) and not is_parts:
        raise ValueError(f"{where} has the `content` {repr(content)[:60]}; it must be text, or a list of parts.")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise ValueError(f"{where} has the `tool_calls` {repr(calls)[:60]}; they must be a list of calls, or null.")


def _is_empty(response: Any) -> bool:
    if isinstance(response, list):
        return not any(message.get("content") or message.get("tool_calls") for message in response)
    return response == ""


def has_images(row: dict[str, Any]) -> bool:
    return "image" in row or "images" in row


def each_dataset(dataset: Any, change: Callable[[Any, str], Any]) -> Any:
    """`change(dataset, name)` of an evaluation dataset, of each of several, or of none."""
    if isinstance(dataset, dict):
        return type(dataset)({name: change(one, f"eval/{name}") for name, one in dataset.items()})
    return None if dataset is None else change(dataset, "eval")


def load_processing_class(model: Any, args: Any, **options: Any) -> Any:
    """The tokenizer or processor that TRL's trainer would load, before the weights."""
    kwargs: Any = args.model_init_kwargs if isinstance(model, str) else None
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    with named(f"`model` is {name!r}, which"), reading_tokenizer(name):
        return AutoProcessor.from_pretrained(
            name, revision=(kwargs or {}).get("revision"), trust_remote_code=args.trust_remote_code, **options
        )


def check_tokenizer(tokenizer: Any, dataset: Dataset | IterableDataset, name: str) -> None:
    """Raises a `ValueError` when `tokenizer` cannot render the dataset: messages without a chat template, text without an
    end token. Warns of text prompts that get a second BOS token."""
    first: dict[str, Any] = next(iter(dataset))
    if is_conversational(first):
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"The {name} dataset holds messages, but the tokenizer of {tokenizer.name_or_path!r} has no chat template: "
                "set `tokenizer.chat_template` and pass it as `processing_class`, or give the dataset as text."
            )
        return
    if tokenizer.eos_token is None:
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no end-of-sequence token, with which every response must "
            "end: set `tokenizer.eos_token` and pass it as `processing_class`."
        )
    column = "prompt" if "prompt" in first else "chosen"  # which begins with the prompt, then
    texts = dataset[column] if isinstance(dataset, Dataset) else [first[column]]
    count = sum(begins_twice(tokenizer, text) for text in texts)
    if count:
        logger.warning(
            f"{count} prompts of the {name} dataset begin with {tokenizer.bos_token!r}, and the tokenizer writes another "
            "one before them: take it out of the prompts."
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
