"""Which pairs were there before: a set whose memory does not grow without end."""

import sqlite3
from typing import Any


class SeenPairs:
    """
    Pairs by 64 bits of each: a set, and from `in_memory` of them on a temporary file of SQLite's.

    Args:
        in_memory (`int`, *optional*, defaults to `2_000_000`):
            How many are kept in memory, at about 100 bytes each.
    """

    def __init__(self, in_memory: int = 2_000_000):
        self._in_memory = in_memory
        self._seen: set[int] = set()
        self._connection: sqlite3.Connection | None = None

    def are_new(self, rows: list[tuple[str, dict[str, Any]]]) -> list[bool]:
        """Which of the rows are the first of their prompt (given by its key) and their two texts. Remembers them."""
        keys = [_pair_hash(key, pair) for key, pair in rows]
        before = self._seen if self._connection is None else self._find(keys)
        news = []
        for key in keys:
            news.append(key not in before)
            before.add(key)
        if self._connection is not None:
            self._keep(keys)
        elif len(before) >= self._in_memory:
            self._connection = sqlite3.connect("", isolation_level=None)
            self._connection.execute("PRAGMA cache_size = -65536")
            self._connection.execute("CREATE TABLE seen (pair INTEGER PRIMARY KEY)")
            self._keep(sorted(before))
            self._seen = set()
        return news

    def _find(self, keys: list[int]) -> set[int]:
        assert self._connection is not None
        found: set[int] = set()
        for start in range(0, len(keys), 500):
            some = keys[start : start + 500]
            query = f"SELECT pair FROM seen WHERE pair IN ({','.join('?' * len(some))})"
            found.update(key for (key,) in self._connection.execute(query, some))
        return found

    def _keep(self, keys: list[int]) -> None:
        assert self._connection is not None
        self._connection.execute("BEGIN")
        self._connection.executemany("INSERT OR IGNORE INTO seen VALUES (?)", ((key,) for key in keys))
        self._connection.execute("COMMIT")


def _pair_hash(key: str, pair: dict[str, Any]) -> int:
    """64 bits that are equal for one prompt with the same two texts in either order."""
    chosen, rejected = pair["chosen"], pair["rejected"]
    if not isinstance(chosen, str):
        chosen, rejected = repr(chosen), repr(rejected)
    return hash((key, chosen, rejected) if chosen < rejected else (key, rejected, chosen))
