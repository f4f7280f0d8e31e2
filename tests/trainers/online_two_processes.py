"""Trainings with `OnlinePbKDTrainer` that end in a file each; run by `torchrun` in test_online_pbkd_distributed.py.

online_two_processes.py JOBS_JSON
"""

import json
import sys

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from tests.trainers.online_cases import Teacher, digits
from trl_kd import OnlinePbKDConfig, OnlinePbKDTrainer


class GivenSamples(OnlinePbKDTrainer):
    """What is sampled depends on the prompt, its sample's number and the step alone: TRL seeds its processes apart."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        completions = []
        first = self.accelerator.process_index * len(prompt_ids)
        for place, ids in enumerate(prompt_ids, first):
            seed = hash((self.state.global_step, place % self.num_generations, *ids))
            generator = torch.Generator().manual_seed(seed % 2**32)
            length = 1 + int(torch.randint(self.max_completion_length, (), generator=generator))
            completions.append(torch.randint(3, 60, (length,), generator=generator).tolist())
        return completions


class Saving(TrainerCallback):
    """Only the main process writes the reward model: two that write at once break each other's files."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        learner = self.trainer.learner
        if not self.trainer.accelerator.is_main_process:
            learner.save_for_use = lambda folder: pytest.fail("a second process writes the reward model")


class StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def make(job: dict, teacher: Teacher) -> GivenSamples:
    trainer = GivenSamples(
        model=job["model"],
        args=OnlinePbKDConfig(**job["settings"]),
        train_dataset=Dataset.from_list(job["rows"]),
        eval_dataset=Dataset.from_list(job["rows"][:4]),
        teacher=teacher,
        preference_function=digits,
    )
    trainer.add_callback(Saving(trainer))
    return trainer


def train(job: dict, world: int) -> None:
    stopped = job.get("stopped_at")
    if stopped is not None:
        first = make(job, Teacher())
        first.add_callback(StopAt(stopped))
        first.train()
    teacher = Teacher()
    trainer = make(job, teacher)
    trainer.train(resume_from_checkpoint=stopped is not None)

    wrapper = "LlamaForCausalLM" if world == 1 else "DistributedDataParallel"
    assert trainer.accelerator.num_processes == world
    assert type(trainer.model_wrapped).__name__ == wrapper, type(trainer.model_wrapped)
    learner = trainer.learner
    flat = torch.cat([p.flatten() for p in learner.model.trainable().values()])
    together = trainer.accelerator.gather(flat).reshape(world, -1)
    assert (together == together[0]).all()  # the reward model is the same on every process
    assert stopped is not None or (len(teacher.asked) > 0) == trainer.accelerator.is_main_process
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        logs = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
        found = {"weights": weights, "reward": flat, "logs": logs, "dual": trainer.dual.history}
        torch.save(found | {"pairs": learner.pool.rows, "asked": sorted(teacher.asked)}, job["out"])
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(sys.argv[1]):
        train(job, 2)
