"""A prompt and its response as tokens, by the rules of TRL's `DPOTrainer`."""

from collections.abc import Mapping
from typing import Any

from trl_kd.responses.finish_reasons import has_end
from trl_kd.responses.reasoning import stripped
from trl_kd.responses.rendering import row_options
from trl_kd.responses.tokens import Encoded, encode
from trl_kd.sampling import Text
from trl_kd.sampling.sampler import beginning


def is_conversational(row: Mapping[str, Any]) -> bool:
    """Whether the prompt of a row is messages, or its first text where it has no prompt. TRL's function of this name looks
    at one column, and Python's hash seed decides which: a text may follow messages."""
    text = next(
        (row[name] for name in ("prompt", "chosen", "rejected", "completion", "messages") if name in row), None
    )
    return isinstance(text, list) and bool(text) and isinstance(text[0], Mapping) and "role" in text[0]


def match_format(prompt: Text, completion: Text) -> Text:
    """The completion in the format of its prompt: plain text becomes the assistant's message after messages.

    Raises:
        `ValueError`: messages follow a prompt of plain text.
    """
    if isinstance(prompt, str) and not isinstance(completion, str):
        raise ValueError(
            f"The prompt {prompt[:60]!r} is plain text and its response a {type(completion).__name__}: give both as text "
            "or both as messages."
        )
    if not isinstance(prompt, str) and isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    return completion


def template_options(columns: Mapping[str, list[Any]], index: int) -> dict[str, Any]:
    """What the columns `tools` and `chat_template_kwargs` of a row tell the chat template. Fields that are null are left
    out."""
    row = {name: columns[name][index] for name in ("tools", "chat_template_kwargs") if name in columns}
    return row_options(row)


def encode_answer(
    tokenizer: Any,
    prompt: Text,
    answer: Text,
    finish_reason: str | None,
    options: Mapping[str, Any] | None = None,
    reasoning: str | None = None,
) -> Encoded:
    """
    Tokenizes a prompt with an answer to it.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer.
        prompt, answer (`str` or `list[dict]`):
            Prompt and answer, see [`match_format`].
        finish_reason (`str`, *optional*):
            Why the answer ended, see [`~trl_kd.responses.finish_reasons.ending`].
        options (`Mapping[str, Any]`, *optional*):
            Keywords for the chat template.
        reasoning (`str`, *optional*):
            `"keep"` takes the answer as it was sampled, `"strip"` without `<think>` blocks, `"error"` refuses one that the
            template changes.

    Raises:
        `ValueError`: see `reasoning`.
        `CannotRender`: see [`~trl_kd.responses.rendering.render`].
    """
    answer = match_format(prompt, stripped(answer) if reasoning == "strip" else answer)
    complete = has_end(finish_reason)
    encoded = encode(tokenizer, prompt, answer, options, complete=complete, reasoning=reasoning)
    if encoded.altered is not None and reasoning == "error":
        raise ValueError(
            f"{altered(encoded.altered, prompt)} Set `reasoning` to 'keep' or 'strip', or change the chat template."
        )
    return encoded


def altered(why: str, prompt: Text) -> str:
    """A sentence for an answer that the chat template changes."""
    return f"What is read of the answer to the prompt {beginning(prompt)!r} is not what was sampled: {why}."


def tokenize_response(
    tokenizer: Any, prompt: Text, completion: Text, options: Mapping[str, Any] | None = None, complete: bool = True
) -> tuple[list[int], list[int]]:
    """
    Tokenizes a prompt with its response: [`~trl_kd.responses.rendering.encode`] without what it says of each token.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer.
        prompt (`str` or `list[dict]`):
            Prompt, plain text or messages.
        completion (`str` or `list[dict]`):
            The response, see [`match_format`].
        options (`Mapping[str, Any]`, *optional*):
            Keywords for the chat template, see [`template_options`].
        complete (`bool`, *optional*, defaults to `True`):
            Whether the response ends where it stops; otherwise it was cut off, and nothing follows its last token.

    Returns:
        `tuple[list[int], list[int]]`: the tokens of the prompt and those of the response. The response starts where the
        whole and the prompt alone differ, so that the first are a prefix of the whole: where tokens merge across the
        border, the prompt is shorter than by itself.
    """
    encoded = encode(tokenizer, prompt, match_format(prompt, completion), options, complete=complete)
    return encoded.prompt_ids, encoded.ids
