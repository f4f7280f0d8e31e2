"""Reasoning that a model wrote into its answer, between `<think>` and `</think>`."""

import re
from typing import Any


OPEN, CLOSE = "<think>", "</think>"


def has_reasoning(text: str) -> bool:
    """Whether a text holds reasoning: a block of it, a block that was never ended, or one that the prompt has begun."""
    return OPEN in text or CLOSE in text


def strip_reasoning(text: str) -> str:
    """
    A text without its reasoning.

    Blocks `<think>…</think>` are left out, everything before a `</think>` that the prompt has opened, and everything behind
    a `<think>` that nothing ends. A text without reasoning is returned as it is.
    """
    if not has_reasoning(text):
        return text
    text = re.sub(f"{OPEN}.*?{CLOSE}", "", text, flags=re.DOTALL)
    return text.rpartition(CLOSE)[2].partition(OPEN)[0].strip()


def stripped(response: Any) -> Any:
    """A response without the reasoning in it."""
    if response is None or isinstance(response, str):
        return response and strip_reasoning(response)
    return [
        {**message, "content": strip_reasoning(message["content"])}
        if message.get("role") == "assistant" and isinstance(message.get("content"), str)
        else message
        for message in response
    ]
