"""`trl-kd pairs --dry_run`: one answer of each source and one label, and what all that is missing would take."""

import math
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from trl_kd.pairs.checks import CHECKED_ROWS, check_kinds, check_parts
from trl_kd.pairs.labels import Labeller, describe_preference
from trl_kd.pairs.pairing import Candidate, PairingSettings, PromptPairs, choose_pairs, make_candidates
from trl_kd.pairs.prompts import PromptRow, read_prompts
from trl_kd.pairs.readonly_store import StoredAnswers
from trl_kd.pairs.statistics import content_text
from trl_kd.sampling import Answer, Request
from trl_kd.sampling.budget import Usage
from trl_kd.sampling.sampler import as_counted


COUNTED = 1000
"""Prompts of a stream that are counted."""

ASSUMPTIONS = (
    "Assumed: every other answer and label takes as long and as many tokens as the one shown, each in a request of its own; "
    "servers work on `max_concurrency` of them at once, models here on one (several at once are faster); no texts are equal."
)

Sources = dict[str, tuple[Any, int]]
Table = list[tuple[str, str]]


@dataclass
class Cost:
    """What something takes: `seconds`, `tokens` and money (`None` where that is not known), and whether it is at most so."""

    seconds: float = 0.0
    tokens: int | None = 0
    money: float = 0.0
    is_bound: bool = False

    def __add__(self, other: "Cost") -> "Cost":
        known = self.tokens is not None and other.tokens is not None
        tokens = (self.tokens or 0) + (other.tokens or 0) if known else None
        return Cost(self.seconds + other.seconds, tokens, self.money + other.money, self.is_bound or other.is_bound)

    def __str__(self) -> str:
        told = f"{'at most' if self.is_bound else 'about'} {_duration(self.seconds)}"
        if self.tokens is None:
            told += ", tokens unknown"
        elif self.tokens:
            told += f", about {self.tokens:,} tokens"
        return told + (f", cost about {self.money:{',.2f' if self.money > 0.1 else '.2g'}}" if self.money else "")


def dry_run(
    prompts: Dataset | IterableDataset,
    sources: Sources,
    preference: Any,
    pairing: PairingSettings,
    output_dir: str | Path,
    shard: tuple[int, int] | None = None,
    relabel: bool = False,
) -> str:
    """
    Asks each source for one answer, of those that the folder lacks, and labels the pair. Nothing is written.

    Args:
        prompts, preference, output_dir, shard, relabel:
            As `build_pairs` takes them.
        sources (`dict`):
            The samplers of `"teacher"` and `"student"`, each with the number of its samples.
        pairing ([`~trl_kd.pairs.pairing.PairingSettings`]):
            How answers become pairs.

    Returns:
        A table.

    Raises:
        `ValueError`, `StoreError`, or what a source raises: as `build_pairs` would.
    """
    check_parts(next(read_prompts(prompts, batch_size=CHECKED_ROWS)), sources, preference)
    check_kinds(prompts, sources, preference)
    settings = {source: sampler.describe() for source, (sampler, _) in sources.items()}
    with closing(StoredAnswers(output_dir)) as stored:
        settings |= {"preference": describe_preference(preference), "shard": None if shard is None else list(shard)}
        stored.check_settings(settings, relabel)
        work = _Work(prompts, sources, shard, stored)
        table: Table = [("prompts", work.told), ("shown", f"row {work.row.index}: {_short(work.row.prompt)}")]
        costs, answers = [], {}
        for source in sources:
            answers[source], cost, lines = _ask(source, sources, work, stored)
            costs.append(cost)
            table += lines
        candidates = make_candidates(
            work.row.prompt, [answers["teacher"]], [answers["student"]], pairing.truncated, pairing.reasoning
        )
        cost, lines = _label(work, candidates, sources, preference, pairing, stored)
    table += [*lines, ("in all", f"{sum([*costs, cost], Cost())}")]
    width = max(len(name) for name, _ in table)
    shown = [f"  {name:<{width}}  {value}" for name, value in table]
    return "\n".join(["Dry run: one answer of each source, and nothing is written.", *shown, ASSUMPTIONS])


