"""A prompt and its response as tokens, by the rules of TRL's `DPOTrainer`."""

import json
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from trl_kd.sampling import Text


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
    """What the columns `tools` and `chat_template_kwargs` of a row tell the chat template."""
    options: dict[str, Any] = {}
    if "tools" in columns:
        tools = columns["tools"][index]
        options["tools"] = (json.loads(tools) if isinstance(tools, str) else tools) or None
    if "chat_template_kwargs" in columns:
        options |= columns["chat_template_kwargs"][index] or {}
    return options


def tokenize_response(
    tokenizer: Any, prompt: Text, completion: Text, options: Mapping[str, Any] | None = None, complete: bool = True
) -> tuple[list[int], list[int]]:
    """
    Tokenizes a prompt with its response.

    Messages go through the chat template as one conversation; after plain text comes the end token, if there is one.

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
    completion = match_format(prompt, completion)
    if isinstance(prompt, str):
        prompt_ids = tokenizer(prompt)["input_ids"]
        ids = tokenizer(f"{prompt}{completion}")["input_ids"]
        if complete and tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
    else:
        rendering = {"tokenize": True, "return_dict": True, **(options or {})}
        prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **rendering)["input_ids"]
        whole = [*prompt, *completion]
        ids = tokenizer.apply_chat_template(whole, continue_final_message=not complete, **rendering)["input_ids"]
    length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt_ids, ids, strict=False)))
    return ids[:length], ids[length:]
