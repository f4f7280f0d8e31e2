"""Pairs that grow while a student trains: a teacher's answers and a preference's labels for one batch at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl_kd.pairs.asking import together
from trl_kd.pairs.labels import Labeller
from trl_kd.pairs.pairing import PairingSettings, PromptPairs, choose_pairs, make_candidates, make_rows
from trl_kd.pairs.prompts import PromptRow
from trl_kd.pairs.store import AnswerStore
from trl_kd.preferences import Preference
from trl_kd.sampling import Answer, Request, Sampler
from trl_kd.sampling.budget import Usage


_PAIRING = PairingSettings()


class BatchPairs:
    """
    Asks a teacher and a preference function about batches.

    Answers are kept in `answers.db` of the folder as they arrive, and never asked for twice; those that cost nothing to read
    again (`is_lookup`) are not kept.

    Args:
        teacher (`Sampler`):
            The teacher, which answers each prompt once.
        preference (`Preference`, *optional*):
            Says who is better. `None`: nobody is asked.
        folder (`Path`):
            Where answers are kept.

    Raises:
        `ValueError`: the folder has answers of another teacher.
    """

    def __init__(self, teacher: Sampler, preference: Preference | None, folder: Path):
        self.teacher, self.preference = teacher, preference
        self._labeller = None if preference is None else Labeller(preference)
        self._folder = folder
        if not teacher.is_lookup:
            with self._store() as store:
                usage = getattr(teacher, "usage", None)
                if isinstance(usage, Usage):
                    usage.resume(store.usage("teacher"))

    @contextmanager
    def _store(self) -> Iterator[AnswerStore]:
        """Open for a moment, so that no folder stays locked by a trainer that has ended."""
        store = AnswerStore(self._folder)
        try:
            nobody: dict[str, Any] = {}  # the student changes, and labels are not kept
            store.check_settings({"teacher": self.teacher.describe(), "student": nobody, "preference": nobody})
            yield store
        finally:
            store.close()

    def check(self, rows: list[PromptRow]) -> None:
        """Raises a `ValueError` if the preference cannot work with such rows."""
        if self._labeller is not None:
            self._labeller.check(rows)

    def teacher_answers(self, rows: Sequence[PromptRow]) -> list[Answer]:
        """The teacher's answer to each prompt. A text is in the format of its prompt, or `None`."""
        if self.teacher.is_lookup:
            requests = [Request(f"{row.key}/{i}", row.prompt, (0,), row.columns) for i, row in enumerate(rows)]
            found = {request.key: answer for request, _, answer in self.teacher.sample(requests)}
            return [found[request.key] for request in requests]
        by_key = {row.key: row for row in rows}
        with self._store() as store:
            missing = store.missing("teacher", list(by_key), 1)
            requests = [Request(key, by_key[key].prompt, (0,), by_key[key].columns) for key in missing]
            usage = getattr(self.teacher, "usage", None)
            if requests and isinstance(usage, Usage):
                store.count_usage("teacher", usage)
            for answers in together(self.teacher, iter(requests)) if requests else ():
                store.add_answers("teacher", [(r.key, sample, answer) for r, sample, answer in answers])
            store.commit()
            stored = store.answers("teacher", list(by_key), 1)
        lost = [key for key in by_key if 0 not in stored[key]]
        if lost:
            raise RuntimeError(f"The teacher ended without {len(lost)} of the answers that it was asked for.")
        return [stored[row.key][0] for row in rows]

    def pairs(self, rows: list[PromptRow], teacher: list[Answer], student: list[list[Answer]]) -> list[dict[str, Any]]:
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
            `list[dict]`: rows as of [`~trl_kd.pairs.build_pairs`], without other columns.
        """
        if self._labeller is None:
            return []
        prompts = []
        for row, ours, theirs in zip(rows, teacher, student, strict=True):
            candidates = make_candidates(row.prompt, [ours], theirs)
            prompts.append(PromptPairs(row.key, row.prompt, candidates, choose_pairs(row.key, candidates, _PAIRING)))
        self._labeller.label(rows, prompts)
        return [pair for prompt in prompts for pair in make_rows(prompt, _PAIRING, self.preference)]
