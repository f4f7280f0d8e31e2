"""What a source of answers is. Teacher and student are asked through the same protocol."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from trl_kd.responses.finish_reasons import ending


Text = str | list[dict[str, Any]]
"""Plain text, or a list of messages."""


@dataclass(frozen=True)
class SamplingSettings:
    """How a source draws its answers.

    Parameters:
        temperature (`float`): At least 0; `0` takes the most likely token each time.
        top_p (`float`): Share of the probability that is sampled from, in (0, 1].
        max_new_tokens (`int`): Longest answer in tokens, its end token included; at least 1.
        stop (`tuple[str, ...]`): Texts at which an answer ends; they are not part of it.
        seed (`int`): Seed from which every answer's own is derived.

    Raises:
        `ValueError`: a field outside its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"`temperature` is {self.temperature!r}: it must be at least 0 (0 is greedy).")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is {self.top_p!r}: it must be above 0 and at most 1.")
        if self.max_new_tokens < 1:
            raise ValueError(f"`max_new_tokens` is {self.max_new_tokens!r}: it must be at least 1.")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))

    def answer_seed(self, key: str, sample: int, attempt: int = 0) -> int:
        """The seed in [0, 2³¹) of one answer: a function of the prompt, the sample's number and the attempt alone, so that
        the same answer is drawn whatever is drawn beside it."""
        again = f"/{attempt}" if attempt else ""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{key}/{sample}{again}".encode()).digest()[:4], "big") >> 1

    def describe(self) -> dict[str, Any]:
        return asdict(self) | {"stop": list(self.stop)}


@dataclass(frozen=True)
class Request:
    """One prompt to answer.

    Parameters:
        key (`str`): Names the prompt among all; equal for equal prompts.
        prompt (`str` or `list[dict]`): Plain text, or messages.
        samples (`tuple[int, ...]`): Numbers of the answers wanted, e.g. `(0, 1, 2, 3)`, or `(2,)` if only that is missing.
        columns (`Mapping[str, Any]`): The row's other columns; `tools` are given to the chat template.
    """

    key: str
    prompt: Text
    samples: tuple[int, ...] = (0,)
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """One answer.

    Parameters:
        text (`str`, `list[dict]` or `None`): The answer without special tokens; `None` where the source has refused one
            for good (a content filter, an empty choice).
        finish_reason (`str`, *optional*): `"stop"`, `"length"` (truncated by `max_new_tokens`), or what a server says;
            `None` if nothing is known.
        tokens (`int`, *optional*): Length in tokens, where known.
        said (`str`, *optional*): What the source said where there is no text, shortened. It is for messages, and neither
            stored nor compared.
    """

    text: Text | None
    finish_reason: str | None = None
    tokens: int | None = None
    said: str | None = field(default=None, compare=False, repr=False)


def as_counted(prompt: Text, answer: Answer) -> Answer:
    """
    An answer as it counts.

    It has no text where its source broke down midway or refused, where it was cut off before it said anything, and where it
    calls a tool though the prompt is plain text, so that it would have to be text too.
    """
    text = answer.text
    if text is None or (isinstance(text, str) and answer.finish_reason in (None, "stop")):
        return answer
    if isinstance(prompt, str) and _calls_tool(text):
        return replace(answer, text=None, finish_reason="tool_calls")
    end = ending(answer.finish_reason)
    is_nothing = end in ("failed", "final") or (end == "cut" and _is_empty(text))
    return replace(answer, text=None) if is_nothing else answer


def _calls_tool(text: Text) -> bool:
    return not isinstance(text, str) and any(message.get("tool_calls") for message in text)


def _is_empty(text: Text) -> bool:
    if isinstance(text, str):
        return not text.strip()
    contents = [message.get("content") or "" for message in text]
    return not _calls_tool(text) and all(isinstance(content, str) and not content.strip() for content in contents)


def beginning(prompt: Text) -> str:
    """The first words of a prompt, or of its last message."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
    return text[:60]


class Sampler(Protocol):
    """A source of answers.

    Attributes:
        is_lookup (`bool`): Whether answers exist already and cost nothing to read again, so that nobody needs to store
            them.
    """

    is_lookup: bool

    def describe(self) -> dict[str, Any]:
        """Everything that answers depend on, as JSON and without secrets: answers of equal descriptions may be mixed."""
        ...

    def sample(self, requests: Iterable[Request]) -> Iterator[tuple[Request, int, Answer]]:
        """Answers requests, lazily read, in any order and one by one: `(request, sample, answer)` as soon as it is there.

        An answer that could not be had (a server that stays down) raises after what is under way has been yielded; a
        later call asks again.

        `requests` may be read in a thread of the sampler's own (`trl_kd.sampling.reading`), so that what has arrived does
        not wait for a slow source: what is behind them must bear that. Answers are yielded in the caller's thread.

        A sampler that draws several answers by one seed may also have `sample_replies(requests)`, which yields them in lists
        `[(request, sample, answer), ...]`: those in a list are stored all or none.

        An answer without a text is stored too, with the source's description. It is asked for again when this changes, or
        what a method `causes(finish_reason)` of the sampler says besides, as JSON.
        """
        ...
