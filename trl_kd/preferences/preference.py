"""What a preference function is: P(first ≻ second), batched, or null where nothing is known."""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from trl_kd.sampling import Text


class Preference(Protocol):
    """
    P(first ≻ second) for each of a batch of comparisons. Any callable of this signature is one.

    Args:
        prompts (`list[str]` or `list[list[dict]]`):
            Prompts, plain text or messages.
        first, second (`list[str]` or `list[list[dict]]`):
            The two responses to each, in the format of the prompts.
        **columns (`list`):
            The rows' own columns, as TRL gives them to reward functions; `first_source` and `second_source`, each
            `"teacher"` or `"student"`; and `first_finish_reason` and `second_finish_reason`, `"length"` for an answer that
            was cut off.

    Returns:
        `list[float | None]`: P(first ≻ second) in [0, 1]: ½ for a tie, `None` where nothing is known.

    A preference function may have a method `describe() -> dict`, everything that its labels depend on, as JSON and without
    secrets; otherwise its qualified name says who it is. It may also have a method `check_rows(prompts, **columns)`, which
    is given the first rows before a model is loaded or anything asked, and raises a `ValueError` for what it could not work
    with; of one without it is checked only whether it can be called with such columns.
    """

    def __call__(
        self, prompts: list[Text], first: list[Text], second: list[Text], **columns: list[Any]
    ) -> list[float | None]: ...


class ScoredPreference:
    """
    A preference that comes from a score of each response by itself, so that no response is scored twice.

    Subclasses have `score(prompts, completions, **columns) -> list[float | None]`, whose columns are the rows' own and
    `finish_reason`.

    Args:
        scale (`float`, *optional*):
            Above 0. P = σ((first − second) / scale), Bradley–Terry. By default the higher score wins outright, and equal
            scores are a tie.
    """

    def __init__(self, scale: float | None = None):
        if scale is not None and not scale > 0:
            raise ValueError(f"`scale` is {scale!r}: it must be above 0, or None for hard labels.")
        self.scale = scale

    def score(self, prompts: list[Text], completions: list[Text], **columns: list[Any]) -> list[float | None]:
        """The score of each completion, higher is better; `None` where there is none."""
        raise NotImplementedError

    def prefer(self, first: float | None, second: float | None) -> float | None:
        """P(first ≻ second) from two scores; `None` if one is missing."""
        if first is None or second is None or math.isnan(first) or math.isnan(second):
            return None
        if first == second:
            return 0.5
        if self.scale is None:
            return float(first > second)
        difference = (first - second) / self.scale
        # Either form is exact where the other overflows, and P(a, b) + P(b, a) = 1 to the last bit but one
        return 1 / (1 + math.exp(-difference)) if difference > -700 else 0.0

    def __call__(
        self, prompts: list[Text], first: list[Text], second: list[Text], **columns: list[Any]
    ) -> list[float | None]:
        scores = [self.score(prompts, completions, **columns) for completions in (first, second)]
        return self.compare(first, second, *scores)

    def compare(
        self, first: Sequence[Any], second: Sequence[Any], of_first: list[float | None], of_second: list[float | None]
    ) -> list[float | None]:
        """P(first ≻ second) of responses from their scores. Equal ones tie, though in another batch a
        model may score one otherwise, in the last bits."""
        rows = zip(first, second, of_first, of_second, strict=True)
        return [self.prefer(a, a if one == other else b) for one, other, a, b in rows]


def check_call(function: Callable[..., Any], positional: Iterable[str], keywords: Iterable[str]) -> None:
    """
    Checks that a function takes what it will be given, without calling it.

    Args:
        function (`Callable`):
            The function. One that does not say what it takes is taken on trust.
        positional, keywords (`Iterable[str]`):
            Names of its arguments.

    Raises:
        `ValueError`: it cannot be called so. The message says what is missing or too much.
    """
    positional, keywords = list(positional), list(keywords)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*positional, **dict.fromkeys(keywords))
    except TypeError as error:
        by_place = f"{', '.join(positional)} and, by keyword, " if positional else "by keyword "
        raise ValueError(
            f"The function {function_name(unwrapped(function))} cannot be called: {error}. It is given {by_place}"
            f"{', '.join(keywords)}: let it take `**kwargs` for those that it does not need, and see that the rows have the "
            "columns that it does."
        ) from None


def unwrapped(function: Any) -> Any:
    """The function inside any number of `functools.partial`."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def function_name(function: Any) -> str:
    """Who a function or an object is, for a record: `module.qualname`."""
    owner = function if hasattr(function, "__qualname__") else type(function)
    return f"{owner.__module__}.{owner.__qualname__}"
