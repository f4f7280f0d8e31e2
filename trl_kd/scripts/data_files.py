"""What is wrong with a file of rows, by its line and column: the libraries that read it tell of blocks, bytes and casts."""

import codecs
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Features

from trl_kd.scripts.errors import InputError


TEXT_FILES = (".jsonl", ".json", ".csv")
_BATCH = 1000
_SHOWN = 60


def check_encoding(path: Path, source: str) -> None:
    """
    Raises an `InputError` for a file of text that is not UTF-8, or that is empty; `source` says which argument names it.

    pyarrow reads such JSON all the same, and fails when a row is used.
    """
    is_blank = True
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            content = line.removeprefix(codecs.BOM_UTF8).strip()
            if is_blank and content == b"null":  # pyarrow would not raise, but end the process
                raise InputError(f"{source}: line {number} of {path.name} is null: each row must be an object.")
            is_blank = is_blank and not content
            try:
                line.decode()
            except UnicodeDecodeError as error:
                kind = "UTF-16" if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "ISO-8859-1"
                before = line[max(error.start - 20, 0) : error.start].decode(errors="replace")
                raise InputError(
                    f"{source}: line {number} of {path.name} is not UTF-8 (byte {line[error.start]:#x} behind {before!r}). "
                    f"Save it as UTF-8, for example by `iconv -f {kind} -t UTF-8` if it is {kind}."
                ) from error
    if is_blank:  # for which each release of `datasets` has another error
        raise InputError(f"{source}, which is empty: it needs at least one row.")


def check_kinds(path: Path, source: str, columns: set[str] | None = None) -> None:
    """
    Looks for what keeps rows of JSON from being read as a table.

    Args:
        path (`Path`):
            A file of JSON, or of JSON lines.
        source (`str`):
            Which argument names it, in messages.
        columns (`set[str]`, *optional*):
            Columns that must be of one kind; by default all.

    Raises:
        `InputError`: a line is no JSON or no object, or a column holds text here and numbers there, say. Blamed is the
            rarer kind.
    """
    found: dict[tuple[str, type], list[Any]] = {}  # how many, and where the first is
    for place, row in _rows(path, source):
        for name, value in row.items():
            if value is not None:
                try:
                    found[name, type(value)][0] += 1
                except KeyError:
                    found[name, type(value)] = [1, place, value]
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    first: dict[tuple[str, str], tuple[str, Any]] = {}
    for (name, kind), (number, place, value) in found.items():
        if columns is None or name in columns:
            counts[name][_KINDS[kind]] += number
            first.setdefault((name, _KINDS[kind]), (" ".join(map(str, place)), value))
    for name, kinds in counts.items():
        if len(kinds) > 1:
            (usual, many), *_, (rare, few) = kinds.most_common()
            where, value = first[name, rare]
            raise InputError(
                f"{source}: {where} of {path.name} has {_shown(value)} in `{name}`, which is {rare} in {few:,} "
                f"row{'s' * (few > 1)} and {usual} in {many:,}: give all rows of `{name}` the same kind, or null."
            )


def _check_characters(value: Any, where: str) -> None:
    """Raises for half of a character, such as JSON may write as \\ud83d, anywhere in a value."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict | list):
            waiting += [*part, *part.values()] if isinstance(part, dict) else part
        elif isinstance(part, str) and not part.isascii():
            try:
                part.encode()
            except UnicodeEncodeError as error:
                half = part[error.start].encode("unicode_escape").decode()
                raise InputError(
                    f"{where} {half}, which is half of a character and no text: write both halves, or drop it."
                ) from None


def infer_features(path: Path, source: str) -> Features | None:
    """The columns of a file of JSON, of all its rows: `datasets` takes them from the first block, where a number that is
    later 0.5 may be 1, and null what is a text later. `None` where rows have no columns in common."""
    schema = pa.schema([])
    reading = _rows(path, source)
    while rows := [row for _, row in islice(reading, _BATCH)]:
        names = dict.fromkeys(name for row in rows for name in row)
        try:
            found = pa.table({name: [row.get(name) for row in rows] for name in names}).schema
            schema = pa.unify_schemas([schema, found], promote_options="permissive")
        except pa.ArrowException:
            return None
    return Features.from_arrow_schema(schema)


_Place = tuple[str, int]


def _rows(path: Path, source: str) -> Iterator[tuple[_Place, dict[str, Any]]]:
    """Each row with its place."""
    for place, text in _texts(path):
        is_read = not isinstance(text, str)
        try:
            row = text if is_read else json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{source}: {place[0]} {place[1]} of {path.name} is no JSON ({error}): {text.strip()[:_SHOWN]!r}."
            ) from error
        if not isinstance(row, dict):
            raise InputError(
                f"{source}: {place[0]} {place[1]} of {path.name} is {_shown(row)}: each row must be an object, such as "
                '{"prompt": "..."}.'
            )
        if is_read or "\\ud" in text or "\\uD" in text:
            for name, value in row.items():
                _check_characters(value, f"{source}: {place[0]} {place[1]} of {path.name} has, in `{name}`,")
        yield place, row


def _texts(path: Path) -> Iterator[tuple[_Place, Any]]:
    """Lines, or the items of a list in a file that is one JSON text."""
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError):
            pass  # of JSON lines then
        else:
            content = content if isinstance(content, list) else [content]
            yield from ((("row", number), row) for number, row in enumerate(content))
            return
    with path.open(encoding="utf-8-sig") as file:
        yield from ((("line", number), line) for number, line in enumerate(file, 1) if not line.isspace())


_KINDS: dict[type, str] = {
    bool: "true or false",
    str: "text",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"
