"""What differs between the settings of a folder and those of a run."""

from collections.abc import Iterator
from itertools import takewhile
from typing import Any


def differences(old: Any, new: Any, name: str) -> Iterator[str]:
    """What differs between two settings that are JSON, a sentence each, which begins with the field's name."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}")
    elif old != new:
        before, after = repr(old), repr(new)
        # Long texts that begin alike are shown from shortly before where they part
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
        start = max(alike - 20, 0)
        yield f"`{name}` was {_part(before, start)} and is {_part(after, start)}"


def _part(text: str, start: int) -> str:
    start = 0 if len(text) <= 60 else start
    return f"{'… ' if start else ''}{text[start : start + 60]}{' …' if len(text) > start + 60 else ''}"


def listed(changes: list[str]) -> str:
    """At most four of what `differences` says, and how many more there are."""
    more = f"; and {len(changes) - 4} more" if len(changes) > 4 else ""
    return f"What differs: {'; '.join(changes[:4])}{more}"
