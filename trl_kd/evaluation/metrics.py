"""Exact match of generated answers, with an interval that says how far to trust it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_kd.evaluation.generation import generate
from trl_kd.pairs.counting import wilson_interval


Scorer = Callable[..., list[float]]
"""A reward function in TRL's signature, `(prompts, completions, **columns) -> list[float]`, with scores in [0, 1]."""


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers, in [0, 1].

    Parameters:
        value (`float`):
            The share.
        low, high (`float`):
            Ends of its 95 % Wilson interval.
        questions (`int`):
            Number of questions. With several answers a question, the interval still counts each question once and is
            a little too wide.
    """

    value: float
    low: float
    high: float
    questions: int

    @classmethod
    def of(cls, scores: Sequence[float]) -> "Accuracy":
        """From one score in [0, 1] a question (its mean over answers, where there are several).

        Raises:
            `ValueError`: no scores.
        """
        if not scores:
            raise ValueError("there is nothing to average: give at least one score.")
        mean = sum(scores) / len(scores)
        return cls(mean, *wilson_interval(mean, len(scores)), len(scores))


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: dict[str, list[Any]],
    scorer: Scorer,
    max_new_tokens: int,
    samples: int = 1,
    seed: int = 0,
    temperature: float = 1.0,
) -> tuple[Accuracy, list[str]]:
    """Lets a model answer questions and scores the answers.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        questions (`dict[str, list]`):
            Columns of equal length; `prompt` is what the model reads, and all others go to the scorer.
        scorer (`Callable`):
            Reward function in TRL's signature; 1 for a right answer and 0 for a wrong one.
        max_new_tokens (`int`):
            Longest answer, in tokens.
        samples (`int`, *optional*, defaults to `1`):
            Answers sampled for each question; `0` for one greedy answer.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of the sampling, above 0.

    Returns:
        `tuple[Accuracy, list[str]]`: the share of right answers, and the first answer to each question.
    """
    repeats = max(samples, 1)
    repeated = {name: [value for value in values for _ in range(repeats)] for name, values in questions.items()}
    prompts = repeated.pop("prompt")
    completions = generate(
        model, tokenizer, prompts, max_new_tokens, sample=samples > 0, seed=seed, temperature=temperature
    )
    scores = scorer(prompts=prompts, completions=completions, **repeated)
    means = [sum(scores[i : i + repeats]) / repeats for i in range(0, len(scores), repeats)]
    return Accuracy.of(means), completions[::repeats]
