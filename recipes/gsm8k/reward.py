"""Who is right on GSM8K: the last number of a response against that of the reference solution."""

import re
from typing import Any


def last_number(text: str) -> float | None:
    """The last number of a text, which is where GSM8K's answers and most responses to it have the result."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def correct(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """TRL reward function: 1 where the last number of a response is that of the reference `answer`, else 0."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(last_number(text) == last_number(truth)) for text, truth in zip(texts, answer, strict=True)]
