"""A rendered prompt and its response as tokens, and which of them are the model's own words."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_kd.responses.rendering import (
    CannotRender,
    Messages,
    Rendering,
    common_prefix,
    is_plain,
    opening_of_trl,
    render,
)


LEFT_OUT, OTHERS, OWN = 0, 1, 2
"""Kinds of a response's tokens. `LEFT_OUT`: the end token behind an answer that was cut off, which carries no loss.
`OTHERS`: a turn of a user or a tool, which is part of the whole response for DPO, and of nothing else. `OWN`: the model's
own words."""


@dataclass(frozen=True)
class Encoded:
    """
    A prompt and its response as tokens.

    Attributes:
        prompt_ids, ids (`list[int]`):
            Tokens of the prompt and of the response, which begins where the whole and the prompt alone differ.
        own (`list[bool]`):
            Of each token of the response, whether it is the model's own.
        altered (`str`, *optional*):
            See [`Rendering`].
    """

    prompt_ids: list[int]
    ids: list[int]
    own: list[bool]
    altered: str | None


def encode(
    processing_class: Any,
    prompt: str | Messages,
    response: str | Messages,
    options: Mapping[str, Any] | None = None,
    *,
    complete: bool = True,
    reasoning: str | None = None,
) -> Encoded:
    """
    Tokenizes a prompt with its response, by the rules of `DPOTrainer`.

    Args:
        processing_class, prompt, response, options, complete, reasoning:
            See [`render`]. Nothing follows the last token of a response that was cut off.

    Raises:
        `CannotRender`: see [`render`].
    """
    tokenize = _Tokenize(processing_class, isinstance(prompt, str))
    if isinstance(prompt, str):
        assert isinstance(response, str)
        ids = tokenize.with_end(prompt + response) if complete else tokenize.without_end(prompt + response)
        start = common_prefix(tokenize(prompt), ids)
        return Encoded(ids[:start], ids[start:], [True] * (len(ids) - start), None)
    rendering = render(processing_class, prompt, response, options, complete=complete, reasoning=reasoning)
    text = rendering.text[: rendering.end]
    ids = tokenize(text)
    kept = reasoning == "keep" and is_plain(response)
    start = common_prefix(tokenize(opening_of_trl(processing_class, prompt, options, rendering, kept)), ids)
    kinds = _kinds(tokenize, text, ids, rendering.turns, len(text))
    return Encoded(ids[:start], ids[start:], [kind == OWN for kind in kinds[start:]], rendering.altered)


def pair_ids(
    processing_class: Any,
    prompt: Messages,
    chosen: Rendering,
    rejected: Rendering,
    options: Mapping[str, Any] | None = None,
    kept: bool = False,
) -> tuple[list[int], list[int], list[int]]:
    """
    Tokens of a pair of rendered messages, by the rules of `DPOTrainer`: both responses begin where the first of them
    differs from the prompt alone.

    Args:
        processing_class, prompt, options:
            See [`~trl_kd.responses.rendering.render`].
        chosen, rejected (`Rendering`):
            The two responses.
        kept (`bool`, *optional*, defaults to `False`):
            Whether both stand as they were sampled.

    Returns:
        `tuple[list[int], list[int], list[int]]`: of the prompt, of `chosen` and of `rejected`.
    """
    tokenize = _Tokenize(processing_class, text_format=False)
    alone = tokenize(opening_of_trl(processing_class, prompt, options, chosen, kept))
    both = [tokenize(rendering.text) for rendering in (chosen, rejected)]
    start = min(common_prefix(alone, ids) for ids in both)
    return alone[:start], both[0][start:], both[1][start:]


def response_kinds(
    processing_class: Any, rendering: Rendering, ids: list[int], count: int, text_format: bool
) -> list[int]:
    """
    Kinds of the last `count` tokens of `ids`.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            Tokenizer or processor.
        rendering (`Rendering`):
            Prompt and response as a text.
        ids (`list[int]`):
            Tokens of prompt and response, as TRL has made them.
        count (`int`):
            Length of the response in tokens.
        text_format (`bool`):
            Whether the row holds text, not messages.

    Returns:
        `list[int]`: [`LEFT_OUT`], [`OTHERS`] or [`OWN`] for each token.

    Raises:
        `CannotRender`: TRL's tokens are not those of the text.
    """
    tokenize = _Tokenize(processing_class, text_format)
    if tokenize(rendering.text) != ids:
        raise CannotRender("its tokens are not those of its rendered text")
    return _kinds(tokenize, rendering.text, ids, rendering.turns, rendering.end)[len(ids) - count :]


def text_kinds(processing_class: Any, rendering: Rendering, start: int) -> list[int]:
    """Kinds of the response's tokens where it is tokenized by itself, from character `start` of the rendered text on, as
    TRL's collator for images does. See [`response_kinds`]."""
    tokenize = _Tokenize(processing_class, text_format=False)
    text = rendering.text[start:]
    turns = [(max(begin - start, 0), end - start) for begin, end in rendering.turns]
    return _kinds(tokenize, text, tokenize(text), turns, rendering.end - start)


class _Tokenize:
    """From text to tokens, as TRL does for one of its two formats: a chat template writes its special tokens itself."""

    def __init__(self, processing_class: Any, text_format: bool):
        self._tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self._options: dict[str, Any] = {} if text_format else {"add_special_tokens": False}

    def __call__(self, text: str) -> list[int]:
        return list(self._tokenizer(text, **self._options)["input_ids"])

    def with_end(self, text: str) -> list[int]:
        """Tokens with one end token behind them, if the tokenizer has one."""
        ids, end = self(text), self._tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def without_end(self, text: str) -> list[int]:
        """Tokens without an end token behind them, whether the text has it or the tokenizer writes it."""
        end = self._tokenizer.eos_token
        ids = self(text.removesuffix(end) if end else text)
        return ids[:-1] if ids and ids[-1] == self._tokenizer.eos_token_id else ids

    def ends(self, text: str, ids: list[int]) -> list[int] | None:
        """Where in the text each token ends; `None` for a tokenizer that does not know."""
        if not self._tokenizer.is_fast:
            return None
        found = self._tokenizer(text, return_offsets_mapping=True, **self._options)
        if list(found["input_ids"]) != ids:
            return None
        ends, last = [], 0
        for place, (_, end) in enumerate(found["offset_mapping"]):
            is_added = end == 0 and place > 0  # a token that the tokenizer writes behind the text
            last = len(text) if is_added else max(last, end)
            ends.append(last)
        return ends

    def before(self, text: str, place: int, ids: list[int], ends: list[int] | None) -> int:
        """How many tokens lie before character `place` of the text, which ends where `ends` says."""
        if place <= 0:
            return 0
        if place >= len(text):
            return len(ids)
        if ends is not None:
            return bisect_right(ends, place)
        return common_prefix(self.without_end(text[:place]), ids)


def _kinds(tokenize: _Tokenize, text: str, ids: list[int], turns: Sequence[tuple[int, int]], end: int) -> list[int]:
    """Of each token of a text, of which nothing counts from character `end` on."""
    ends = None if all(place in (0, len(text)) for place in (end, *sum(turns, ()))) else tokenize.ends(text, ids)
    kinds = [OTHERS] * len(ids)
    for begin, stop in turns:
        for token in range(tokenize.before(text, begin, ids, ends), tokenize.before(text, stop, ids, ends)):
            kinds[token] = OWN
    last = tokenize.before(text, end, ids, ends)
    return kinds[:last] + [LEFT_OUT] * (len(ids) - last)
