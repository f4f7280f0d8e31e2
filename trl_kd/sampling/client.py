"""Asks OpenAI-compatible servers: several at once, within a budget, and without a secret in any message.

The work runs on an event loop in a thread of its own, and items are read in another: what feeds them must bear that. Results
are yielded in the caller's thread, so that what stores them need not be safe for threads.
"""

import asyncio
import atexit
import os
import queue
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any, TypeVar

from trl_kd.sampling.budget import Budget, Usage
from trl_kd.sampling.reading import Read, Reader
from trl_kd.sampling.recorded import hidden_texts, not_words
from trl_kd.sampling.server_errors import (
    MALFORMED,
    REFUSALS,
    TOO_LONG,
    ServerError,
    attempts,
    explain,
    redact,
    refused,
)
from trl_kd.sampling.urls import basic, credentials, missing_key, plain_url


Item = TypeVar("Item")
Result = TypeVar("Result")
Ask = Callable[..., Awaitable[dict[str, Any]]]

OPENAI_URL = "https://api.openai.com/v1"

_FINAL = (*REFUSALS, TOO_LONG)
"""Codes of errors that another attempt does not change."""


class ServerClient:
    """
    One or several servers of the OpenAI protocol that serve the same model. Needs the extra `api`.

    Args:
        base_url (`str` or `list[str]`, *optional*):
            Where the servers are, e.g. `"http://localhost:8000/v1"`; by default `OPENAI_BASE_URL` of the environment, else
            OpenAI. Requests go to the least busy one. Credentials in it (`http://user:password@host/v1`) are sent as HTTP
            basic authentication instead of the key.
        api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable that holds the key, which every one of the servers gets. Unless it is named by you it may
            be missing, as local servers need none.
        max_concurrency (`int`, *optional*, defaults to `16`):
            Requests under way at each URL, at least 1.
        max_retries (`int`, *optional*, defaults to `5`):
            How often a request is tried again after a time-out, a lost connection, a malformed answer, or the status 408,
            409, 429 or 5xx, with a growing delay or the server's `Retry-After`.
        timeout (`float`, *optional*, defaults to `600.0`):
            Seconds that an attempt may take, from connecting to the last byte, above 0.
        max_requests, max_tokens (`int`, *optional*), max_cost (`float`, *optional*):
            Caps on the `requests`, prompt and completion tokens, and `cost` of `usage`, in which a build counts what former
            ones into the same folder have used. Once one is reached no request starts; those under way are finished, so that
            the last two caps may be passed by as much as these bring.
        price_in, price_out (`float`, *optional*):
            Price of a million prompt and completion tokens.

    Attributes:
        usage (`Usage`): Sum over all runs, to be looked at while one is under way; `usage.resume(former)` goes on from that
            of former processes.

    Raises:
        `ImportError`: `openai` is not installed.
        `ValueError`: an argument outside its range.
    """

    def __init__(
        self,
        base_url: str | Sequence[str] | None = None,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        max_concurrency: int = 16,
        max_retries: int = 5,
        timeout: float = 600.0,
        max_requests: int | None = None,
        max_tokens: int | None = None,
        max_cost: float | None = None,
        price_in: float | None = None,
        price_out: float | None = None,
    ):
        _openai()
        if not base_url:
            base_url = os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
        urls = [base_url] if isinstance(base_url, str) else list(base_url)
        self.urls = [plain_url(url) for url in urls]
        self._credentials = [credentials(url) for url in urls]
        self.api_key_env = api_key_env
        for name, number, least in (("max_concurrency", max_concurrency, 1), ("max_retries", max_retries, 0)):
            if number < least:
                raise ValueError(f"`{name}` is {number!r}: it must be at least {least}.")
        if not timeout > 0:
            raise ValueError(f"`timeout` is {timeout!r}: it must be above 0 seconds.")
        self.max_concurrency = max_concurrency
        self.max_retries = max_retries
        self.timeout = timeout
        self.budget = Budget(max_requests, max_tokens, max_cost, price_in, price_out)
        self._length_field = "max_tokens"
        self._key()  # a variable that is named but not set is said now

    def __repr__(self) -> str:
        return f"ServerClient({', '.join(self.urls)})"

    @property
    def usage(self) -> Usage:
        return self.budget.usage

    @property
    def capacity(self) -> int:
        """Requests under way at all URLs together."""
        return self.max_concurrency * len(self.urls)

    def run(
        self,
        items: Iterable[Item],
        work: Callable[[Ask, Item, Callable[[Result], None]], Coroutine[Any, Any, None]],
    ) -> Iterator[Result]:
        """
        Works on many items at once.

        Args:
            items (`Iterable`):
                Read lazily, in a thread, one at a time, and never further ahead of what is finished than `2 * capacity`.
            work (`Callable`):
                Coroutine function of `(ask, item, emit)`. `await ask(body, completions=False)` posts a JSON body to a chat
                completions endpoint, or to the plain one, and returns the server's reply in one form, see
                [`~trl_kd.sampling.replies.read_reply`]; a server that wants `max_completion_tokens` gets that instead of
                `max_tokens`.
                `emit(result)` hands over a result, any number of times.

        Yields:
            Results, as they arrive.

        Raises:
            `ServerError`, `BudgetExceeded`, or what `items` or `work` raised: once everything under way has been yielded. An
            item that is still being read then is not waited for.
        """
        waiting = 0
        is_reading = is_over = False
        unreadable: BaseException | None = None
        with _Run(self) as run, closing(Reader(items, run.results)) as reader:
            while True:
                if not (is_reading or is_over or run.error) and waiting < 2 * self.capacity:
                    reader.want()
                    is_reading = True
                if not waiting and (run.error or not is_reading):
                    break
                result = run.results.get()
                if isinstance(result, Read):
                    is_reading, is_over, unreadable = False, result.is_over, result.error
                    if not is_over:
                        run.submit(work, result.item)
                        waiting += 1
                elif result is _FINISHED:
                    waiting -= 1
                else:
                    yield result
            failure = run.error or unreadable
            if failure is not None:
                raise failure

    @property
    def secrets(self) -> list[str]:
        """What must be in no message and no file."""
        pairs = [pair for pair in self._credentials if pair]
        found = [self._key(), *(pair[1] for pair in pairs), *map(basic, pairs)]
        return [secret for secret in found if secret]

    def _key(self) -> str | None:
        """The key, read from the environment whenever it is needed so that no object holds it."""
        key = os.environ.get(self.api_key_env, "").strip()
        if not key and self.api_key_env != "OPENAI_API_KEY":
            raise ValueError(missing_key("api_key_env", self.api_key_env))
        if not key.isascii() or not key.isprintable():
            raise ValueError(
                f"The environment variable {self.api_key_env} holds characters that no key has: copy the key again."
            )
        return key or None


