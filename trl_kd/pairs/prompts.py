"""Prompts as they are read: in batches, each with the key under which its answers are stored."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset

from trl_kd.sampling import Text
from trl_kd.sampling.nulls import without_nulls


BATCH_SIZE = 1000


@dataclass(slots=True)
class PromptRow:
    """A row of the source: its `index`, the `key` of its prompt (32 hexadecimal digits), `prompt`, and other `columns`."""

    index: int
    key: str
    prompt: Text
    columns: dict[str, Any]


def read_prompts(
    prompts: Dataset | IterableDataset, shard: tuple[int, int] | None = None, batch_size: int = BATCH_SIZE
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

    Raises:
        `ValueError`: no column `prompt`, or one that is neither text nor messages, or not of the first one's kind.
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
        others = zip(*batch.values(), strict=True) if names else [()] * len(texts)
        for index, (prompt, values) in enumerate(zip(texts, others, strict=True), start):
            kind = kind or type(prompt)
            if type(prompt) is not kind or not (kind is str or _is_messages(prompt)):
                raise ValueError(_refusal(prompt, index))
            if kind is not str:
                prompt = without_nulls(prompt)
            columns = dict(zip(names, values, strict=True))
            key = prompt_key(prompt, columns)
            if shard is None or int(key[:15], 16) % shard[1] == shard[0]:
                rows.append(PromptRow(index, key, prompt, columns))
        start += len(texts)
        yield rows


def prompt_key(prompt: Text, columns: dict[str, Any]) -> str:
    """The key of a prompt: equal for equal prompts with equal `tools` and `chat_template_kwargs`."""
    tools, kwargs = columns.get("tools"), columns.get("chat_template_kwargs")
    if isinstance(prompt, str) and not tools and not kwargs:
        data = "text" + prompt
    else:
        data = "json" + to_json([prompt, without_nulls(tools) or None, without_nulls(kwargs) or None])
    return hashlib.blake2b(data.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def to_json(value: Any) -> str:
    """JSON of anything, to be hashed: what JSON has no word for by its bytes, or by its type."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> str:
    if isinstance(value, bytes):
        return value.hex()
    # Dates and decimals read well; the default of most other objects holds an address, which changes with every run
    return str(value) if type(value).__str__ is not object.__str__ else type(value).__qualname__


def _is_messages(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) and "role" in m for m in prompt)


def _refusal(prompt: Any, index: int) -> str:
    return (
        f"Row {index} of the prompts: `prompt` is {str(prompt)[:60]!r}; it must be text or a list of messages with a role "
        "each, like the first."
    )
