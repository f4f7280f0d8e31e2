"""Reasoning that stands inside an answer: what a model thought before it wrote its answer proper."""

OPENING, CLOSING = "<think>", "</think>"


def has_reasoning(text: str) -> bool:
    """
    Whether an answer holds a reasoning block.

    Args:
        text (`str`):
            The answer.

    Returns:
        `bool`: whether a block `<think>…</think>` is in it, or an opening without an end (the answer was cut off), or an
        end without an opening (the prompt has opened it).

    Example:

    ```python
    >>> from trl_kd.responses.reasoning import has_reasoning

    >>> [has_reasoning(text) for text in ("<think>2, or 3?</think>2", "<think>2, or", "2, or 3?</think>2", "2")]
    [True, True, True, False]
    ```
    """
    return OPENING in text or CLOSING in text
