"""Messages with calls of tools in Parquet files: as JSON, since the arguments of two calls have no common Arrow type."""

import json
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
from datasets import Features, Json, List

from trl_kd.responses.nulls import without_nulls


JSON_TYPE = Features({"messages": List(Json())}).arrow_schema.field("messages").type
"""Arrow type of such a column, which `load_dataset` gives to messages in a file of JSON lines, too."""

_ANSWERS = {"chosen", "rejected", "teacher"}


def is_json(arrow_type: pa.DataType) -> bool:
    """Whether a column's Arrow type is `JSON_TYPE`."""
    return pa.types.is_list(arrow_type) and arrow_type.value_type == JSON_TYPE.value_type


def have_calls(texts: Iterable[Any]) -> bool:
    """Whether a message of texts or conversations calls a tool."""
    return any(message.get("tool_calls") for text in texts if isinstance(text, list) for message in text)


def json_columns(names: Iterable[str]) -> set[str]:
    """`names` of columns that must be JSON, and those that go with them: a trainer makes a row's `teacher` a `chosen`."""
    found = set(names)
    return found | _ANSWERS if found & _ANSWERS else found


def to_json_array(conversations: Iterable[list[dict[str, Any]] | None]) -> pa.Array:
    """
    An Arrow array of `JSON_TYPE`, which gives the messages back as they are.

    Arguments that the JSON reader of `datasets` would change (integers of more than 64 bits, some floats of 17 digits) or
    refuse are kept as JSON text, as those are that a server gives in broken JSON.
    """
    texts = [None if messages is None else [_encoded(message) for message in messages] for messages in conversations]
    return pa.array(texts, pa.list_(pa.string())).cast(JSON_TYPE)


def as_json(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of messages as JSON. Fields that Arrow filled with nulls are left out."""
    if is_json(column.type):
        return column
    if pa.types.is_null(column.type):
        return pa.chunked_array([pa.nulls(len(column), JSON_TYPE)])
    return pa.chunked_array([to_json_array(without_nulls(column.to_pylist()))], JSON_TYPE)


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    """`table.to_pylist()`, with messages in place of their JSON."""
    rows = table.to_pylist()
    names = [field.name for field in table.schema if is_json(field.type)]
    for row in rows:
        for name in names:
            if row[name] is not None:
                row[name] = [json.loads(message) for message in row[name]]
    return rows


def _encoded(message: dict[str, Any]) -> str:
    text = json.dumps(message)
    if not message.get("tool_calls") or _reads_back(text, message):
        return text
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function") or {}
        arguments = function.get("arguments")
        if not _reads_back(json.dumps(arguments), arguments):
            call = call | {"function": function | {"arguments": json.dumps(arguments)}}
        calls.append(call)
    return json.dumps(message | {"tool_calls": calls})


def _reads_back(text: str, value: Any) -> bool:
    try:
        return bool(Json().decode_example(text) == value)
    except ValueError:
        return False
