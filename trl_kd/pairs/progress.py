"""What is seen of a build while it runs, and a garbage collector that does not slow it down."""

import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm


class Bar(tqdm):
    """Safe for threads: a sampler may read its requests, and so skip what is stored, in another than ours."""

    def update(self, n: float | None = 1) -> bool | None:
        with self.get_lock():
            return super().update(n)

    def skip(self, count: int) -> None:
        """Moves on without counting it as progress of this run, which would flatter the rate."""
        with self.get_lock():
            if self.disable:
                return
            self.initial += count
            self.n += count
            self.last_print_n += count
            self.refresh()


def show_cost(bar: Bar, source: Any) -> None:
    """Shows what a source or judge has cost, beside the bar."""
    cost = getattr(getattr(source, "usage", None), "cost", None)
    if cost:
        bar.set_postfix_str(f"cost so far {cost:.4g}", refresh=False)


@contextmanager
def rare_collection() -> Iterator[Callable[[], int]]:
    """Takes the search for garbage in cycles into its own hands: many small objects live for a moment here, and the search
    would take 40 % of the time. Yields a function to call for each batch; at every 20th it looks at what is new since the
    start."""
    was_enabled, batches = gc.isenabled(), itertools.count(1)
    gc.disable()
    gc.freeze()
    try:
        yield lambda: gc.collect() if next(batches) % 20 == 0 else 0
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
