"""An output folder belongs to one run at a time, and the processes of a run end together."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import DistBackendError, distributed_c10d

from tests.conftest import refuse_weights
from tests.scripts.test_rounds import pairs_config, rounds  # noqa: F401 (fixtures)
from trl_kd.pairs.lock import LOCK, lock_folder
from trl_kd.sampling.server_errors import ServerError
from trl_kd.scripts.errors import ProcessError
from trl_kd.scripts.training import stopped_training


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


def run_both(programs: list[list[str]], words: list[str]) -> tuple[list[int], list[str]]:
    """Runs a command in two processes, without an elastic agent; returns how they end, and what they say."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank, program in enumerate(programs):
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *program, *words]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT))
    try:
        with ThreadPoolExecutor() as threads:
            said = [done[1] for done in threads.map(lambda process: process.communicate(timeout=200), started)]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], said


@pytest.mark.distributed
def test_another_process_says_that_the_main_one_has_ended(rounds, tmp_path):  # noqa: F811
    (tmp_path / "dying.py").write_text(DYING)
    codes, said = run_both([[str(tmp_path / "dying.py")], ["-m", "trl_kd.scripts.pbkd"]], rounds[1:])
    assert codes == [-9, 2], said
    assert "Traceback" not in said[1]
    assert "pbkd: error: The main process of this run (" in said[1].splitlines()[-1]
    assert "What is finished is kept: the same command goes on from there." in said[1]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("[gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:1"), "Connection closed by peer"),
        (DistBackendError("NCCL error: remote process exited or"), "remote process exited"),
        (RuntimeError("shapes do not match"), None),
        (ServerError("Connection refused"), None),
    ],
)
def test_errors_of_a_lost_process(monkeypatch, out, error, said):
    monkeypatch.setattr(distributed_c10d, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed_c10d, "get_rank", lambda: 1)
    for processes in (1, 2):
        monkeypatch.setattr(distributed_c10d, "get_world_size", lambda processes=processes: processes)
        expected = type(error) if said is None or processes == 1 else ProcessError
        with pytest.raises(expected) as caught, stopped_training(str(out)):
            raise error
        if expected is ProcessError:
            assert f"of rank 1, has lost another process of its run ({said}), and ends too" in str(caught.value)


LOST = """
import os, signal, sys
from transformers import Trainer
from trl_kd.scripts import pbkd
take = Trainer.training_step
def step(self, *args, **kwargs):
    if self.state.global_step == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return take(self, *args, **kwargs)
Trainer.training_step = step
pbkd.COMMAND.run_module()
"""
"""A process that dies in the middle of a training."""


@pytest.mark.distributed
@pytest.mark.parametrize(("dies", "saves"), [(0, True), (1, False)])
def test_a_process_that_has_lost_another_in_a_training_says_so(base, tmp_path, dies, saves):
    (tmp_path / "lost.py").write_text(LOST)
    programs = [["-m", "trl_kd.scripts.pbkd"]] * 2
    programs[dies] = [str(tmp_path / "lost.py")]
    saving = ("--save_steps", "1") if saves else ("--save_strategy", "no")
    codes, said = run_both(programs, [*base[1:], *saving, "--max_steps", "3"])
    assert (codes[dies], codes[1 - dies]) == (-9, 2), said
    assert "Traceback" not in said[1 - dies]
    assert f"pbkd: error: This process, of rank {1 - dies}, has lost another process of its run (" in said[1 - dies]
    assert ("go on from checkpoint-1" if saves else "There is no checkpoint yet") in said[1 - dies]
