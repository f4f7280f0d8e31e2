"""A prompt and its response as one text, and which tokens of it are the model's own words.

`DPOTrainer` takes every token behind the prompt for the response. That is right for one complete answer. It is wrong for the
end of an answer that was cut off, for turns that a user or a tool wrote, and for templates that change what the model said.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from trl_kd.responses.nulls import without_nulls


Messages = list[dict[str, Any]]
REASONING: tuple[str | None, ...] = (None, "keep", "strip", "error")
"""What a setting `reasoning` may be."""

LEFT_OUT, OTHERS, OWN = 0, 1, 2
"""Kinds of a response's tokens. `LEFT_OUT`: the end token behind an answer that was cut off, which carries no loss.
`OTHERS`: a turn of a user or a tool, which is part of the whole response for DPO, and of nothing else. `OWN`: the model's
own words."""

_PROBE = "RESPONSE"
_OPEN = "<think>"


class CannotRender(ValueError):
    """The chat template cannot render a row, or not so that its turns can be told apart."""


@dataclass(frozen=True)
class Rendering:
    """
    A prompt and its response as one text.

    Attributes:
        opening (`str`):
            What a model goes on from when it is asked for an answer.
        text (`str`):
            Prompt and response as trainers see them.
        turns (`tuple[tuple[int, int], ...]`):
            Where in `text` the model's own words are, with what ends each turn.
        end (`int`):
            Where in `text` the loss ends: behind the last word of a response that was cut off, else at the end.
        altered (`str`, *optional*):
            Why `text` is not what the model wrote or will be asked to write: the end of a sentence.
    """

    opening: str
    text: str
    turns: tuple[tuple[int, int], ...]
    end: int
    altered: str | None = None


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


def render(
    processing_class: Any,
    prompt: str | Messages,
    response: str | Messages,
    options: Mapping[str, Any] | None = None,
    *,
    complete: bool = True,
    reasoning: str | None = None,
) -> Rendering:
    """
    Renders a prompt and its response as `DPOTrainer` does.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            Tokenizer or processor.
        prompt, response (`str` or `list[dict]`):
            Both text, or both messages. The end token is added to a text that lacks it.
        options (`Mapping[str, Any]`, *optional*):
            Keyword arguments for the chat template, `tools` among them.
        complete (`bool`, *optional*, defaults to `True`):
            Whether the response ends where it stops. Otherwise it was cut off, and no end belongs behind it.
        reasoning (`str`, *optional*):
            `"keep"` puts a response of one message behind the generation prompt as it was sampled, whatever the template
            makes of it. Any other value takes the template's rendering.

    Raises:
        `CannotRender`: the template fails, or turns of several messages cannot be told apart.
    """
    if isinstance(prompt, str):
        assert isinstance(response, str)
        end = getattr(processing_class, "tokenizer", processing_class).eos_token or ""
        body = prompt + response
        text = body if end and response.endswith(end) else body + end
        return Rendering(prompt, text, ((0, len(text)),), len(text) - (0 if complete else len(end)))
    template = _Template(processing_class, options or {})
    assert not isinstance(response, str)
    opening = template.opening(prompt)
    if reasoning == "keep" and len(response) == 1 and not response[0].get("tool_calls"):
        return _as_sampled(template, prompt, opening, text_of(response[0]), complete)
    text = template([*prompt, *response])
    turns = _own_turns(template, prompt, response, text)
    end = len(text) if complete else _last_word(template, prompt, response, text)
    return Rendering(opening, text, turns, end, _alteration(prompt, response, opening, text))


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
    start = common_prefix(tokenize(trl_opening(processing_class, prompt, options, rendering, reasoning)), ids)
    kinds = _kinds(tokenize, text, ids, rendering.turns)
    return Encoded(ids[:start], ids[start:], [kind == OWN for kind in kinds[start:]], rendering.altered)


def pair_ids(
    processing_class: Any,
    prompt: str | Messages,
    chosen: Rendering,
    rejected: Rendering,
    options: Mapping[str, Any] | None = None,
    reasoning: str | None = None,
) -> tuple[list[int], list[int], list[int]]:
    """
    Tokens of a pair of rendered messages, by the rules of `DPOTrainer`: both responses begin where the first of them
    differs from the prompt alone.

    Returns:
        `tuple[list[int], list[int], list[int]]`: of the prompt, of `chosen` and of `rejected`.
    """
    tokenize = _Tokenize(processing_class, isinstance(prompt, str))
    alone = tokenize(trl_opening(processing_class, prompt, options, chosen, reasoning))
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


def common_prefix(one: Sequence, other: Sequence) -> int:
    """How many first elements are equal."""
    if one == other[: len(one)]:  # as with most templates, and much faster
        return len(one)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, whose content may be a list of parts."""
    content = message.get("content")
    if isinstance(content, str) or content is None:
        return content or ""
    return "".join(part.get("text") or "" for part in content if isinstance(part, dict))


