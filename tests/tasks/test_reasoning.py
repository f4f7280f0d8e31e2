"""With the extra, reasoning-gym's generators and scorers make a task; without it one sentence says what to install."""

import sys

import pytest

from trl_kd.tasks.reasoning import reasoning_gym_task


def test_generators_and_scorers_are_theirs():
    pytest.importorskip("reasoning_gym")
    task = reasoning_gym_task("chain_sum", min_terms=2, max_terms=2, min_digits=2, max_digits=2)
    questions = task.questions("train", 20, seed=0)
    assert questions == task.questions("train", 20, seed=0)
    for question in questions:
        assert task.verify(question, f" {question.answer}\n")
        assert not task.verify(question, str(int(question.answer) + 1))
        assert set(question.prompt + question.answer) <= set(task.alphabet)


def test_without_it_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"pip install 'trl-kd\[tasks\]'"):
        reasoning_gym_task("chain_sum")
