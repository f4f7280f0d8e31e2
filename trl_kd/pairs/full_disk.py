"""A full disk: how it is told from other failures, what is said of it, and the reserve for what is paid for already."""

import errno
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trl_kd.pairs.places import StoreError, check_file


RESERVE = ".reserve"
RESERVE_BYTES = 8 * 2**20
"""Enough for the answers of the requests that are under way at once: 32 of them with 64,000 tokens each, say."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PROBED_BYTES = 2**16
_OF_WRITING = re.compile("(?i)inline_container|PytorchStreamWriter|iostream|writ")
"""What torch's errors of writing say, and numpy's, which have no number either."""


class DiskFull(StoreError):
    """The disk of a folder is full, or a quota is reached."""


def disk_full(
    folder: str | Path,
    needed: int,
    kept: str = "What was stored is kept",
    way_out: str = "free some space and run the same command again",
) -> DiskFull:
    """
    The error of a full disk, in words.

    Args:
        folder (`str` or `Path`):
            The folder that was written to.
        needed (`int`):
            Bytes that must be free to go on.
        kept (`str`, *optional*):
            What is not lost.
        way_out (`str`, *optional*):
            What to do.
    """
    free = free_bytes(folder)
    missing = (
        f"{needed:,} bytes are needed and {free:,} are free, so that {needed - free:,} are missing"
        if free < needed
        else f"{needed:,} bytes are needed, and though {free:,} are free a quota or a limit stops them"
    )
    return DiskFull(f"The disk of `{folder}` is full: {missing}. {kept}: {way_out}.")


def free_bytes(folder: str | Path) -> int:
    """Bytes that are free for us where a folder is, or is to be."""
    path = Path(folder).absolute()
    return shutil.disk_usage(next(place for place in [path, *path.parents] if place.exists())).free


def is_disk_full(error: BaseException | None, folder: str | Path, is_saving: bool = False) -> bool:
    """
    Whether an error comes of a full disk. Where a library hides the number of the error, it is looked whether anything can
    be written.

    Args:
        error (`BaseException`, *optional*):
            The error.
        folder (`str` or `Path`):
            The folder that was written to.
        is_saving (`bool`, *optional*, defaults to `False`):
            Whether nothing but writing was going on: then an error without a number need not speak of it.
    """
    if error is None or isinstance(error, StoreError):
        return isinstance(error, DiskFull)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        return code == sqlite3.SQLITE_FULL or (
            code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and not can_write(folder)
        )
    numbers = re.findall(r"\(os error (\d+)\)", str(error))  # of safetensors and others in Rust
    if numbers:
        return int(numbers[-1]) in _FULL
    if isinstance(error, RuntimeError | OSError) and (is_saving or _OF_WRITING.search(str(error))):
        return is_disk_full(error.__cause__ or error.__context__, folder) or not can_write(folder)
    return False


def can_write(folder: str | Path) -> bool:
    """Whether a little more can be written to a folder."""
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".probe") as file:
            file.write(os.urandom(_PROBED_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno not in _FULL
    return True


@contextmanager
def full_disk_said(folder: str | Path, needed: int = RESERVE_BYTES) -> Iterator[None]:
    """Turns the error of a full disk into a sentence."""
    try:
        yield
    except OSError as error:
        if not isinstance(error, StoreError) and error.errno in _FULL:
            raise disk_full(folder, needed) from error
        raise


class Reserve:
    """
    Space on the disk of a folder that is kept for what is paid for already when the disk fills up.

    Args:
        folder (`Path`):
            The folder, which exists.

    Raises:
        `DiskFull`: there is no room for it.
    """

    def __init__(self, folder: Path):
        self._path = folder / RESERVE
        check_file(self._path, "the reserve for a full disk")
        try:
            with self._path.open("wb") as file:
                _allocate(file.fileno())
        except OSError as error:
            self.free()
            if error.errno in _FULL:
                raise disk_full(folder, RESERVE_BYTES) from error
            raise

    def free(self) -> bool:
        """Gives the space back. Returns whether there was any."""
        with suppress(OSError):
            self._path.unlink()
            return True
        return False


def _allocate(descriptor: int) -> None:
    """Takes the space of a reserve."""
    if hasattr(os, "posix_fallocate"):
        try:
            return os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
        except OSError as error:
            if error.errno in _FULL:
                raise
    os.pwrite(descriptor, os.urandom(RESERVE_BYTES), 0)  # nothing that a file system would compress
