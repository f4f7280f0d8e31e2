"""Answers from OpenAI-compatible servers: vLLM, llama.cpp, `transformers serve`, OpenAI and others."""

import asyncio
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from trl_kd.sampling.budget import Usage
from trl_kd.sampling.client import Ask, ServerClient
from trl_kd.sampling.nulls import without_nulls
from trl_kd.sampling.sampler import Answer, Request, SamplingSettings, Text
from trl_kd.sampling.server_errors import ServerError, check_extra


logger = logging.getLogger(__name__)

REFUSALS = ("content_filter", "content_policy_violation")
"""Codes of errors that are a server's last word on one prompt, and no fault of the settings."""

_HARMLESS = "Say yes."

Reply = list[tuple[Request, int, Answer]]
"""The answers of one reply of a server: those to the samples that one request was for."""

Emit = Callable[[Reply], None]


class ServerSampler:
    """
    A model behind one or several servers of the OpenAI protocol, as a source of answers. Needs the extra `api`.

    The samples of a prompt are asked for in one request where the server honours `n`; what is missing is asked for again,
    each with its own seed. A request for several carries the seed of its first sample.

    A prompt that the server refuses for good gets an answer without a text, whose `finish_reason` says why:
    `"content_filter"` and the like, `"prompt_too_long"`, or `"bad_request"` where the same request with other words is
    answered. Any other refusal is an error.

    Args:
        model (`str`):
            Name of the model at the server.
        server (`str`, `list[str]` or [`ServerClient`], *optional*):
            Base URLs, or a client with its limits and budget. By default `OPENAI_BASE_URL` of the environment, else OpenAI.
        settings ([`SamplingSettings`], *optional*):
            How answers are drawn.
        system_prompt (`str`, *optional*):
            Put before conversations that have no system message.
        completions (`bool`, *optional*, defaults to `False`):
            Whether prompts are continued as they are, by the plain completions endpoint. They must be plain text. Otherwise
            a plain text is sent as one message of the user's, and columns `tools` and `chat_template_kwargs` go with it.
        chat_template_kwargs (`dict`, *optional*):
            Variables for the chat template, e.g. `{"enable_thinking": False}`, sent in every request to a server that takes
            them, as vLLM and llama.cpp do. Those of a row's column come on top.
        extra (`dict`, *optional*):
            Fields set in every request, e.g. `{"top_k": 20}`; with the value `None` a field is left out, e.g.
            `{"seed": None}` for a server that refuses it.

    Raises:
        `ImportError`: `openai` is not installed.
        `ValueError`: a system prompt or variables of the chat template without a chat, a key in `extra`, or an argument
        of [`ServerClient`] outside its range.
    """

    is_lookup = False

    def __init__(
        self,
        model: str,
        server: str | Sequence[str] | ServerClient | None = None,
        settings: SamplingSettings | None = None,
        *,
        system_prompt: str | None = None,
        completions: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        extra: dict[str, Any] | None = None,
    ):
        for name, value in (("system_prompt", system_prompt), ("chat_template_kwargs", chat_template_kwargs)):
            if completions and value is not None:
                raise ValueError(f"`{name}` needs a chat: leave it out, or set `completions` to false.")
        self.model = model
        self.client = server if isinstance(server, ServerClient) else ServerClient(server)
        self.settings = settings or SamplingSettings()
        self.system_prompt = system_prompt
        self.completions = completions
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.extra = check_extra(extra)
        self._most_choices: int | None = None  # that the server gave where more were asked for
        self._warned = False

    @property
    def usage(self) -> Usage:
        return self.client.usage

    def describe(self) -> dict[str, Any]:
        """The model and how it is asked. Not where: the same model at another address gives the same answers."""
        template = {"chat_template_kwargs": self.chat_template_kwargs} if self.chat_template_kwargs else {}
        return {
            "source": "server",
            "model": self.model,
            "endpoint": "completions" if self.completions else "chat",
            "system_prompt": self.system_prompt,
            "extra": self.extra,
            **template,
            **self.settings.describe(),
        }

    def check_requests(self, requests: Iterable[Request]) -> None:
        """Raises a `ValueError` for a request that cannot be put to the server. None is sent."""
        for request in requests:
            self._body(request)

    def sample(self, requests: Iterable[Request]) -> Iterator[tuple[Request, int, Answer]]:
        """
        Answers requests in the order in which the server does.

        Raises:
            `ServerError`: the server refused a request, or could not be had after all retries.
            `BudgetExceeded`: a cap of the client is reached.
            `ValueError`: a conversation for the plain completions endpoint.
        """
        for reply in self.sample_replies(requests):
            yield from reply

    def sample_replies(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """As `sample`, with the answers of each reply together. They must be stored so too: the seed of a reply is that of
        its first sample, and another, if it alone were asked for again, would have another seed."""
        return self.client.run(requests, self._answer)

    async def _answer(self, ask: Ask, request: Request, emit: Emit) -> None:
        texts: list[Text | None] = []

        def keep(answers: list[tuple[int, Answer]]) -> None:
            texts.extend(answer.text for _, answer in answers)
            emit([(request, sample, answer) for sample, answer in answers])

        await self._ask(ask, request, self._body(request), tuple(request.samples), keep)
        if len(texts) > 1 and self.settings.temperature > 0 and not self._warned and texts[0] is not None:
            self._warned = all(text == texts[0] for text in texts)
            if self._warned:
                logger.warning(
                    "All %d answers of %r to one prompt are equal at temperature %g: unless the question has one answer, "
                    "the server may ignore `temperature` or `seed` (`transformers serve` samples only if the model's "
                    "generation_config.json has `do_sample: true`).",
                    len(texts),
                    self.model,
                    self.settings.temperature,
                )

    async def _ask(
        self,
        ask: Ask,
        request: Request,
        body: dict[str, Any],
        samples: tuple[int, ...],
        keep: Callable[[list[tuple[int, Answer]]], None],
    ) -> None:
        """Asks for samples in as few requests as the server allows, side by side, until all are there."""
        size = min(len(samples), self._most_choices or len(samples))
        parts = [samples[start : start + size] for start in range(0, len(samples), size)]

        async def ask_part(part: tuple[int, ...]) -> None:
            answers = await self._choices(ask, request, body, part)
            if answers:
                keep(list(zip(part, answers, strict=False)))  # a server may also give more than asked
            rest = part[len(answers) :]
            if rest:
                # A server that ignores or caps `n`: the others are asked for in parts of what it gave
                self._most_choices = max(1, len(answers))
                await self._ask(ask, request, body, rest, keep)

        # Each is waited for: what one part has cost is kept whatever happens to another
        for outcome in await asyncio.gather(*map(ask_part, parts), return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def _choices(
        self, ask: Ask, request: Request, body: dict[str, Any], samples: tuple[int, ...]
    ) -> list[Answer]:
        """One request for several samples: as many answers as the server gave, none if it gave none to several."""
        fields = {"seed": self.settings.answer_seed(request.key, samples[0])}
        if len(samples) > 1:
            fields["n"] = len(samples)
        whole = {name: value for name, value in (body | fields | self.extra).items() if value is not None}
        try:
            reply = await ask(whole, completions=self.completions)
        except ServerError as error:
            failure = error
        else:
            tokens = reply["usage"].get("completion_tokens") if len(reply["choices"]) == 1 else None
            answers = [self._read(choice, tokens) for choice in reply["choices"]]
            return answers or ([Answer(None, "empty")] if len(samples) == 1 else [])
        if failure.code in REFUSALS:
            return [Answer(None, failure.code)] * len(samples)
        if failure.code == "context_length_exceeded" or "maximum context length" in failure.said:
            return [Answer(None, "prompt_too_long")] * len(samples)
        if failure.status in (400, 422):
            if len(samples) > 1:
                return []  # it may refuse `n`; if not, asking for one says what is wrong
            if await self._takes_other_words(ask, whole):
                logger.warning(
                    "%r refuses the prompt that begins %r, and is not asked for it again: %s",
                    self.model,
                    _beginning(request.prompt),
                    failure.said,
                )
                return [Answer(None, "bad_request")]
            raise ServerError(f"{failure} The prompt begins {_beginning(request.prompt)!r}.", failure.status)
        if (failure.status or 0) >= 500:  # the same object, which the client has already
            failure.args = (f"{failure} The prompt begins {_beginning(request.prompt)!r}.",)
        raise failure

    async def _takes_other_words(self, ask: Ask, body: dict[str, Any]) -> bool:
        """Whether a request that was refused is answered when only its texts are others, so that these are at fault: no
        setting, no tool and no role, for which all prompts would be refused."""
        try:
            await ask(other_words(body), completions=self.completions)
        except ServerError as error:
            if error.status in (400, 422):
                return False
            raise
        return True

    def _body(self, request: Request) -> dict[str, Any]:
        """What does not differ between the samples of a request."""
        settings = self.settings
        body: dict[str, Any] = {
            "model": self.model,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_new_tokens,
        }
        if settings.stop:
            body["stop"] = list(settings.stop)
        if self.completions:
            if not isinstance(request.prompt, str):
                raise ValueError(
                    "The plain completions endpoint takes plain text, but a prompt is a conversation: set "
                    "`completions=False`, or give prompts as text."
                )
            return body | {"prompt": request.prompt}
        if isinstance(request.prompt, str):  # its answer must be a text, and not a call of a tool
            messages, tools = [{"role": "user", "content": request.prompt}], None
        else:
            messages, tools = without_nulls(request.prompt), request.columns.get("tools")
        if self.system_prompt is not None and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        if isinstance(tools, str):
            tools = json.loads(tools)
        body |= {"messages": messages, "tools": without_nulls(tools) or None}
        template = self.chat_template_kwargs | (request.columns.get("chat_template_kwargs") or {})
        return body | {"chat_template_kwargs": template or None}

    def _read(self, choice: dict[str, Any], tokens: int | None) -> Answer:
        """An answer from a choice; without a text where the server has none to give."""
        reason = choice.get("finish_reason")
        message = choice.get("message") or {}
        if self.completions:
            text = choice.get("text")
        elif message.get("tool_calls"):
            # As TRL has them in a dataset, arguments as an object
            text = [{"role": "assistant", "content": message.get("content") or "", "tool_calls": _calls(message)}]
        else:
            text = message.get("content")
        if message.get("refusal"):
            return Answer(None, "refusal", tokens)
        if reason == "content_filter" or text is None:
            return Answer(None, reason if reason not in (None, "stop") else "empty", tokens)
        return Answer(text, reason, tokens)


def _calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function") or {}
        arguments = function.get("arguments") or "{}"
        with suppress(ValueError):  # the model's text need not be JSON
            arguments = json.loads(arguments)
        calls.append({"type": "function", "function": {"name": function.get("name"), "arguments": arguments}})
    return calls


def other_words(body: dict[str, Any]) -> dict[str, Any]:
    """A request with the same settings, tools and roles, and with other, harmless texts."""
    if "prompt" in body:
        return body | {"prompt": _HARMLESS}
    messages = []
    for message in body["messages"]:
        content = message.get("content")
        if isinstance(content, str):
            content = _HARMLESS
        elif isinstance(content, list):
            content = [{**part, "text": _HARMLESS} if "text" in part else part for part in content]
        messages.append({**message, "content": content} if "content" in message else message)
    return body | {"messages": messages}


def _beginning(prompt: Text) -> str:
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
    return text[:60]
