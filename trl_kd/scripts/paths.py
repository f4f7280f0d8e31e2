"""Paths in arguments: a `~` is resolved once, where arguments are read, and a name is refused that a library would take for
something else."""

import errno
import os
import re
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

from trl_kd.scripts.errors import InputError


FIELDS = frozenset(
    (
        *("output_dir", "resume_from_checkpoint", "pairs_config", "accelerate_config", "deepspeed", "fsdp_config"),
        *("accelerator_config", "dataset_name", "preference_dataset", "merge", "judge_template"),
        *("model_name_or_path", "teacher_model_name_or_path", "reward_model_name_or_path", "reward_funcs"),
        *("teacher", "student", "teacher_adapter", "student_adapter", "preference", "preference_tokenizer"),
    )
)
"""Arguments of the commands that may be paths, or hold one behind the name of a kind (`"reward_model:~/model"`)."""

_KIND = re.compile(r"((?:vllm|verifier|function|reward_model|likelihood):)?(.*)", re.DOTALL)


def reader(field: str) -> Callable[[str], str]:
    """What makes of a word of the command line the value of `field`, a path."""
    return partial(resolved, field)


def resolved(field: str, value: str) -> str:
    """
    The value of `field`, with the home folder in place of `~`. It means the same wherever it is read from here on: nothing
    behind this expands it once more.

    Raises:
        `InputError`: `~name` of nobody, or characters that no path can have.
    """
    match = _KIND.fullmatch(value)
    assert match is not None
    kind, path = match[1] or "", match[2]
    if "\0" in path:
        raise InputError(f"`{field}` is {value!r}: no path has a NUL character, leave it out.")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise InputError(f"`{field}` is {value!r}, which is not UTF-8: rename the file or folder.") from None
    written_out = os.path.expanduser(path)
    if written_out.startswith("~"):
        user = path.split("/")[0]
        raise InputError(
            f"`{field}` is {value!r}: there is no user {user[1:]!r} here. A file or folder of that name is './{path}'."
        )
    if not path.startswith("{"):  # JSON in place of its file
        try:
            os.lstat(written_out)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise InputError(
                    f"`{field}` is {value!r}, which no path can be ({error.strerror}): shorten it."
                ) from None
    if os.path.normpath(written_out).startswith("~"):  # `./~name`, which libraries make `~name` and expand
        written_out = os.path.abspath(written_out)
    return kind + written_out


def check_name(field: str, value: str) -> None:
    """Raises for a path in which `datasets` would read the address of something else."""
    if "::" in os.path.abspath(value) or "://" in value:
        raise InputError(
            f"`{field}` is {value!r}: `datasets` reads '::' and '://' in a path as an address, so that nothing could be "
            "loaded from there. Give a folder of this machine without them."
        )
    if os.path.expandvars(value) != value:
        raise InputError(
            f"`{field}` is {value!r}: `datasets` puts a variable of the environment in place of '$' and its name, so that "
            "nothing could be loaded from there. Write the folder out, or give another."
        )


def nearest_folder(path: Path) -> Path:
    """
    What exists of a path: itself, or the nearest folder above it.

    Raises:
        `OSError`: it cannot be looked at, or is a link to nothing.
    """
    while True:
        try:
            os.stat(path)
            return path
        except (FileNotFoundError, NotADirectoryError):
            if path.is_symlink() or path == path.parent:
                raise
            path = path.parent


def shell(*words: str) -> str:
    """A command as it can be pasted into a shell."""
    return shlex.join(words)


def option(name: str, value: str) -> list[str]:
    """A key with its value, as words; a value that looks like a key is joined to it."""
    return [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]
