"""Which answers to a prompt are compared, and the rows that come of it: pure functions of the answers and their labels."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any, Literal, get_args

from trl_kd.pairs.rows import pair_row
from trl_kd.responses.finish_reasons import ending
from trl_kd.responses.nulls import without_nulls
from trl_kd.responses.reasoning import REASONING, answer_reasons, says_something, stripped
from trl_kd.sampling import Answer, Text
from trl_kd.sampling.sampler import beginning


Policy = Literal["teacher_vs_student", "best_vs_worst", "all"]
Source = Literal["teacher", "student"]
Pair = tuple[int, int]
"""Indices i < j of two candidates of one prompt."""


@dataclass(frozen=True)
class PairingSettings:
    """How answers become pairs.

    Parameters:
        policy (`str`):
            - `"teacher_vs_student"`: each student answer against a teacher's. With T and S of them, pair i of max(T, S)
              takes teacher i mod T and student i mod S, so that every answer is used.
            - `"best_vs_worst"`: one pair a prompt, of all its answers: by score, or by the mean of P(it ≻ another) where the
              preference compares pairs (which then asks for all of them). Ties go to the teacher, then to the earlier
              sample.
            - `"all"`: every two answers, of one source too.
        max_pairs_per_prompt (`int`, *optional*):
            At most so many pairs a prompt, drawn by `seed` and prompt before anything is compared.
        truncated (`str`):
            `"keep"`, or `"drop"` to leave out answers that were cut off, at their `max_new_tokens` say.
        seed (`int`):
            Seed of the draw.
        reasoning (`str`, *optional*):
            What becomes of `<think>` blocks in answers: `"strip"` takes them out before anything is compared, and an answer
            of nothing else counts as none; `"keep"` leaves them, as by default; with `"error"` the first one ends the
            build.

    Raises:
        `ValueError`: a field outside its range.
    """

    policy: Policy = "teacher_vs_student"
    max_pairs_per_prompt: int | None = None
    truncated: Literal["keep", "drop"] = "keep"
    seed: int = 0
    reasoning: str | None = None

    def __post_init__(self):
        if self.reasoning not in REASONING:
            raise ValueError(f"`reasoning` is {self.reasoning!r}: use 'keep', 'strip' or 'error', or leave it out.")
        if self.policy not in get_args(Policy):
            raise ValueError(
                f"`policy` is {self.policy!r}: it must be one of {', '.join(map(repr, get_args(Policy)))}."
            )
        if self.max_pairs_per_prompt is not None and self.max_pairs_per_prompt < 1:
            raise ValueError(
                f"`max_pairs_per_prompt` is {self.max_pairs_per_prompt!r}: it must be at least 1, or None for all."
            )
        if self.truncated not in ("keep", "drop"):
            raise ValueError(f"`truncated` is {self.truncated!r}: it must be 'keep' or 'drop'.")

    @property
    def needs_teacher(self) -> bool:
        """Whether a pair may hold no text of the teacher's, so that rows need a column for one."""
        return self.policy != "teacher_vs_student"

    def describe(self) -> dict[str, Any]:
        described = asdict(self)
        if self.reasoning is None:  # folders from before there was such a setting describe themselves without it
            del described["reasoning"]
        return described


_ONLY_PAIR: list[Pair] = [(0, 1)]


@dataclass(slots=True)
class Candidate:
    """An answer that may enter a pair, in the format of its prompt."""

    source: Source
    text: Text
    finish_reason: str | None = None


@dataclass(slots=True)
class PromptPairs:
    """A prompt, its candidates (the teacher's first, then by sample), the `pairs` that policy and cap allow, and what the
    preference said: a score of each candidate, or P(i ≻ j) of each pair (i, j) of different texts."""

    key: str
    prompt: Text
    candidates: list[Candidate]
    pairs: list[Pair] = field(default_factory=list)
    scores: list[float | None] | None = None
    labels: dict[Pair, float | None] = field(default_factory=dict)


