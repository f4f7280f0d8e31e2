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
        failure = CannotRender("the chat template leaves out what the assistant says")
        for content in (_PROBE, [{"type": "text", "text": _PROBE}]):
            try:
                _, found, after = self([*messages, {"role": "assistant", "content": content}]).rpartition(_PROBE)
            except CannotRender as error:  # it may take the other form alone
                failure = error
                continue
            if found:
                return after
        raise failure

    def first_special(self, text: str) -> str | None:
        """The first special or added token in a text, or its first word if there is none."""
        tokenizer = getattr(self._processing_class, "tokenizer", self._processing_class)
        tokens = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        found = [(text.find(token), -len(token), token) for token in tokens if token and token in text]
        return min(found)[2] if found else next(iter(text.split()), None)


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
    if said and said in text:
        return text.rindex(said) + len(said)
    mark = template.first_special(closing)
    place = -1 if mark is None else text.rfind(mark)
    if place < 0:
        raise CannotRender("the chat template renders it so that the end of the response cannot be found")
    return place


def _without_opened(opening: str, said: str) -> str:
    """A text without the `<think>` that it repeats of the generation prompt, as some servers do."""
    if opening.rstrip().endswith(OPEN) and said.lstrip().startswith(OPEN):
        return said.lstrip()[len(OPEN) :].lstrip("\n")
    return said


# ---- Turns -------------------------------------------------------------------------------------------------------------

_UNCLEAR = (
    "the chat template renders its turns so that the model's own cannot be told from others, and they are not imitated"
)


def _own_turns(
    template: _Template, prompt: Messages, response: Messages, text: str
) -> tuple[tuple[tuple[int, int], ...], str | None]:
    """Where the model's own turns are, and a sentence's end if some cannot be told from what stands around them."""
    others = [place for place, message in enumerate(response) if message.get("role") != "assistant"]
    if not others:
        return ((0, len(text)),), None
    gaps = _gaps(template, prompt, response, others, text)
    if gaps is None:
        return (), _UNCLEAR
    turns, unclear = [], None
    for number, (begin, end) in enumerate(gaps):
        first = others[number - 1] + 1 if number else 0
        last = others[number] if number < len(others) else len(response)
        if first == last:
            continue  # no turn of the model's lies between these two
        history = [*prompt, *response[:first]]
        start = begin + _opening_in(template, history, text[begin:end]) if number else 0
        stop: int | None = end
        if last < len(response):
            stop = _end_in(template, history, response[last], text, start, end)
        said = [text_of(message).rpartition(CLOSE)[2].strip() for message in response[first:last]]
        if stop is None or not all(one in text[start:stop] for one in said):
            unclear = _UNCLEAR
        else:
            turns.append((start, stop))
    return tuple(turns), unclear


def _gaps(
    template: _Template, prompt: Messages, response: Messages, others: list[int], text: str
) -> list[tuple[int, int]] | None:
    """What lies between the words of the others in the rendered text, before the first and behind the last: one stretch
    more than there are others. It is found by other words in their place. `None` if the template does more than to repeat
    them."""
    marks = {place: f"{_PROBE}{number}_" for number, place in enumerate(others)}
    marked = template([*prompt, *(_saying(m, marks.get(place)) for place, m in enumerate(response))])
    pieces = []
    for mark in marks.values():
        piece, found, marked = marked.partition(mark)
        if not found or mark in marked:
            return None
        pieces.append(piece)
    gaps, at = [], 0
    for place, piece in zip(others, pieces, strict=True):
        if not text.startswith(piece, at):
            return None
        gaps.append((at, at + len(piece)))
        said = text_of(response[place])
        at += len(piece)
        at += len(said if text.startswith(said, at) else said.strip())
    if text[at:] != marked:
        return None
    return [*gaps, (at, len(text))]


def _saying(message: dict[str, Any], words: str | None) -> dict[str, Any]:
    """A message with other words."""
    if words is None:
        return message
    if isinstance(message.get("content"), list):
        return {**message, "content": [{"type": "text", "text": words}]}
    return {**message, "content": words}


def _opening_in(template: _Template, history: Messages, stretch: str) -> int:
    """How much of a stretch behind somebody else's words is the template's, before the model speaks."""
    opened = template([*history[:-1], _saying(history[-1], _PROBE)], add_generation_prompt=True)
    return common_prefix(opened.rpartition(_PROBE)[2], stretch)


def _end_in(
    template: _Template, history: Messages, following: dict[str, Any], text: str, start: int, end: int
) -> int | None:
    """Where in a stretch of a text the model's turn ends, before the template leads over to the next one."""
    alone = template.closing(history)
    try:
        probe = _saying({"role": "assistant", "content": following.get("content")}, _PROBE)
        between = template([*history, probe, _saying(following, f"{_PROBE}0_")])
        leading = between.partition(_PROBE)[2].partition(f"{_PROBE}0_")[0]
    except CannotRender:  # a tool's result that no call stands before, say
        leading = alone
    for written in (leading, alone):
        mark = template.first_special(written)
        place = -1 if mark is None else text.rfind(mark, start, end)
        if mark is not None and place >= 0:
            place += len(mark)
            return place + common_prefix(alone.partition(mark)[2], text[place:end])
    return None


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
