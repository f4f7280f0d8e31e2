"""One process at a time writes a folder."""

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from trl_kd.pairs.places import StoreError, check_file


LOCK = ".lock"


class FolderLock:
    """What [`lock_folder`] returns. A file in the folder names who has it."""

    def __init__(self, folder: str | Path):
        self._owner = Path(folder) / LOCK
        check_file(self._owner, "the lock of the folder")
        # A lock that is only a file would outlive a process that is killed. Any thread may close the store
        self._lock = FileLock(self._owner, thread_local=False, fallback_to_soft=False)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise self._held(folder) from None
        except PermissionError as error:
            raise StoreError(
                f"`{folder}` may not be written ({error}): give another `output_dir`, or change its permissions."
            ) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StoreError(
                f"`{folder}` is on a file system that cannot lock files ({error}): use another."
            ) from error
        self._write(f"{os.getpid()}@{socket.gethostname()}")

    def _held(self, folder: str | Path) -> StoreError:
        try:
            pid, _, host = self._owner.read_text(encoding="utf-8").strip().partition("@")
        except OSError:  # Windows lets nobody read a locked file
            pid, host = "", ""
        where = f" on the host {host}" if host and host != socket.gethostname() else ""
        return StoreError(
            f"`{folder}` is being written by process {pid or '(unknown)'}{where}: let it end, or give another `output_dir`."
        )

    def _write(self, owner: str) -> None:
        with suppress(OSError):  # as above, or a full disk: the lock itself holds
            self._owner.write_text(owner, encoding="utf-8")

    def close(self) -> None:
        """Lets other processes in."""
        if self._lock.is_locked:
            self._write("")
            self._lock.release()

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def lock_folder(folder: str | Path) -> FolderLock:
    """
    Claims a folder, which exists, until the returned lock is closed or the process ends, however it ends.

    Raises:
        `StoreError`: another process has it, which the message names with its host, or it may not be written,
        or its file system knows no locks.
    """
    return FolderLock(folder)
