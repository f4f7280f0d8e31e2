"""Trainings that end in a file each; run by `torchrun` in test_pbkd_distributed.py.

two_processes.py {ddp,fsdp2} JOBS_JSON
"""

import json
import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset

from trl_kd import PbKDConfig, PbKDTrainer


def train(kind: str, job: dict) -> None:
    args = PbKDConfig(**job["settings"])
    if kind == "fsdp2":
        # On CPU accelerate calls this MULTI_CPU and would wrap in DDP
        PartialState().distributed_type = DistributedType.MULTI_GPU
    trainer = PbKDTrainer(model=job["model"], args=args, train_dataset=Dataset.from_list(job["rows"]))
    trainer.train()

    world = {"single": 1, "ddp": 2, "fsdp2": 2}[kind]
    wrapper = {"single": "LlamaForCausalLM", "ddp": "DistributedDataParallel", "fsdp2": "FSDPLlamaForCausalLM"}[kind]
    assert trainer.accelerator.num_processes == world
    assert type(trainer.model_wrapped).__name__ == wrapper, type(trainer.model_wrapped)
    expected = {"single": "NO", "ddp": "MULTI_CPU", "fsdp2": "FSDP"}[kind]
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
