"""What is wrong with prompts, sources or a preference, found before anything is loaded, asked or paid for."""

import json
import logging
from typing import Any

from trl_kd.pairs.labels import Labeller
from trl_kd.pairs.pairing import make_candidates
from trl_kd.pairs.prompts import PromptRow
from trl_kd.preferences import Preference
from trl_kd.sampling import Request, Sampler


logger = logging.getLogger(__name__)

CHECKED_ROWS = 100
"""Rows, from the start of the prompts, that are looked at."""


def check_parts(rows: list[PromptRow], sources: dict[str, tuple[Sampler, int]], preference: Preference) -> None:
    """
    Checks that the first rows can be answered and labelled.

    Answers that exist already (`is_lookup`) are read. Another sampler may have a method `check_requests(requests)`, and a
    preference `check_rows(prompts, **columns)` with the columns that it will get; each raises a `ValueError` for what it
    could not work with. Of any other preference it is known at least whether it can be called so.

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
    """
    for source, (sampler, samples) in sources.items():
        _check_kind(
            source, sampler, ("is_lookup", "describe", "sample"), "ServerSampler(MODEL, URL) or ColumnSampler(NAME)"
        )
        _warn_of_greedy(source, sampler, samples)
    _check_kind("preference", preference, ("__call__",), "TeacherWins() or RewardFunctionPreference(FUNCTION)")
    for row in rows:
        _check_tools(row)
    for source, (sampler, samples) in sources.items():
        for row in rows:
            try:
                _check_source(source, sampler, samples, row)
            except ValueError as error:
                raise ValueError(f"Row {row.index} of the prompts, for the {source}: {error}") from error
    Labeller(preference).check(rows)


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


def _warn_of_greedy(source: str, sampler: Any, samples: int) -> None:
    if samples > 1 and getattr(getattr(sampler, "settings", None), "temperature", None) == 0:
        logger.warning(
            "The %s is asked for %d answers to each prompt at temperature 0, where all of them are equal: raise its "
            "temperature, or ask for one.",
            source,
            samples,
        )


def _check_source(source: str, sampler: Any, samples: int, row: PromptRow) -> None:
    # A row's own key: what is looked up is not shared by equal prompts
    request = Request(f"{row.key}/{row.index}", row.prompt, tuple(range(samples)), row.columns)
    if sampler.is_lookup:
        answers = {source: [answer for _, _, answer in sampler.sample([request])]}
        make_candidates(row.prompt, answers.get("teacher", []), answers.get("student", []))
    elif callable(getattr(sampler, "check_requests", None)):
        sampler.check_requests([request])


def _check_tools(row: PromptRow) -> None:
    tools: Any = row.columns.get("tools")
    wrong = ""
    try:
        read = json.loads(tools) if isinstance(tools, str) else tools
    except ValueError as error:
        wrong = f", which is no JSON ({error})"
    else:
        if read is None or (isinstance(read, list) and all(isinstance(tool, dict) for tool in read)):
            return
    raise ValueError(
        f"Row {row.index} of the prompts: `tools` is {str(tools)[:60]!r}{wrong}; it must be null or a list of JSON schemas, "
        "as it stands or in one text of JSON."
    )
