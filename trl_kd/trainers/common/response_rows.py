"""Responses of a dataset of pairs: what the chat template makes of them, their tokens, and which of these count.

`DPOTrainer` tokenizes. What it cannot know stands in columns of its own, `chosen_kinds` and `rejected_kinds`: one kind for
each token of a response (see `trl_kd.responses.tokens`), or null where every token is the model's own.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, Features, IterableDataset, Sequence, Value
from trl import extract_prompt

from trl_kd._trl.models import main_first
from trl_kd._trl.seams import prepare_preference_dataset
from trl_kd.preferences.tokens import is_conversational, match_format
from trl_kd.responses.finish_reasons import has_end
from trl_kd.responses.nulls import without_nulls
from trl_kd.responses.reasoning import says_something, stripped
from trl_kd.responses.rendering import CannotRender, Rendering, common_prefix, is_plain, render, row_options
from trl_kd.responses.tokens import OWN, pair_ids, response_kinds, text_kinds


logger = get_logger(__name__)

SIDES = ("chosen", "rejected")
KIND_COLUMNS = ("chosen_kinds", "rejected_kinds")
REASON_COLUMNS = ("chosen_finish_reason", "rejected_finish_reason")
_OPTIONS = ("tools", "chat_template_kwargs")
_ADVICE: dict[str | None, str] = {
    None: "`reasoning='keep'` learns the generation prompt with the response as it was sampled, 'strip' takes `<think>` "
    "blocks out, and 'error' stops here.",
    "keep": "`reasoning='keep'` is for single messages of text, with the reasoning that the generation prompt opens.",
    "strip": "The generation prompt asks for reasoning: turn it off by `chat_template_kwargs`, or use another template.",
}
_LOOKED = Features({"failed": Value("string"), "altered": Value("string")})


def tokenize_rows(
    dataset: Dataset | IterableDataset, processing_class: Any, args: Any, name: str, limit: str = "max_length"
) -> Dataset | IterableDataset:
    """
    Tokenizes as `DPOTrainer` does, without a model, and says what `args.max_length` takes away, which users know as `limit`.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Pairs in TRL's preference format. `chosen_finish_reason` and `rejected_finish_reason`, where there are such
            columns, say which responses were cut off.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            The student's.
        args (`PbKDConfig`):
            Settings.
        name (`str`):
            Name of the dataset in messages.
        limit (`str`, *optional*, defaults to `"max_length"`):
            Name of the setting.

    Returns:
        The dataset with the columns `prompt_ids`, `chosen_ids` and `rejected_ids`, and [`KIND_COLUMNS`] if a row needs them.

    Raises:
        `ValueError`: no row can be rendered or has a response token left, or `reasoning` is 'error' and a template changes
            a response.
    """
    reader = PairReader(processing_class, args, name)
    dataset = reader.look(dataset)
    before = len(dataset) if isinstance(dataset, Dataset) else None
    if reader.renders_itself(dataset):
        dataset = reader.tokenize(dataset)
    else:
        dataset = prepare_preference_dataset(dataset, processing_class, args, name)
    if before is not None and before > len(dataset):
        said = (
            f"In {before - len(dataset)} of {before} rows of the {name} dataset the prompt alone fills `{limit}` = "
            f"{args.max_length}, which leaves no response token"
        )
        if not len(dataset):
            raise NothingToLearn(f"{said}: raise `{limit}` or shorten the prompts.")
        logger.warning(f"{said}: they are left out.")
    dataset = reader.mark(dataset)
    if before is None:
        return dataset
    responses = dataset.select_columns(["chosen_ids", "rejected_ids"])
    if not any(row["chosen_ids"] or row["rejected_ids"] for row in responses):
        raise NothingToLearn(
            f"No row of the {name} dataset has a response token: check its 'chosen' and 'rejected' columns."
        )
    return dataset


class NothingToLearn(ValueError):
    """No row of a dataset has a token to learn from."""


def map_rows(dataset: Any, change: Any, doing: str, processes: int | None, **options: Any) -> Any:
    """`dataset.map` as TRL calls it: by the main process first, whose result the others find in the cache. `doing` and
    `processes` (`dataset_num_proc`) are for a dataset that is no stream."""
    if not isinstance(dataset, Dataset):
        return dataset.map(change, **options)
    with main_first():
        return dataset.map(change, num_proc=processes, desc=doing, **options)


class ResponseReader:
    """
    Reads the responses of one dataset.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            The student's.
        args:
            Settings, of which `reasoning`, `max_length`, `truncation_mode` and `dataset_num_proc` are read.
        name (`str`):
            Name of the dataset in messages.
        sides (`tuple[str, ...]`, *optional*, defaults to `("chosen", "rejected")`):
            Columns of the responses.
        options (`Mapping[str, Any]`, *optional*):
            Keyword arguments for every chat template, besides the row's own.
    """

    def __init__(
        self,
        processing_class: Any,
        args: Any,
        name: str,
        sides: tuple[str, ...] = SIDES,
        options: Mapping[str, Any] | None = None,
    ):
        # Not `args` itself: what a map function holds tells `datasets` whether its result is in the cache
        self.processing_class, self.name = processing_class, name
        self.sides, self.options = sides, dict(options or {})
        self.reasons = tuple(f"{side}_finish_reason" for side in sides)
        self.reasoning: str | None = args.reasoning
        self.processes = getattr(args, "dataset_num_proc", None)
        self.cuts_end = getattr(args, "truncation_mode", None) == "keep_start"
        self.max_length = getattr(args, "max_length", None)

    def _map(self, dataset: Any, change: Any, doing: str, **options: Any) -> Any:
        return map_rows(dataset, change, f"{doing} the {self.name} dataset", self.processes, **options)

    # ---- What the template makes of them -----------------------------------------------------------------------------

    def look(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """Takes reasoning out if asked to, leaves out rows that cannot be learnt from, and says where a template changes a
        response. The prompt is in a column of its own afterwards.

        Raises:
            `ValueError`: no row is left, or `reasoning` is 'error' and a response is changed.
        """
        first: dict[str, Any] = next(iter(dataset))
        if "prompt" not in first:
            dataset = self._map(dataset, extract_prompt, "Extracting the prompts of")
        if not is_conversational(first) and self.reasoning != "strip" and not self._knows_ends(first):
            return dataset
        if not isinstance(dataset, Dataset):
            dataset = dataset.filter(self._can_be_learnt)
        else:
            read = ["prompt", *self.sides, *(c for c in (*_OPTIONS, *self.reasons) if c in dataset.column_names)]
            rows = dataset.select_columns(read)
            looked = self._map(rows, self._look_at, "Rendering", remove_columns=read, features=_LOOKED)
            altered = [(i, why) for i, why in enumerate(looked["altered"]) if why]
            if altered:
                row, why = altered[0]
                logger.warning(self._altered(why, f"row {row}", f"{len(altered)} of {len(dataset)} rows"))
            dataset = self._leave_out(dataset, looked["failed"])
        return self._map(dataset, self._strip, "Taking the reasoning out of") if self.reasoning == "strip" else dataset

    def _knows_ends(self, row: dict[str, Any]) -> bool:
        return any(column in row for column in self.reasons)

    def _look_at(self, row: dict[str, Any]) -> dict[str, str]:
        altered = None
        for side in self.sides:
            if row[side] is None:
                continue
            left = self._strip(row)[side]
            if says_something(row[side]) and not says_something(left):
                return {"failed": f"`{side}` is nothing but reasoning", "altered": ""}
            if not says_something(left) and not has_end(row.get(f"{side}_finish_reason")):
                return {"failed": f"`{side}` was cut off before it said anything", "altered": ""}
            try:
                altered = altered or self.render({**row, side: left}, side).altered
            except CannotRender as error:
                return {"failed": str(error), "altered": ""}
        return {"failed": "", "altered": altered or ""}

    def _strip(self, row: dict[str, Any]) -> dict[str, Any]:
        return {side: stripped(row[side]) if self.reasoning == "strip" else row[side] for side in self.sides}

    def _response(self, row: dict[str, Any], side: str) -> Any:
        """A response in the format of its prompt."""
        return match_format(row["prompt"], row[side])

    def _can_be_learnt(self, row: dict[str, Any]) -> bool:
        found = self._look_at(row)
        if found["failed"]:
            logger.warning_once(f"A row of the {self.name} dataset is left out: {found['failed']}. This is said once.")
        elif found["altered"]:
            logger.warning_once(self._altered(found["altered"], "the first such row", "some rows"))
        return not found["failed"]

    def _altered(self, why: str, where: str, count: str) -> str:
        """What is said of rows that the template changes.

        Raises:
            `ValueError`: `reasoning` is 'error'.
        """
        said = f"In {count} of the {self.name} dataset what is learnt is not what is sampled. In {where} {why}."
        if self.reasoning == "error":
            raise ValueError(f"{said} Set `reasoning` to 'keep' or 'strip', or change the chat template.")
        return f"{said} {_ADVICE[self.reasoning]}"

    def _leave_out(self, dataset: Dataset, failed: list[str]) -> Dataset:
        if not any(failed):
            return dataset
        row = next(i for i, why in enumerate(failed) if why)
        kept = [i for i, why in enumerate(failed) if not why]
        said = f"{len(dataset) - len(kept)} of {len(dataset)} rows of the {self.name} dataset cannot be learnt from"
        if not kept:
            raise NothingToLearn(f"{said}. Row {row}: {failed[row]}.")
        logger.warning(f"{said} and are left out. The first is row {row}: {failed[row]}.")
        return dataset.select(kept)

    def keeps(self, row: dict[str, Any]) -> bool:
        """Whether the responses of a row stand as they were sampled: all of them or none."""
        return self.reasoning == "keep" and all(
            row[side] is None or is_plain(self._response(row, side)) for side in self.sides
        )

    def render(self, row: dict[str, Any], side: str) -> Rendering:
        """One response of a row with its prompt.

        Raises:
            `CannotRender`: see [`~trl_kd.responses.rendering.render`].
        """
        return render(
            self.processing_class,
            row["prompt"],
            self._response(row, side),
            self.options | row_options(row),
            complete=has_end(row.get(f"{side}_finish_reason")),
            reasoning="keep" if self.keeps(row) else None,
        )


class PairReader(ResponseReader):
    """Reads the responses of a dataset of pairs, and their tokens. See [`ResponseReader`]."""

    # ---- Tokens ------------------------------------------------------------------------------------------------------

    def renders_itself(self, dataset: Any) -> bool:
        """Whether TRL cannot tokenize these rows as they were built: it writes null options into the template, and knows no
        response but the template's."""
        first = next(iter(dataset), None)
        if first is None or not is_conversational(first):
            return False
        if self.reasoning == "keep":
            return True
        columns = [column for column in _OPTIONS if column in first]
        if not isinstance(dataset, Dataset):
            return bool(columns)
        return any(_has_nulls(column, value) for column in columns for value in dataset[column])

    def tokenize(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """What `DPOTrainer` does, with the row's own options and `reasoning`."""
        dataset = self._map(dataset, self._tokenize, "Tokenizing")
        limit = self.max_length
        if limit is not None and self.cuts_end:
            dataset = dataset.filter(lambda row: len(row["prompt_ids"]) < limit)
        return dataset

    def _tokenize(self, row: dict[str, Any]) -> dict[str, list[int]]:
        chosen, rejected = (self.render(row, side) for side in self.sides)
        ids = pair_ids(self.processing_class, row["prompt"], chosen, rejected, row_options(row), self.keeps(row))
        return dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True))

    # ---- Kinds of tokens ---------------------------------------------------------------------------------------------

    def needs_kinds(self, row: dict[str, Any]) -> bool:
        """Whether some token of a response may not be the model's own."""
        cut = not all(has_end(row.get(column)) for column in self.reasons)
        return cut or any(not isinstance(row[side], str) and len(row[side]) > 1 for side in self.sides)

    def mark(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """Adds [`KIND_COLUMNS`] to tokenized rows, if a row needs them."""
        if not isinstance(dataset, Dataset):
            return dataset.map(self._mark).filter(self._is_marked).remove_columns("failed")
        read = [column for column in (*self.sides, *self.reasons) if column in dataset.column_names]
        batches: Iterable[dict[str, list]] = dataset.select_columns(read).with_format(None).iter(batch_size=1000)
        rows = (dict(zip(b, values, strict=True)) for b in batches for values in zip(*b.values(), strict=True))
        if not any(self.needs_kinds(row) for row in rows):
            return dataset
        features = {
            **dataset.features,
            **dict.fromkeys(KIND_COLUMNS, Sequence(Value("int8"))),
            "failed": Value("string"),
        }
        dataset = self._map(dataset, self._mark, "Telling the model's own tokens of", features=Features(features))
        return self._leave_out(dataset.remove_columns("failed"), list(dataset["failed"]))

    def _mark(self, row: dict[str, Any]) -> dict[str, Any]:
        marked: dict[str, Any] = {**dict.fromkeys(KIND_COLUMNS), "failed": ""}
        if self.needs_kinds(row):
            try:
                marked |= {f"{side}_kinds": self._kinds(row, side) for side in self.sides}
            except CannotRender as error:
                marked["failed"] = str(error)
        return marked

    def _kinds(self, row: dict[str, Any], side: str) -> list[int]:
        ids, text_format = row[f"{side}_ids"], isinstance(row["prompt"], str)
        whole = row["prompt_ids"] + ids
        return response_kinds(self.processing_class, self.render(row, side), whole, len(ids), text_format)

    def _is_marked(self, row: dict[str, Any]) -> bool:
        if row["failed"]:
            logger.warning_once(f"A row of the {self.name} dataset is left out: {row['failed']}. This is said once.")
        return not row["failed"]

    def count_own(self, row: dict[str, Any]) -> int:
        """How many tokens of the chosen response are the model's own, tokenized apart from its prompt."""
        rendered = self.render({**row, "tools": None}, "chosen")
        kinds = text_kinds(self.processing_class, rendered, common_prefix(rendered.opening, rendered.text))
        return sum(kind == OWN for kind in kinds)

    def kinds_alone(self, row: dict[str, Any]) -> list[list[int] | None]:
        """Kinds of the two responses of a row with images, which TRL's collator tokenizes apart from their prompt, and
        without the row's tools."""
        row = {column: value for column, value in row.items() if column != "tools"}
        if not self.needs_kinds(row):
            return [None, None]
        rendered = [self.render(row, side) for side in self.sides]
        start = min(common_prefix(one.opening, other.text) for one in rendered for other in rendered)
        return [text_kinds(self.processing_class, one, start) for one in rendered]


def _has_nulls(column: str, value: Any) -> bool:
    """Whether TRL would write nulls of a row's options into the template. (A missing list of tools is none.)"""
    if value is None:
        return column == "chat_template_kwargs"
    return not isinstance(value, str) and value != without_nulls(value)
