"""Answers from OpenAI-compatible servers: vLLM, llama.cpp, `transformers serve`, OpenAI and others."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from trl_kd.responses.finish_reasons import ending
from trl_kd.responses.nulls import without_nulls
from trl_kd.sampling.budget import Usage
from trl_kd.sampling.client import Ask, ServerClient, backoff
from trl_kd.sampling.recorded import recorded_description
from trl_kd.sampling.sampler import Answer, Request, SamplingSettings, Text, as_counted, beginning
from trl_kd.sampling.server_errors import (
    MALFORMED,
    REFUSALS,
    ServerError,
    is_too_long,
    named_context,
    role_hint,
)


logger = logging.getLogger(__name__)

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
    answered. Any other refusal is an error; so is a request that is too long by `max_new_tokens` alone.

    A reply that cannot be read, and an answer that the server broke off (`"error"`, `"abort"`), is asked for again with
    another seed, up to `max_retries` times. Then it has no text either. The same holds, without asking again, for an empty
    text that was cut off or has only a reasoning beside it, and for the call of a tool in answer to plain text.

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
            `{"seed": None}` for a server that refuses it. Those that [`~trl_kd.sampling.recorded.REQUEST_FIELDS`] lists
            are stored and compared; of any other the name alone is.

    Raises:
        `ImportError`: `openai` is not installed.
        `ValueError`: a system prompt or variables of the chat template without a chat, or an argument of [`ServerClient`]
        outside its range.
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
        self.extra = dict(extra or {})
        self._most_choices: int | None = None  # that the server gave where more were asked for
        self._warned = False
        self._has_replied = False
        self._remarked: set[str] = set()  # reasons

    @property
    def usage(self) -> Usage:
        return self.client.usage

    def describe(self) -> dict[str, Any]:
        """The model and how it is asked. Not where: the same model at another address gives the same answers."""
        template = {"chat_template_kwargs": self.chat_template_kwargs} if self.chat_template_kwargs else {}
        return recorded_description(
            {
                "source": "server",
                "model": self.model,
                "endpoint": "completions" if self.completions else "chat",
                "system_prompt": self.system_prompt,
                "extra": self.extra,
                **template,
                **self.settings.describe(),
            }
        )

    def causes(self, finish_reason: str | None) -> dict[str, Any]:
        """What an answer without a text is due to, besides what `describe` says. Where asking again would cost as much as a
        text, there is nothing."""
        failed = ending(finish_reason) == "failed"
        if not failed and finish_reason not in ("prompt_too_long", "bad_request"):
            return {}
        return {"base_url": sorted(self.client.urls)} | ({"max_retries": self.client.max_retries} if failed else {})

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
            refuses_several = not answers
            if refuses_several:  # `n`, it may be; if not, asking for one says what is wrong
                answers = await self._choices(ask, request, body, part[:1])
                if answers[0].finish_reason == "bad_request":
                    answers *= len(part)
            given = list(zip(part, answers, strict=False))  # a server may also give more than asked
            await self._again(ask, request, body, given, keep)
            rest = part[len(answers) :]
            if rest:
                # A server that ignores, caps or refuses `n`: the others are asked for in parts of what it gave
                if answers[-1].text is not None or not refuses_several:
                    self._most_choices = max(1, len(answers))
                await self._ask(ask, request, body, rest, keep)

        await _all(map(ask_part, parts))

    async def _again(
        self,
        ask: Ask,
        request: Request,
        body: dict[str, Any],
        given: list[tuple[int, Answer]],
        keep: Callable[[list[tuple[int, Answer]]], None],
    ) -> None:
        """Keeps the answers of one reply, and asks again, each with another seed, for those that broke off midway."""
        final = dict(given)

        async def replace(sample: int) -> None:
            for attempt in range(1, self.client.max_retries + 1):
                await asyncio.sleep(backoff(attempt - 1))
                final[sample] = (await self._choices(ask, request, body, (sample,), attempt))[0]
                if ending(final[sample].finish_reason) != "failed":
                    return

        try:
            await _all(replace(sample) for sample, answer in given if ending(answer.finish_reason) == "failed")
        except BaseException:  # the others of the reply are paid for
            keep([(sample, answer) for sample, answer in final.items() if ending(answer.finish_reason) != "failed"])
            raise
        for answer in final.values():
            self._remark(request, answer)
        keep(list(final.items()))

    def _remark(self, request: Request, answer: Answer) -> None:
        """Names the first prompt without an answer for each reason. The others are in the counts."""
        reason = str(answer.finish_reason)
        if answer.text is None and reason not in (*self._remarked, "bad_request"):
            self._remarked.add(reason)
            logger.warning(
                "%r gave no answer (%s) to the prompt that begins %r: %s. Further ones like it are counted only.",
                self.model,
                reason,
                beginning(request.prompt),
                answer.said or "nothing was said",
            )

    async def _choices(
        self, ask: Ask, request: Request, body: dict[str, Any], samples: tuple[int, ...], attempt: int = 0
    ) -> list[Answer]:
        """One request for several samples: as many answers as the server gave, none if it gave none to several."""
        fields = {"seed": self.settings.answer_seed(request.key, samples[0], attempt)}
        if len(samples) > 1:
            fields["n"] = len(samples)
        whole = {name: value for name, value in (body | fields | self.extra).items() if value is not None}
        try:
            reply = await ask(whole, completions=self.completions)
        except ServerError as failure:
            return await self._without_text(ask, request, whole, failure, len(samples))
        tokens = (reply["usage"] or {}).get("completion_tokens") if len(reply["choices"]) == 1 else None
        answers = [self._read(request.prompt, choice, tokens) for choice in reply["choices"]]
        self._has_replied = True
        return answers or ([Answer(None, "empty")] if len(samples) == 1 else [])

    async def _without_text(
        self, ask: Ask, request: Request, whole: dict[str, Any], failure: ServerError, count: int
    ) -> list[Answer]:
        """What is made of a failure: answers without a text where only this prompt is at fault, none where the number of
        choices may be, otherwise the failure is raised."""
        if failure.code in REFUSALS:
            return [Answer(None, failure.code, said=failure.said)] * count
        if is_too_long(failure):
            self._check_context(whole, failure)
            return [Answer(None, "prompt_too_long", said=failure.said)] * count
        if failure.code == MALFORMED and self._has_replied:  # one prompt must not stop all others for good
            return [Answer(None, MALFORMED, said=failure.said)] * count if count == 1 else []
        if failure.status in (400, 422):
            if count > 1:
                return []
            if await self._takes_other_words(ask, whole):
                logger.warning(
                    "%r refuses the prompt that begins %r, and is not asked for it again: %s",
                    self.model,
                    beginning(request.prompt),
                    failure.said,
                )
                return [Answer(None, "bad_request", said=failure.said)]
        if failure.status not in (401, 403, 404):  # the same object, which the client has already
            failure.args = (f"{failure} The prompt begins {beginning(request.prompt)!r}.{role_hint(whole, failure)}",)
        raise failure

    def _check_context(self, whole: dict[str, Any], failure: ServerError) -> None:
        """Raises for a request that is too long whatever the prompt is."""
        context = named_context(failure.said)
        longest = whole.get("max_completion_tokens") or whole.get("max_tokens") or 0
        if context is not None and longest >= context:
            raise ServerError(
                f"{failure} The length of the answer alone (`max_new_tokens` = {longest}) reaches the context of {context} "
                "tokens: lower it, or serve the model with a longer context.",
                failure.status,
                failure.code,
                failure.said,
            ) from None

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
        template = self.chat_template_kwargs | without_nulls(request.columns.get("chat_template_kwargs") or {})
        return body | {"chat_template_kwargs": template or None}

    def _read(self, prompt: Text, choice: dict[str, Any], tokens: int | None) -> Answer:
        """An answer from a choice; without a text where the server has none to give."""
        reason, message = choice["finish_reason"], choice["message"]
        if choice["error"] and ending(reason) != "failed":
            reason = "error"
        said: str | None = choice["text"] if self.completions else message["content"]
        if said is not None and not said.strip() and (message["reasoning"] or message["reasoning_content"]):
            said = None  # it has thought, and said nothing
        text: Text | None = said
        if message["tool_calls"] and not self.completions:
            text = [{"role": "assistant", "content": said or "", "tool_calls": message["tool_calls"]}]
        if message["refusal"]:
            reason, text = "refusal", None
        elif text is None and ending(reason) == "complete":
            reason = "empty"
        elif ending(reason) == "final":
            text = None
        answer = as_counted(prompt, Answer(text, reason, tokens))
        return answer if answer.text is not None else replace(answer, said=_shown(choice))


def _shown(choice: dict[str, Any]) -> str:
    """What a choice without a text holds, shortened."""
    message = {name: value for name, value in choice["message"].items() if value}
    held = {**choice, "message": message, "logprobs": None}
    return json.dumps({name: value for name, value in held.items() if value}, ensure_ascii=False)[:300]


async def _all(waiting: Iterable[Awaitable[None]]) -> None:
    """Waits for each, whatever happens to another: what one has cost is kept."""
    for outcome in await asyncio.gather(*waiting, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


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
