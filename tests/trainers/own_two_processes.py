"""Trainings with models whose logits are their own, run by `torchrun` in test_own_distributed.py; writes what they say.

own_two_processes.py {ddp,fsdp2} JOBS_JSON
"""

import json
import os
import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset

from trl_kd import MMPbKDConfig, MMPbKDTrainer, PbKDConfig, PbKDTrainer


def run(kind: str, job: dict) -> dict:
    config = PbKDConfig if job["trainer"] == "pbkd" else MMPbKDConfig
    args = config(**job["settings"])
    if kind == "fsdp2":  # see two_processes.py
        PartialState().distributed_type = DistributedType.MULTI_GPU
    rows = Dataset.from_list(job["rows"])
    said = {}
    try:
        if job["trainer"] == "pbkd":
            trainer = PbKDTrainer(job["model"], args=args, train_dataset=rows, teacher_model=job["teacher"])
        else:
            trainer = MMPbKDTrainer(job["model"], job["teacher"], args=args, train_dataset=rows)
        said["loaded"] = True
        said["world"] = trainer.accelerator.num_processes
        start = [p.detach().clone() for p in trainer.model.parameters()]
        try:
            trainer.train()
            said["loss"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        finally:
            local = [p.to_local() if hasattr(p, "to_local") else p for p in trainer.model.parameters()]
            said["moved"] = not hasattr(next(trainer.model.parameters()), "to_local") and any(
                not torch.equal(p, q) for p, q in zip(local, start, strict=True)
            )
            said["steps"] = trainer.state.global_step
    except ValueError as error:
        said["error"] = str(error)
    return said


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, jobs = sys.argv[1], json.loads(sys.argv[2])
    for job in jobs:
        said = run(kind, job)
        rank = os.environ.get("RANK", "0")
        with open(f"{job['out']}.{kind}.{rank}", "w", encoding="utf-8") as file:
            json.dump(said, file)
