"""Why an answer ended. Servers, samplers and data sets use many words for four kinds of end."""

import logging
from functools import lru_cache
from typing import Any, Literal


logger = logging.getLogger(__name__)

Ending = Literal["complete", "cut", "failed", "final"]

_ENDINGS: dict[str, Ending] = {
    **dict.fromkeys(
        ("stop", "tool_calls", "function_call", "eos", "eos_token", "end_turn", "stop_sequence"), "complete"
    ),
    **dict.fromkeys(("length", "max_tokens", "model_length"), "cut"),
    **dict.fromkeys(("error", "abort", "cancelled", "malformed"), "failed"),
    **dict.fromkeys(
        ("content_filter", "content_policy_violation", "refusal", "prompt_too_long", "bad_request", "empty"), "final"
    ),
}

KNOWN = frozenset(_ENDINGS)
"""The words that are known, in lower case."""


def ending(finish_reason: Any) -> Ending:
    """
    Sorts a finish reason.

    Args:
        finish_reason (`str`, *optional*):
            What a source says, in any case. `None`, NaN and an empty text mean that nothing is known.

    Returns:
        `str`, one of:

        - `"complete"`: the answer ends where its author ended it. Where nothing is known it counts as complete.
        - `"cut"`: the answer was cut off. Its text counts, an end token behind it does not. A word that is not known here
          is one of these, and is reported once.
        - `"failed"`: the source broke down midway. Ask again.
        - `"final"`: the source refuses this prompt for good.
    """
    if finish_reason is None or finish_reason != finish_reason:
        return "complete"
    word = str(finish_reason).strip().lower()
    if not word:
        return "complete"
    if word not in _ENDINGS:
        _report(word)
    return _ENDINGS.get(word, "cut")


def has_end(finish_reason: Any) -> bool:
    """Whether an end token belongs behind an answer that ended so."""
    return ending(finish_reason) == "complete"


def check_finish_reason(value: Any, where: str) -> None:
    """Raises a `ValueError` that begins with `where`, unless the value is a text, or null."""
    if value is not None and value == value and not isinstance(value, str):
        raise ValueError(f"{where} is {value!r}: it must be a text, such as 'stop' or 'length', or null.")


@lru_cache(maxsize=256)
def _report(word: str) -> None:
    logger.warning(
        f"The finish reason {word[:60]!r} is not known: answers that end with it count as cut off, so that no end token is "
        "taught behind them."
    )
