"""Trainings that end in a file each; run by `torchrun` in test_pbkd_distributed.py.

two_processes.py {ddp,fsdp2,zero2,zero3} JOBS_JSON
"""

import json
import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset

from trl_kd import PbKDConfig, PbKDTrainer


WORLDS = {  # kind: (processes, class of the wrapped model, accelerate's name)
    "single": (1, "LlamaForCausalLM", "NO"),
    "ddp": (2, "DistributedDataParallel", "MULTI_CPU"),
    "fsdp2": (2, "FSDPLlamaForCausalLM", "FSDP"),
    "zero2": (2, "DeepSpeedEngine", "DEEPSPEED"),
    "zero3": (2, "DeepSpeedEngine", "DEEPSPEED"),
}


def train(kind: str, job: dict) -> None:
    if kind.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    args = PbKDConfig(**job["settings"])
    if kind == "fsdp2":
        # On CPU accelerate calls this MULTI_CPU and would wrap in DDP
        PartialState().distributed_type = DistributedType.MULTI_GPU
    trainer = PbKDTrainer(model=job["model"], args=args, train_dataset=Dataset.from_list(job["rows"]))
    trainer.train()

    world, wrapper, expected = WORLDS[kind]
    assert trainer.accelerator.num_processes == world
    assert type(trainer.model_wrapped).__name__ == wrapper, type(trainer.model_wrapped)
    assert trainer.accelerator.distributed_type == expected, trainer.accelerator.distributed_type
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        torch.save({"weights": weights, "logs": logs, "dual": trainer.dual.history}, job["out"])
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(sys.argv[2]):
        train(sys.argv[1], job)
