"""One process at a time writes a folder, and others can see whether it still does."""

import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from trl_kd.pairs.places import StoreError, check_file, make_folder


LOCK = "_lock"
"""Uploads of trainers to the Hub leave out names that begin with an underscore."""

BEAT, SILENCE = 5.0, 45.0
"""Seconds between two beats of a lock, and without one after which another host takes its owner for dead."""


class FolderLock:
    """
    What [`lock_folder`] returns. A file in the folder names who has it.

    Attributes:
        owner (`str`):
            This process, as the file names it: `pid@host`, and what for.
    """

    def __init__(self, folder: str | Path, purpose: str = ""):
        self.owner = f"{os.getpid()}@{socket.gethostname()} {purpose}".strip()
        self._path = Path(folder) / LOCK
        check_file(self._path, "the lock of the folder")
        self._lock = _lock_file(self._path)
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
        self._write(self.owner)

    def _held(self, folder: str | Path) -> StoreError:
        pid, host = _split(_owner(self._path) or "")
        where = f" on the host {host}" if host and host != socket.gethostname() else ""
        return StoreError(
            f"`{folder}` is being written by process {pid or '(unknown)'}{where}: let it end, or give another `output_dir`."
        )

    def _write(self, owner: str) -> None:
        with suppress(
            OSError
        ):  # Windows lets nobody write a locked file, and a disk may be full: the lock itself holds
            self._path.write_text(owner, encoding="utf-8")

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Tells other hosts, which may not see the lock, that its owner lives: a thread touches the file all the time, which
        takes no room on a full disk."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(BEAT):
                with suppress(OSError):
                    os.utime(self._path)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def remove(self) -> None:
        """Lets other processes in, and leaves no file behind."""
        if self._lock.is_locked:
            with suppress(OSError):
                self._path.unlink()  # while it is locked: who has opened it finds that it is gone, and makes another
            self._lock.release()

    def close(self) -> None:
        """Lets other processes in."""
        if self._lock.is_locked:
            self._write("")
            self._lock.release()

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def lock_folder(folder: str | Path, purpose: str = "") -> FolderLock:
    """
    Claims a folder, which exists, until the returned lock is closed or the process ends, however it ends. `purpose` is
    written down, where the folder is not one of pairs.

    Raises:
        `StoreError`: another process has it, which the message names with its host, or it may not be written,
        or its file system knows no locks.
    """
    return FolderLock(folder, purpose)


def check_unclaimed(folder: str | Path) -> None:
    """Raises as [`lock_folder`] if another process has claimed a folder. Nothing is written where none has."""
    if (Path(folder) / LOCK).is_file():
        lock_folder(folder).remove()  # what a process has left that was killed


@contextmanager
def hold_folder(folder: str | Path, purpose: str) -> Iterator[FolderLock]:
    """
    Makes a folder and claims it, as [`lock_folder`] does. Afterwards there is no lock in it, and no folder if nothing was
    written.
    """
    is_new = not Path(folder).exists()
    make_folder(Path(folder))
    lock = lock_folder(folder, purpose)
    try:
        yield lock
    finally:
        lock.remove()
        if is_new:
            with suppress(OSError):
                Path(folder).rmdir()


class LockWatch:
    """
    Whether the process that has claimed a folder has it still, as another process sees it.

    On the same host the lock says so: it ends with its process, however that ends. From another host a lock may not be
    seen, so that the file must be touched all the time there (`beating`); it is not compared with a clock, but looked at
    twice.

    Args:
        folder (`str` or `Path`):
            The folder.
        owner (`str`):
            `owner` of the lock.
    """

    def __init__(self, folder: str | Path, owner: str):
        self.owner = owner
        self._path = Path(folder) / LOCK
        self._is_near = _split(owner)[1] == socket.gethostname()
        self._touched: int | None = None
        self._seen = time.monotonic()

    def is_held(self) -> bool:
        if not self._path.is_file() or _owner(self._path) not in (self.owner, None):
            return False
        return self._is_locked() if self._is_near else self._is_beating()

    def _is_locked(self) -> bool:
        lock = _lock_file(self._path)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return True
        lock.release()
        return False

    def _is_beating(self) -> bool:
        with self._path.open("rb") as file:  # a network file system asks the server anew when a file is opened
            touched = os.fstat(file.fileno()).st_mtime_ns
        if touched != self._touched:
            self._touched, self._seen = touched, time.monotonic()
        return time.monotonic() - self._seen < SILENCE


def _lock_file(path: Path) -> FileLock:
    # A lock that is only a file would outlive a process that is killed. Any thread may close the store
    return FileLock(path, thread_local=False, fallback_to_soft=False)


def _owner(path: Path) -> str | None:
    """Whom the file names; `None` where it cannot be read, as a locked one on Windows."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _split(owner: str) -> tuple[str, str]:
    """Process and host."""
    pid, _, host = owner.partition(" ")[0].partition("@")
    return pid, host