def ask_teacher(prompts: Dataset | IterableDataset, sampler: Any, folder: str | Path) -> Table:
    """
    Asks a teacher alone for one answer, of those that the folder of a training lacks. Nothing is written.

    Returns:
        The row that is shown, the answer, and what all that are missing would take.

    Raises:
        `ValueError`, `StoreError`, or what the teacher raises.
    """
    with closing(StoredAnswers(folder)) as stored:
        nobody: dict[str, Any] = {}
        stored.check_settings({"teacher": sampler.describe(), "student": nobody, "preference": nobody})
        sources = {"teacher": (sampler, 1)}
        work = _Work(prompts, sources, None, stored)
        _, _, table = _ask("teacher", sources, work, stored)
    return [("shown", f"row {work.row.index}: {_short(work.row.prompt)}"), *table]


class _Work:
    """What there is to do: how many `prompts`, how many answers of each source are `missing`, and the `row` to show, the
    first that lacks an answer."""

    def __init__(
        self,
        prompts: Dataset | IterableDataset,
        sources: Sources,
        shard: tuple[int, int] | None,
        stored: StoredAnswers,
    ):
        is_stream = isinstance(prompts, IterableDataset)
        self.prompts = 0
        self.missing = {source: 0 for source, (sampler, _) in sources.items() if not sampler.is_lookup}
        lacking: dict[str, PromptRow] = {}
        first: PromptRow | None = None
        seen: set[str] = set()
        for rows in read_prompts(prompts.take(COUNTED) if is_stream else prompts, shard):
            self.prompts += len(rows)
            first = first or next(iter(rows), None)
            fresh: dict[str, PromptRow] = {}
            for row in rows:  # equal prompts share their answers
                if row.key not in seen:
                    fresh.setdefault(row.key, row)
            seen.update(fresh)
            for source in self.missing:
                sampler, samples = sources[source]
                missing = stored.missing(source, list(fresh), samples, getattr(sampler, "causes", None))
                self.missing[source] += sum(map(len, missing.values()))
                if missing:
                    lacking.setdefault(source, fresh[next(iter(missing))])
        if first is None:
            raise ValueError(f"`shard` is {shard!r}, which holds none of the {'first ' if is_stream else ''}prompts.")
        self.row = lacking.get("teacher") or lacking.get("student") or first
        self.told = f"{self.prompts:,}"
        if is_stream:
            self.told += f" (a stream: what stands below is for these, of the first {COUNTED:,})"


def _ask(source: str, sources: Sources, work: _Work, stored: StoredAnswers) -> tuple[Answer, Cost, Table]:
    """An answer to the row that is shown, what all that are missing would take, and the lines that say so."""
    sampler, samples = sources[source]
    row, remaining = work.row, work.missing.get(source, 0)
    if not sampler.is_lookup and not remaining:
        answer = as_counted(row.prompt, stored.answers(source, [row.key], 1)[row.key][0])
        return answer, Cost(), [(source, _said(answer)), ("", "all answers are stored")]
    causes = getattr(sampler, "causes", None)
    sample = 0 if sampler.is_lookup else stored.missing(source, [row.key], samples, causes).get(row.key, (0,))[0]
    with _Measured(sampler) as measured:
        request = Request(
            f"{row.key}/{row.index}" if sampler.is_lookup else row.key, row.prompt, (sample,), row.columns
        )
        with closing(sampler.sample([request])) as answering:
            _, _, answer = next(answering)
    if sampler.is_lookup:
        return answer, Cost(), [(source, _said(answer))]
    cost = measured.cost(remaining, answer.tokens)
    all_of_them = work.prompts * samples
    told = f"{remaining:,} answers to ask" + (f" of {all_of_them:,}" if remaining < all_of_them else "")
    return answer, cost, [(source, _said(answer)), ("", f"{told}: {cost}")]


