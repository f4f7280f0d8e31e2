"""The bundled tasks: arithmetic that a tiny model learns in a minute, and gets wrong now and then."""

import random

from trl_kd.tasks.task import Question, Task


TERMS = 4
DIGITS = 3


def running_sums(rng: random.Random) -> Question:
    """A chain of additions and subtractions, answered with every intermediate total, which stay between 0 and 19."""
    total = rng.randrange(1, 10)
    prompt, totals = str(total), []
    for _ in range(TERMS - 1):
        step = rng.randrange(1, 10)
        change = rng.choice([change for change in (step, -step) if 0 <= total + change <= 19])
        total += change
        prompt += f"{change:+d}"
        totals.append(str(total))
    return Question(f"{prompt}=", ",".join(totals))


def addition(rng: random.Random) -> Question:
    """A sum of two numbers, answered units first: each digit then needs only the carry of the one before it."""
    a, b = rng.randrange(10**DIGITS), rng.randrange(10**DIGITS)
    return Question(f"{a:0{DIGITS}d}+{b:0{DIGITS}d}=", f"{a + b:0{DIGITS + 1}d}"[::-1])


TASKS = {
    task.name: task
    for task in (
        Task(
            name="running_sums",
            description="Add and subtract from left to right, and write down every total on the way.",
            generate=running_sums,
            alphabet="0123456789+-=,",
            max_response_tokens=3 * (TERMS - 1),
        ),
        Task(
            name="addition",
            description="Add two numbers of three digits, and write the sum from its last digit to its first.",
            generate=addition,
            alphabet="0123456789+=",
            max_response_tokens=DIGITS + 2,
        ),
    )
}
"""The bundled tasks by name."""