def make_candidates(
    prompt: Text,
    teacher: list[Answer],
    student: list[Answer],
    truncated: Literal["keep", "drop"] = "keep",
    reasoning: str | None = None,
) -> list[Candidate]:
    """The answers that can be paired, the teacher's first: those with a text and, if asked, not truncated, and without the
    reasoning in them."""
    is_messages = not isinstance(prompt, str)
    candidates = []
    source: Source
    for source, answers in (("teacher", teacher), ("student", student)):
        for answer in answers:
            text = answer.text
            if text is None or (truncated == "drop" and ending(answer.finish_reason) == "cut"):
                continue
            if reasoning == "error":
                refuse_reasoning(source, prompt, text)
            if reasoning == "strip" and answer_reasons(text):
                text = stripped(text)
                if not says_something(text):
                    continue
            if is_messages and isinstance(text, str):
                text = [{"role": "assistant", "content": text}]
            elif not is_messages and not isinstance(text, str):
                raise ValueError(
                    f"The {source}'s answer to {str(prompt)[:60]!r} is a list of messages, but the prompt is text: give "
                    "both as text or both as messages."
                )
            if is_messages:
                text = without_nulls(text)
            candidates.append(Candidate(source, text, answer.finish_reason))
    return candidates


def refuse_reasoning(source: str, prompt: Text, answer: Text | None) -> None:
    """Raises a `ValueError` for an answer that holds reasoning."""
    if answer is not None and answer_reasons(answer):
        raise ValueError(
            f"`reasoning` is 'error', and the {source}'s answer to the prompt {beginning(prompt)!r} holds a `<think>` "
            "block: turn reasoning off where it comes from, or set `reasoning` to 'strip' or 'keep'. What was answered is "
            "stored."
        )


def choose_pairs(key: str, candidates: list[Candidate], settings: PairingSettings) -> list[Pair]:
    """The pairs to compare, each of two texts once. For `"best_vs_worst"` all, of which `make_rows` takes one."""
    if len(candidates) == 2 and candidates[0].source != candidates[1].source:
        return _ONLY_PAIR
    if settings.policy == "teacher_vs_student":
        teachers = [i for i, candidate in enumerate(candidates) if candidate.source == "teacher"]
        students = range(len(teachers), len(candidates))
        if not teachers or not students:
            return []
        count = max(len(teachers), len(students))
        pairs = [(teachers[i % len(teachers)], students[i % len(students)]) for i in range(count)]
    else:
        pairs = list(combinations(range(len(candidates)), 2))
    if len(pairs) > 1:
        pairs = _distinct(pairs, candidates)
    most = settings.max_pairs_per_prompt
    if most is not None and len(pairs) > most and settings.policy != "best_vs_worst":
        drawn = sorted(pairs, key=lambda pair: hashlib.sha256(f"{settings.seed}/{key}/{pair}".encode()).digest())
        pairs = sorted(drawn[:most], key=pairs.index)
    return pairs


def _distinct(pairs: list[Pair], candidates: list[Candidate]) -> list[Pair]:
    """Without pairs of the same two texts, and without two equal texts of which none is the teacher's."""
    seen: list[tuple[Text, Text]] = []
    kept = []
    for i, j in pairs:
        a, b = candidates[i].text, candidates[j].text
        if (a == b and candidates[i].source == "student") or (a, b) in seen or (b, a) in seen:
            continue
        seen.append((a, b))
        kept.append((i, j))
    return kept


