"""Two tasks beside the bundled ones, on which `imitation_ablations.py` chooses the defaults of `PbKDTrainer`.

`either_separator` has several right answers to each question: with a strong student most ties are both right. `graded` has
no right answer, but a hidden score.
"""

import math
import random
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from trl_kd.preferences.reward_function import RewardFunctionPreference
from trl_kd.tasks import TASKS, Question, Task
from trl_kd.tasks.arithmetic import running_sums


# ---- Several right answers ---------------------------------------------------------------------------------------------


def either_separator(rng: random.Random) -> Question:
    """Running sums, with a comma or a semicolon between two totals, as one likes."""
    question = running_sums(rng)
    return Question(question.prompt, "".join(rng.choice(",;") if c == "," else c for c in question.answer))


def _same_totals(question: Question, response: str) -> bool:
    return response.strip().replace(";", ",") == question.answer.replace(";", ",")


EITHER_SEPARATOR = Task(
    name="either_separator",
    description="Running sums, with a comma or a semicolon between two totals.",
    generate=either_separator,
    alphabet="0123456789+-=,;",
    max_response_tokens=TASKS["running_sums"].max_response_tokens,
    verify=_same_totals,
)


# ---- No right answer ---------------------------------------------------------------------------------------------------

LETTERS = "abcdefgh"
LENGTH = 6
SHARPNESS = 1.2
"""Demonstrations are drawn from exp(SHARPNESS × raw score): good ones, but not the best."""

_tables = random.Random("graded")
FIT = {x: {y: _tables.gauss(0, 1) for y in LETTERS} for x in LETTERS}
"""How well a letter answers the letter at its place in the prompt."""
FLOW = {y: {z: _tables.gauss(0, 0.7) for z in LETTERS} for y in LETTERS}
"""How well a letter follows another one in the answer."""


def raw_score(letters: str, response: str) -> float:
    fit = sum(FIT[x][y] for x, y in zip(letters, response, strict=True))
    return fit + sum(FLOW[y][z] for y, z in pairwise(response))


@lru_cache(maxsize=100_000)
def extremes(letters: str) -> tuple[float, float]:
    """The least and the greatest raw score of an answer."""
    found = []
    for sign in (-1, 1):
        best = {y: sign * FIT[letters[0]][y] for y in LETTERS}
        for x in letters[1:]:
            best = {z: max(best[y] + sign * FLOW[y][z] for y in LETTERS) + sign * FIT[x][z] for z in LETTERS}
        found.append(sign * max(best.values()))
    return found[0], found[1]


def demonstration(rng: random.Random) -> Question:
    """Six letters, and an answer drawn from exp(SHARPNESS × raw score), letter by letter from the last to the first."""
    letters = "".join(rng.choices(LETTERS, k=LENGTH))
    after = dict.fromkeys(LETTERS, 1.0)  # of each letter, the weight of all that can follow it
    weights = []
    for x in reversed(letters):
        own = {y: math.exp(SHARPNESS * FIT[x][y]) * after[y] for y in LETTERS}
        weights.append(own)
        after = {y: sum(math.exp(SHARPNESS * FLOW[y][z]) * own[z] for z in LETTERS) for y in LETTERS}
    answer = ""
    for own in reversed(weights):
        step = [own[y] * (math.exp(SHARPNESS * FLOW[answer[-1]][y]) if answer else 1.0) for y in LETTERS]
        answer += rng.choices(LETTERS, weights=step)[0]
    return Question(f"{letters}>", answer)


@dataclass(frozen=True)
class GradedTask(Task):
    """A task whose answers have a hidden score in [0, 1] instead of being right or wrong."""

    def score(self, prompts: list[str], completions: list[str], answer: list[str], **columns) -> list[float]:
        return [grade(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def grade(prompt: str, completion: str) -> float:
    """0 for the worst answer and for what is none, 1 for the best."""
    letters, response = prompt.removesuffix(">"), completion.strip()
    if len(response) != LENGTH or not set(response) <= set(LETTERS):
        return 0.0
    low, high = extremes(letters)
    return (raw_score(letters, response) - low) / (high - low)


GRADED = GradedTask(
    name="graded",
    description="Answer six letters with six letters, as a hidden score likes them.",
    generate=demonstration,
    alphabet=f"{LETTERS}>",
    max_response_tokens=LENGTH + 1,
    verify=lambda question, response: grade(question.prompt, response) > 0.99,
)

SCALE = 0.1
"""Of its labels: P(first ≻ second) = σ((the first's score − the second's) / SCALE)."""


class DrawnPreference(RewardFunctionPreference):
    """Hard labels that are Bradley–Terry draws. Whoever asks again for two responses gets the same label."""

    def __init__(self) -> None:
        super().__init__(GRADED.score, SCALE)

    def compare(self, first, second, of_first, of_second):
        chances = super().compare(first, second, of_first, of_second)
        rows = zip(chances, first, second, of_first, of_second, strict=True)
        return [p if p in (None, 0.5) else float(random.Random(repr(row)).random() < p) for p, *row in rows]
