"""What is read from the database of a folder, checked: a damaged value is named by file, table and row."""

import json
import math
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from trl_kd.pairs.null_causes import recorded_cause
from trl_kd.pairs.places import StoreError, quoted
from trl_kd.sampling import Answer
from trl_kd.sampling.budget import Usage


OURS = {"settings", "answers", "labels", "nulls"}
_FIRST = OURS - {"nulls"}
"""The tables that every version has made."""
HELD = "held"
"""The setting that names which of `KINDS` are stored."""
KINDS = {
    "answers of the teacher": "SELECT 1 FROM answers WHERE source = 'teacher' LIMIT 1",
    "answers of the student": "SELECT 1 FROM answers WHERE source = 'student' LIMIT 1",
    "labels": "SELECT 1 FROM labels LIMIT 1",
}
"""What is paid for, with what finds one of it."""


def check_database(connection: sqlite3.Connection, path: Path, version: int, made: Iterable[Path]) -> None:
    """
    Checks that a database which was there before is one of answers, and not empty beside what was made of them.

    Args:
        connection (`sqlite3.Connection`):
            The database, of which nothing is changed.
        path (`Path`):
            Its file.
        version (`int`):
            Its format; 0 where no version of ours has finished making its tables.
        made (`Iterable[Path]`):
            What is made of its answers.

    Raises:
        `StoreError`: it is a database of something else, or empty beside something made of its answers, or has lost all
            answers of a source, or all labels, since.
    """
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    tables = {name for name in tables if not name.startswith("sqlite_")}
    if not (tables <= OURS if version == 0 else tables >= _FIRST):
        others = ", ".join(sorted(tables)) or "(none)"
        raise StoreError(
            f"`{path}` is a database of something else, with the tables {others}. It was left as it is: put the stored "
            "answers back in its place, give another `output_dir`, or move it away to ask everything anew."
        )
    is_empty = "settings" not in tables or not connection.execute("SELECT COUNT(*) FROM settings").fetchone()[0]
    lost = "nothing" if is_empty else " and ".join(f"no {kind}" for kind in _lost(connection, path))
    finished = next(iter(made), None) if lost else None
    if finished is not None:
        raise StoreError(
            f"`{path}` holds {lost}, though `{finished}` was made of what it held: that would be asked for, and paid, "
            f"again. Put a copy of it back. To start over on purpose, delete `{path}`."
        )


def _lost(connection: sqlite3.Connection, path: Path) -> list[str]:
    """Which of `KINDS` were stored and are not there any more."""
    row = connection.execute("SELECT value FROM settings WHERE name = ?", (HELD,)).fetchone()
    held = StoredValues(path).setting(HELD, row[0], are_texts) if row else []
    return [kind for kind in held if kind in KINDS and connection.execute(KINDS[kind]).fetchone() is None]


class StoredValues:
    """
    Reads values of rows.

    Args:
        path (`Path`):
            File of the database, for errors.

    Raises:
        `StoreError`: a value is none that we write.
    """

    def __init__(self, path: Path):
        self._path = path

    def setting(self, name: str, text: Any, holds: Callable[[Any], bool] = lambda value: True) -> Any:
        """A setting from its JSON, of which `holds` must be true."""
        with suppress(ValueError, TypeError, RecursionError):
            value = json.loads(text)
            if holds(value):
                return value
        raise self._damaged("settings", f"name = '{name}'", "value", text)

    def cause(self, text: Any, place: Sequence[Any]) -> str:
        """What an answer without a text is due to, as it is recorded today."""
        with suppress(ValueError, TypeError, RecursionError, AttributeError):
            return recorded_cause(text)
        raise self._damaged("nulls", _of_answer(place), "cause", text)

    def answer(self, values: Sequence[Any], place: Sequence[Any]) -> Answer:
        """An answer from its `text`, `finish_reason` and `tokens`; its place is its source, prompt and sample."""
        text, finish_reason, tokens = values
        read: Any = 0
        with suppress(ValueError, TypeError, RecursionError):
            read = json.loads(text)
        is_text = read is None or isinstance(read, str) or _are_messages(read)
        for column, value, holds in (
            ("text", text, is_text),
            ("finish_reason", finish_reason, isinstance(finish_reason, str | None)),
            ("tokens", tokens, isinstance(tokens, int | None)),
        ):
            if not holds:
                raise self._damaged("answers", _of_answer(place), column, value)
        return Answer(read, finish_reason, tokens)

    def label(self, value: Any, place: tuple[bytes, bytes]) -> float | None:
        """A label or a score; its place is the keys of its preference and of itself."""
        if value is None or (isinstance(value, float | int) and math.isfinite(value)):
            return value
        raise self._damaged(
            "labels", "preference = x'{}' AND key = x'{}'".format(*(k.hex() for k in place)), "value", value
        )

    def _damaged(self, table: str, where: str, column: str, value: Any) -> StoreError:
        way_out = f'sqlite3 {quoted(self._path)} "DELETE FROM {table} WHERE {where}"'
        return StoreError(
            f"`{self._path}` is damaged: in the row of `{table}` where {where}, `{column}` is {_shortened(value)}. It was "
            f"left as it is: put a copy of the file back, or delete the row (`{way_out}`), so that it is made anew."
        )


def is_description(name: str, value: Any) -> bool:
    """Whether a setting is what it must be that says what the stored answers and labels are of."""
    if name == "shard":
        return value is None or (
            isinstance(value, list) and len(value) == 2 and all(isinstance(v, int) for v in value)
        )
    return name not in ("teacher", "student", "preference") or isinstance(value, dict)


def is_usage(value: Any) -> bool:
    """Whether a setting is what was used."""
    names = {field.name for field in fields(Usage)}
    return (
        isinstance(value, dict) and value.keys() <= names and all(isinstance(v, float | int) for v in value.values())
    )


def is_share(value: Any) -> bool:
    """Whether a setting is a share, and of how many."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, float | int) for part in value)


def are_texts(value: Any) -> bool:
    """Whether a setting is a list of texts."""
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _of_answer(place: Sequence[Any]) -> str:
    source, prompt, sample = place
    return f"source = '{source}' AND prompt = x'{prompt.hex()}' AND sample = {sample}"


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} …"
