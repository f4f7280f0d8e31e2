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
from trl_kd.responses.reasoning import CLOSE, OPEN, REASONING_FIELDS


Messages = list[dict[str, Any]]

_PROBE = "RESPONSE"


class CannotRender(ValueError):
    """The chat template cannot render a row, or not so that the end of its response can be found."""


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
            `"keep"` puts a response of one message of text behind the generation prompt as it was sampled, whatever the
            template makes of it. Any other value, and any other response, takes the template's rendering.

    Raises:
        `CannotRender`: the template fails.
    """
    if isinstance(prompt, str):
        assert isinstance(response, str)
        end = getattr(processing_class, "tokenizer", processing_class).eos_token or ""
        text = prompt + response + ("" if end and response.endswith(end) else end)
        return Rendering(prompt, text, ((0, len(text)),), len(text) - (0 if complete else len(end)))
    template = _Template(processing_class, options or {})
    assert not isinstance(response, str)
    opening = template.opening(prompt)
    if reasoning == "keep" and is_plain(response):
        return _as_sampled(template, prompt, opening, text_of(response[0]), complete)
    text = template([*prompt, *response])
    turns, altered = _own_turns(template, prompt, response, text)
    end = len(text) if complete else _last_word(template, prompt, response, text)
    return Rendering(opening, text, turns, end, altered or _alteration(prompt, response, opening, text))


def is_plain(response: str | Messages) -> bool:
    """Whether a response is one message of text alone, which stands behind the generation prompt as it was sampled."""
    if isinstance(response, str) or len(response) != 1:
        return False
    return not any(response[0].get(name) for name in ("tool_calls", *REASONING_FIELDS))


def opening_of_trl(
    processing_class: Any, prompt: Messages, options: Mapping[str, Any] | None, rendering: Rendering, kept: bool
) -> str:
    """The prompt alone, with which TRL compares the whole to find where the response begins. `kept`: whether the response
    stands as it was sampled."""
    if kept or not ends_open(prompt):
        return rendering.opening
    return _Template(processing_class, options or {})(prompt, add_generation_prompt=True)


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
        for content in (_PROBE, [{"type": "text", "text": _PROBE}]):
            _, found, after = self([*messages, {"role": "assistant", "content": content}]).rpartition(_PROBE)
            if found:
                return after
        raise CannotRender("the chat template leaves out what the assistant says")


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
    said = _without_opened(opening, said)
    unended = complete and opening.rstrip().endswith(OPEN) and CLOSE not in said
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


def _without_opened(opening: str, said: str) -> str:
    """A text without the `<think>` that it repeats of the generation prompt, as some servers do."""
    if opening.rstrip().endswith(OPEN) and said.lstrip().startswith(OPEN):
        return said.lstrip()[len(OPEN) :].lstrip("\n")
    return said


# ---- Turns -------------------------------------------------------------------------------------------------------------


def _own_turns(
    template: _Template, prompt: Messages, response: Messages, text: str
) -> tuple[tuple[tuple[int, int], ...], str | None]:
    """Where the model's own turns are, and a sentence's end if some cannot be told from what stands around them."""
    turns, altered = [], None
    for place, message in enumerate(response):
        if message.get("role") != "assistant":
            continue
        start = 0  # the prompt is not looked at: TRL says where the response begins
        end: int | None = len(text)
        if place or len(response) > 1:
            history = [*prompt, *response[:place]]
            start = common_prefix(template(history, add_generation_prompt=True), text)
            if place < len(response) - 1:
                end = _turn_end(template, history, message, response[place + 1 :], text, start)
        if end is None or end < start:
            altered = "the chat template renders a turn so that its end cannot be found, and it is not imitated"
        else:
            turns.append((start if place else 0, end))
    return tuple(turns), altered


def _turn_end(
    template: _Template, history: Messages, message: dict[str, Any], later: Messages, text: str, start: int
) -> int | None:
    """Where a turn ends that others follow. Templates may render it otherwise than a last one: without its reasoning, or
    with another end."""
    alone = template([*history, message])
    if text.startswith(alone):
        return len(alone)
    # It ends with what the template writes behind an answer, before the next turn says something
    closing = template.closing(history)
    mark = next(iter(closing.split()), None)
    if mark is None:
        return None
    said = text_of(message).rpartition(CLOSE)[2].strip()
    shown = text.find(said, start)
    if shown < 0:
        return None
    following = text_of(later[0]).strip()
    limit = text.find(following, shown + len(said)) if following else len(text)
    end = text.find(mark, shown + len(said), max(limit, 0))
    if end < 0:
        return None
    end += len(mark)
    return end + common_prefix(closing.partition(mark)[2], text[end:])


def _alteration(prompt: Messages, response: Messages, opening: str, text: str) -> str | None:
    if ends_open(prompt):
        return "the prompt ends within a message of the assistant's, and its template begins another"
    rendered = text[common_prefix(opening, text) :]
    for message in response:
        if message.get("role") != "assistant":
            continue
        if _without_opened(opening, text_of(message).strip()).strip() not in rendered:
            return "the chat template leaves a part of the response out"
        for call in message.get("tool_calls") or []:
            if str((call.get("function") or call).get("name")) not in rendered:
                return "the chat template leaves a call of a tool out"
    if not text.strip().startswith(opening.strip()):
        return f"the response does not continue the generation prompt, which ends in {opening[-20:]!r}"
    return None