def _label(
    work: _Work,
    candidates: list[Candidate],
    sources: Sources,
    preference: Any,
    pairing: PairingSettings,
    stored: StoredAnswers,
) -> tuple[Cost, Table]:
    """The same for labels."""
    if len(candidates) < 2:
        told = (
            "no pair to label (an answer has no text, or was cut off and dropped), so that labels are not in the sum"
        )
        return Cost(), [("preference", told)]
    is_lookup = getattr(preference, "is_lookup", False)
    remaining = 0 if is_lookup else max(_labels(work, sources, preference, pairing) - stored.label_count(), 0)
    prompt = PromptPairs(work.row.key, work.row.prompt, candidates, [(0, 1)])
    labeller = Labeller(preference, None if is_lookup or remaining else stored)
    with _Measured(preference) as measured:
        asked = labeller.label([work.row], [prompt])
    table = [("preference", _verdict(prompt, preference))]
    if is_lookup:
        return Cost(), table
    if not remaining:
        return Cost(), [*table, ("", "all labels are stored")]
    told = f"at most {remaining:,} {'scores' if labeller.is_scored else 'labels'} to get"
    if not asked:
        return Cost(), [*table, ("", f"{told}, which are not in the sum")]
    cost = measured.cost(remaining / asked, 0)
    return cost, [*table, ("", f"{told}: {cost}")]


def _labels(work: _Work, sources: Sources, preference: Any, pairing: PairingSettings) -> int:
    """How many scores or labels there are if no two answers to a prompt are equal."""
    everyone = [Candidate("teacher", f"t{sample}") for sample in range(sources["teacher"][1])]
    everyone += [Candidate("student", f"s{sample}") for sample in range(sources["student"][1])]
    pairs = choose_pairs(work.row.key, everyone, pairing)
    each = {i for pair in pairs for i in pair} if Labeller(preference).is_scored else pairs
    return work.prompts * len(each)


def _verdict(prompt: PromptPairs, preference: Any) -> str:
    teacher, student = prompt.candidates
    if teacher.text == student.text:
        return "null: the texts are equal, and teach imitation only"
    if prompt.scores is None:
        label, scores = prompt.labels[0, 1], ""
    else:
        label = preference.prefer(*prompt.scores)
        scores = f" (scores {' and '.join('unknown' if s is None else f'{s:g}' for s in prompt.scores)})"
    return f"P(teacher ≻ student) = {'unknown' if label is None else f'{label:g}'}{scores}"


class _Measured:
    """Time and use of one thing asked of a source or preference, its loading apart. Gives its memory back at the end."""

    def __init__(self, part: Any):
        self._part = part
        self._loads = callable(getattr(part, "load", None))

    def __enter__(self) -> "_Measured":
        start = time.monotonic()
        if self._loads:
            self._part.load()
        self._start = time.monotonic()
        self._loading = self._start - start
        usage = getattr(self._part, "usage", None)
        self._before = replace(usage) if isinstance(usage, Usage) else None
        return self

    def __exit__(self, *_: object) -> None:
        self._seconds = time.monotonic() - self._start
        if callable(getattr(self._part, "close", None)):
            self._part.close()

    def cost(self, times: float, tokens: int | None) -> Cost:
        """What `times` as many would take, if one has `tokens` where no server counts them."""
        at_once = getattr(getattr(self._part, "client", None), "capacity", 1)
        seconds = self._loading + self._seconds * math.ceil(times / at_once)
        if self._before is None:
            return Cost(seconds, None if tokens is None else round(tokens * times), is_bound=self._loads)
        used: Usage = self._part.usage - self._before
        counted = None if used.unreported else round((used.prompt_tokens + used.completion_tokens) * times)
        return Cost(seconds, counted, used.cost * times)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 1 else "a second"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _said(answer: Answer) -> str:
    said = f": {_short(answer.said)}" if answer.said else ""
    return _short(answer.text) + (f" ({answer.finish_reason})" if answer.finish_reason else "") + said


def _short(text: Any) -> str:
    """A text, or messages, on one line."""
    if text is None:
        return "no answer"
    if not isinstance(text, str):
        text = " / ".join(f"{message.get('role')}: {content_text(message.get('content'))}" for message in text)
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:100]} …"
