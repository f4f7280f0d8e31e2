"""What a server of the OpenAI protocol says, in one form. Servers differ in it, and some break off midway."""

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    StrictInt,
    TypeAdapter,
    ValidationError,
    WrapValidator,
)

from trl_kd.sampling.server_errors import MALFORMED, hide_in


DEEPEST = 100
"""Levels of lists and objects that a reply may have: what handles it later is recursive."""

MOST_TOKENS = 10**8
"""A count of tokens above this is a fault of the server's, and must not use up a budget."""


def _well_formed(value: Any) -> Any:
    """Text without half characters, which JSON escapes can have and no file format takes."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else value


def _texts(value: Any) -> Any:
    """The text of a content in parts: of these only texts are an answer, and not a model's reasoning."""
    if not isinstance(value, list):
        return value
    texts = [text for part in value if (text := _part(part)) is not None]
    return "".join(texts) if texts else None


def _or_none(value: Any, validate: Any) -> Any:
    try:
        return validate(value)
    except ValidationError:
        return None


def _call_arguments(value: Any) -> Any:
    """As TRL has them in a dataset: an object. The model's own text need not be JSON, and then stays as it is."""
    if not isinstance(value, str):
        return value or {}
    try:
        read = json.loads(value or "{}")
    except (ValueError, RecursionError):
        return value
    return value if is_deep(read) else read


Text = Annotated[str, BeforeValidator(_well_formed)]


class _Function(BaseModel):
    name: Text
    arguments: Annotated[Any, AfterValidator(_call_arguments)] = None


class _ToolCall(BaseModel):
    type: Literal["function"] = "function"
    function: _Function


class _Message(BaseModel):
    content: Annotated[Text | None, BeforeValidator(_texts)] = None
    refusal: Annotated[Text | None, WrapValidator(_or_none)] = None
    reasoning: Any = None
    reasoning_content: Any = None
    tool_calls: Annotated[list[_ToolCall] | None, BeforeValidator(lambda calls: calls or None)] = None


class _Token(BaseModel):
    token: Text = ""
    logprob: float | None = None


class _LikelyToken(_Token):
    top_logprobs: list[_Token] | None = None


class _Logprobs(BaseModel):
    """Of the chat endpoint `content`, of the plain one the other three."""

    content: list[_LikelyToken] | None = None
    tokens: list[Text] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[Text, float | None] | None] | None = None


class _Choice(BaseModel):
    finish_reason: Annotated[
        Text | None, BeforeValidator(lambda reason: reason if reason is None or isinstance(reason, str) else "unknown")
    ] = None
    message: Annotated[_Message, BeforeValidator(lambda message: {} if message is None else message)] = _Message()
    text: Annotated[Text | None, BeforeValidator(_texts)] = None
    logprobs: Annotated[_Logprobs | None, WrapValidator(_or_none)] = None
    error: Any = None


def _or_malformed(value: Any, validate: Any) -> _Choice:
    try:
        return validate(value)
    except ValidationError:
        return _Choice(finish_reason=MALFORMED)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Tokens = Annotated[StrictInt, Field(ge=0, le=MOST_TOKENS), BeforeValidator(_whole)]


class _Usage(BaseModel):
    prompt_tokens: _Tokens | None = None
    completion_tokens: _Tokens | None = None


class _Reply(BaseModel):
    choices: list[Annotated[_Choice, WrapValidator(_or_malformed)]]
    usage: Annotated[_Usage | None, WrapValidator(_or_none)] = None


_REPLY = TypeAdapter(_Reply)


def read_reply(text: str, secrets: list[str]) -> dict[str, Any] | None:
    """
    Reads a completion.

    Args:
        text (`str`):
            What a server sent.
        secrets (`list[str]`):
            What must not stand in it: a server that echoes the key would get it into the dataset.

    Returns:
        `dict`, or `None` for what is no reply:

        - `choices` (`list[dict]`): each with `finish_reason` (`str` or `None`; `"malformed"` where the choice cannot be
          read), `message` (`content` as one text or `None`, `refusal`, `reasoning`, `reasoning_content`, and `tool_calls`
          as TRL has them), `text`, `logprobs` and `error`;
        - `usage` (`dict`): `prompt_tokens` and `completion_tokens`, whole numbers in [0, 10⁸], or empty;
        - or instead `error` (`dict`): what a server sent in place of an answer.
    """
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(read, dict) or is_deep(read):
        return None
    read = hide_in(read, secrets, 8)
    if read.get("error") and not read.get("choices"):
        return {"error": read["error"] if isinstance(read["error"], dict) else {"message": read["error"]}}
    try:
        return _REPLY.validate_python(read).model_dump()
    except ValidationError:
        return None


def is_deep(value: Any) -> bool:
    """Whether there are more levels of lists and objects than [`DEEPEST`]."""
    level = [value]
    for _ in range(DEEPEST + 1):
        if not level:
            return False
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def _part(part: Any) -> str | None:
    if isinstance(part, str):
        return part
    is_text = isinstance(part, dict) and part.get("type", "text") in ("text", "output_text")
    return part["text"] if is_text and isinstance(part.get("text"), str) else None
