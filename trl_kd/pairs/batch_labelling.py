"""Pairs that grow while a student trains: a teacher's answers and a preference's labels for one batch at a time."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_kd.pairs.fetched import FetchedAnswers
from trl_kd.pairs.labels import Labeller, describe_preference
from trl_kd.pairs.pairing import PairingSettings, PromptPairs, choose_pairs, make_candidates, make_rows
from trl_kd.pairs.prompts import PromptRow
from trl_kd.pairs.readonly_store import resume_usage
from trl_kd.pairs.store import AnswerStore
from trl_kd.preferences import Preference
from trl_kd.sampling import Answer, Request, Sampler
from trl_kd.sampling.budget import Usage


_PAIRING = PairingSettings()


class BatchPairs:
    """
    Asks a teacher and a preference function about batches.

    Args:
        teacher (`Sampler`):
            The teacher, which answers each prompt once: unless it looks answers up, they are kept in `teacher` of the folder
            as they arrive ([`~trl_kd.pairs.fetched.FetchedAnswers`]).
        preference (`Preference`, *optional*):
            Says who is better, once for each comparison: labels are kept in `labels` of the folder as they arrive, under
            what the preference says of itself. `None`: nobody is asked.
        folder (`Path`):
            Where answers and labels are kept, and what teacher and judge have used: their caps hold for all runs into it.
        reasoning (`str`, *optional*):
            See [`~trl_kd.pairs.pairing.PairingSettings`].
        made (`Sequence[Path]`, *optional*):
            What is made of answers and labels: where any of it exists, an empty store is refused.
    """

    def __init__(
        self,
        teacher: Sampler,
        preference: Preference | None,
        folder: Path,
        reasoning: str | None = None,
        made: Sequence[Path] = (),
    ):
        self.preference, self._reasoning = preference, reasoning
        self._labels = folder / "labels"
        self._made = made
        self._store: AnswerStore | None = None
        self._teacher = teacher
        self._fetched = None if teacher.is_lookup else FetchedAnswers(teacher, folder / "teacher", 1, made=made)
        self._seen: dict[str, Answer] = {}  # to open a database for each batch takes longer than to remember
        resume_usage([(teacher, "teacher", [folder / "teacher"]), (preference, "judge", [self._labels])])

    def teacher_answers(self, rows: Sequence[PromptRow]) -> list[Answer]:
        """The teacher's answer to each prompt. A text is in the format of its prompt, or `None`.

        Raises:
            `ValueError`: the folder has answers of another teacher.
        """
        if self._fetched is None:
            requests = [Request(f"{row.key}/{i}", row.prompt, (0,), row.columns) for i, row in enumerate(rows)]
            found = {request.key: answer for request, _, answer in self._teacher.sample(requests)}
            return [found[request.key] for request in requests]
        new = {row.key: row for row in rows if row.key not in self._seen}
        if new:
            prompts = Dataset.from_list([{"prompt": row.prompt, **row.columns} for row in new.values()])
            self._fetched.fetch(prompts, show_progress=False, release=False)
            requests = [Request(row.key, row.prompt, (0,), row.columns) for row in new.values()]
            self._seen |= {request.key: answer for request, _, answer in self._fetched.sample(requests)}
        return [self._seen[row.key] for row in rows]

    def pairs(
        self, rows: list[PromptRow], teacher: list[Answer], student: list[list[Answer]]
    ) -> list[list[dict[str, Any]]]:
        """
        Each student's answer against the teacher's.

        Args:
            rows (`list[PromptRow]`):
                Prompts.
            teacher (`list[Answer]`):
                From [`teacher_answers`].
            student (`list[list[Answer]]`):
                The student's answers to each. Of equal ones one pair is made.

        Returns:
            `list[list[dict]]`: for each prompt rows as of [`~trl_kd.pairs.build_pairs`], without other columns.
        """
        if self.preference is None:
            return [[] for _ in rows]
        prompts = []
        for row, ours, theirs in zip(rows, teacher, student, strict=True):
            candidates = make_candidates(row.prompt, [ours], theirs, reasoning=self._reasoning)
            prompts.append(PromptPairs(row.key, row.prompt, candidates, choose_pairs(row.key, candidates, _PAIRING)))
        self._label(self.preference, rows, prompts)
        return [make_rows(prompt, _PAIRING, self.preference) for prompt in prompts]

    def _label(self, preference: Preference, rows: list[PromptRow], prompts: list[PromptPairs]) -> None:
        if getattr(preference, "is_lookup", False):
            Labeller(preference).label(rows, prompts)
            return
        if self._store is None:
            self._store = AnswerStore(self._labels, self._made)
            others: dict[str, Any] = {"teacher": {}, "student": {}}
            self._store.check_settings({"preference": describe_preference(preference), **others}, relabel=True)
        usage = getattr(preference, "usage", None)
        with self._store.counting("judge", usage) if isinstance(usage, Usage) else nullcontext():
            Labeller(preference, self._store).label(rows, prompts)

    def close(self) -> None:
        """Lets other processes at answers and labels. The next batch opens them again."""
        if self._fetched is not None:
            self._fetched.close()
        if self._store is not None:
            self._store.close()
        self._store = None
