"""An output folder belongs to one run at a time, and the processes of a run end together."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import refuse_weights
from tests.scripts.test_rounds import pairs_config, rounds  # noqa: F401 (fixtures)
from trl_kd.pairs.lock import LOCK, lock_folder


ROOT = Path(__file__).parents[2]
DYING = """
import os, signal, sys
from trl_kd.scripts import pbkd
from trl_kd.trainers.rounds.rounds import PbKDRounds
PbKDRounds._tidy = lambda self, number: os.kill(os.getpid(), signal.SIGKILL)
pbkd.COMMAND.run_module()
"""
"""A main process that dies when the first round is trained."""


@pytest.mark.parametrize("command", ["base", "mm_base", "rounds"])
def test_a_second_run_is_refused_before_weights_load(command, request, trl_kd, out, monkeypatch):
    words = request.getfixturevalue(command)
    refuse_weights(monkeypatch)
    out.mkdir()
    with lock_folder(out):
        error = trl_kd(*words).error
    assert f"`{out}` is being written by process {os.getpid()}: let it end, or give another `output_dir`." in error


def test_checkpoints_of_a_run_that_goes_on_are_neither_resumed_nor_removed(trl_kd, base, out):
    (out / "checkpoint-1").mkdir(parents=True)
    (out / "checkpoint-1" / "trainer_state.json").write_text("{}")
    with lock_folder(out):
        refused = trl_kd(*base)
    assert "is being written by process" in refused.error
    assert "start over" not in refused.err
    assert "holds checkpoint-1 of an earlier run" in trl_kd(*base).error
    assert not (out / LOCK).exists()


def test_the_lock_is_held_to_the_end_and_leaves_nothing(trl_kd, base, out, monkeypatch):
    from trl_kd.trainers.pbkd.trainer import PbKDTrainer

    card, held = PbKDTrainer.create_model_card, []

    def create_model_card(self, *args, **kwargs):
        held.append((out / LOCK).is_file())
        return card(self, *args, **kwargs)

    monkeypatch.setattr(PbKDTrainer, "create_model_card", create_model_card)
    assert trl_kd(*base).code == 0
    assert held
    assert all(held)
    assert not (out / LOCK).exists()


@pytest.mark.distributed
def test_another_process_says_that_the_main_one_has_ended(rounds, out, tmp_path):  # noqa: F811
    (tmp_path / "dying.py").write_text(DYING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank, program in enumerate(([str(tmp_path / "dying.py")], ["-m", "trl_kd.scripts.pbkd"])):
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *program, *rounds[1:]]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT))
    try:
        started[0].communicate(timeout=200)
        said = started[1].communicate(timeout=60)[1]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [-9, 2], said
    assert "Traceback" not in said
    assert "pbkd: error: The main process of this run (" in said.splitlines()[-1]
