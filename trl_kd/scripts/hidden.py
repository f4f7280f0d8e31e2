"""Arguments in which keys and passwords may stand, and what is shown of them in messages and in printed commands."""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from trl_kd.sampling.recorded import (
    MODEL_FIELDS,
    NOT_SHOWN,
    REQUEST_FIELDS,
    TEMPLATE_FIELDS,
    How,
    Rule,
    kind_of,
    recorded,
)


_RULES: dict[str, Rule] = {
    "model_init_kwargs": MODEL_FIELDS,
    "extra_body": REQUEST_FIELDS,
    "chat_template_kwargs": TEMPLATE_FIELDS,
    "hub_token": How.HIDDEN,
}
"""By the end of a name. Other mappings are options of torch and transformers, in which no key has a place."""


def _rule(name: str) -> Rule | None:
    return next((rule for ending, rule in _RULES.items() if name.endswith(ending)), None)


def is_free(name: str) -> bool:
    """Whether a key may stand in a field, so that no message may show a value of it that is refused."""
    return _rule(name) is not None


def described(name: str, value: Any, where: str = "") -> str:
    """The beginning of a sentence about a value that is refused: "`field` is 5", of a free field "`field` is a number".
    `where` says where it stands."""
    if is_free(name):
        return f"`{name}` is {kind_of(value)}{where} {NOT_SHOWN}"
    return f"`{name}` is {value!r}{where}"


def shown(name: str, value: Any) -> Any:
    """What a table may show of the value of a field."""
    rule = _rule(name)
    return value if rule is None or value is None else recorded(value, rule)


def has_hidden(words: Iterable[str]) -> bool:
    """Whether a command line holds a value that may not be shown."""
    for name, text in _values(words):
        value: Any = text
        with suppress(ValueError, RecursionError):
            value = json.loads(text)
        if shown(name, value) != value:
            return True
    return False


def free_name(words: Iterable[str], word: str) -> str | None:
    """The free field behind which a word of a command line stands, if it is one of the value's: a shell splits JSON that is
    not in quotes."""
    return next((name for name, text in _values(words) if text == word and is_free(name)), None)


def _values(words: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The values of a command line, each with the name of its field."""
    name = ""
    for word in words:
        if word.startswith("--"):
            key, equals, text = word[2:].partition("=")
            name = key.replace("-", "_")
            if equals:
                yield name, text
        else:
            yield name, word
