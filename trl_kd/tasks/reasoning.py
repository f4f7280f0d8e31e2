"""Tasks of [reasoning-gym](https://github.com/open-thought/reasoning-gym): its generators and its scorers."""

import random
import string
from typing import Any

from trl_kd.tasks.task import Question, Task


def reasoning_gym_task(
    dataset: str, max_response_tokens: int = 16, alphabet: str = string.printable[:95] + "\n", **config: Any
) -> Task:
    """
    Makes a [`Task`] of a reasoning-gym dataset. Needs the extra `tasks`.

    Args:
        dataset (`str`):
            Its name there, for example `"chain_sum"`.
        max_response_tokens (`int`, *optional*, defaults to `16`):
            Characters of the longest answer, and one more for the end-of-sequence token.
        alphabet (`str`, *optional*):
            Every character that a question or an answer can hold; printable ASCII by default.
        **config:
            Its settings there, for example `min_terms=2`.

    Returns:
        [`Task`]: whose verifier is the dataset's own scorer; only the full score counts as right.

    Raises:
        `ImportError`: reasoning-gym is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ImportError("reasoning-gym is not installed: pip install 'trl-kd[tasks]'.") from error

    def generate(rng: random.Random) -> Question:
        entry = reasoning_gym.create_dataset(dataset, size=1, seed=rng.randrange(2**31), **config)[0]
        return Question(entry["question"], entry["answer"])

    scorer = reasoning_gym.create_dataset(dataset, size=1, seed=0, **config)

    def verify(question: Question, response: str) -> bool:
        entry = {"question": question.prompt, "answer": question.answer, "metadata": {}}
        return scorer.score_answer(response.strip(), entry) == 1.0

    return Task(
        name=dataset,
        description=f"The task {dataset} of reasoning-gym.",
        generate=generate,
        alphabet=alphabet,
        max_response_tokens=max_response_tokens,
        verify=verify,
    )
