"""Trainings with `MMPbKDTrainer` that end in a file each; run by `torchrun` in test_mm_pbkd_distributed.py.

mm_two_processes.py JOBS_JSON

where JOBS_JSON has lists of jobs by their kind, "ddp", "fsdp2" or "zero3": one launch for all, since most
time goes to imports.
"""

import json
import os
import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset

from trl_kd import MMPbKDConfig, MMPbKDTrainer


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}


class GivenSamples(MMPbKDTrainer):
    """What is sampled depends on the prompt, the step and whose turn it is alone: TRL seeds its processes apart."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        completions = []
        for ids in prompt_ids:
            seed = hash((self.state.global_step, self.model_wrapped is self.teacher_model, *ids))
            generator = torch.Generator().manual_seed(seed % 2**32)
            length = 1 + int(torch.randint(self.max_completion_length, (), generator=generator))
            completions.append(torch.randint(3, 60, (length,), generator=generator).tolist())
        return completions


def train(kind: str, job: dict) -> None:
    os.environ.update(FSDP2 if kind == "fsdp2" else {})
    args = MMPbKDConfig(**job["settings"])
    if kind == "zero3":
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    if kind == "fsdp2":
        # On CPU accelerate calls this MULTI_CPU and would wrap in DDP
        PartialState().distributed_type = DistributedType.MULTI_GPU
    trainer_class = GivenSamples if job["given_samples"] else MMPbKDTrainer
    trainer = trainer_class(
        model=job["model"],
        teacher_model=job["teacher"],
        args=args,
        train_dataset=Dataset.from_list(job["rows"]),
        eval_dataset=Dataset.from_list(job["rows"][:4]),
        preference_dataset=Dataset.from_list(job["pairs"]) if job["pairs"] else None,
    )
    trainer.train()

    world, wrapper, expected = {
        "single": (1, "LlamaForCausalLM", "NO"),
        "ddp": (2, "DistributedDataParallel", "MULTI_CPU"),
        "fsdp2": (2, "FSDPLlamaForCausalLM", "FSDP"),
        "zero3": (2, "DeepSpeedEngine", "DEEPSPEED"),
    }[kind]
    assert trainer.accelerator.num_processes == world
    assert type(trainer.model_wrapped).__name__ == wrapper, type(trainer.model_wrapped)
    assert trainer.accelerator.distributed_type == expected, trainer.accelerator.distributed_type
    q = trainer.adversary.q.state_dict()
    together = trainer.accelerator.gather(torch.cat([value.flatten() for value in q.values()])).reshape(world, -1)
    assert (together == together[0]).all()  # Q is the same on every process
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        logs = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
        found = {"weights": weights, "q": q, "logs": logs, "dual": trainer.dual.history}
        torch.save(found, job["out"])
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind, jobs in json.loads(sys.argv[1]).items():
        for job in jobs:
            train(kind, job)
