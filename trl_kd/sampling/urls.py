"""Addresses of servers, with the credentials that may stand in them."""

import base64
import re
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from trl_kd.sampling.recorded import NOT_SHOWN


def plain_url(url: str) -> str:
    """A base URL without credentials, or an error that does not show them."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        plain = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), "", ""))
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:  # a bracket that is not closed, or a port that is no number
        parts, plain, usable = SplitResult("", "", "", "", ""), url.rpartition("@")[2], False
    if "@" in parts.path + parts.query + parts.fragment:
        raise ValueError("`base_url` has an '@' after its host: percent-encode '/', '?', '#' and '@' in a password.")
    if not usable or parts.query or parts.fragment:
        raise ValueError(
            f"`base_url` is {plain!r}: it must look like 'http://localhost:8000/v1', without '?' and '#'."
        )
    return plain


def hostname(url: str) -> str | None:
    """The host of a URL, where it has one."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def credentials(url: str) -> tuple[str, str] | None:
    """The user and the password that stand in a URL."""
    parts = urlsplit(url)
    return (unquote(parts.username), unquote(parts.password or "")) if parts.username is not None else None


def basic(pair: tuple[str, str]) -> str:
    """A user and a password as HTTP basic authentication sends them."""
    return base64.b64encode(":".join(pair).encode()).decode()


def missing_key(field: str, variable: str) -> str:
    """What is said of the `variable` of the environment that `field` names and that is not there. It is not shown where it
    may be the key itself."""
    if re.fullmatch(r"[A-Z]+|[A-Z][A-Z0-9]*(_[A-Z0-9]+)+", variable):
        return f"`{field}` is {variable!r}, but the environment has no such variable: set it."
    return f"`{field}` names no variable of the environment {NOT_SHOWN}: put the key into one, and give its name."
