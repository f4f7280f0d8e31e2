"""From prompts to pairs: answers, labels, rows. Each step reads all prompts, and does what is not done yet."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, IterableDataset

from trl_kd.pairs.asking import MissingRequests, look_up, together
from trl_kd.pairs.checks import CHECKED_ROWS, check_kinds, check_parts
from trl_kd.pairs.dataset import PairWriter, load_pairs, renamed
from trl_kd.pairs.dedup import SeenPairs
from trl_kd.pairs.folder import check_folder
from trl_kd.pairs.labels import Labeller, describe_preference
from trl_kd.pairs.pairing import (
    PairingSettings,
    Policy,
    PromptPairs,
    choose_pairs,
    make_candidates,
    make_rows,
    refuse_reasoning,
)
from trl_kd.pairs.progress import Bar, answer_bar, rare_collection, show_cost
from trl_kd.pairs.prompts import BATCH_SIZE, Fingerprint, PromptRow, read_prompts
from trl_kd.pairs.report import PairReport
from trl_kd.pairs.store import AnswerStore
from trl_kd.preferences import Preference
from trl_kd.sampling import Answer, Request, Sampler
from trl_kd.sampling.budget import Usage
from trl_kd.sampling.sampler import as_counted


def build_pairs(
    prompts: Dataset | IterableDataset,
    *,
    teacher: Sampler,
    student: Sampler,
    preference: Preference,
    output_dir: str | Path,
    num_teacher_samples: int = 1,
    num_student_samples: int = 1,
    policy: Policy = "teacher_vs_student",
    max_pairs_per_prompt: int | None = None,
    truncated: Literal["keep", "drop"] = "keep",
    reasoning: str | None = None,
    seed: int = 0,
    shard: tuple[int, int] | None = None,
    relabel: bool = False,
    label_batch_size: int = 64,
    prompts_from: Mapping[str, Any] | None = None,
    show_progress: bool = True,
) -> Dataset:
    """
    Builds preference pairs of a teacher's and a student's answers in a folder, with a card and a page to look at.

    Answers and labels are kept in `answers.db` of the folder as they arrive. After an interruption, even `kill -9`, the same
    call goes on where it stopped; what was answered is not asked again. What costs nothing to read again (`is_lookup`) is
    not kept. Memory does not grow with the number of prompts.

    What a source or preference has used, where it has a `usage` ([`~trl_kd.sampling.budget.Usage`]), is kept too, and it
    goes on from there: caps hold for all runs into the folder together.

    Args:
        prompts (`Dataset` or `IterableDataset`):
            Rows with a `prompt`, text or messages, and any other columns. A stream is read several times, and must give the
            same rows each time. Equal prompts (with equal `tools`) share their answers.
        teacher, student (`Sampler`):
            Who answers. If a sampler has a `column`, it is the one that it reads, which is then left out of the dataset.
        preference (`Preference`):
            Who says which of two answers is better.
        output_dir (`str` or `Path`):
            The folder. One process at a time writes it.
        num_teacher_samples, num_student_samples (`int`, *optional*, defaults to `1`):
            Answers of each to a prompt. A later call may ask for more.
        policy, max_pairs_per_prompt, truncated, reasoning, seed:
            See [`PairingSettings`]. They may differ from those of a former call.
        shard (`tuple[int, int]`, *optional*):
            `(i, n)` for piece i = 0 … n − 1 of n, each in a folder of its own, for [`merge_shards`].
        relabel (`bool`, *optional*, defaults to `False`):
            Whether to accept another preference than before for the stored answers.
        label_batch_size (`int`, *optional*, defaults to `64`):
            Comparisons given to the preference at once. Their labels are stored together. (A judge's are stored one by one,
            and asked for in larger batches.)
        prompts_from (`Mapping[str, Any]`, *optional*):
            Where the prompts come from, as JSON, for the settings and the card: `{"dataset": …, "split": …}`.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar for each step.

    Returns:
        `Dataset`: The pairs, in the order of the prompts, with
            - `prompt`, `chosen`, `rejected`: in the format of the prompts;
            - `preference`: P(chosen ≻ rejected) in [½, 1], null for equal texts or where nothing is known;
            - `teacher_side`: `"chosen"`, `"rejected"`, or null if the teacher wrote neither;
            - `teacher` and `teacher_finish_reason`, unless `policy` is `"teacher_vs_student"`: a text of the teacher's where
              no row of the prompt has one, otherwise null;
            - `score_chosen`, `score_rejected`: null where the preference gives no scores;
            - `chosen_source`, `rejected_source`, `chosen_finish_reason`, `rejected_finish_reason`;
            - `student_count`: how often the student gave its answer, since equal answers to a prompt make one row; null
              where the two answers are of one source;
            - `source_row`: index of the prompt's row;
            - the other columns of the prompts, but for those that are read as answers. Names that trainers read get the
              prefix `source_`.

    Raises:
        `ValueError`: an option outside its range, prompts that cannot be read, a folder that holds files of somebody else's,
        or answers or labels in it that were made with other settings.
        `StoreError`: the folder is in use, damaged, or its disk full.
    """
    for name, value in (("num_teacher_samples", num_teacher_samples), ("num_student_samples", num_student_samples)):
        if value < 1:
            raise ValueError(f"`{name}` is {value!r}: it must be at least 1.")
    if label_batch_size < 1:
        raise ValueError(f"`label_batch_size` is {label_batch_size!r}: it must be at least 1.")
    if not isinstance(prompts, Dataset | IterableDataset):
        raise ValueError(
            f"`prompts` is a {type(prompts).__name__}: give a `Dataset` or an `IterableDataset` with a column 'prompt'."
        )
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise ValueError(f"`shard` is {shard!r}: it must be (i, n) with 0 ≤ i < n.")
    pairing = PairingSettings(policy, max_pairs_per_prompt, truncated, seed, reasoning)
    check_folder(output_dir)
    first = next(read_prompts(prompts, batch_size=CHECKED_ROWS), None)
    if not first:
        raise ValueError("There are no prompts: the dataset is empty.")
    sources = {"teacher": (teacher, num_teacher_samples), "student": (student, num_student_samples)}
    check_parts(first, sources, preference)
    check_kinds(prompts, sources, preference)
    settings: dict[str, Any] = {
        "teacher": teacher.describe(),
        "student": student.describe(),
        "preference": describe_preference(preference),
    }
    place = {"shard": None if shard is None else list(shard)}
    store = AnswerStore(output_dir)
    try:
        store.check_settings(settings | place, relabel)
        settings["pairing"] = {
            "num_teacher_samples": num_teacher_samples,
            "num_student_samples": num_student_samples,
            **pairing.describe(),
        }
        settings["prompts"] = dict(prompts_from or {})
        settings |= place
        build = _Build(prompts, sources, preference, pairing, store, shard, show_progress)
        if pairing.reasoning == "error":
            build.refuse_given_reasoning()
        for source in sources:
            build.ask(source)
        if not getattr(preference, "is_lookup", False):
            build.label(label_batch_size)
        build.write(Path(output_dir), settings, list(first[0].columns))
    finally:
        store.close()
    return load_pairs(output_dir)


class _Build:
    def __init__(
        self,
        prompts: Dataset | IterableDataset,
        sources: dict[str, tuple[Sampler, int]],
        preference: Preference,
        pairing: PairingSettings,
        store: AnswerStore,
        shard: tuple[int, int] | None,
        show_progress: bool,
    ):
        self.prompts = prompts
        self.sources = sources
        self.preference = preference
        self.pairing = pairing
        self.store = store
        self.shard = shard
        self.show_progress = show_progress
        self.usages = _usages({source: sampler for source, (sampler, _) in sources.items()} | {"judge": preference})
        self._resume()

    def _resume(self) -> None:
        """Lets sources and judge go on from what former runs have used; two that share a client, from the sum."""
        for usage in self.usages.values():
            mine = [self.store.usage(name) for name, other in self.usages.items() if other is usage]
            usage.resume(sum(mine, Usage()))

    def _count(self, name: str) -> None:
        if name in self.usages:
            self.store.count_usage(name, self.usages[name])

    def refuse_given_reasoning(self) -> None:
        """Raises a `ValueError` for an answer with reasoning that is there already, before anything is asked."""
        for rows in read_prompts(self.prompts, self.shard):
            for source, (sampler, samples) in self.sources.items():
                if sampler.is_lookup:
                    requests = [
                        Request(f"{r.key}/{r.index}", r.prompt, tuple(range(samples)), r.columns) for r in rows
                    ]
                    given = look_up(source, sampler, samples, requests)
                else:
                    stored = self.store.answers(source, [row.key for row in rows], samples)
                    given = [list(stored[row.key].values()) for row in rows]
                for row, answers in zip(rows, given, strict=True):
                    for answer in answers:
                        refuse_reasoning(source, row.prompt, answer.text)

    def ask(self, source: str) -> None:
        """Asks a source for every answer that is not stored."""
        sampler, samples = self.sources[source]
        if sampler.is_lookup:
            return
        with answer_bar(sampler, source, self._total(samples), self.show_progress) as bar:
            causes = getattr(sampler, "causes", None)
            requests = MissingRequests(self.prompts, self.shard, self.store, source, samples, bar, causes)
            reading = iter(requests)
            first = next(reading, None)
            if first is not None:  # or a model would be loaded for nothing
                self._count(source)
                has_texts = self.store.has_texts(source)
                for answers in together(sampler, itertools.chain([first], reading), source, has_texts):
                    self.store.add_answers(source, [(r.key, sample, answer) for r, sample, answer in answers], causes)
                    for request, sample, answer in answers:
                        requests.answered(request.key, sample)
                        if self.pairing.reasoning == "error":
                            refuse_reasoning(source, request.prompt, answer.text)
                    bar.answered([answer for _, _, answer in answers])
                    show_cost(bar, sampler)
                requests.check()
                self.store.commit()
                _free(sampler)

    def label(self, batch_size: int) -> None:
        """Asks the preference for every label or score that is not stored."""
        labeller = Labeller(self.preference, self.store, batch_size)
        self._count("judge")
        self.store.count_verdicts(self.preference)
        with self._bar("labels of prompts") as bar:
            # Of a stream the slowest label of a batch is waited for, while nothing else is asked: few batches, then
            for rows in read_prompts(self.prompts, self.shard, BATCH_SIZE if labeller.streams else batch_size):
                start, count = bar.n, len(rows)

                def advance(done: int, of: int, start: int = start, count: int = count) -> None:
                    show_cost(bar, self.preference)
                    bar.update(start + count * done // of - bar.n)

                if not labeller.label(rows, self._pairs(rows, self._answers(rows)), advance):
                    bar.skip(count)
        self.store.commit()
        _free(self.preference)

    def write(self, folder: Path, settings: dict[str, Any], columns: list[str]) -> None:
        """Pairs all answers and writes the dataset with the prompts' own `columns`, its statistics, card and page."""
        is_lookup = getattr(self.preference, "is_lookup", False)
        labeller = Labeller(self.preference, None if is_lookup else self.store)
        names = renamed(columns, self._used_up())
        known = self.prompts.features or {}
        features = {new: known[old] for old, new in {"prompt": "prompt", **names}.items() if old in known}
        writer = PairWriter(folder, features)
        report, seen, fingerprint = PairReport(self.pairing.seed), SeenPairs(), Fingerprint()
        try:
            with self._bar("prompts paired") as bar, rare_collection() as collect:
                for rows in read_prompts(self.prompts, self.shard, fingerprint=fingerprint):
                    collect()
                    answers = self._answers(rows)
                    report.prompts += len(rows)
                    for source, of_rows in answers.items():
                        report.add_answers(source, [answer for of_row in of_rows for answer in of_row])
                    prompts = self._pairs(rows, answers)
                    labeller.label(rows, prompts)
                    made = list(self._rows(rows, prompts, seen))
                    pairs = [pair for _, pair in made]
                    report.add_rows(pairs)
                    writer.write(pairs, {new: [row.columns.get(old) for row, _ in made] for old, new in names.items()})
                    bar.update(len(rows))
        except BaseException:
            writer.abandon()
            raise
        writer.close()
        if hasattr(self.preference, "unparseable"):
            report.unparseable, report.judged = self.store.null_labels(), self.store.label_count()
            report.unreadable = self.store.unreadable()
            report.orders = self.store.orders()
        report.usage = {name: self.store.usage(name) for name in self.usages}
        report.write(folder, settings | {"prompts": settings["prompts"] | fingerprint.describe()})

    def _rows(
        self, rows: list[PromptRow], prompts: list[PromptPairs], seen: SeenPairs
    ) -> Iterator[tuple[PromptRow, dict]]:
        made = [
            (row, pair)
            for row, prompt in zip(rows, prompts, strict=True)
            for pair in make_rows(prompt, self.pairing, self.preference)
        ]
        for (row, pair), is_new in zip(made, seen.are_new([(row.key, pair) for row, pair in made]), strict=True):
            if is_new:
                pair["source_row"] = row.index
                yield row, pair

    def _answers(self, rows: list[PromptRow]) -> dict[str, list[list[Answer]]]:
        """Answers of each source to each of the rows, by sample."""
        requests: dict[int, list[Request]] = {}
        answers = {}
        for source, (sampler, samples) in self.sources.items():
            if not sampler.is_lookup:
                answers[source] = self._recall(source, samples, rows)
                continue
            if samples not in requests:
                # Equal prompts may have different answers in the rows of a dataset
                numbers = tuple(range(samples))
                requests[samples] = [Request(f"{r.key}/{r.index}", r.prompt, numbers, r.columns) for r in rows]
            answers[source] = look_up(source, sampler, samples, requests[samples])
        return answers

    def _recall(self, source: str, samples: int, rows: list[PromptRow]) -> list[list[Answer]]:
        stored = self.store.answers(source, [row.key for row in rows], samples)
        for row in rows:
            if len(stored[row.key]) < samples:
                raise ValueError(
                    f"Row {row.index} of the prompts was another when the {source} was asked: a stream must give the same "
                    "rows each time it is read. Run the same command again to ask for what is missing."
                )
        return [[as_counted(row.prompt, stored[row.key][sample]) for sample in range(samples)] for row in rows]

    def _pairs(self, rows: list[PromptRow], answers: dict[str, list[list[Answer]]]) -> list[PromptPairs]:
        prompts = []
        for row, teacher, student in zip(rows, answers["teacher"], answers["student"], strict=True):
            candidates = make_candidates(row.prompt, teacher, student, self.pairing.truncated, self.pairing.reasoning)
            pairs = choose_pairs(row.key, candidates, self.pairing)
            prompts.append(PromptPairs(row.key, row.prompt, candidates, pairs))
        return prompts

    def _used_up(self) -> list[str]:
        return [sampler.column for sampler, _ in self.sources.values() if hasattr(sampler, "column")]

    def _total(self, times: int = 1) -> int | None:
        """So many for each prompt, where their number is known."""
        total = len(self.prompts) * times if isinstance(self.prompts, Dataset) else None
        return total if total is None or self.shard is None else total // self.shard[1]  # about so many

    def _bar(self, name: str) -> Bar:
        return Bar(name, self._total(), " prompts", not self.show_progress)


def _usages(parts: dict[str, Any]) -> dict[str, Usage]:
    found = {name: getattr(part, "usage", None) for name, part in parts.items()}
    return {name: usage for name, usage in found.items() if isinstance(usage, Usage)}


def _free(source: Any) -> None:
    """Gives back the memory of a model that is not needed any more."""
    close = getattr(source, "close", None)
    if callable(close):
        close()
