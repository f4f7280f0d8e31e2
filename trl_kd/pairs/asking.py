"""Asking a source for what is not stored yet: which requests there are, and how answers come."""

from collections.abc import Iterator
from typing import Any

from datasets import Dataset, IterableDataset

from trl_kd.pairs.progress import Bar
from trl_kd.pairs.prompts import PromptRow, read_prompts
from trl_kd.pairs.store import AnswerStore
from trl_kd.sampling import Answer, Request, Sampler


class MissingRequests:
    """The requests for what is not stored of a source's answers, in the order of the prompts and each once, and which of
    them are still without an answer."""

    def __init__(
        self,
        prompts: Dataset | IterableDataset,
        shard: tuple[int, int] | None,
        store: AnswerStore,
        source: str,
        samples: int,
        bar: Bar,
    ):
        self._prompts, self._shard, self._store = prompts, shard, store
        self._source, self._samples, self._bar = source, samples, bar
        self._under_way: dict[str, set[int]] = {}
        self._is_read = False

    def __iter__(self) -> Iterator[Request]:
        for rows in read_prompts(self._prompts, self._shard):
            # Under way first, stored second: an answer that arrives between the two is seen by the second
            fresh: dict[str, PromptRow] = {}
            for row in rows:
                if row.key not in self._under_way:
                    fresh.setdefault(row.key, row)
            missing = self._store.missing(self._source, list(fresh), self._samples)
            self._under_way |= {key: set(samples) for key, samples in missing.items()}
            self._bar.skip(len(rows) * self._samples - sum(map(len, missing.values())))
            for key, samples in missing.items():
                yield Request(key, fresh[key].prompt, samples, fresh[key].columns)
        self._is_read = True

    def answered(self, key: str, sample: int) -> None:
        waiting = self._under_way.get(key, set())
        waiting.discard(sample)
        if not waiting:
            self._under_way.pop(key, None)

    def check(self) -> None:
        """Raises a `RuntimeError` if the source ended before it had answered everything."""
        if self._under_way or not self._is_read:
            missing = sum(map(len, self._under_way.values()))
            raise RuntimeError(
                f"The {self._source} ended without {missing} of the answers that it was asked for. Those that came are "
                "stored: run the same command again for the rest."
            )


def together(sampler: Any, requests: Iterator[Request]) -> Iterator[list[tuple[Request, int, Answer]]]:
    """Answers as they arrive, in lists of those that are stored all or none."""
    replies = getattr(sampler, "sample_replies", None)
    return replies(requests) if callable(replies) else ([answer] for answer in sampler.sample(requests))


def look_up(source: str, sampler: Sampler, samples: int, requests: list[Request]) -> list[list[Answer]]:
    """The answers of a source that reads them, to each of the requests, by sample."""
    given = list(sampler.sample(requests))
    if samples == 1 and [request for request, _, _ in given] == requests:  # in order, as most do: the fast way
        return [[answer] for _, _, answer in given]
    found: dict[str, dict[int, Answer]] = {request.key: {} for request in requests}
    for request, sample, answer in given:
        found[request.key][sample] = answer
    for answers in found.values():
        if len(answers) < samples:
            raise RuntimeError(f"The {source} gave {len(answers)} answers where {samples} were asked for.")
    return [[answers[sample] for sample in range(samples)] for answers in found.values()]
