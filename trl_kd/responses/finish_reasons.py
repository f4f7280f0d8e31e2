"""Why an answer ended. Servers, samplers and data sets use many words for four kinds of end."""

import logging
from functools import lru_cache
from typing import Literal


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


def ending(finish_reason: str | None) -> Ending:
    """
    Sorts a finish reason.

    Args:
        finish_reason (`str`, *optional*):
            What a source says, in any case. `None` means that nothing is known.

    Returns:
        `str`, one of:

        - `"complete"`: the answer ends where its author ended it, so that an end token belongs behind it. `None` is one of
          these.
        - `"cut"`: the answer was cut off. Its text counts, an end token behind it does not. A word that is not known here
          is one of these, and is reported once.
        - `"failed"`: the source broke down midway. Ask again.
        - `"final"`: the source refuses this prompt for good.
    """
    if finish_reason is None:
        return "complete"
    word = finish_reason.lower()
    if word not in _ENDINGS:
        _report(word)
    return _ENDINGS.get(word, "cut")


@lru_cache(maxsize=256)
def _report(word: str) -> None:
    logger.warning(
        f"The finish reason {word[:60]!r} is not known: answers that end with it count as cut off, so that no end token is "
        "taught behind them."
    )
