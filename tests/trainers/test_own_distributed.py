"""Sharded models are looked at by all processes together, before the first update; whole ones as always."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainers.mm_cases import ROWS
from tests.trainers.own_two_processes import run
from tests.trainers.test_own_distributions import save_other


ROOT = Path(__file__).parents[2]
KIND = "a layer before the output layer"
EXACT = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 2}
MATCHED = {"lmbda": 0.0, "moment_coef": 0.0, "max_completion_length": 5}


@pytest.fixture
def jobs(tiny_dir, pairs, settings, tmp_path) -> dict[str, dict]:
    other = save_other(tmp_path / "other", KIND)
    settings = {**settings, **EXACT}
    token = {**settings, "imitation": "token"}
    jobs = {
        "student": {"trainer": "pbkd", "model": other, "teacher": None, "rows": pairs, "settings": settings},
        "teacher": {"trainer": "pbkd", "model": tiny_dir, "teacher": other, "rows": pairs, "settings": token},
        "matched": {
            "trainer": "mm",
            "model": tiny_dir,
            "teacher": other,
            "rows": ROWS,
            "settings": {**settings, **MATCHED},
        },
    }
    return {name: {**job, "out": str(tmp_path / name)} for name, job in jobs.items()}


def launch(kind: str, jobs: dict[str, dict]) -> dict[str, list[dict]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    if kind == "fsdp2":
        wrap = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **wrap}
    script = str(Path(__file__).with_name("own_two_processes.py"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, script, kind, json.dumps(list(jobs.values()))],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-20000:]
    return {
        name: [json.loads(Path(f"{job['out']}.{kind}.{rank}").read_text()) for rank in "01"]
        for name, job in jobs.items()
    }


@pytest.mark.distributed
def test_sharded_models_are_looked_at_before_the_first_update(jobs):
    said = launch("fsdp2", jobs)
    for name, who in (("student", "The student"), ("teacher", "The teacher"), ("matched", "The teacher")):
        for rank in said[name]:  # the same on both
            assert rank.get("loaded"), rank
            assert rank["world"] == 2
            assert rank["error"].startswith(who), rank
            assert "'modernbert-decoder'" in rank["error"]
            assert rank["steps"] == 0
    assert "split among the processes" in said["matched"][0]["error"]


@pytest.mark.distributed
def test_whole_models_are_looked_at_when_they_are_loaded(jobs):
    said = launch("ddp", jobs)
    for rank in said["student"]:
        assert "loaded" not in rank
        assert "Take a student of another type" in rank["error"]
    for name in ("teacher", "matched"):
        halves = {**jobs[name]["settings"], "per_device_train_batch_size": 8}
        alone = run("single", {**jobs[name], "settings": halves})
        assert [rank["loss"] for rank in said[name]] == [pytest.approx(alone["loss"], rel=1e-4)] * 2
