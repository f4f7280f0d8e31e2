"""What went wrong at a server, in one sentence: where, why, and what to change. No secret gets into it."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any


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
    """`hide` in all texts of parsed JSON, where no escape hides a secret from it."""
    if isinstance(value, str):
        return hide(value, secrets, shortest)
    if isinstance(value, dict):
        return {key: hide_in(item, secrets, shortest) for key, item in value.items()}
    return [hide_in(item, secrets, shortest) for item in value] if isinstance(value, list) else value


_SECRET_NAME = re.compile(r"(?i)api.?key|authori[sz]ation|secret|password|credential|bearer|(access|auth).?token")


def check_extra(extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """
    Further fields of a request, which are stored with the settings and shown in the card.

    Raises:
        `ValueError`: one has the name of a key or password, at any depth.
    """
    for name, value in (extra or {}).items():
        if _SECRET_NAME.search(name):
            raise ValueError(
                f"`extra` (`extra_body`) has the field {name!r}: fields are stored and shown, so that no key may be among "
                "them. It is read from the environment, see `api_key_env`."
            )
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                check_extra(item)
    return dict(extra or {})


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
    tries = f"{max_retries + 1} attempts (`max_retries` is {max_retries})"
    fewer = f"lower `max_concurrency` (now {max_concurrency})"
    if type(error).__name__ == "APITimeoutError":
        return ServerError(
            f"{url} gave no answer within `timeout` = {timeout:g} seconds in {tries}: raise `timeout`, or {fewer}."
        )
    status = getattr(error, "status_code", None)
    if status is None:
        return ServerError(
            f"{url} could not be reached, or cut the connection, in {tries}: check `base_url` and that the server runs."
        )
    said, code = _read(error.body if error.body is not None else str(error))
    said = clean(" ".join(said.split()))[:300]
    if status in (401, 403):
        way_out = f"Put a valid key into the environment variable {api_key_env}."
    elif status == 404:
        way_out = "Check `model` and `base_url` (it mostly ends in /v1)."
    elif status == 429:
        way_out = f"{tries} were made: {fewer}, or check your quota."
    elif status >= 500:
        way_out = f"{tries} were made: look at the server's log."
    else:
        way_out = (
            "Change the setting that it names; `extra` (on the command line `extra_body`) sets a field of the request or, "
            "with null, leaves it out."
        )
    message = f"{url} refused with status {status}: {said or 'no reason given'} — {way_out}"
    return ServerError(message, status, clean(code) if code else None, said)


def _read(body: Any) -> tuple[str, str | None]:
    """What an error's body says, and its code, in the shapes of OpenAI and vLLM (`message`) and FastAPI (`detail`)."""
    if not isinstance(body, dict):
        return str(body), None
    inner = body.get("error", body)
    inner = inner if isinstance(inner, dict) else {"message": inner}
    code = inner.get("code")
    message = inner.get("message") or inner.get("detail") or json.dumps(body)
    return str(message), code if isinstance(code, str) else None