_FINISHED: Any = object()


class _Stopped(Exception):
    """A request that did not start because another has failed."""


class _Run:
    """The event loop of one `run`, with its connections. `error` is the first failure; after it nothing starts."""

    def __init__(self, client: ServerClient):
        self.client = client
        self.results: queue.SimpleQueue = queue.SimpleQueue()
        self.error: BaseException | None = None
        key = client._key() or "none"
        from trl_kd.sampling.http_client import HTTPClient  # needs `openai`

        self.connections = [
            _openai().AsyncOpenAI(
                api_key=key,
                base_url=url,
                max_retries=client.max_retries,
                timeout=client.timeout,
                http_client=HTTPClient(client.timeout),
                default_headers={"Authorization": f"Basic {basic(pair)}"} if pair else None,
            )
            for url, pair in zip(client.urls, client._credentials, strict=True)
        ]
        self.busy = [0] * len(client.urls)
        self.asked = [0] * len(client.urls)
        self.tasks: set[asyncio.Task] = set()

    def __enter__(self) -> "_Run":
        self.loop = asyncio.new_event_loop()
        self.slots = asyncio.Semaphore(self.client.capacity)
        self.thread = threading.Thread(target=self._spin, name="trl-kd-server-client", daemon=True)
        self.thread.start()
        # A generator that nobody has closed is finalised when the thread is dead already, and would wait for it forever
        atexit.register(self.close)
        return self

    def _spin(self) -> None:
        self.loop.run_forever()
        # Here, since the caller's thread may be inside a loop of its own, as in a notebook
        self.loop.run_until_complete(self.loop.shutdown_default_executor())

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives up what is under way (nothing, unless the caller has stopped early) and ends the thread."""
        if self.loop.is_closed():
            return
        atexit.unregister(self.close)
        asyncio.run_coroutine_threadsafe(self._close(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def _close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for connection in self.connections:
            await connection.close()

    def submit(self, work: Callable[..., Coroutine[Any, Any, None]], item: Any) -> None:
        def start() -> None:
            task = self.loop.create_task(self._work(work, item))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

        self.loop.call_soon_threadsafe(start)

    async def _work(self, work: Callable[..., Coroutine[Any, Any, None]], item: Any) -> None:
        try:
            await work(self.ask, item, self.results.put)
        except _Stopped:
            pass
        except Exception as error:
            self.error = self.error or error
        finally:
            self.results.put(_FINISHED)

    async def ask(self, body: dict[str, Any], completions: bool = False) -> dict[str, Any]:
        wanted = self.client._length_field
        try:
            return await self._ask(_with_length(body, wanted), completions)
        except ServerError as failure:
            if "max_tokens" not in body or wanted != "max_tokens" or not _wants_other_length(failure):
                raise
            refusal = failure
        # Newer OpenAI models refuse the old name, and many servers ignore the new one: it is kept if it is answered
        try:
            reply = await self._ask(_with_length(body, "max_completion_tokens"), completions)
        except ServerError as failure:
            raise (refusal if failure.status == 400 else failure) from None
        self.client._length_field = "max_completion_tokens"
        return reply

    async def _ask(self, body: dict[str, Any], completions: bool) -> dict[str, Any]:
        """Posts a request, again and again as long as the answer is none."""
        from trl_kd.sampling.replies import read_reply  # needs pydantic, which comes with `openai`

        client, hidden = self.client, hidden_texts(body)
        secrets = [*client.secrets, *hidden]
        for attempt in range(client.max_retries + 1):
            async with self.slots:
                if self.error:
                    raise _Stopped
                client.budget.start()
                # There is a slot, so the least busy URL has room; the fewest asked so far breaks ties
                index = min(range(len(self.busy)), key=lambda i: (self.busy[i], self.asked[i]))
                self.busy[index] += 1
                self.asked[index] += 1
                try:
                    text, retries, failure = await self._post(index, body, completions, secrets)
                    if failure is not None and failure.status not in (400, 422):
                        self.error = self.error or failure  # nothing can be done, so that nothing may take the slot
                finally:
                    self.busy[index] -= 1
            if failure is not None:
                raise failure
            reply = read_reply(text, [*client.secrets, *not_words(hidden)])
            if reply is not None and "error" not in reply:
                client.budget.count(reply["usage"] or {}, retries)
                return reply
            clean = partial(redact, secrets=secrets)
            problem = (
                self._malformed(index, clean(text)) if reply is None else self._refused(index, reply["error"], clean)
            )
            if not _may_pass(problem):
                break
            await asyncio.sleep(backoff(attempt))
        raise problem

    async def _post(
        self, index: int, body: dict[str, Any], completions: bool, secrets: list[str]
    ) -> tuple[str, int, ServerError | None]:
        """The text of an answer and the retries it took, or the failure, which is returned and not raised: an exception
        that is raised here would carry the library's own, whose text may hold an echo of the key."""
        connection = self.connections[index]
        endpoint = connection.completions if completions else connection.chat.completions
        named = {name: body[name] for name in ("model", "prompt" if completions else "messages")}
        rest = {name: value for name, value in body.items() if name not in named}
        try:
            reply = await endpoint.with_raw_response.create(**named, extra_body=rest)
            return reply.http_response.text, reply.retries_taken, None
        except _openai().OpenAIError as error:
            return "", 0, self._explain(index, error, partial(redact, secrets=secrets))

    def _malformed(self, index: int, text: str) -> ServerError:
        """The error of a reply that is none, of which the `text` is without secrets."""
        return ServerError(
            f"{self.client.urls[index]} sent replies that are not completions in JSON, in "
            f"{attempts(self.client.max_retries)}, e.g. {text[:200]!r}: check that `base_url` leads to an OpenAI-compatible "
            "server (it mostly ends in /v1).",
            code=MALFORMED,
            said=text[:200],
        )

    def _refused(self, index: int, error: dict[str, Any], clean: Callable[[str], str]) -> ServerError:
        """The error that a server has sent as if it were an answer."""
        client, code = self.client, str(error.get("code"))
        status = int(code) if len(code) == 3 and code.isdecimal() and code[0] in "45" else None
        problem = refused(
            error,
            status,
            url=client.urls[index],
            clean=clean,
            api_key_env=client.api_key_env,
            tries=attempts(client.max_retries),
            max_concurrency=client.max_concurrency,
        )
        if status is None and problem.code not in _FINAL:
            problem.code = MALFORMED
        return problem

    def _explain(self, index: int, error: Any, clean: Callable[[str], str]) -> ServerError:
        client = self.client
        return explain(
            error,
            url=client.urls[index],
            clean=clean,
            api_key_env=client.api_key_env,
            max_retries=client.max_retries,
            timeout=client.timeout,
            max_concurrency=client.max_concurrency,
        )


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ImportError("Asking a server needs the `openai` package: `pip install trl-kd[api]`.") from error
    return openai


def _with_length(body: dict[str, Any], name: str) -> dict[str, Any]:
    """A request whose `max_tokens` goes by another name."""
    return {(name if key == "max_tokens" else key): value for key, value in body.items()}


def _wants_other_length(failure: ServerError) -> bool:
    """Whether a refusal says that `max_tokens` has another name. That it mentions this is not enough: vLLM does so where a
    request is too long for its context."""
    if failure.status != 400 or "max_completion_tokens" not in failure.said:
        return False
    said = failure.said.lower()
    return failure.code == "unsupported_parameter" or any(
        words in said for words in ("unsupported", "not supported", "instead")
    )


def _may_pass(problem: ServerError) -> bool:
    """Whether an error that came in place of an answer is worth another attempt."""
    if problem.status is None:
        return problem.code not in _FINAL
    return problem.status in (408, 409, 429) or problem.status >= 500


def backoff(attempt: int) -> float:
    """Seconds to wait behind a failed attempt, counted from 0."""
    return min(0.5 * 2**attempt, 8.0)
