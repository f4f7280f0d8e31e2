"""Anything as JSON, to be hashed or compared: equal where it is read anew in another process."""

import json
from typing import Any


def to_json(value: Any) -> str:
    """JSON of anything, to be hashed: what JSON has no word for by its bytes, or by its type."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> str:
    if isinstance(value, bytes):
        return value.hex()
    # Dates and decimals read well; the default of most other objects holds an address, which changes with every run
    return str(value) if type(value).__str__ is not object.__str__ else type(value).__qualname__
