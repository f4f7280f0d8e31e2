"""Values of arguments, as a YAML file or the command line gives them: whether a field can have them."""

import json
import math
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from functools import wraps
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from trl_kd.scripts.errors import InputError
from trl_kd.scripts.hidden import described, is_free


_UNIONS = (Union, UnionType)
_LARGEST = 2**63 - 1
_JSON = ("_kwargs", "_body")
"""How the names of `trl-kd pairs` end whose text is JSON, in YAML a mapping too."""


def whole_number(text: str) -> int:
    """An `int` of at most 64 bits, which is what the libraries below can count with."""
    value = int(text)
    if abs(value) > _LARGEST:
        raise ValueError
    return value


def mapping(text: str) -> dict[str, Any]:
    """An object in JSON."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


def for_python(text: str) -> None:
    """What the command line says of a field whose values only Python can make."""
    raise ArgumentTypeError("it is for Python alone: drop it")


def number(text: str) -> float:
    """A finite `float`."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def number_or_infinity(text: str) -> float:
    """A `float` that is not NaN."""
    value = float(text)
    if math.isnan(value):
        raise ValueError
    return value


CONVERSIONS: dict[str, Callable[[str], Any]] = {
    **{"int": whole_number, "float": number, "dict": mapping},
    "ParallelismConfig": for_python,
}
"""What reads the values of a class, by its name."""


def optional(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """`convert`, for a field that may be null."""

    @wraps(convert)
    def read(text: str) -> Any:
        return None if text.lower() in ("none", "null") else convert(text)

    return read


def check_plain(key: str, value: Any, where: str = "") -> None:
    """Raises for a value that holds, at any depth, a text that no file can hold, or a number that nothing can count with."""
    for part in _parts(value):
        if isinstance(part, int) and abs(part) > _LARGEST:
            raise InputError(
                f"`{key}` is, or holds, a whole number of {part.bit_length()} bits{where}: at most 63 will do."
            )
        if isinstance(part, str):
            try:
                part.encode()
            except UnicodeEncodeError:
                raise InputError(
                    f"{described(key, part, where)}, which is not UTF-8: write its characters out."
                ) from None


def _parts(value: Any) -> Iterator[Any]:
    """What a value consists of, each part once: by an alias YAML may put a list into itself."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, (dict, list, tuple)):
            if id(part) in seen:
                continue
            seen.add(id(part))
            waiting += [*part, *part.values()] if isinstance(part, dict) else part
        else:
            yield part


def check_kind(key: str, value: Any, hint: Any, path: str) -> None:
    """Raises for a value of a YAML file that is of another kind than its field: YAML reads 5, 010 and 2024_01 as numbers,
    and on the command line they are texts."""
    kinds = _kinds(hint)
    if key.endswith(_JSON):
        kinds.add(dict)
    if value is None:
        return
    for item in value if isinstance(value, list) and list in kinds else [value]:
        if not _is_one_of(item, kinds):
            raise InputError(f"{described(key, value, f' in {path}')}, and it must be {_wanted(key, item, kinds)}.")
    if isinstance(value, dict):
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:  # a date, bytes, or a mapping that holds itself
            raise InputError(f"{described(key, value, f' in {path}')}, which must be as in JSON: {error}.") from None


def _is_one_of(item: Any, kinds: set[Any]) -> bool:
    if isinstance(item, bool):
        return bool in kinds
    return isinstance(item, tuple(kinds - {list, type(None)})) or (isinstance(item, int) and float in kinds)


def _kinds(hint: Any) -> set[Any]:
    """The classes of a field, and those of the items of its lists."""
    origin = get_origin(hint) or hint
    if origin in (*_UNIONS, list):
        return ({origin} & {list}).union(*(_kinds(argument) for argument in get_args(hint)))
    if origin is Literal:
        return {type(argument) for argument in get_args(hint)}
    return {origin}


def _wanted(key: str, item: Any, kinds: set[Any]) -> str:
    if dict in kinds:
        return "a mapping of names to values"
    if kinds & {int, float}:
        return "a number, or one of the words that the documentation has"
    if str in kinds and is_free(key):
        return "text: put it into quotes"
    if str in kinds:
        return "text" if isinstance(item, list | dict) else f"text: put it into quotes, as in {key}: '{item}'"
    return "left out: it is for Python alone"
