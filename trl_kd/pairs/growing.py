"""Pairs that grow while a student trains: a teacher's answers and a preference's labels for one batch at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_kd.pairs.fetched import FetchedAnswers
from trl_kd.pairs.labels import Labeller
from trl_kd.pairs.pairing import PairingSettings, PromptPairs, choose_pairs, make_candidates, make_rows
from trl_kd.pairs.prompts import PromptRow
from trl_kd.preferences import Preference
from trl_kd.sampling import Answer, Request, Sampler


_PAIRING = PairingSettings()


class BatchPairs:
    """
    Asks a teacher and a preference function about batches.

    Args:
        teacher (`Sampler`):
            The teacher, which answers each prompt once: unless it looks answers up, they are kept in the folder as they
            arrive ([`~trl_kd.pairs.fetched.FetchedAnswers`]).
        preference (`Preference`, *optional*):
            Says who is better. `None`: nobody is asked.
        folder (`Path`):
            Where answers are kept.
    """

    def __init__(self, teacher: Sampler, preference: Preference | None, folder: Path):
        self.preference = preference
        self._labeller = None if preference is None else Labeller(preference)
        self._fetched = None if teacher.is_lookup else FetchedAnswers(teacher, folder, samples=1)
        self._teacher: Sampler = self._fetched or teacher

    def teacher_answers(self, rows: Sequence[PromptRow]) -> list[Answer]:
        """The teacher's answer to each prompt. A text is in the format of its prompt, or `None`.

        Raises:
            `ValueError`: the folder has answers of another teacher.
        """
        if self._fetched is not None:
            prompts = Dataset.from_list([{"prompt": row.prompt, **row.columns} for row in rows])
            self._fetched.fetch(prompts, show_progress=False, release=False)
        requests = [Request(f"{row.key}/{i}", row.prompt, (0,), row.columns) for i, row in enumerate(rows)]
        found = {request.key: answer for request, _, answer in self._teacher.sample(requests)}
        return [found[request.key] for request in requests]

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
        if self._labeller is None:
            return [[] for _ in rows]
        prompts = []
        for row, ours, theirs in zip(rows, teacher, student, strict=True):
            candidates = make_candidates(row.prompt, [ours], theirs)
            prompts.append(PromptPairs(row.key, row.prompt, candidates, choose_pairs(row.key, candidates, _PAIRING)))
        self._labeller.label(rows, prompts)
        return [make_rows(prompt, _PAIRING, self.preference) for prompt in prompts]
