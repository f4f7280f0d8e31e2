"""A verifier or any other reward function written for TRL decides."""

import asyncio
import functools
import inspect
import logging
import math
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from trl_kd.preferences.description import describe_function, naming
from trl_kd.preferences.preference import ScoredPreference, check_call, function_name, unwrapped
from trl_kd.preferences.tokens import match_format, template_options, tokenize_response
from trl_kd.sampling import Text


logger = logging.getLogger(__name__)

RewardFunction = Callable[..., Iterable[float | None] | Awaitable[Iterable[float | None]]]


class RewardFunctionPreference(ScoredPreference):
    """
    Scores responses with reward functions as `GRPOTrainer` and `RLOOTrainer` call them, so that existing ones work.

    A function gets, all by keyword,

    - `prompts` and `completions`: plain text, or messages (`[{"role": "assistant", "content": …}]` for a completion);
    - `completion_ids`: tokens of each completion, its end token included, if there is a `processing_class`; otherwise
      `None` for each;
    - `trainer_state`: a fresh `TrainerState`, of step 0, since nothing is trained here;
    - `log_metric(name, value)`, whose values are averaged in `metrics`, and `log_extra(column, values)`, which does nothing;
    - the rows' own columns.

    It returns a number for each completion, `None` where it has no opinion; it may be a coroutine function. Several
    coroutine functions run side by side, on one event loop that stays the same from call to call.

    Args:
        reward_func (`Callable` or `list[Callable]`):
            One reward function, or several whose scores are added as TRL adds them: `None` is left out of the sum, and only
            a response for which all return `None` has no score.
        scale (`float`, *optional*):
            See [`ScoredPreference`]. By default the higher score wins outright, and equal scores are a tie.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            Tokenizer for `completion_ids`.
        reward_weights (`list[float]`, *optional*):
            Weight of each function, 1 by default.

    Raises:
        `ValueError`: a function returns another number of scores than it was given completions, or something that is no
        number.
    """

    def __init__(
        self,
        reward_func: RewardFunction | list[RewardFunction],
        scale: float | None = None,
        processing_class: Any = None,
        reward_weights: list[float] | None = None,
    ):
        super().__init__(scale)
        self.functions = list(reward_func) if isinstance(reward_func, list | tuple) else [reward_func]
        self.weights = [1.0] * len(self.functions) if reward_weights is None else list(reward_weights)
        if not self.functions or len(self.weights) != len(self.functions):
            raise ValueError(
                f"`reward_weights` is {reward_weights!r} for {len(self.functions)} reward functions: give at least one "
                "function, and one weight for each."
            )
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self._logged: dict[str, list[float]] = {}

    @property
    def metrics(self) -> dict[str, float]:
        """Means of what the functions have given to `log_metric` so far."""
        return {name: total / count for name, (total, count) in self._logged.items()}

    def score(self, prompts: list[Text], completions: list[Text], **columns: list[Any]) -> list[float | None]:
        """The weighted sum of what the functions return for each completion."""
        keywords = self._keywords(prompts, completions, columns)
        results: list[Any] = []
        for function in self.functions:
            with naming(function):
                results.append(function(**keywords))
        waiting = [index for index, result in enumerate(results) if inspect.isawaitable(result)]
        if waiting:
            named = [_named(self.functions[index], results[index]) for index in waiting]
            for index, result in zip(waiting, wait(named), strict=True):
                results[index] = result
        read = [
            _read_scores(result, len(prompts), function_name(unwrapped(function)))
            for result, function in zip(results, self.functions, strict=True)
        ]
        return [self._sum(scores) for scores in zip(*read, strict=True)]

    def check_rows(self, prompts: list[Text], **columns: list[Any]) -> None:
        """Raises a `ValueError` if a function does not take what it would be given with such rows."""
        keywords = self._keywords(prompts[:1], [""] * len(prompts[:1]), {name: v[:1] for name, v in columns.items()})
        for function in self.functions:
            check_call(function, (), keywords)
            if self.tokenizer is None and _asks_for_tokens(function):
                logger.warning(
                    "The reward function %s takes `completion_ids`, which are None without a tokenizer: give a "
                    "`processing_class` (`--preference_tokenizer`).",
                    function_name(unwrapped(function)),
                )

    def _keywords(self, prompts: list[Text], completions: list[Text], columns: dict[str, list[Any]]) -> dict[str, Any]:
        from transformers import TrainerState  # here, since it brings torch with it

        ids: list[list[int] | None] = [None] * len(prompts)
        if self.tokenizer is not None:
            ids = [
                tokenize_response(self.tokenizer, prompt, completion, template_options(columns, index))[1]
                for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
            ]
        return {
            **{name: values for name, values in columns.items() if name not in ("prompt", "completion")},
            "prompts": prompts,
            "completions": [match_format(*pair) for pair in zip(prompts, completions, strict=True)],
            "completion_ids": ids,
            "trainer_state": TrainerState(),
            "log_extra": lambda column, values: None,
            "log_metric": self._log_metric,
        }

    def _log_metric(self, name: str, value: float) -> None:
        total, count = self._logged.get(name, (0.0, 0))
        self._logged[name] = [total + float(value), count + 1]

    def _sum(self, scores: tuple[float | None, ...]) -> float | None:
        known = [weight * score for weight, score in zip(self.weights, scores, strict=True) if score is not None]
        return sum(known) if known else None

    def describe(self) -> dict[str, Any]:
        """Names, weights, and what [`~trl_kd.preferences.description.describe_function`] sees of each function."""
        return {
            "preference": "reward_function",
            "functions": [describe_function(function) for function in self.functions],
            "reward_weights": self.weights,
            "scale": self.scale,
            "tokenizer": getattr(self.tokenizer, "name_or_path", None),
        }


