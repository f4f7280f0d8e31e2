"""A source that is asked once for each answer, and looked up from then on: what a loop over several builds gives them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_kd.pairs.asking import MissingRequests, together
from trl_kd.pairs.progress import Bar, answer_bar, show_cost
from trl_kd.pairs.prompts import prompt_key, read_prompts
from trl_kd.pairs.readonly_store import StoredAnswers
from trl_kd.pairs.store import AnswerStore
from trl_kd.sampling import Answer, Request, Sampler
from trl_kd.sampling.budget import Usage
from trl_kd.sampling.sampler import as_counted


class FetchedAnswers:
    """
    Answers of a sampler, kept in a folder for good, as a [`Sampler`] that looks them up.

    `fetch` asks for those that the folder lacks. They are stored as they arrive, so that it may be interrupted at any
    moment. What the sampler has used (its `usage`) is kept there too: its caps hold for all that was ever fetched.

    Args:
        sampler (`Sampler`):
            Who answers.
        folder (`str` or `Path`):
            Where the answers are kept; made by the first `fetch`.
        samples (`int`):
            Answers to each prompt.
        source (`str`, *optional*, defaults to `"teacher"`):
            What the sampler is called in the store and in messages.
        made (`Sequence[str | Path]`, *optional*):
            What is made of the answers: where any of it exists, an empty store is refused.
    """

    is_lookup = True

    def __init__(
        self,
        sampler: Sampler,
        folder: str | Path,
        samples: int,
        source: str = "teacher",
        made: Sequence[str | Path] = (),
    ):
        self.sampler = sampler
        self.folder = Path(folder)
        self.samples = samples
        self.source = source
        self.made = made
        self._causes = getattr(sampler, "causes", None)
        self._store: AnswerStore | None = None

    def describe(self) -> dict[str, Any]:
        return self.sampler.describe()

    def fetch(self, prompts: Dataset, show_progress: bool = True, release: bool = True) -> int:
        """
        Asks for every answer to `prompts` that is not stored, and returns how many these were. Then `release` gives back the
        memory of a model that has answered, and lets other processes at the folder; otherwise it stays open for the next
        `fetch`, until [`close`].

        Raises:
            `ValueError`: the folder holds answers that were made with other settings.
            `StoreError`: the folder is in use, damaged, or its disk full.
        """
        asked = 0
        try:
            store = self._opened()
            usage = getattr(self.sampler, "usage", None)
            counting = store.counting(self.source, usage) if isinstance(usage, Usage) else nullcontext()
            total = len(prompts) * self.samples
            with counting, answer_bar(self.sampler, self.source, total, show_progress) as bar:
                requests = MissingRequests(prompts, None, store, self.source, self.samples, bar, self._causes)
                asked = self._ask(requests, store, bar)
            store.commit()
        finally:
            if release:
                self.close()
        close = getattr(self.sampler, "close", None)
        if asked and release and callable(close):
            close()
        return asked

    def _opened(self) -> AnswerStore:
        if self._store is None:
            others: dict[str, Any] = {name: {} for name in ("teacher", "student", "preference") if name != self.source}
            store = AnswerStore(self.folder, self.made)
            try:
                store.check_settings({self.source: self.describe(), **others})
                usage = getattr(self.sampler, "usage", None)
                if isinstance(usage, Usage):
                    usage.resume(store.usage(self.source))
            except BaseException:
                store.close()
                raise
            self._store = store
        return self._store

    def close(self) -> None:
        """Lets other processes at the folder. The next `fetch` opens it again."""
        if self._store is not None:
            self._store.close()
        self._store = None

    def _ask(self, requests: MissingRequests, store: AnswerStore, bar: Bar) -> int:
        reading, asked = iter(requests), 0
        first = next(reading, None)
        if first is None:  # or a model would be loaded for nothing
            return 0
        for answers in together(self.sampler, chain([first], reading), self.source, store.has_texts(self.source)):
            stored = [(request.key, sample, answer) for request, sample, answer in answers]
            store.add_answers(self.source, stored, self._causes)
            for request, sample, _ in answers:
                requests.answered(request.key, sample)
            asked += len(answers)
            bar.answered([answer for _, _, answer in answers])
            show_cost(bar, self.sampler)
        requests.check()
        return asked

    def has_all(self, prompts: Dataset) -> bool:
        """Whether every answer to `prompts` is stored."""
        with closing(StoredAnswers(self.folder)) as stored:
            return not any(
                stored.missing(self.source, [row.key for row in rows], self.samples) for rows in read_prompts(prompts)
            )

    def count(self) -> int:
        """How many answers are stored."""
        with closing(StoredAnswers(self.folder)) as stored:
            return stored.answer_count(self.source)

    def sample(self, requests: Iterable[Request]) -> Iterator[tuple[Request, int, Answer]]:
        given = list(requests)
        keys = [prompt_key(request.prompt, dict(request.columns)) for request in given]
        if self._store is not None:
            answers = self._store.answers(self.source, keys, self.samples)
        else:
            with closing(StoredAnswers(self.folder)) as stored:
                answers = stored.answers(self.source, keys, self.samples)
        for request, key in zip(given, keys, strict=True):
            for sample in request.samples:
                if sample not in answers[key]:
                    raise ValueError(f"Answer {sample} of the {self.source} is not fetched yet: call `fetch` first.")
                yield request, sample, as_counted(request.prompt, answers[key][sample])
