"""What stands where a folder of pairs keeps its files, before any of them is opened."""

import json
import os
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class StoreError(OSError):
    """The folder of pairs cannot be written: somebody else does, its disk is full, or its database is damaged."""


def make_folder(folder: Path) -> None:
    """
    Makes an output folder, if it is not there.

    Raises:
        `StoreError`: a file, or a link to nothing, stands in its place or above it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        place = next(
            path for path in [folder, *folder.parents] if (path.exists() or path.is_symlink()) and not path.is_dir()
        )
        raise StoreError(f"`{folder}` cannot be made, since {_what(place)}: give another `output_dir`.") from error


def check_file(path: Path, kept: str) -> None:
    """
    Checks that a file can be written, or is not there, in a folder of pairs.

    Args:
        path (`Path`):
            The file.
        kept (`str`):
            What is kept in it.

    Raises:
        `StoreError`: something else has its name, or a link to nothing.
    """
    if path.is_symlink() and not path.exists():
        raise StoreError(
            f"{_what(path)}. That file holds {kept}: bring it back (mount its disk, say), or "
            "remove the link to begin without."
        )
    if path.exists() and not path.is_file():
        raise StoreError(
            f"{_what(path)}, where the file with {kept} belongs: move it away, or give another `output_dir`."
        )


def check_files(folder: Path, names: Iterable[str]) -> None:
    """Raises as [`check_file`] for files that a run is to write in the end."""
    for name in names:
        check_file(folder / name, "results of this run")


def _what(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return f"`{path}` is a link to `{path.readlink()}`, which is not there"
    return f"`{path}` is a {'folder' if path.is_dir() else 'file' if path.is_file() else 'device or pipe'}"


def quoted(path: Path) -> str:
    """A path as a word of a command that can be pasted into a shell, and as none of its options."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives another name to write a file under, which becomes `path` when it is whole. If that fails nothing of it stays."""
    building = path.with_name(f"{path.name}.building")
    try:
        yield building
        os.replace(building, path)
    except BaseException:
        with suppress(OSError):
            building.unlink()
        raise


def read_json_file(path: Path) -> Any:
    """
    A file that a build has written beside its pairs.

    Raises:
        `StoreError`: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(
            f"`{path}` is damaged ({' '.join(str(error).split())}): put a copy of it back, or build the pairs again by the "
            "same command, which asks for nothing that is stored."
        ) from error
