"""What a folder of pairs holds already, for those who only look."""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

from trl_kd.pairs.database import TABLES, Statement, check_format
from trl_kd.pairs.null_causes import NULLS, nulls_of
from trl_kd.pairs.places import check_file
from trl_kd.pairs.store import AnswerStore
from trl_kd.sampling.budget import Usage


class StoredAnswers(AnswerStore):
    """
    The answers and labels of a folder, read without a lock, also while another process writes them. Nothing is written:
    what it is given to store is dropped.

    Args:
        folder (`str` or `Path`):
            The output folder. One that is not there holds nothing.

    Raises:
        `StoreError`: the database is damaged or of another version.
    """

    _former: tuple[Any, Any] | None = None

    def _connect(self) -> None:
        self._connection = sqlite3.connect(":memory:", isolation_level=None)
        self._connection.executescript(TABLES + NULLS.format(""))
        check_file(self.path, "the stored answers")
        if not self.path.exists():
            return
        # SQLite would make a log in the folder even to read, unless it is told that the file does not change
        is_logged = any(Path(f"{self.path}-{log}").exists() for log in ("wal", "journal"))
        uri = f"file:{quote(str(self.path.absolute()))}?{'mode=ro' if is_logged else 'immutable=1'}"
        with self._guard():
            stored = sqlite3.connect(uri, uri=True, timeout=30, isolation_level=None)
        with self._guard():
            if check_format(stored, self.path, self._finished()):  # or its tables are not made yet
                self._connection = stored

    def close(self) -> None:
        """Closes the database."""
        self._connection.close()

    def answer_count(self, source: str) -> int:
        """How many answers of a source are stored."""
        with self._guard():
            return self._connection.execute("SELECT COUNT(*) FROM answers WHERE source = ?", (source,)).fetchone()[0]

    def commit(self) -> None:
        """There is nothing to commit."""

    def _write(self, *statements: Statement) -> None:
        """Nothing is kept: no answer, no label, no setting."""

    def _forget_keys(self, stored: dict[str, Any], before: dict[str, Any]) -> None:
        """Labels stay under the whole of what their preference has said of itself."""
        self._former = before.get("preference"), stored.get("preference")

    def _key_of(self, preference: Any) -> bytes:
        recorded, stored = self._former or (None, None)
        return super()._key_of(stored if preference == recorded else preference)

    def _know_nulls(self, before: dict[str, Any]) -> None:
        """What the folder does not know of them is known in memory."""
        if self._noted("nulls"):
            return
        with self._guard():
            self._connection.executescript(NULLS.format("TEMP "))
            for source in ("teacher", "student"):
                self._connection.executemany(*nulls_of(source, before.get(source)))


def resume_usage(parts: Sequence[tuple[object, str, Sequence[Path]]]) -> None:
    """
    Lets sources and judges go on from what former runs have used, so that their caps hold for all of them together.

    Args:
        parts (`Sequence[tuple]`):
            A source or judge, which may count its `usage`; its name in the stores; and the folders of these.
    """
    spent: list[tuple[Usage, Usage]] = []
    for part, name, folders in parts:
        usage = getattr(part, "usage", None)
        if isinstance(usage, Usage):
            spent.append((usage, sum((_stored_usage(folder, name) for folder in folders), Usage())))
    for usage, _ in spent:  # two that share a client, from the sum
        usage.resume(sum((stored for other, stored in spent if other is usage), Usage()))


def _stored_usage(folder: Path, name: str) -> Usage:
    with closing(StoredAnswers(folder)) as stored:
        return stored.usage(name)
