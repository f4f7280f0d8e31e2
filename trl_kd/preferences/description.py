"""What a preference or reward function depends on, as far as it can be seen: a changed one must not keep old labels."""

import functools
import hashlib
import inspect
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import CodeType
from typing import Any

from trl_kd.preferences.preference import function_name, unwrapped
from trl_kd.sampling.as_json import to_json


def describe_function(function: Any) -> dict[str, Any]:
    """
    What a function says of itself by a method `describe`, or what is seen of it.

    Args:
        function (`Callable`):
            A function, any number of `functools.partial` around one, or an object that can be called.

    Returns:
        `dict[str, str]`: its `name`; a digest of its `source`, of the whole file in which it stands unless that is an
        installed package's; and a digest of what is `bound` to it, if anything is: arguments of `functools.partial`, default
        values, and values that it is closed over (of lists, dictionaries and sets among these only that, since they may be
        caches). What it imports from other files, reads elsewhere or keeps in attributes is not seen: where that matters it
        needs a method `describe`.
    """
    bound: list[Any] = []
    while isinstance(function, functools.partial):
        bound += [_stated(function.args), _stated(function.keywords)]
        function = function.func
    if hasattr(function, "describe"):
        described = dict(function.describe())
    else:
        inner = inspect.unwrap(function)
        described = {"name": function_name(function), "source": _digest(_source(inner))}
        bound += [_fixed(value) for value in _held(inner)]
    return described | {"bound": _digest(to_json(bound))} if bound else described


@contextmanager
def naming(function: Any) -> Iterator[None]:
    """Says whose error it is, of those that read like bad input; other errors show where they are by their traceback."""
    try:
        yield
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        name = function_name(unwrapped(function))
        kind = next(
            k for k in (ValueError, TypeError, OSError, ImportError, NotImplementedError) if isinstance(error, k)
        )
        raise kind(f"The function {name} failed with {type(error).__name__}: {error}") from error


def _held(function: Any) -> Iterator[Any]:
    """Default values, and values that a function is closed over."""
    yield from getattr(function, "__defaults__", None) or ()
    yield from (getattr(function, "__kwdefaults__", None) or {}).values()
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # not assigned yet
            yield cell.cell_contents


def _source(function: Any) -> str:
    owner = function if hasattr(function, "__qualname__") else type(function)
    try:
        path = Path(inspect.getsourcefile(owner) or "")
        if path.is_file() and not _is_installed(path):
            return path.read_text(encoding="utf-8", errors="replace")
        return inspect.getsource(owner)
    except (OSError, TypeError):  # typed into a shell, or compiled
        call: Any = owner if hasattr(owner, "__code__") else getattr(owner, "__call__", None)  # noqa: B004
        return to_json(_code(call.__code__)) if hasattr(call, "__code__") else ""


def _is_installed(path: Path) -> bool:
    is_package = {"site-packages", "dist-packages"} & set(path.parts)
    return bool(is_package) or path.is_relative_to(sysconfig.get_paths()["stdlib"])


def _code(code: CodeType) -> list[Any]:
    """What compiled code does: the constants of one hold that of the functions inside."""
    constants = [_code(value) if isinstance(value, CodeType) else repr(_stated(value)) for value in code.co_consts]
    return [code.co_code, constants, code.co_names]


def _stated(value: Any) -> Any:
    """A value without addresses, which another process has others of."""
    if isinstance(value, dict):
        return {str(key): _stated(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_stated(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    return function_name(value) if callable(value) else value


def _fixed(value: Any) -> Any:
    """The same of a value that cannot change, as a cache would; of another its kind."""
    if isinstance(value, tuple):
        return [_fixed(item) for item in value]
    return type(value).__qualname__ if isinstance(value, dict | list | set) else _stated(value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