def row_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the columns `tools` and `chat_template_kwargs` of a row tell the chat template. Fields that are null are left
    out: Arrow adds them where other rows have them."""
    tools = row.get("tools")
    tools = without_nulls(json.loads(tools) if isinstance(tools, str) else tools) or None
    return {"tools": tools, **without_nulls(row.get("chat_template_kwargs") or {})}


# ---- Templates ---------------------------------------------------------------------------------------------------------


class _Template:
    """A chat template with its options, as a function from messages to text."""

    def __init__(self, processing_class: Any, options: Mapping[str, Any]):
        from transformers import ProcessorMixin  # building pairs reads this module's names, and needs no model

        self._processing_class, self._options = processing_class, options
        self._is_processor = isinstance(processing_class, ProcessorMixin)

    def __call__(self, messages: Messages, **how: Any) -> str:
        if self._is_processor:  # their templates read lists of parts
            messages = [_in_parts(message) for message in messages]
        try:
            return self._processing_class.apply_chat_template(messages, tokenize=False, **self._options, **how)
        except Exception as error:  # a template is code of the checkpoint's, and may raise anything
            said = " ".join(str(error).split()) or type(error).__name__
            raise CannotRender(f"the chat template cannot render it: {said[:200]}") from error

    def opening(self, prompt: Messages) -> str:
        """Where the assistant begins, or where its last message breaks off."""
        if ends_open(prompt):
            return self(prompt, continue_final_message=True)
        return self(prompt, add_generation_prompt=True)

    def closing(self, messages: Messages) -> str:
        """What the template writes behind an answer to these messages."""
        probed = self([*messages, {"role": "assistant", "content": _PROBE}])
        return probed.rpartition(_PROBE)[2]


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def ends_open(prompt: Messages) -> bool:
    """Whether the prompt ends within a message of the assistant's, which the model goes on with."""
    return prompt[-1].get("role") == "assistant"


def closing(processing_class: Any, prompt: Messages, options: Mapping[str, Any] | None = None) -> str:
    """What the chat template writes behind an answer to this prompt. See [`render`]."""
    return _Template(processing_class, options or {}).closing(prompt)


def _as_sampled(template: _Template, prompt: Messages, opening: str, said: str, complete: bool) -> Rendering:
    if opening.rstrip().endswith(_OPEN) and said.lstrip().startswith(_OPEN):
        said = said.lstrip()[len(_OPEN) :].lstrip("\n")  # some servers repeat what the prompt has opened
    unended = complete and opening.rstrip().endswith(_OPEN) and "</think>" not in said
    altered = "the generation prompt opens a block of reasoning, which the response does not end" if unended else None
    said = opening + said
    text = said + template.closing(prompt)
    return Rendering(opening, text, ((0, len(text)),), len(text) if complete else len(said), altered)


def _last_word(template: _Template, prompt: Messages, response: Messages, text: str) -> int:
    """Where the last message's own text ends, before what the template writes behind it."""
    closing = template.closing([*prompt, *response[:-1]])
    if text.endswith(closing):
        return len(text) - len(closing)
    said = text_of(response[-1]).strip()
    if not said or said not in text:
        raise CannotRender("the chat template renders it so that the end of the response cannot be found")
    return text.rindex(said) + len(said)


