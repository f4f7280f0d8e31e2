"""Fields that a row does not have, and that its table filled with nulls."""

from typing import Any


def without_nulls(value: Any) -> Any:
    """Leaves out fields that are null, at any depth: Arrow adds them where messages or tools have different fields, and
    templates would print them, and servers refuse them."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
