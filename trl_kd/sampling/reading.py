"""Reads what is to be asked in a thread of its own, so that answers which have arrived do not wait for a slow source."""

import queue
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass
class Read:
    """What came of reading one item: the `item`; or, where the source `is_over`, what it raised, if it did."""

    item: Any = None
    is_over: bool = False
    error: BaseException | None = None


class Reader:
    """
    Reads an item, in a thread, whenever it is asked for one, and puts a [`Read`] where results arrive.

    Args:
        items (`Iterable`):
            The source. An item that is being read when the reader is closed is read to its end, and dropped.
        arrivals (`queue.SimpleQueue`):
            Where the item goes.
    """

    def __init__(self, items: Iterable[Any], arrivals: queue.SimpleQueue):
        self._items = iter(items)
        self._arrivals = arrivals
        self._wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        # A daemon: neither an error nor the end of the program waits for a source that takes long
        threading.Thread(target=self._run, name="trl-kd-reader", daemon=True).start()

    def want(self) -> None:
        """Asks for one more item."""
        self._wanted.put(True)

    def close(self) -> None:
        self._wanted.put(False)

    def _run(self) -> None:
        while self._wanted.get():
            try:
                read = Read(next(self._items))
            except StopIteration:
                read = Read(is_over=True)
            except BaseException as error:
                read = Read(is_over=True, error=error)
            self._arrivals.put(read)