def make_rows(prompt: PromptPairs, settings: PairingSettings, preference: Any = None) -> list[dict[str, Any]]:
    """
    The rows of a prompt whose preferences are known.

    Args:
        prompt (`PromptPairs`):
            With `scores` or `labels` filled in.
        settings (`PairingSettings`):
            Its `policy`.
        preference (`ScoredPreference`, *optional*):
            Turns two scores into P(first ≻ second).

    Returns:
        `list[dict[str, Any]]`: Rows as of [`pair_row`], but with a null `teacher_side` where the teacher wrote neither text;
        `score_chosen`, `score_rejected`, `chosen_source`, `rejected_source`, `chosen_finish_reason`,
        `rejected_finish_reason`; `student_count`, how many of the student's samples are the row's text of the student's,
        null where the two texts are of one source; and `teacher` and `teacher_finish_reason` where the policy can need them.
        They are null unless no row of the prompt has a text of the teacher's: then its first row carries the best of them,
        which is imitated there. Rows that teach nothing are left out.
    """
    candidates, scores = prompt.candidates, prompt.scores
    pairs = prompt.pairs
    if settings.policy == "best_vs_worst" and len(pairs) > 1:
        values = scores if scores is not None else list(_wins(prompt))
        pairs = [_best_and_worst(prompt, values)]
    rows = []
    for i, j in pairs:
        first, second = candidates[i], candidates[j]
        label = _probability(prompt, i, j) if scores is None else preference.prefer(scores[i], scores[j])
        row = pair_row(prompt.prompt, first.text, second.text, label)
        flipped = row["teacher_side"] == "rejected"  # as if the first were the teacher's
        chosen, rejected = (second, first) if flipped else (first, second)
        row["teacher_side"] = (
            "chosen" if chosen.source == "teacher" else "rejected" if rejected.source == "teacher" else None
        )
        if settings.needs_teacher:
            row["teacher"] = None
        row["score_chosen"], row["score_rejected"] = None, None
        if scores is not None:
            row["score_chosen"], row["score_rejected"] = (scores[j], scores[i]) if flipped else (scores[i], scores[j])
        row["chosen_source"], row["rejected_source"] = chosen.source, rejected.source
        row["chosen_finish_reason"], row["rejected_finish_reason"] = chosen.finish_reason, rejected.finish_reason
        row["student_count"] = _student_count(prompt, i, j)
        if settings.needs_teacher:
            row["teacher_finish_reason"] = None
        rows.append(row)
    if not settings.needs_teacher:
        return rows
    if rows and all(row["teacher_side"] is None for row in rows):
        best = _best_of_teacher(prompt)
        if best is not None:
            rows[0]["teacher"], rows[0]["teacher_finish_reason"] = best.text, best.finish_reason
    return [row for row in rows if row["preference"] is not None or row["teacher_side"] or row["teacher"] is not None]


def _student_count(prompt: PromptPairs, i: int, j: int) -> int | None:
    """How often the student gave its answer of a pair, of which one row is made; `None` for a pair of one source."""
    students = [prompt.candidates[k].text for k in (i, j) if prompt.candidates[k].source == "student"]
    if len(students) != 1:
        return None
    return sum(one.source == "student" and one.text == students[0] for one in prompt.candidates)


def _probability(prompt: PromptPairs, i: int, j: int) -> float | None:
    if i < j:
        return prompt.labels.get((i, j))
    opposite = prompt.labels.get((j, i))
    return None if opposite is None else 1 - opposite


def _wins(prompt: PromptPairs) -> Iterator[float | None]:
    """Mean of P(it ≻ another) for each candidate, over the pairs that are known; `None` if none is."""
    known = [(pair, p) for pair, p in prompt.labels.items() if p is not None]
    for i in range(len(prompt.candidates)):
        won = [p if pair[0] == i else 1 - p for pair, p in known if i in pair]
        yield sum(won) / len(won) if won else None


def _best_and_worst(prompt: PromptPairs, values: list[float | None]) -> Pair:
    texts = [candidate.text for candidate in prompt.candidates]
    # A text that several gave counts as that of the first who gave it, the teacher if it is among them
    known = [(value, -i) for i, value in enumerate(values) if value is not None and texts.index(texts[i]) == i]
    if len(known) < 2:
        return prompt.pairs[0]
    best, worst = -max(known)[1], -min(known)[1]
    return best, worst


def _best_of_teacher(prompt: PromptPairs) -> Candidate | None:
    teachers = [i for i, candidate in enumerate(prompt.candidates) if candidate.source == "teacher"]
    if not teachers:
        return None
    values = prompt.scores if prompt.scores is not None else list(_wins(prompt))
    best = max(teachers, key=lambda i: (values[i] is not None, values[i] or 0.0, -i))
    return prompt.candidates[best]
