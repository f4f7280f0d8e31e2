"""What is seen of a build while it runs, and a garbage collector that does not slow it down."""

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

from trl_kd.sampling import Answer, Sampler


_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt}{unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Bar(tqdm):
    """Safe for threads: a sampler may read its requests, and so skip what is stored, in another than ours."""

    def __init__(self, desc: str, total: int | None, unit: str, disable: bool, **options: Any):
        super().__init__(
            desc=desc, total=total, unit=unit, disable=disable, bar_format=_FORMAT, smoothing=0.05, **options
        )

    def answered(self, answers: Sequence[Answer]) -> None:
        """Moves on by answers that have come."""
        self.update(len(answers))

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


class TokenBar(Bar):
    """
    Moves by the tokens of answers while these are drawn, up to what all of them can come to have: an answer that ends
    earlier takes the rest of its tokens off the total.

    Args:
        answers (`int`, *optional*):
            How many there are to be.
        longest (`int`):
            Most tokens of each.
    """

    def __init__(self, desc: str, answers: int | None, longest: int, disable: bool):
        self._answers, self._done, self._longest = answers, 0, longest
        total = None if answers is None else answers * longest
        super().__init__(desc, total, " tokens", disable, unit_scale=True)

    def answered(self, answers: Sequence[Answer]) -> None:
        self._end(len(answers), sum(self._longest - (answer.tokens or 0) for answer in answers))

    def skip(self, count: int) -> None:
        self._end(count, count * self._longest)

    def _end(self, answers: int, unused: int) -> None:
        with self.get_lock():
            if self.disable:
                return
            self._done += answers
            if self.total is not None:
                self.total -= unused
            of = "" if self._answers is None else f" of {self._answers:,}"
            self.set_postfix_str(f"{self._done:,}{of} answers")


@contextmanager
def answer_bar(sampler: Sampler, source: str, answers: int | None, is_shown: bool) -> Iterator[Bar]:
    """A bar for the answers of a source, of which so many are wanted; it moves by their tokens where the sampler tells of
    these."""
    name = f"{source} answers"
    if not hasattr(sampler, "on_tokens"):
        with Bar(name, answers, " answers", not is_shown) as bar:
            yield bar
        return
    with TokenBar(name, answers, sampler.settings.max_new_tokens, not is_shown) as bar:  # type: ignore[attr-defined]
        sampler.on_tokens = bar.update
        try:
            yield bar
        finally:
            sampler.on_tokens = None


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
