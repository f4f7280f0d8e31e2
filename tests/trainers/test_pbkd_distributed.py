"""Two processes of one row each, or accumulation, equal one process of two: really two, under DDP and FSDP2, and under
ZeRO-2 and ZeRO-3 where DeepSpeed is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainers.two_processes import WORLDS, train


ROOT = Path(__file__).parents[2]
# Null rows and teachers unevenly spread over the ranks' halves of a batch
LABELS = [(None, "chosen"), (1.0, "rejected"), (0.2, None), (0.6, "chosen"), (1.0, None), (None, "rejected")]


EXACT = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 3}
MOVING = {"dual_learning_rate": 0.5, "preference_nll_target": 0.1}


def zero(stage: int) -> dict:
    """A DeepSpeed configuration that splits every weight, even the small ones of these models."""
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,
        **dict.fromkeys(sizes, "auto"),
    }


@pytest.fixture
def jobs(tiny_dir, teacher_dir, pairs, settings, tmp_path) -> list[dict]:
    rows = [{**pairs[i % len(pairs)], "preference": p, "teacher_side": s} for i, (p, s) in enumerate(LABELS * 2)]
    settings = {**settings, **EXACT, **MOVING}
    token = {"imitation": "token", "teacher_model_name_or_path": teacher_dir}
    # Without the preference term: weights of the teacher's texts that differ, and half of them for each rank
    alone = {**settings, "dual_init": 0.0, "dual_learning_rate": 0.0, "preference_nll_target": None}
    texts = [{**row, "prompt": f"{i}{row['prompt']}"} for i, row in enumerate(rows)]
    texts = [
        {**row, "teacher_side": "chosen", "preference": p}
        for row, p in zip(texts, [1.0, 0.6, None, 0.5] * 3, strict=True)
    ]
    given = [(rows, settings), (rows, settings | token), (texts, alone), (texts, alone | token)]
    return [
        {"model": tiny_dir, "rows": data, "settings": s, "out": str(tmp_path / f"{i}.pt")}
        for i, (data, s) in enumerate(given)
    ]


def launch(kind: str, jobs: list[dict]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    if kind == "fsdp2":
        wrap = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **wrap}
    if kind.startswith("zero"):
        environment |= {"DS_ACCELERATOR": "cpu"}
    script = str(Path(__file__).with_name("two_processes.py"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, script, kind, json.dumps(jobs)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.distributed
@pytest.mark.parametrize("kind", [kind for kind in WORLDS if kind != "single"])
def test_two_processes_equal_one(kind, jobs):
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    expected = []
    for job in jobs:
        train("single", {**job, "settings": {**job["settings"], "per_device_train_batch_size": 4}})
        expected.append(torch.load(job["out"]))
        job["settings"]["per_device_train_batch_size"] = 2
        if kind.startswith("zero"):
            job["settings"]["deepspeed"] = zero(int(kind[-1]))
    launch(kind, jobs)
    for one, job in zip(expected, jobs, strict=True):
        two = torch.load(job["out"])
        assert one["weights"].keys() == two["weights"].keys()
        for name, weight in one["weights"].items():
            torch.testing.assert_close(two["weights"][name], weight, rtol=1e-5, atol=1e-6)
        assert two["dual"] == pytest.approx(one["dual"], rel=1e-5)
        for ones, twos in zip(one["logs"], two["logs"], strict=True):
            for name in ones:
                if name.startswith(("pbkd/", "rewards/", "loss")):
                    assert twos[name] == pytest.approx(ones[name], rel=1e-4, abs=1e-6), name
