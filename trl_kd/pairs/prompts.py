"""Prompts as they are read: in batches, each with the key under which its answers are stored."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset

from trl_kd.responses.nulls import without_nulls
from trl_kd.sampling import Text
from trl_kd.sampling.as_json import to_json


BATCH_SIZE = 1000


@dataclass(slots=True)
class PromptRow:
    """A row of the source: its `index`, the `key` of its prompt (32 hexadecimal digits), `prompt`, and other `columns`."""

    index: int
    key: str
    prompt: Text
    columns: dict[str, Any]


class Fingerprint:
    """Which prompts there are, whatever shard of them is read: their number, and a digest of all keys in order."""

    def __init__(self):
        self._rows = 0
        self._keys = hashlib.blake2b(digest_size=16)

    def add(self, keys: list[str]) -> None:
        self._rows += len(keys)
        self._keys.update("".join(keys).encode())

    def describe(self) -> dict[str, Any]:
        return {"rows": self._rows, "keys": self._keys.hexdigest()}


def read_prompts(
    prompts: Dataset | IterableDataset,
    shard: tuple[int, int] | None = None,
    batch_size: int = BATCH_SIZE,
    fingerprint: Fingerprint | None = None,
) -> Iterator[list[PromptRow]]:
    """
    Reads prompts in order.

    Args:
        prompts (`Dataset` or `IterableDataset`):
            Rows with a `prompt`, text or messages. Fields of messages that are null are left out.
        shard (`tuple[int, int]`, *optional*):
            `(i, n)`: only the prompts whose key is `i` modulo `n`, so that equal prompts stay together.
        batch_size (`int`, *optional*, defaults to `1000`):
            Rows read at once.
        fingerprint (`Fingerprint`, *optional*):
            To which the keys of all rows are added.

    Raises:
        `ValueError`: no column `prompt`, or one that is neither text nor messages, or not of the first one's kind;
        or a message that says nothing.
    """
    start, kind = 0, None
    for batch in prompts.with_format(None).iter(batch_size=batch_size):
        if "prompt" not in batch:
            raise ValueError(
                f"The prompts have no column 'prompt': they have {', '.join(map(repr, batch))}. Rename one."
            )
        texts = batch.pop("prompt")
        names = list(batch)
        rows = []
        keys = []
        others = zip(*batch.values(), strict=True) if names else [()] * len(texts)
        for index, (prompt, values) in enumerate(zip(texts, others, strict=True), start):
            kind = kind or type(prompt)
            if type(prompt) is not kind or not (kind is str or _is_messages(prompt)):
                raise ValueError(_refusal(prompt, index))
            if kind is not str:
                prompt = without_nulls(prompt)
                for number, message in enumerate(prompt):
                    if "content" not in message and not message.get("tool_calls"):
                        raise ValueError(
                            f"Row {index} of the prompts: message {number} of `prompt`, of the role {message['role']!r}, "
                            "has neither `content` nor `tool_calls`: fill it in, or leave the row out."
                        )
            columns = dict(zip(names, values, strict=True))
            key = prompt_key(prompt, columns)
            keys.append(key)
            if shard is None or int(key[:15], 16) % shard[1] == shard[0]:
                rows.append(PromptRow(index, key, prompt, columns))
        start += len(texts)
        if fingerprint is not None:
            fingerprint.add(keys)
        yield rows


def prompt_key(prompt: Text, columns: dict[str, Any]) -> str:
    """The key of a prompt: equal for equal prompts with equal `tools` and `chat_template_kwargs`."""
    tools, kwargs = columns.get("tools"), columns.get("chat_template_kwargs")
    if isinstance(prompt, str) and not tools and not kwargs:
        data = "text" + prompt
    else:
        data = "json" + to_json([prompt, without_nulls(tools) or None, without_nulls(kwargs) or None])
    return hashlib.blake2b(data.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _is_messages(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) and "role" in m for m in prompt)


def _refusal(prompt: Any, index: int) -> str:
    return (
        f"Row {index} of the prompts: `prompt` is {str(prompt)[:60]!r}; it must be text or a list of messages with a role "
        "each, like the first."
    )