def _asks_for_tokens(function: Any) -> bool:
    try:
        return "completion_ids" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _read_scores(result: Any, expected: int, name: str) -> list[float | None]:
    try:
        values = list(result)
    except TypeError:
        raise ValueError(
            f"The reward function {name} returned {result!r}: it must return a list, one score for each completion."
        ) from None
    if len(values) != expected:
        raise ValueError(
            f"The reward function {name} returned {len(values)} scores for {expected} completions: it must return one for "
            "each, None where it has no opinion."
        )
    return [_read_score(value, name) for value in values]


def _read_score(value: Any, name: str) -> float | None:
    if value is None:
        return None
    try:
        if isinstance(value, str):  # which `float` would read
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"The reward function {name} returned {str(value)[:60]!r} for a completion: a score is a number, or None."
        ) from None
    return None if math.isnan(number) else number


@functools.cache
def _event_loop(process: int) -> asyncio.AbstractEventLoop:
    """One loop a process, in a thread of its own: it serves callers that are inside a loop already, and connections that a
    function keeps stay usable from call to call."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=f"reward-functions-{process}", daemon=True).start()
    return loop


async def _named(function: Any, awaitable: Awaitable[Any]) -> Any:
    with naming(function):
        return await awaitable


def wait(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    """Waits for coroutines, side by side, whether or not the caller is inside an event loop."""

    async def gather() -> list[Any]:
        return await asyncio.gather(*awaitables)

    future = asyncio.run_coroutine_threadsafe(gather(), _event_loop(os.getpid()))
    try:
        return future.result()
    except BaseException:
        future.cancel()  # on Ctrl-C, what was asked for need not be waited for
        raise


def load_function(name: str) -> Callable[..., Any]:
    """
    Finds a function by name, in an installed package, in the current folder, or in a file.

    Args:
        name (`str`):
            `"package.module.function"`, as TRL's `--reward_funcs`; `"package.module:function"`; or
            `"path/to/file.py:function"`. After a colon the function may be an attribute of something:
            `"my_module:task.score"`.

    Raises:
        `ValueError`: no such function, or it cannot be imported.
    """
    module_name, colon, attributes = name.rpartition(":")
    if not colon:
        module_name, _, attributes = name.rpartition(".")
    is_relative_module = module_name.startswith(".") and not module_name.endswith(".py")
    if not module_name or not attributes or is_relative_module or attributes == "py":
        raise ValueError(
            f"no function {name!r}: give it as 'package.module.function', 'package.module:function' or "
            "'path/to/file.py:function'."
        )
    try:
        function = functools.reduce(getattr, attributes.split("."), import_named(module_name))
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise ValueError(f"cannot load the function {name!r}: {error}.") from error
    except Exception as error:  # whatever the module's own lines do
        raise ValueError(f"cannot load the function {name!r}: {type(error).__name__}: {error}.") from error
    if not callable(function):
        raise ValueError(f"{name!r} is a {type(function).__name__}, not a function.")
    return function


def import_named(name: str) -> Any:
    """Imports a module by its name, from the current folder too, or from a file whose name ends with `.py`."""
    if not name.endswith(".py"):
        if os.getcwd() not in sys.path:  # a command's own folder stands there instead
            sys.path.insert(0, os.getcwd())
        return import_module(name)
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"no file {name}")
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
