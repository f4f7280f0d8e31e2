"""YAML files of users: a mapping of keys to values, or one sentence that says what is wrong."""

from pathlib import Path
from typing import Any

import yaml

from trl_kd.scripts.errors import InputError, one_line


_UNREADABLE = (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, OSError)
"""What PyYAML raises: of its own for the grammar, and Python's for what only looks like a date or a number, for values that
a tag makes impossible, and for nesting without end."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which PyYAML would take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} stands there twice, drop one of them",
                        problem_mark=key.start_mark,
                    )
                seen.add((key.tag, key.value))
        return node


def read_mapping(field: str, path: str, hint: str) -> dict[Any, Any]:
    """
    Args:
        field (`str`):
            Argument that names the file, in messages.
        path (`str`):
            A file of YAML or JSON, in UTF-8 or UTF-16.
        hint (`str`):
            End of the message to whom gives a file without a mapping.

    Raises:
        `InputError`: no such file, or one that does not hold a mapping.
    """
    if not Path(path).is_file():
        raise InputError(f"`{field}` is {path!r}: no such file.")
    try:
        content = yaml.load(Path(path).read_bytes(), Loader=_Loader)
    except _UNREADABLE as error:
        raise InputError(f"`{field}` is {path!r}, which is not readable as YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"`{field}` is {path!r}, which must hold a mapping{hint}")
    return content
