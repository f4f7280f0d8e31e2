"""Answers without a text in a folder of pairs: what they are due to, so that they are asked for again when it changes."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl_kd.sampling.recorded import recorded_description


NULLS = """
CREATE {}TABLE IF NOT EXISTS nulls (
    source TEXT NOT NULL, prompt BLOB NOT NULL, sample INTEGER NOT NULL, cause TEXT NOT NULL,
    PRIMARY KEY (source, prompt, sample)) WITHOUT ROWID;
"""
"""Answers without a text, and what each is due to: the settings of its source, as JSON."""

Causes = Callable[[str | None], Mapping[str, Any]]
"""What answers without a text, by their finish reason, are due to besides what their source says of itself."""


def as_cause(description: Any, causes: Mapping[str, Any]) -> str:
    """What an answer without a text is due to, as it is stored: what its source says of itself, and further `causes`."""
    return json.dumps({**(description or {}), **causes}, sort_keys=True)


def recorded_cause(cause: str) -> str:
    """A stored cause without what is not recorded any more, see [`~trl_kd.sampling.recorded`]."""
    return json.dumps(recorded_description(json.loads(cause)), sort_keys=True)


def nulls_of(source: str, description: Any) -> tuple[str, Sequence[tuple]]:
    """A statement that takes the answers without a text that a former version has stored into the table of these, and its
    values. Their causes hold no address: what a server refused is asked for again, since that version blamed prompts for
    contexts that the settings had broken."""
    return (
        "INSERT OR IGNORE INTO nulls SELECT source, prompt, sample, ? FROM answers WHERE source = ? AND text = 'null'",
        [(as_cause(description, {}), source)],
    )
