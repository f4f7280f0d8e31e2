"""Two processes of a row or two equal one process of all rows: really two, under DDP, FSDP2 and, if it is there, ZeRO-3."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainers.mm_cases import PAIRS, ROWS
from tests.trainers.mm_two_processes import train


ROOT = Path(__file__).parents[2]
BATCH_SIZES = ("per_device_train_batch_size", "per_device_eval_batch_size")
LABELS = [1.0, 0.5, 0.7, 1.0, 0.0]
COMMON = {
    # Exact and quiet
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
    # Short
    "max_steps": 3,
    "max_completion_length": 5,
    "logging_steps": 1,
    "save_strategy": "no",
    "eval_strategy": "steps",
    "eval_steps": 3,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "lmbda": 0.5,
    "pair_held_out": 0.2,
    "q_warmup_steps": 2,
}
JOBS = {
    "two rows each": {"q_head": "mlp", "q_steps": 2, "imitation_weight": 0.1, "state_gradient": True},
    # Of one source alone, so that a process may have nothing to imitate
    "a row each": {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "imitation_weight": 0.1},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "lmbda": 0.25},
    "no preferences": {"q_steps": 3},
}

ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "zero_allow_untested_optimizer": True,
    **dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        "auto",
    ),
}
# DeepSpeed steps in the backward, so that Q meets the student after its step: only what that leaves alone is compared
ZERO3_JOBS = {
    "the student stays": {"q_head": "mlp", "q_steps": 2, "learning_rate": 0.0, "imitation_weight": 0.1},
    "no preferences": {"state_gradient": True},
}


@pytest.fixture(scope="module")
def jobs(tiny_dir, teacher_dir, tmp_path_factory) -> list[dict]:
    """Each with the file that holds what one process makes of it."""
    return make_jobs(JOBS, tiny_dir, teacher_dir, tmp_path_factory.mktemp("jobs"))


def make_jobs(named: dict[str, dict], tiny_dir: str, teacher_dir: str, folder: Path) -> list[dict]:
    rows = [{**row, "completion": row["completion"] if i % 3 else None} for i, row in enumerate(ROWS)]
    pairs = [{**row, "preference": LABELS[i % 5]} for i, row in enumerate(PAIRS)]
    jobs = []
    for name, more in named.items():
        settings = {**COMMON, "output_dir": str(folder / name), **more}
        job = {"model": tiny_dir, "teacher": teacher_dir, "rows": rows, "given_samples": True, "settings": settings}
        job |= {"pairs": None if name == "no preferences" else pairs, "out": str(folder / f"{name}.pt")}
        whole = {key: 2 * settings[key] for key in BATCH_SIZES}
        train("single", {**job, "settings": {**settings, **whole}, "out": job["out"] + ".single"})
        jobs.append(job)
    return jobs


def launch(jobs: dict[str, list[dict]]) -> None:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    script = str(Path(__file__).with_name("mm_two_processes.py"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, script, json.dumps(jobs)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-20000:]


@pytest.fixture(scope="module")
def launched(jobs) -> None:
    kinds = {}
    for kind in ("ddp", "fsdp2"):
        # Under FSDP2 TRL's own generation takes as many tokens on every process, or hangs
        same_length = {**jobs[0]["settings"], "generation_kwargs": {"min_new_tokens": 5}}
        real = {**jobs[0], "settings": same_length, "given_samples": False, "out": f"{jobs[0]['out']}.real"}
        kinds[kind] = [{**job, "out": f"{job['out']}.{kind}"} for job in (*jobs, real)]
    launch(kinds)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_equal_one(kind, jobs, launched):
    assert Path(f"{jobs[0]['out']}.real.{kind}").exists()  # both processes have sampled from both models
    check_equal(jobs, kind)


@pytest.mark.distributed
def test_two_processes_of_zero3_equal_one(tiny_dir, teacher_dir, tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    jobs = make_jobs(ZERO3_JOBS, tiny_dir, teacher_dir, tmp_path)
    together = [
        {**job, "settings": {**job["settings"], "deepspeed": ZERO3}, "out": f"{job['out']}.zero3"} for job in jobs
    ]
    launch({"zero3": together})
    check_equal(jobs, "zero3")


def check_equal(jobs: list[dict], kind: str) -> None:
    for job in jobs:
        one, two = torch.load(job["out"] + ".single"), torch.load(f"{job['out']}.{kind}")
        for part in ("weights", "q"):
            assert one[part].keys() == two[part].keys()
            for name, weight in one[part].items():
                torch.testing.assert_close(two[part][name], weight, rtol=1e-4, atol=1e-6)
        assert two["dual"] == pytest.approx(one["dual"], rel=1e-5)
        assert len(one["logs"]) == len(two["logs"]) == 4
        for ones, twos in zip(one["logs"], two["logs"], strict=True):
            names = [name for name in ones if name.endswith("loss") or "mmpbkd/" in name]
            assert len(names) > 3
            for name in names:
                if ones[name] is None:  # the held-out accuracy of few pairs
                    assert twos[name] is None
                else:
                    assert twos[name] == pytest.approx(ones[name], rel=1e-4, abs=1e-6), name
