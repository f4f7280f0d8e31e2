"""What is wrong with prompts, sources or a preference, found before anything is loaded, asked or paid for."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from datasets import Dataset, IterableDataset

from trl_kd.pairs.labels import Labeller
from trl_kd.pairs.pairing import make_candidates
from trl_kd.pairs.prompts import PromptRow, read_prompts
from trl_kd.preferences import Preference
from trl_kd.responses.rendering import CannotRender
from trl_kd.responses.special_tokens import begins_twice
from trl_kd.sampling import Request, Sampler, Text


logger = logging.getLogger(__name__)

CHECKED_ROWS = 100
"""Rows, from the start of the prompts, that are looked at."""

_KINDS = 200


def check_parts(rows: list[PromptRow], sources: dict[str, tuple[Sampler, int]], preference: Preference) -> None:
    """
    Checks that the first rows can be answered and labelled.

    Answers that exist already (`is_lookup`) are read. Another sampler may have a method `check_requests(requests)`, and a
    preference `check_rows(prompts, **columns)` with the columns that it will get; each raises a `ValueError` for what it
    could not work with. Of any other preference it is known at least whether it can be called so. A sampler may have a
    method `check_model()`, which raises an `OSError` for a model that cannot be loaded.

    Args:
        rows (`list[PromptRow]`):
            At least one row.
        sources (`dict[str, tuple[Sampler, int]]`):
            The samplers of `"teacher"` and `"student"`, each with the number of its samples.
        preference (`Preference`):
            The preference function.

    Raises:
        `ValueError`: the sentence names the row, where it is a row's fault.
        `TypeError`: something that is no sampler or preference function.
        `OSError`: a model that cannot be loaded.
    """
    for source, (sampler, samples) in sources.items():
        _check_kind(
            source, sampler, ("is_lookup", "describe", "sample"), "ServerSampler(MODEL, URL) or ColumnSampler(NAME)"
        )
        _check_model(source, sampler)
        _warn_of_greedy(source, sampler, samples)
        _warn_of_second_start(source, sampler, rows)
    _check_kind("preference", preference, ("__call__",), "TeacherWins() or RewardFunctionPreference(FUNCTION)")
    for row in rows:
        _check_tools(row.columns.get("tools"), f"Row {row.index} of the prompts")
    for row in rows:
        _check_row(row, sources)
    _check_preference(rows, preference)


def check_kinds(
    prompts: Dataset | IterableDataset, sources: dict[str, tuple[Sampler, int]], preference: Preference
) -> None:
    """
    Checks one row of each kind behind the first ones, in which [`check_parts`] has looked at every row.

    A kind is the roles of a prompt's messages, and how answers that exist already are given. A chat template may refuse a
    role that one row in a thousand has. Up to 200 kinds are looked at, and nothing of a stream.

    Raises:
        `ValueError`: the sentence names the row, the field and the way out.
    """
    if not isinstance(prompts, Dataset):
        return
    lookups = [sampler.column for sampler, _ in sources.values() if hasattr(sampler, "column")]
    names = ["prompt", *(name for name in dict.fromkeys(lookups) if name in prompts.column_names and name != "prompt")]
    seen: set[Any] = set()
    index = 0
    for batch in prompts.select_columns(names).with_format(None).iter(batch_size=1000):
        for values in zip(*(batch[name] for name in names), strict=True):
            kind = tuple(map(_kind, values))
            if kind not in seen and len(seen) < _KINDS:
                seen.add(kind)
                if index >= CHECKED_ROWS:
                    ((row,),) = read_prompts(prompts.select([index]))
                    _check_row(replace(row, index=index), sources)
                    _check_preference([replace(row, index=index)], preference)
            index += 1


def _kind(value: Any) -> Any:
    """What kind of value a prompt or an answer is: the roles of messages, the kinds of a list, or a type."""
    if isinstance(value, list):
        return tuple(_kind(item) for item in value[:20])
    return value.get("role") if isinstance(value, dict) else type(value).__name__


def _check_row(row: PromptRow, sources: dict[str, tuple[Sampler, int]]) -> None:
    for source, (sampler, samples) in sources.items():
        try:
            _check_source(source, sampler, samples, row)
        except Exception as error:
            said = _refused_by_template(row, error) if _is_of_template(error) else str(error)
            if not isinstance(error, ValueError) and not _is_of_template(error):
                raise
            raise ValueError(f"Row {row.index} of the prompts, for the {source}: {said}") from error


def _check_preference(rows: list[PromptRow], preference: Preference) -> None:
    labeller = Labeller(preference)
    try:
        labeller.check(rows)
    except Exception as error:
        if not _is_of_template(error):
            raise
        if len(rows) > 1:  # which of them it is
            for row in rows:
                _check_preference([row], preference)
        said = _refused_by_template(rows[0], error)
        raise ValueError(f"Row {rows[0].index} of the prompts, for the preference: {said}") from error


def _is_of_template(error: Exception) -> bool:
    """Whether a chat template has refused a conversation; jinja2 is imported by whoever rendered it."""
    return isinstance(error, CannotRender) or type(error).__module__.startswith("jinja2.")


def _refused_by_template(row: PromptRow, error: Exception) -> str:
    roles = [message["role"] for message in row.prompt if isinstance(message, dict)]
    way_out = (
        "move the text of the `system` message into the first message of the role `user`"
        if "system" in roles
        else "give the roles that it takes"
    )
    return (
        f"its chat template refuses `prompt`, whose messages have the roles {', '.join(roles)} ({error}): {way_out}, leave "
        "such rows out, or give a tokenizer with another `chat_template`."
    )


def check_asked_anew(preference: Any, name: str) -> None:
    """Raises a `ValueError` for stored labels in a training that samples its student: they belong to other answers."""
    if getattr(preference, "is_lookup", False) and hasattr(preference, "column"):
        raise ValueError(
            f"`{name}` reads the column {preference.column!r}, whose labels belong to answers that are there already, and "
            "the student answers anew: give a preference that can be asked."
        )


def _check_kind(name: str, part: Any, needed: tuple[str, ...], example: str) -> None:
    missing = [attribute for attribute in needed if not hasattr(part, attribute)]
    if isinstance(part, str):
        raise TypeError(f"`{name}` is the text {part!r}: give an object, such as {example}.")
    if missing:
        lacking = ", ".join(f"`{attribute}`" for attribute in missing)
        raise TypeError(
            f"`{name}` is a {type(part).__name__}, which has no {lacking}: give an object that does, such as {example}."
        )


def _check_model(source: str, sampler: Any) -> None:
    """Raises where a sampler knows that its model cannot be loaded, before another one is asked and paid."""
    if callable(getattr(sampler, "check_model", None)):
        try:
            sampler.check_model()
        except OSError as error:
            raise OSError(f"`{source}`: {error}") from error


def _warn_of_greedy(source: str, sampler: Any, samples: int) -> None:
    if samples > 1 and getattr(getattr(sampler, "settings", None), "temperature", None) == 0:
        logger.warning(
            "The %s is asked for %d answers to each prompt at temperature 0, where all of them are equal: raise its "
            "temperature, or ask for one.",
            source,
            samples,
        )


def _warn_of_second_start(source: str, sampler: Any, rows: list[PromptRow]) -> None:
    tokenizer: Any = getattr(sampler, "tokenizer", None)
    count = 0 if tokenizer is None else sum(begins_twice(tokenizer, row.prompt) for row in rows)
    if count:
        logger.warning(
            "%d of the first %d prompts begin with %r, and the tokenizer of the %s writes another one before them: take it "
            "out of the prompts.",
            count,
            len(rows),
            tokenizer.bos_token,
            source,
        )


def _check_source(source: str, sampler: Any, samples: int, row: PromptRow) -> None:
    # A row's own key: what is looked up is not shared by equal prompts
    request = Request(f"{row.key}/{row.index}", row.prompt, tuple(range(samples)), row.columns)
    if sampler.is_lookup:
        answers = {source: [answer for _, _, answer in sampler.sample([request])]}
        for answer in answers[source]:
            _check_answer(answer.text, row.prompt, getattr(sampler, "column", None))
        make_candidates(row.prompt, answers.get("teacher", []), answers.get("student", []))
    elif callable(getattr(sampler, "check_requests", None)):
        sampler.check_requests([request])


def _check_answer(text: Any, prompt: Text, column: str | None) -> None:
    """Refuses an answer that is a whole conversation, its prompt included, as in UltraFeedback's own files."""
    if text is None or isinstance(text, str):
        return
    where = "the answer" if column is None else f"the column {column!r}"

    def such_as(value: str) -> str:
        mapped = f"`dataset.map(lambda row: {{{column!r}: row[{column!r}]{value}}})`"
        return "" if column is None else f", e.g. by {mapped}"

    if isinstance(prompt, str):
        last = such_as('[-1]["content"]')
        raise ValueError(
            f"{where} holds a list of messages, but the prompt is text: give the text of the answer{last}, or the prompt as "
            "messages."
        )
    if text[0]["role"] in ("system", "user"):
        raise ValueError(
            f"{where} begins with a message of the role {text[0]['role']!r}: give what follows the prompt, and not the "
            f"whole conversation{such_as('[-1:]')}."
        )


def check_template_columns(columns: Mapping[str, Any], where: str) -> None:
    """Raises a `ValueError` that begins with `where` for a value that a chat template is given with each row, and that is of
    another kind."""
    _check_tools(columns.get("tools"), where)
    variables = columns.get("chat_template_kwargs")
    if not isinstance(variables, Mapping | None):
        raise ValueError(
            f"{where}: `chat_template_kwargs` is {repr(variables)[:60]}; it must be null or a mapping of names to values."
        )


def _check_tools(tools: Any, where: str) -> None:
    wrong = ""
    try:
        read = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        wrong = f", which is no JSON ({error})"
    else:
        if read is None or (isinstance(read, list) and all(isinstance(tool, dict) for tool in read)):
            return
    raise ValueError(
        f"{where}: `tools` is {str(tools)[:60]!r}{wrong}; it must be null or a list of JSON schemas, "
        "as it stands or in one text of JSON."
    )
