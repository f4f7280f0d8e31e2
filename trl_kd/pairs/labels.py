"""Labels and scores of a batch of prompts: each is asked for once, and kept where it cost something."""

import hashlib
import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from trl_kd.pairs.pairing import Candidate, PromptPairs
from trl_kd.pairs.prompts import PromptRow
from trl_kd.pairs.store import AnswerStore
from trl_kd.preferences import Preference, function_name
from trl_kd.preferences.description import describe_function, naming
from trl_kd.preferences.preference import check_call
from trl_kd.preferences.reward_function import wait
from trl_kd.sampling.as_json import to_json


_OURS = {
    *("prompts", "completions", "first", "second", "first_source", "second_source"),
    *("finish_reason", "first_finish_reason", "second_finish_reason"),
}
"""Arguments of preference functions, which no column may take."""


_Item = tuple[PromptRow, tuple[Candidate, ...]]
"""A score or a label to be had: of one candidate, or of two."""

Advance = Callable[[int, int], None]


class Labeller:
    """
    Asks a preference function about prompts and their candidates.

    Args:
        preference (`Preference`):
            With a method `score`, every answer of a pair is scored once; otherwise each pair is labelled once, the teacher's
            or the earlier answer first. Of one with a method `stream(prompts, first, second)`, which yields places and
            labels, each label is kept as it arrives. One that says what columns it `reads` is not asked again where others
            differ.
        store (`AnswerStore`, *optional*):
            Where labels are kept, under what they depend on: prompt, other columns and texts. Without one, they are asked
            for each time.
        batch_size (`int`, *optional*, defaults to `64`):
            Comparisons given to the preference function, and then stored, at once.

    Attributes:
        streams (`bool`): Whether labels arrive one by one.
    """

    def __init__(self, preference: Preference, store: AnswerStore | None = None, batch_size: int = 64):
        self.preference: Any = preference
        self.store = store
        self.batch_size = batch_size
        self.is_scored = callable(getattr(preference, "score", None))
        self.streams = callable(getattr(preference, "stream", None))

    def check(self, rows: list[PromptRow]) -> None:
        """Raises a `ValueError` if the preference cannot work with such rows: by its `check_rows`, or by its signature."""
        anybody = Candidate("teacher", "")
        (prompts, *_), columns = self._arguments([(row, (anybody, anybody)) for row in rows])
        if callable(getattr(self.preference, "check_rows", None)):
            self.preference.check_rows(prompts, **columns)
        elif self.is_scored:
            check_call(self.preference.score, ("prompts", "completions"), columns)
        else:
            check_call(self.preference, ("prompts", "first", "second"), columns)

    def label(
        self, rows: list[PromptRow], prompts: list[PromptPairs], advance: Advance = lambda done, of: None
    ) -> int:
        """Fills in `scores` or `labels` of `prompts`, which are those of `rows`. Returns how many were not known before.
        Whenever some of these have come, `advance` is told how many there are now, and of how many."""
        items: list[_Item] = []
        places: list[tuple[PromptPairs, Any]] = []
        for row, prompt in zip(rows, prompts, strict=True):
            candidates = prompt.candidates
            if self.is_scored:
                prompt.scores = [None] * len(candidates)
                for i in sorted({i for pair in prompt.pairs for i in pair}):
                    items.append((row, (candidates[i],)))
                    places.append((prompt, i))
            else:
                for pair in prompt.pairs:
                    first, second = candidates[pair[0]], candidates[pair[1]]
                    if first.text != second.text:
                        items.append((row, (first, second)))
                        places.append((prompt, pair))
        values, asked = self._values(items, advance)
        for (prompt, place), value in zip(places, values, strict=True):
            if prompt.scores is not None:
                prompt.scores[place] = value
            else:
                prompt.labels[place] = value
        return asked

    def _values(self, items: list[_Item], advance: Advance) -> tuple[list[float | None], int]:
        if self.store is None:
            return (self._ask(items) if items else []), len(items)
        columns = {id(row): to_json(self._read_by_preference(row.columns)) for row, _ in items}
        keys = [_key(item, columns[id(item[0])]) for item in items]
        known = self.store.labels(list(dict.fromkeys(keys)))
        missing = {key: item for key, item in zip(keys, items, strict=True) if key not in known}
        waiting = list(missing.items())
        if waiting and self.streams:  # each label is paid for, and kept at once
            (prompts, first, second), _ = self._arguments([item for _, item in waiting])
            for done, (place, value) in enumerate(self.preference.stream(prompts, first, second), 1):
                label = {waiting[place][0]: self._read(value)}
                self.store.add_labels(label)
                known |= label
                advance(done, len(waiting))
            self.store.check_space()
            return [known[key] for key in keys], len(missing)
        for start in range(0, len(waiting), self.batch_size):
            some = waiting[start : start + self.batch_size]
            values = self._ask([item for _, item in some])
            labels = {key: value for (key, _), value in zip(some, values, strict=True)}
            self.store.add_labels(labels)
            self.store.check_space()
            known |= labels
            advance(start + len(some), len(waiting))
        return [known[key] for key in keys], len(missing)

    def _read_by_preference(self, columns: dict[str, Any]) -> dict[str, Any]:
        """The columns that a label depends on: those that the preference says it `reads`, or all."""
        reads = getattr(self.preference, "reads", None)
        return columns if reads is None else {name: columns.get(name) for name in reads}

    def _arguments(self, items: list[_Item]) -> tuple[list[list[Any]], dict[str, list[Any]]]:
        """What the preference function gets: prompts and texts, and columns."""
        sides = 1 if self.is_scored else 2
        texts = [[candidates[side].text for _, candidates in items] for side in range(sides)]
        names = [name for name in (items[0][0].columns if items else ()) if name not in _OURS]
        columns: dict[str, list[Any]] = {name: [row.columns.get(name) for row, _ in items] for name in names}
        if self.is_scored:
            columns["finish_reason"] = [candidates[0].finish_reason for _, candidates in items]
        else:
            for side, name in enumerate(("first", "second")):
                columns[f"{name}_source"] = [candidates[side].source for _, candidates in items]
                columns[f"{name}_finish_reason"] = [candidates[side].finish_reason for _, candidates in items]
        return [[row.prompt for row, _ in items], *texts], columns

    def _ask(self, items: list[_Item]) -> list[float | None]:
        texts, columns = self._arguments(items)
        ask = self.preference.score if self.is_scored else self.preference
        with nullcontext() if function_name(ask).startswith("trl_kd.") else naming(self.preference):
            values = ask(*texts, **columns)
            if inspect.isawaitable(values):
                (values,) = wait([values])
            values = list(values)
        if len(values) != len(items):
            raise ValueError(
                f"The preference function {function_name(self.preference)} returned {len(values)} values for {len(items)} "
                "comparisons: it must return one each (None where it does not know)."
            )
        return [self._read(value) for value in values]

    def _read(self, value: Any) -> float | None:
        if value is None:
            return None
        number = float(value)
        if math.isnan(number):
            return None
        if not self.is_scored and not 0 <= number <= 1:
            raise ValueError(
                f"The preference function {function_name(self.preference)} returned {value!r}: it must return P(first ≻ "
                "second), a number in [0, 1], or None where it does not know."
            )
        return number


def describe_preference(preference: Any) -> dict[str, Any]:
    """What a preference function says of itself, or its name and a hash of its source."""
    return describe_function(preference)


def _key(item: _Item, columns: str) -> bytes:
    row, candidates = item
    parts = [row.key, columns, [[one.source, one.text, one.finish_reason] for one in candidates]]
    return hashlib.blake2b(to_json(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()
