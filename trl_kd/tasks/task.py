"""A verifiable task: a generator of questions, and a check of the answers."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from trl_kd.preferences.reward_function import import_named


SPLITS = {
    "pretraining": range(0, 50),
    "train": range(50, 80),
    "validation": range(80, 90),
    "test": range(90, 100),
}
"""Which hundredths of all questions belong to each split."""


class Question(NamedTuple):
    """A question and its right answer.

    Parameters:
        prompt (`str`):
            What the model reads.
        answer (`str`):
            A response that is right; the one to learn from where a model is taught the task.
    """

    prompt: str
    answer: str


def exact_match(question: Question, response: str) -> bool:
    """Whether the response is the answer, but for white space around it."""
    return response.strip() == question.answer


@dataclass(frozen=True)
class Task:
    r"""
    A task whose answers can be checked by a program.

    Parameters:
        name (`str`):
            Short name, used for folders and in tables.
        description (`str`):
            One sentence for a reader who sees the task for the first time.
        generate (`Callable[[random.Random], Question]`):
            Draws one question. All its randomness comes from its argument.
        alphabet (`str`):
            Every character that a prompt or an answer can hold; the character tokenizer is made from it.
        max_response_tokens (`int`):
            Characters of the longest answer, and one more for the end-of-sequence token.
        verify (`Callable[[Question, str], bool]`, *optional*, defaults to [`exact_match`]):
            Whether a response answers the question.

    Example:

    ```python
    >>> from trl_kd.tasks import Question, Task

    >>> def double(rng):
    ...     number = rng.randrange(10_000)
    ...     return Question(f"2*{number}=", str(2 * number))

    >>> task = Task("double", "Twice a number.", double, alphabet="0123456789*=", max_response_tokens=6)
    >>> question = task.questions("test", 1, seed=0)[0]
    >>> task.verify(question, question.answer)
    True
    ```
    """

    name: str
    description: str
    generate: Callable[[random.Random], Question]
    alphabet: str
    max_response_tokens: int
    verify: Callable[[Question, str], bool] = exact_match

    def questions(self, split: str, count: int, seed: int) -> list[Question]:
        """Draws questions of one split, all different.

        A question's split follows from a hash of its prompt, so that no question of one split is in another, whatever
        the seeds and the counts.

        Args:
            split (`str`):
                `"pretraining"`, `"train"`, `"validation"` or `"test"`.
            count (`int`):
                Number of questions.
            seed (`int`):
                Seed of the generator; the same seed gives the same questions, and a larger count only adds to them.

        Returns:
            `list[Question]`: `count` questions with different prompts.

        Raises:
            `ValueError`: unknown split, or the task has fewer different questions than asked for.
        """
        if split not in SPLITS:
            raise ValueError(f"`split` is {split!r}: use one of {', '.join(SPLITS)}.")
        rng = random.Random(f"{self.name}/{split}/{seed}")
        found: dict[str, Question] = {}
        misses = 0
        while len(found) < count:
            question = self.generate(rng)
            if question.prompt not in found and split_of(question.prompt) == split:
                found[question.prompt] = question
                misses = 0
            else:
                misses += 1
            if misses > 10_000:
                raise ValueError(
                    f"task {self.name!r} has only about {len(found)} different questions in its {split} split and "
                    f"{count} were asked for: ask for fewer, or widen the generator."
                )
        return list(found.values())

    def score(self, prompts: list[str], completions: list[str], answer: list[str], **columns) -> list[float]:
        """Scores responses: a reward function in TRL's signature, for data with the columns `prompt` and `answer`.

        Returns:
            `list[float]`: 1 for a right response, 0 for a wrong one.
        """
        rows = zip(prompts, completions, answer, strict=True)
        return [float(self.verify(Question(prompt, right), text)) for prompt, text, right in rows]


def split_of(prompt: str) -> str:
    """The split that a prompt belongs to."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def load_task(name: str, bundled: dict[str, Task]) -> Task:
    """Returns a bundled task by its name, or one's own as `"module:attribute"` or `"path/to/file.py:attribute"`.

    Raises:
        `ValueError`: no such task; the message lists what there is.
    """
    if name in bundled:
        return bundled[name]
    module_name, _, attribute = name.rpartition(":")
    if not module_name:
        raise ValueError(
            f"no task {name!r}: the bundled tasks are {', '.join(bundled)}; one's own is given as "
            "'module:attribute' or 'path/to/file.py:attribute'."
        )
    try:
        task = getattr(import_named(module_name), attribute)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise ValueError(f"cannot load task {name!r}: {error}.") from error
    if not isinstance(task, Task):
        raise ValueError(f"{name!r} is a {type(task).__name__}, not a `trl_kd.tasks.Task`.")
    return task
