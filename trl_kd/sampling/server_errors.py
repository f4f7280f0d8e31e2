"""What went wrong at a server, in one sentence: where, why, and what to change. No secret gets into it."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any


REFUSALS = ("content_filter", "content_policy_violation")
"""Codes of errors that are a server's last word on one prompt, and no fault of the settings."""

TOO_LONG = "context_length_exceeded"
"""Code of a request that does not fit into the model's context."""

MALFORMED = "malformed"
"""Code of a reply that cannot be read, and finish reason of such a choice."""


class ServerError(RuntimeError):
    """A server that refused a request, or could not be had after all retries.

    Attributes:
        status (`int`, *optional*): HTTP status, `None` without an answer.
        code (`str`, *optional*): The server's own name of the error.
        said (`str`): What the server said, without secrets.
    """

    def __init__(self, message: str, status: int | None = None, code: str | None = None, said: str = ""):
        super().__init__(message)
        self.status = status
        self.code = code
        self.said = said


def hide(text: str, secrets: list[str], shortest: int) -> str:
    """`text` without those secrets that have at least `shortest` characters: a short one may be a common word."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= shortest:
            text = text.replace(secret, "***")
    return text


def hide_in(value: Any, secrets: list[str], shortest: int) -> Any:
    """`hide` in all texts and numbers of parsed JSON, where no escape hides a secret from it."""
    if isinstance(value, str):
        return hide(value, secrets, shortest)
    if isinstance(value, dict):
        return {key: hide_in(item, secrets, shortest) for key, item in value.items()}
    if isinstance(value, list):
        return [hide_in(item, secrets, shortest) for item in value]
    hidden = hide(str(value), secrets, shortest)
    return value if hidden == str(value) else hidden


def redact(text: str, secrets: list[str]) -> str:
    """A message without secrets and without what looks like one: an authorization header, or a password in a URL."""
    text = hide(text, secrets, 4)
    text = re.sub(r"(?i)\b(bearer|basic)(\s+)[^\s\"',;}]{4,}", r"\1\2***", text)
    return re.sub(r"://[^/@\s]+@", "://***@", text)


def explain(
    error: Any,
    *,
    url: str,
    clean: Callable[[str], str],
    api_key_env: str,
    max_retries: int,
    timeout: float,
    max_concurrency: int,
) -> ServerError:
    """
    An error for the user from one of the `openai` package's.

    Args:
        error (`openai.OpenAIError`):
            What the package raised after its retries.
        url (`str`):
            Which server, without credentials.
        clean (`Callable`):
            Takes secrets out of what the server said: some echo the request's headers.
        api_key_env, max_retries, timeout, max_concurrency:
            Settings of the client that the way out may be.
    """
    tries = attempts(max_retries)
    if type(error).__name__ == "APITimeoutError":
        return ServerError(
            f"{url} gave no answer within `timeout` = {timeout:g} seconds in {tries}: raise `timeout`, or lower "
            f"`max_concurrency` (now {max_concurrency})."
        )
    status = getattr(error, "status_code", None)
    if status is None:
        return ServerError(
            f"{url} could not be reached, or cut the connection, in {tries}: check `base_url` and that the server runs."
        )
    if 300 <= status < 400:
        target = clean(str(error.response.headers.get("location", "")).partition("?")[0])[:200]
        return ServerError(
            f"{url} redirects to {target!r}, which is another server: prompts and key are sent to none that you have not "
            "named. Give that one as `base_url` if it is meant.",
            status,
        )
    body = error.body if error.body is not None else str(error)
    return refused(
        body, status, url=url, clean=clean, api_key_env=api_key_env, tries=tries, max_concurrency=max_concurrency
    )


def refused(
    body: Any,
    status: int | None,
    *,
    url: str,
    clean: Callable[[str], str],
    api_key_env: str,
    tries: str,
    max_concurrency: int,
) -> ServerError:
    """
    An error for the user from what a server says of one.

    Args:
        body (`Any`):
            What it says.
        status (`int`, *optional*):
            HTTP status; `None` for an error without one, which some servers send as if it were an answer.
        url, clean, api_key_env, max_concurrency:
            See [`explain`].
        tries (`str`):
            How many attempts there are.
    """
    said, code = _read(body)
    said = clean(" ".join(said.split()))[:300]
    if status in (401, 403):
        way_out = f"Put a valid key into the environment variable {api_key_env}."
    elif status == 404:
        way_out = "Check `model` and `base_url` (it mostly ends in /v1)."
    elif status == 429:
        way_out = (
            f"The request failed in {tries}: lower `max_concurrency` (now {max_concurrency}), or check your quota."
        )
    elif status is None or status >= 500:
        way_out = f"The request failed in {tries}: look at the server's log."
    else:
        way_out = (
            "Change the setting that it names; `extra` (on the command line `extra_body`) sets a field of the request or, "
            "with null, leaves it out."
        )
    how = "answered with an error" if status is None else f"refused with status {status}"
    return ServerError(
        f"{url} {how}: {said or 'no reason given'} — {way_out}", status, clean(code) if code else None, said
    )


_CONTEXT = re.compile(
    r"(?i)maximum (?:context|model) length(?: (?:is|of) (?P<a>\d[\d,]*))?|context size(?: \((?P<b>\d[\d,]*) tokens?\))"
    r"|(?P<c>\d[\d,]*) maximum context length|context length(?: is only| is| of| \()\s*(?P<d>\d[\d,]*)"
)


def is_too_long(failure: ServerError) -> bool:
    """Whether a request was refused since it does not fit into the model's context."""
    return failure.code == TOO_LONG or (failure.status in (400, 413, 422) and bool(_CONTEXT.search(failure.said)))


def named_context(said: str) -> int | None:
    """The context, in tokens, that such a refusal names."""
    found = (next(filter(None, match.groups()), None) for match in _CONTEXT.finditer(said))
    return next((int(number.replace(",", "")) for number in found if number), None)


def role_hint(body: Mapping[str, Any], failure: ServerError) -> str:
    """What to do where a server refuses the role `system`, as templates such as Gemma's do; otherwise nothing."""
    roles = [message.get("role") for message in body.get("messages", ())]
    if "system" not in roles or "system" not in failure.said.lower():
        return ""
    return (
        " The model's chat template may take no role `system`: leave out `system_prompt`, or move the text of `system` "
        "messages in the column `prompt` into the first message of the role `user`."
    )


def attempts(max_retries: int) -> str:
    """How often a request is tried, in words."""
    return f"{max_retries + 1} attempt{'s' * (max_retries > 0)} (`max_retries` is {max_retries})"


def _read(body: Any) -> tuple[str, str | None]:
    """What an error's body says, and its code, in the shapes of OpenAI and vLLM (`message`) and FastAPI (`detail`)."""
    if not isinstance(body, dict):
        return str(body), None
    inner = body.get("error", body)
    inner = inner if isinstance(inner, dict) else {"message": inner}
    code = inner.get("code")
    message = inner.get("message") or inner.get("detail") or json.dumps(body)
    return str(message), code if isinstance(code, str) else None