def _own_turns(template: _Template, prompt: Messages, response: Messages, text: str) -> tuple[tuple[int, int], ...]:
    turns = []
    for place, message in enumerate(response):
        if message.get("role") != "assistant":
            continue
        history = [*prompt, *response[:place]]
        last = place == len(response) - 1
        start = 0  # the prompt is not looked at: TRL says where the response begins
        if place or not last:
            start = common_prefix(template(history, add_generation_prompt=True), text)
        end = len(text) if last else _turn_end(template, history, message, text, start)
        turns.append((start if place else 0, end))
    return tuple(turns)


def _turn_end(template: _Template, history: Messages, message: dict[str, Any], text: str, start: int) -> int:
    """Where a turn ends that others follow. Templates may render it otherwise than a last one, without its reasoning."""
    alone = template([*history, message])
    if text.startswith(alone):
        return len(alone)
    turn = alone[common_prefix(template(history, add_generation_prompt=True), alone) :]
    if turn and text.startswith(turn, start):
        return start + len(turn)
    said = text_of(message).strip()
    for shown in (said, said.rpartition("</think>")[2].strip()):
        place = text.find(shown, start) if shown else -1
        if place >= 0 and shown in alone:
            after = alone.rpartition(shown)[2]
            end = place + len(shown)
            return end + len(after) if text.startswith(after, end) else end
    raise CannotRender("the chat template renders a turn within the response so that its end cannot be found")


def _alteration(prompt: Messages, response: Messages, opening: str, text: str) -> str | None:
    if ends_open(prompt):
        return "the prompt ends within a message of the assistant's, and its template begins another"
    start = common_prefix(opening, text)
    for message in response:
        said = text_of(message).strip()
        if message.get("role") == "assistant" and said not in text[start:]:
            return "the chat template leaves a part of the response out"
    if not text.strip().startswith(opening.strip()):
        return f"the response does not continue the generation prompt, which ends in {opening[-20:]!r}"
    return None


# ---- Tokens ------------------------------------------------------------------------------------------------------------


class _Tokenize:
    """From text to tokens, as TRL does for one of its two formats: a chat template writes its special tokens itself."""

    def __init__(self, processing_class: Any, text_format: bool):
        self._tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self._options = {} if text_format else {"add_special_tokens": False}

    def __call__(self, text: str) -> list[int]:
        return list(self._tokenizer(text, **self._options)["input_ids"])

    def with_end(self, text: str) -> list[int]:
        """Tokens with one end token behind them, if the tokenizer has one."""
        ids, end = self(text), self._tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    def without_end(self, text: str) -> list[int]:
        """Tokens without an end token that the tokenizer itself has put behind the text."""
        ids, end = self(text), self._tokenizer.eos_token_id
        added = end is not None and ids[-1:] == [end] and not text.endswith(self._tokenizer.eos_token)
        return ids[:-1] if added else ids

    def before(self, text: str, place: int, ids: list[int]) -> int:
        """How many tokens lie before character `place` of the text."""
        if place <= 0:
            return 0
        return len(ids) if place >= len(text) else common_prefix(self.without_end(text[:place]), ids)


def _kinds(
    tokenize: _Tokenize, text: str, ids: list[int], turns: Sequence[tuple[int, int]], end: int | None = None
) -> list[int]:
    kinds = [OTHERS] * len(ids)
    for begin, stop in turns:
        for token in range(tokenize.before(text, begin, ids), tokenize.before(text, stop, ids)):
            kinds[token] = OWN
    last = len(ids) if end is None else tokenize.before(text, end, ids)
    return kinds[:last] + [LEFT_OUT] * (len(ids) - last)


def trl_opening(
    processing_class: Any, prompt: str | Messages, options: Mapping[str, Any] | None, rendering: Rendering, reasoning
) -> str:
    """The prompt alone, with which TRL compares the whole to find where the response begins."""
    if isinstance(prompt, str) or reasoning == "keep" or not ends_open(prompt):
        return rendering.opening
    return _Template(processing_class, options or {})(prompt, add_generation_prompt=True)
