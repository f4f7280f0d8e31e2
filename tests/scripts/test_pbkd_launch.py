"""Under `accelerate launch`: who is launched, and how a failing process is reported."""

import os
import signal

import pytest
import torch
import yaml

from trl_kd.scripts import launch, pbkd, training
from trl_kd.scripts.errors import InputError, report


CHILD = """
import os, signal, sys

print("rank", os.environ.get("RANK", "-"), sys.argv[1:], flush=True)
if "refuse" in sys.argv:
    print("one line", file=sys.stderr)
    sys.exit(2)
if "bug" in sys.argv:
    raise RuntimeError("a bug")
if "kill" in sys.argv:
    os.kill(os.getpid(), signal.SIGKILL)
"""

# Port 0: any that is free, since others may be running on this machine
TWO = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


@pytest.fixture
def child(tmp_path, monkeypatch, capfd):
    """Launches a script that does as it is told; gives the exit code and what was printed."""
    (tmp_path / "told_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def run(words, launch_args, with_traceback=False):
        code = report(lambda: launch.launch("told_child", words, launch_args), "prog", with_traceback)
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def cpu_config(tmp_path):
    path = tmp_path / "cpu.yaml"
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "use_cpu": True, "num_processes": 1}
    path.write_text(yaml.safe_dump(config | {"num_machines": 1, "machine_rank": 0, "mixed_precision": "no"}))
    return str(path)


@pytest.mark.parametrize("launch_args", [["--num_processes", "1"], TWO])
class TestChild:
    def test_it_gets_its_arguments(self, child, launch_args):
        code, out, _ = child(["--beta", "0.1"], launch_args)
        assert code == 0
        assert out.count("['--beta', '0.1']") == (2 if launch_args == TWO else 1)
        assert "'--traceback'" in child([], launch_args, with_traceback=True)[1]

    def test_what_it_refuses_is_said_by_it_alone(self, child, launch_args):
        code, _, err = child(["refuse"], launch_args)
        assert code == 2
        assert "one line" in err
        assert "Traceback" not in err
        assert "CalledProcessError" not in err
        assert "FAILED" not in err

    def test_its_bug_has_its_traceback_and_no_other(self, child, launch_args):
        code, _, err = child(["bug"], launch_args)
        assert code == 1
        assert "RuntimeError: a bug" in err
        assert "accelerate" not in err.split("Traceback", 1)[1]

    def test_its_violent_end_is_told(self, child, launch_args):
        code, _, err = child(["kill"], launch_args)
        assert code == 128 + signal.SIGKILL
        assert "was ended by SIGKILL" in err.splitlines()[-1]


def test_accelerate_refuses(child):
    code, out, err = child([], ["--multi_gpu", "--num_processes", "1"])
    assert (code, out) == (2, "")
    assert "at least 2 processes" in err.splitlines()[-1]
    code, _, err = child([], ["--mixed_precision", "fp12"])
    assert code == 2
    assert "`mixed_precision`" in err


@pytest.mark.skipif(torch.accelerator.device_count() > 1, reason="accelerate starts as many as asked for")
def test_one_process_is_not_started_in_place_of_two(child):
    code, out, err = child([], ["--num_processes", "2"])
    assert (code, out) == (2, "")
    assert "`num_processes` is 2" in err
    assert "--multi_gpu" in err


def test_configurations(cpu_config, tmp_path):
    assert launch.resolve_config(None) == []
    assert launch.resolve_config(cpu_config) == ["--config_file", cpu_config]
    assert launch.resolve_config("fsdp2")[1].endswith("fsdp2.yaml")
    with pytest.raises(InputError, match=r"`accelerate_config` is 'nowhere'.*fsdp1.*zero3"):
        launch.resolve_config("nowhere")
    for text in ("a: [", "words"):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InputError, match="`accelerate_config` is"):
            launch.resolve_config(str(tmp_path / "bad.yaml"))


def test_who_needs_the_launcher(monkeypatch, tmp_path):
    from accelerate.commands.config import config_args

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "none.yaml"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert not launch.needs_launcher([], use_cpu=False)
    assert launch.needs_launcher(["--num_processes", "1"], use_cpu=True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert launch.needs_launcher([], use_cpu=False)
    assert launch.planned_processes([], use_cpu=False) == 4
    assert not launch.needs_launcher([], use_cpu=True)
    monkeypatch.setenv("LOCAL_RANK", "0")  # torchrun has launched already
    assert not launch.needs_launcher([], use_cpu=False)


def test_launch_options_go_to_the_launcher(base, monkeypatch, tmp_path, cpu_config, trl_kd):
    seen = []
    monkeypatch.setattr(training, "launch", lambda *args: seen.append(args) or 0)
    config = tmp_path / "run.yaml"
    config.write_text("num_processes: 4\nmixed_precision: no\nmulti_gpu: true\ncpu: false\ngradient_clipping: 1.0\n")
    words = ["--num_processes", "2", "--config", str(config), "--accelerate_config", cpu_config, "--gpu_ids=0,1"]
    assert trl_kd(*base, *words).code == 0
    module, script_args, launch_args = seen[0]
    assert module == "trl_kd.scripts.pbkd"
    assert script_args[:2] == ["--config", str(config)]
    assert not {"--num_processes", "--gpu_ids=0,1"} & set(script_args)
    assert [word for word in base[1:] if word not in script_args] == []
    args = launch.parse_launch_args(launch_args, module, script_args)
    assert (args.num_processes, args.gpu_ids, args.config_file) == (2, "0,1", cpu_config)  # the command line wins
    assert (args.multi_gpu, args.mixed_precision, args.cpu) == (True, "no", False)
    assert args.training_script_args == script_args


def test_a_launched_process_takes_the_file_of_both_and_no_launch_options(base, monkeypatch, tmp_path):
    trained = []
    monkeypatch.setattr(training.TrainingCommand, "train", lambda self, *args: trained.append(args) or 0)
    config = tmp_path / "run.yaml"
    config.write_text("num_processes: 4\ndual_init: 1\nbeta: 0.3\n")
    assert pbkd.COMMAND.train_here([*base[1:], "--config", str(config)]) == 0
    assert trained[0][1].beta == 0.3
    with pytest.raises(InputError, match="`--num_processes` is for a launcher"):
        pbkd.COMMAND.train_here([*base[1:], "--num_processes", "2"])


@pytest.mark.slow
def test_a_launched_run(trl_kd, base, cpu_config, out):
    """A real launch: the student is saved, and bad input is one line also from there."""
    assert trl_kd(*base, "--accelerate_config", cpu_config).code == 0
    assert (out / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes(trl_kd, base):
    done = trl_kd(*base, *TWO, "--logging_steps", "1", "--max_steps", "1")
    assert done.code == 0, done.err
    assert "'pbkd/rows_used': '8'" in done.out  # a batch of 4 on each
