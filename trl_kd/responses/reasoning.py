"""Reasoning that a model wrote into its answer, between `<think>` and `</think>`."""

import re
from typing import Any


OPEN, CLOSE = "<think>", "</think>"
REASONING: tuple[str | None, ...] = (None, "keep", "strip", "error")
"""What a setting `reasoning` may be."""
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message in which servers and data sets keep reasoning apart from the answer."""

_BLOCK = re.compile(f"{OPEN}.*?{CLOSE}", re.DOTALL)
_OPENED_BY_PROMPT = re.compile(rf"\A.*(?:(?<! ){CLOSE}|{CLOSE}(?! ))", re.DOTALL)  # not within a sentence about it
_NEVER_ENDED = re.compile(rf"\A\s*{OPEN}.*", re.DOTALL)


def has_reasoning(text: str) -> bool:
    """Whether a text holds reasoning: see [`strip_reasoning`]."""
    return strip_reasoning(text) != text


def strip_reasoning(text: str) -> str:
    """
    A text without its reasoning.

    Blocks `<think>…</think>` are left out. So is everything up to a `</think>` whose block the prompt has opened, and
    everything if the text begins with a `<think>` that nothing ends. A tag between two spaces stands in a sentence about it,
    and stays. A text without reasoning is returned as it is.
    """
    left = _OPENED_BY_PROMPT.sub("", _BLOCK.sub("", text))
    left = _NEVER_ENDED.sub("", left)
    return text if left == text else left.strip()


def answer_reasons(answer: Any) -> bool:
    """Whether an answer, text or messages, holds reasoning in its text."""
    if isinstance(answer, str):
        return has_reasoning(answer)
    return any(has_reasoning(text) for message in answer for text in _texts(message))


def stripped(response: Any) -> Any:
    """A response, text or messages, without the reasoning in it or beside it."""
    if response is None or isinstance(response, str):
        return response and strip_reasoning(response)
    return [_stripped(message) if message.get("role") == "assistant" else message for message in response]


def says_something(response: Any) -> bool:
    """Whether a response has a text, or calls a tool."""
    if isinstance(response, str):
        return bool(response.strip())
    return any(message.get("tool_calls") or any(text.strip() for text in _texts(message)) for message in response)


def _texts(message: dict[str, Any]) -> list[str]:
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    return [text for part in parts if isinstance(text := part.get("text") if isinstance(part, dict) else part, str)]


def _stripped(message: dict[str, Any]) -> dict[str, Any]:
    kept = {name: None if name in REASONING_FIELDS else value for name, value in message.items()}
    content = message.get("content")
    if isinstance(content, str):
        kept["content"] = strip_reasoning(content)
    elif isinstance(content, list):
        kept["content"] = [
            {**part, "text": strip_reasoning(part["text"])} if isinstance(part.get("text"), str) else part
            for part in content
        ]
    return kept
