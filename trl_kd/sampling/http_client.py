"""The HTTP client under the `openai` package's: an attempt ends in time, and no prompt goes to another host."""

import asyncio
import logging
import sys
from typing import Any

import openai


class _NoBodies(logging.Filter):
    """Takes the bodies out of what the `openai` package logs, as some of its versions do: keys may be among their fields."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, dict):
            record.args = {
                name: value for name, value in record.args.items() if name not in ("json_data", "extra_json")
            }
        return True


logging.getLogger("openai._base_client").addFilter(_NoBodies())


class HTTPClient(openai.DefaultAsyncHttpxClient):
    """
    An HTTP client of the library that the installed `openai` package uses (`httpx2`, or `httpx` before its version 3).

    The library's own time limits are for each read, so that a server that sends a byte now and then is waited for without
    end. Here the limit is for a whole attempt, as the `openai` package makes several with a growing delay between them. A
    redirect is followed only to the same scheme, host and port: prompts and the key are for the server that was named.

    Args:
        limit (`float`):
            Seconds that an attempt may take, from connecting to the last byte.
    """

    def __init__(self, limit: float):
        super().__init__(timeout=limit)
        self._limit = limit

    async def send(self, request: Any, **options: Any) -> Any:
        """Sends a request and reads its whole answer. One that is redirected elsewhere is answered by the redirect."""
        options["follow_redirects"] = False
        try:
            async with asyncio.timeout(self._limit):
                response = await super().send(request, **options)
                for _ in range(self.max_redirects):
                    following = response.next_request
                    if following is None or _origin(following.url) != _origin(request.url):
                        break
                    response = await super().send(following, **options)
                response.encoding = (
                    "utf-8"  # as JSON is: by another, that a header names, it may not be readable at all
                )
                return response
        except TimeoutError:
            # The library's own error is what the `openai` package tries again
            raise _library().TimeoutException(f"No answer within {self._limit:g} seconds.", request=request) from None


def _origin(url: Any) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


def _library() -> Any:
    """The module `httpx2` or `httpx`."""
    client = next(parent for parent in HTTPClient.__mro__ if parent.__name__ == "AsyncClient")
    return sys.modules[client.__module__.partition(".")[0]]
