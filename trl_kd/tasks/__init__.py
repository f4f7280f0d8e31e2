"""Bundled verifiable tasks, and tiny models that learn them in a minute on a CPU."""

from trl_kd.tasks.arithmetic import TASKS
from trl_kd.tasks.reasoning import reasoning_gym_task
from trl_kd.tasks.task import SPLITS, Question, Task, exact_match, load_task, split_of


__all__ = ["SPLITS", "TASKS", "Question", "Task", "exact_match", "load_task", "reasoning_gym_task", "split_of"]
