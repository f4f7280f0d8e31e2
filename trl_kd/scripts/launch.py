"""Running a training command through `accelerate launch`, where that makes a difference."""

import logging
import os
import signal
import subprocess
import sys
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from trl_kd.scripts.errors import InputError, bad_input, refuse, show_traceback
from trl_kd.scripts.yaml_files import read_mapping


LAUNCHED = "TRL_KD_LAUNCHED"
"""Set in the environment of processes that [`launch`] has started."""


def resolve_config(name: str | None) -> list[str]:
    """`--accelerate_config` as arguments of `accelerate launch`: a file, or the name of one that TRL ships."""
    if name is None:
        return []
    path = Path(name)
    if not path.is_file():
        shipped = resources.files("trl.accelerate_configs")
        names = sorted(entry.name[: -len(".yaml")] for entry in shipped.iterdir() if entry.name.endswith(".yaml"))
        if name not in names:
            raise InputError(f"`accelerate_config` is {name!r}: no such file, and TRL ships {', '.join(names)}.")
        path = Path(str(shipped.joinpath(f"{name}.yaml")))
    config = read_mapping("accelerate_config", str(path), "; `accelerate config` writes one.")
    if config.get("distributed_type") == "DEEPSPEED" and find_spec("deepspeed") is None:
        raise InputError(
            f"`accelerate_config` is {name!r}, which needs DeepSpeed: pip install deepspeed, or use 'multi_gpu' or 'fsdp2'."
        )
    return ["--config_file", str(path)]


def needs_launcher(launch_args: list[str], use_cpu: bool) -> bool:
    """
    Whether to go through `accelerate launch`. One process without launch options needs none: run in place it starts
    sooner, keeps its threads, and its errors are its own.
    """
    if "LOCAL_RANK" in os.environ:  # torchrun, or a launcher of the user's
        return False
    if launch_args:
        return True
    from accelerate.commands.config.config_args import default_config_file

    return not use_cpu and (Path(default_config_file).is_file() or torch.accelerator.device_count() > 1)


def parse_launch_args(launch_args: list[str], module: str = "", script_args: list[str] | None = None) -> Any:
    """The arguments of `accelerate launch`, checked by its own parser."""
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_args([*launch_args, "--module", module, *(script_args or [])])


def planned_processes(launch_args: list[str], use_cpu: bool) -> int:
    """How many processes the run will have, as far as can be told without starting them."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if not needs_launcher(launch_args, use_cpu):
        return 1
    from accelerate.commands.config.config_args import default_config_file

    args = parse_launch_args(launch_args, "none")
    path = Path(args.config_file or default_config_file)
    config = read_mapping("accelerate_config", str(path), ".") if args.config_file or path.is_file() else {}
    if config.get("distributed_type") == "NO" and not (args.multi_gpu or args.use_deepspeed or args.use_fsdp):
        return 1
    asked = args.num_processes or config.get("num_processes") or max(torch.accelerator.device_count(), 1)
    if not isinstance(asked, int) or asked < 1:
        raise InputError(
            f"`num_processes` is {asked!r}, which no run can have: it must be a whole number, at least 1."
        )
    return asked


def launch(module: str, script_args: list[str], launch_args: list[str]) -> int:
    """
    Runs `python -m module script_args` under `accelerate launch launch_args`.

    Returns:
        The exit code of the first process that failed, or 0. What went wrong there has been said there.
    """
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if show_traceback.get():
        script_args = [*script_args, "--traceback"]
    # The agent's summary of a failed process repeats what the process itself has said
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with bad_input():
        args = parse_launch_args(launch_args, module, script_args)
        _check_processes(args)
        os.environ[LAUNCHED] = "1"
        try:
            launch_command(args)
        except SignalException as stop:  # so that the processes have ended before this one does
            if stop.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            return 128 + stop.sigval
        except subprocess.CalledProcessError as error:
            return _exit_code(error.returncode, "The training process")
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            return _exit_code(failure.exitcode, f"The training process of rank {rank}")
    return 0


def _check_processes(args: Any) -> None:
    """`accelerate launch` starts one process where it sees fewer than two devices, whatever it was asked for."""
    distributed = args.multi_gpu or args.use_deepspeed or args.use_fsdp or args.use_megatron_lm or args.tpu
    asked = args.num_processes or 1
    for name in ("main_process_ip", "main_process_port", "machine_rank"):
        if (args.num_machines or 1) > 1 and not args.config_file and getattr(args, name) is None:
            raise InputError(f"`num_machines` is {args.num_machines}, but `{name}` is not set: give it, or drop both.")
    if asked > 1 and not distributed and not args.config_file and torch.accelerator.device_count() < 2:
        raise InputError(
            f"`num_processes` is {asked}, but with {torch.accelerator.device_count()} devices here accelerate would "
            "start one process: leave it out, or add `--multi_gpu` (with `--use_cpu` where there is no GPU)."
        )


def _exit_code(code: int, who: str) -> int:
    if code < 0:
        number = -code
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        hint = " (the machine may have run out of memory)" if number == signal.SIGKILL else ""
        print(f"{who} was ended by {name}{hint}.", file=sys.stderr)
        return 128 + number
    return code
