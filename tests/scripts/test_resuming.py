"""A run that was stopped goes on by a command that is printed, and none begins anew beside its checkpoints."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from transformers import Trainer

from tests.scripts.conftest import replaced
from tests.scripts.test_checks import commands  # noqa: F401
from tests.scripts.test_online_pbkd import online, pairs_config  # noqa: F401
from trl_kd.scripts import launch as launch_module
from trl_kd.scripts import pbkd, training
from trl_kd.scripts.launch import LAUNCHED


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C at the end of a step."""

    take = Trainer.training_step

    def at(step: int) -> None:
        def stop(self, *args, **kwargs):
            if self.state.global_step == step:
                raise KeyboardInterrupt
            return take(self, *args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", stop)

    return at


def printed(text: str, name: str) -> str:
    return next(line.removeprefix(f"  {name}: ") for line in text.splitlines() if line.startswith(f"  {name}: "))


def has_steps(out: Path) -> int:
    checkpoints = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((checkpoints[-1] / "trainer_state.json").read_text())["global_step"]


def test_interrupted_resumed_and_begun_anew(trl_kd, base, tmp_path, interrupted, monkeypatch):
    out = tmp_path / "it's [1] run"
    words = [
        *replaced(base, "--output_dir", str(out)),
        "--save_steps",
        "1",
        "--max_steps",
        "4",
        "--save_total_limit",
        "9",
    ]
    with monkeypatch.context():
        interrupted(0)
        stopped = trl_kd(*words)
        assert stopped.code == 130
        assert "There is no checkpoint yet: the same command begins anew." in stopped.err
        interrupted(2)
        stopped = trl_kd(*words)
        assert stopped.code == 130
        assert "Stopped. To go on from checkpoint-2:" in stopped.err
        command = stopped.err.split("checkpoint-2:\n")[1].split("\n")[0].strip()
    monkeypatch.undo()

    for more in ([], ["--dry_run"], ["--resume_from_checkpoint", "false"]):
        refused = trl_kd(*words, *more)
        assert "which holds checkpoint-2 of an earlier run: resume it" in refused.error
        assert printed(refused.err, "resume") == command
        assert printed(refused.err, "start over").startswith("rm -r -- ")
    remove, anew = printed(refused.err, "start over").split(" && ")
    assert shlex.split(anew) == ["trl-kd", *words]

    program, *resume = shlex.split(command)
    assert program == "trl-kd"
    assert resume == [*words, "--resume_from_checkpoint", "true"]
    assert trl_kd(*resume).code == 0
    assert has_steps(out) == 4

    subprocess.run(remove, shell=True, check=True)
    assert not list(out.glob("checkpoint-*"))
    assert (out / "README.md").is_file()
    assert trl_kd(*words, "--dry_run").code == 0


def test_a_dry_run_warns_of_another_number_of_processes(trl_kd, base, out):
    (out / "checkpoint-1").mkdir(parents=True)
    (out / "checkpoint-1" / "trainer_state.json").write_text("{}")
    for processes, is_said in ((2, True), (1, False)):
        (out / "checkpoint-1" / "pbkd_dual.json").write_text(json.dumps({"num_processes": processes}))
        done = trl_kd(*base, "--resume_from_checkpoint", "true", "--dry_run")
        assert done.code == 0, done.err
        assert ("saved by a run of 2 processes, and this run has 1" in done.out) == is_said


@pytest.mark.parametrize("place", ["datasets.Dataset.map", "transformers.Trainer.training_step"])
def test_ctrl_c_stays_ctrl_c_where_a_library_fails_on_its_way_out(trl_kd, base, monkeypatch, place):
    """As `datasets` does: it closes its file, and then writes to it."""

    def fail(*args, **kwargs):
        try:
            raise KeyboardInterrupt
        finally:
            raise ValueError("I/O operation on closed file")

    monkeypatch.setattr(place, fail)
    stopped = trl_kd(*base)
    assert stopped.code == 130
    assert "There is no checkpoint yet: the same command begins anew." in stopped.err
    assert "closed file" not in stopped.err


@pytest.mark.parametrize("command", ["pbkd", "mm-pbkd", "online-pbkd"])
def test_every_trainer_refuses_a_checkpoint(trl_kd, commands, out, command):  # noqa: F811
    (out / "checkpoint-45").mkdir(parents=True)
    assert trl_kd(*commands[command], "--dry_run").code == 0  # it was not saved in full
    (out / "checkpoint-45" / "trainer_state.json").write_text('{"global_step": 45}')
    for more in ([], ["--dry_run"]):
        refused = trl_kd(*commands[command], *more)
        assert "holds checkpoint-45 of an earlier run" in refused.error
        assert printed(refused.err, "resume").startswith(f"trl-kd {command} --model_name_or_path")
    assert trl_kd(*replaced(commands[command], "--output_dir", str(out / "other")), "--dry_run").code == 0


def test_rounds_go_on_by_themselves(trl_kd, commands, out, interrupted):  # noqa: F811
    words = commands["rounds"]
    interrupted(0)
    stopped = trl_kd(*words)
    assert stopped.code == 130
    assert "the same command goes on from here" in stopped.err
    assert "resume_from_checkpoint" not in stopped.err


def test_tokens_are_not_printed(trl_kd, base, out):
    (out / "checkpoint-1").mkdir(parents=True)
    (out / "checkpoint-1" / "trainer_state.json").write_text("{}")
    for words in (["--hub_token", "secret"], ["--hub-token=secret"], ["--run_name", "hf_secretsecretsecret"]):
        assert "secret" not in trl_kd(*base, *words).err


def test_under_a_launcher(trl_kd, base, out, monkeypatch, capfd):
    """The process that the user has started says how to go on; what it launched does not repeat it."""
    seen = []

    def stop(*args):
        seen.append(args)
        (out / "checkpoint-3").mkdir(parents=True, exist_ok=True)
        (out / "checkpoint-3" / "trainer_state.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "launch", stop)
    stopped = trl_kd(*base, "--multi_gpu", "--num_processes", "2")
    assert stopped.code == 130
    assert "To go on from checkpoint-3:" in stopped.err
    assert "--multi_gpu --num_processes 2 --resume_from_checkpoint true" in stopped.err

    monkeypatch.setattr(training.TrainingCommand, "train", stop)
    monkeypatch.setattr(pbkd.PbKDCommand, "train", stop)
    for launched, said in ((False, True), (True, False)):
        if launched:
            monkeypatch.setenv(LAUNCHED, "1")
        with pytest.raises(KeyboardInterrupt):
            pbkd.COMMAND.train_here([*base[1:], "--resume_from_checkpoint", "true"])
        told = "the same command with --resume_from_checkpoint true"
        assert (told in capfd.readouterr().err) == said


@pytest.mark.parametrize(("signal", "code"), [(2, None), (15, 143)])
def test_signals_to_a_launcher(monkeypatch, signal, code):
    def stopped(args):
        raise SignalException("stop", sigval=signal)

    monkeypatch.setattr("accelerate.commands.launch.launch_command", stopped)
    monkeypatch.setenv(LAUNCHED, "")
    if code is None:
        with pytest.raises(KeyboardInterrupt):
            launch_module.launch("none", [], ["--multi_gpu", "--num_processes", "2", "--cpu"])
    else:
        assert launch_module.launch("none", [], ["--multi_gpu", "--num_processes", "2", "--cpu"]) == code
