"""Addresses of servers, with the credentials that may stand in them."""

import base64
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit


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
