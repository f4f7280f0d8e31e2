"""The database of a folder: opened by one process, written in transactions, and safe from a disk that fills up."""

import logging
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from trl_kd.pairs.filesystems import is_network_folder
from trl_kd.pairs.full_disk import RESERVE_BYTES, Reserve, disk_full, full_disk_said, is_disk_full
from trl_kd.pairs.lock import lock_folder
from trl_kd.pairs.null_causes import NULLS
from trl_kd.pairs.places import StoreError, check_file, make_folder, quoted
from trl_kd.pairs.stored_values import StoredValues, check_database


logger = logging.getLogger(__name__)

DATABASE = "answers.db"

TABLES = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answers (
    source TEXT NOT NULL, prompt BLOB NOT NULL, sample INTEGER NOT NULL, text TEXT NOT NULL, finish_reason TEXT,
    tokens INTEGER, PRIMARY KEY (source, prompt, sample));
CREATE TABLE IF NOT EXISTS labels (
    preference BLOB NOT NULL, key BLOB NOT NULL, value REAL, PRIMARY KEY (preference, key)) WITHOUT ROWID;
"""
FORMAT = 1
_CHECKED_BYTES = 64 * 2**20

Statement = tuple[str, Sequence[tuple]]
"""One of SQL, and the rows that it is executed with."""


class Database:
    """
    Opens the database of a folder, and holds the lock that keeps a second process out.
    See [`~trl_kd.pairs.store.AnswerStore`].

    Args:
        folder (`str` or `Path`):
            The folder; made if it does not exist.
        made (`Sequence[str | Path]`, *optional*):
            What is made of its content elsewhere.
    """

    def __init__(self, folder: str | Path, made: Sequence[str | Path] = ()):
        self.path = Path(folder) / DATABASE
        self._made = [Path(place) for place in made]
        self._values = StoredValues(self.path)
        self._mutex = threading.RLock()  # a sampler may read its requests in a thread of its own
        self._timer: threading.Timer | None = None
        self._held: list[tuple[Statement, ...]] = []  # not committed yet
        self._is_full = False
        self._failure: StoreError | None = None  # of a commit in a thread of its own
        self._connect()

    def _connect(self) -> None:
        """Claims the folder and opens its database."""
        folder = self.path.parent
        check_file(self.path, "the stored answers")
        with full_disk_said(folder):
            make_folder(folder)
            self._lock = lock_folder(folder)
        try:
            with full_disk_said(folder):
                self._reserve = Reserve(folder)
            self._was_there = self.path.exists()
            if not self._was_there:
                self._warn_of_absence()
            with self._guard():
                self._connection = sqlite3.connect(
                    self.path, timeout=30, isolation_level=None, check_same_thread=False
                )
                try:
                    self._open()
                except BaseException:
                    self._connection.close()
                    raise
        except BaseException:
            if hasattr(self, "_reserve"):
                self._reserve.free()
            self._lock.close()
            raise

    def _open(self) -> None:
        execute = self._connection.execute
        check_format(self._connection, self.path, self._finished() if self._was_there else ())
        self._is_grouped = is_network_folder(self.path.parent)
        execute(f"PRAGMA journal_mode = {'DELETE' if self._is_grouped else 'WAL'}")
        # A killed process loses nothing that is committed; under WAL a power cut may cost what the system holds in memory
        execute("PRAGMA synchronous = NORMAL")
        execute("PRAGMA secure_delete = ON")  # what is forgotten is not left in the file
        if self.path.stat().st_size <= _CHECKED_BYTES:
            found = execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise self._damaged(found)
        self._connection.executescript(TABLES + NULLS.format(""))
        execute(f"PRAGMA user_version = {FORMAT}")

    def _warn_of_absence(self) -> None:
        finished = next(self._finished(), None)
        if finished is not None:
            logger.warning(
                f"`{self.path}` is not there, though `{finished}` was made of what it held: that is asked for, and paid, "
                "again. To prevent this, stop this run, delete the file and put a copy of the former one back."
            )

    def _finished(self) -> Iterator[Path]:
        """What was made of the answers."""
        yield from self.path.parent.glob("data/train-*.parquet")
        yield from (place for place in self._made if place.exists())

    @contextmanager
    def _guard(self) -> Iterator[None]:
        with self._mutex:
            try:
                yield
            except sqlite3.DatabaseError as error:
                raise self._said(error) from error

    def _said(self, error: sqlite3.DatabaseError) -> StoreError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if is_disk_full(error, self.path.parent):
            return disk_full(self.path.parent, RESERVE_BYTES)
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return self._damaged(str(error))
        return StoreError(f"`{self.path}` cannot be read or written: {error}. What it holds was left as it is.")

    def _damaged(self, found: str) -> StoreError:
        found, path, moved = " ".join(found.split()), quoted(self.path), self.path.with_name(f"{DATABASE}.damaged")
        return StoreError(
            f"`{self.path}` is damaged ({found}); it was left as it is. Save what is readable with `sqlite3 {path} "
            f".recover`, or move it away (`mv {path} {quoted(moved)}`, and `{DATABASE}-wal` if it is there) to ask "
            "everything anew."
        )

    def _write(self, *statements: Statement) -> None:
        """Executes statements, each with its rows, in one transaction."""
        with self._guard():
            self._held.append(statements)
            try:
                self._execute(statements)
            except sqlite3.Error as error:
                self._recover(error)
                return
            except BaseException:  # all of the statements or none, also where Ctrl-C comes between them
                self._store_again(self._held[:-1])
                raise
            if not self._is_grouped or _rows(self._held) >= 64:
                self.commit()
            elif self._timer is None:
                self._timer = threading.Timer(1.0, self._commit_later)
                self._timer.daemon = True
                self._timer.start()

    def _execute(self, statements: Iterable[Statement]) -> None:
        if not self._connection.in_transaction:
            self._connection.execute("BEGIN IMMEDIATE")
        for statement, rows in statements:
            self._connection.executemany(statement, rows)

    def _commit_later(self) -> None:
        try:
            self.commit()
        except StoreError as error:  # nobody would hear it here
            self._failure = error

    def commit(self) -> None:
        """Writes what is still held back, and what else belongs to it."""
        with self._guard():
            if self._timer is not None:
                self._timer.cancel()
            self._timer = None
            try:
                self._commit()
            except sqlite3.Error as error:
                self._recover(error)

    def _commit(self) -> None:
        self._before_commit()
        if self._connection.in_transaction:
            self._connection.execute("COMMIT")
        self._held = []

    def _recover(self, error: sqlite3.Error) -> None:
        """After a write that failed: stores again what is held back, on a full disk in the place of the reserve, or all but
        the last write, which may be at fault by itself. Raises where anything is lost."""
        held = self._held
        is_full = is_disk_full(error, self.path.parent)
        if is_full:
            self._reserve.free()
        tries = [held, held[:-1]] if is_full else [held[:-1]]
        stored = next((some for some in tries if self._store_again(some)), [])
        self._held = []
        if not is_full:
            raise error
        self._is_full = True
        self.check_space(_rows(held) - _rows(stored))

    def _store_again(self, groups: list[tuple[Statement, ...]]) -> bool:
        """Stores what is held back in a transaction of its own. Returns whether it could."""
        try:
            self._roll_back()
            for statements in groups:
                self._execute(statements)
            self._commit()
        except sqlite3.Error:
            self._roll_back()
            return False
        return True

    def _roll_back(self) -> None:
        with suppress(sqlite3.Error):  # SQLite may have done it by itself
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        self._rolled_back()

    def _before_commit(self) -> None:
        """Writes what else belongs into a transaction."""

    def _rolled_back(self) -> None:
        """Forgets that it was written."""

    def check_space(self, lost: int | None = None) -> None:
        """
        Raises once the disk was full. What is under way then is still stored, but nothing else may be asked for.

        Args:
            lost (`int`, *optional*):
                Answers or labels that could not be stored; with 0 nothing is raised.

        Raises:
            `DiskFull`: the disk was full.
        """
        if self._failure is not None:
            raise self._failure
        if self._is_full and lost != 0:
            but = f", but for {lost} of the answers or labels, which will be asked for again" if lost else ""
            raise disk_full(self.path.parent, 2 * RESERVE_BYTES, f"What was stored is kept{but}")

    def close(self) -> None:
        """Commits, closes the database and lets other processes in."""
        with ExitStack() as then:  # each of these, also where Ctrl-C comes between them
            then.callback(self._lock.close)
            then.callback(self._reserve.free)
            then.callback(self._disconnect)
            self.commit()

    def _disconnect(self) -> None:
        with self._mutex:  # a reader's thread may be in the middle of a query
            self._connection.close()


def check_format(connection: sqlite3.Connection, path: Path, made: Iterable[Path]) -> int:
    """The format of a database, 0 of one without its tables yet, after what [`check_database`] checks of it."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, FORMAT):
        raise StoreError(
            f"`{path}` has format {version}, and this version of trl-kd reads {FORMAT}: install "
            "the version that wrote it, or give another `output_dir`."
        )
    check_database(connection, path, version, made)
    return version


def _rows(groups: Iterable[Sequence[Statement]]) -> int:
    """Answers or labels in what is held back."""
    return sum(max((len(rows) for _, rows in statements), default=0) for statements in groups)
