"""Two processes of four rows equal one process of eight, and go on where they stopped: really two, under DDP."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainers.online_cases import ROWS, SHORT
from tests.trainers.online_two_processes import train


ROOT = Path(__file__).parents[2]
COMMON = {
    **SHORT,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "learning_rate": 0.1,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "eval_strategy": "steps",
    "eval_steps": 3,
    "per_device_eval_batch_size": 4,
    "rm_held_out": 0.2,
}
JOBS = {
    "a reward model": {"num_generations": 4, "rm_steps": 2, "rm_batch_size": 6},
    "imitation": {"imitation_weight": 0.5, "gradient_accumulation_steps": 2, "adversary": "discriminator"},
}


def launch(jobs: list[dict]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    launched = subprocess.run(
        [*command, "-m", "tests.trainers.online_two_processes", json.dumps(jobs)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=400,
        check=False,
    )
    assert launched.returncode == 0, launched.stderr[-9000:]


def test_two_processes_equal_one(tiny_dir, tmp_path):
    jobs = []
    for name, more in JOBS.items():
        for world in (1, 2):
            settings = {**COMMON, "output_dir": str(tmp_path / f"{name} {world}"), **more}
            settings["per_device_train_batch_size"] = 8 // world
            settings["per_device_eval_batch_size"] = 8 // world
            jobs.append(
                {"model": tiny_dir, "rows": ROWS, "settings": settings, "out": str(tmp_path / f"{name}{world}.pt")}
            )
    launch(jobs[1::2])
    for one, two in zip(jobs[::2], jobs[1::2], strict=True):
        train(one, 1)
        left, right = (torch.load(job["out"], weights_only=False) for job in (one, two))
        assert left["pairs"] == right["pairs"]
        assert left["asked"] == right["asked"]
        torch.testing.assert_close(left["reward"], right["reward"], atol=1e-5, rtol=1e-4)
        assert left["dual"] == pytest.approx(right["dual"], abs=1e-5)
        for name, value in left["weights"].items():
            torch.testing.assert_close(value, right["weights"][name], atol=1e-5, rtol=1e-4, msg=name)
        for a, b in zip(left["logs"], right["logs"], strict=True):
            for name in a:  # TRL's others are means over micro-batches, whose rows are shuffled
                if name in ("loss", "eval_loss", "reward", "kl", "grad_norm") or "pbkd/" in name or "rewards/" in name:
                    assert a[name] == pytest.approx(b[name], abs=2e-5, rel=1e-4), name


def test_two_processes_go_on_where_they_stopped(tiny_dir, tmp_path):
    """In the middle of a generation batch, whose buffer each process has a part of."""
    common = COMMON | {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 4}
    common |= {"steps_per_generation": 2, "imitation_weight": 0.2, "save_strategy": "steps", "save_steps": 3}
    common |= {"optim": "adamw_torch", "eval_strategy": "no"}
    jobs = []
    for name, more in {"whole": {}, "resumed": {"stopped_at": 3}}.items():
        settings = common | {"output_dir": str(tmp_path / name)}
        jobs.append(
            {"model": tiny_dir, "rows": ROWS * 2, "settings": settings, "out": str(tmp_path / f"{name}.pt")} | more
        )
    launch(jobs)
    whole, resumed = (torch.load(job["out"], weights_only=False) for job in jobs)
    assert whole["pairs"] == resumed["pairs"]
    assert whole["dual"] == resumed["dual"]
    assert torch.equal(whole["reward"], resumed["reward"])
    for name, value in whole["weights"].items():
        assert torch.equal(value, resumed["weights"][name]), name
