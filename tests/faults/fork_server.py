"""Runs commands of `trl-kd` in children of a process that has imported everything once: an import takes longer than a run.

Run as a module, it reads requests from its standard input and answers each when the child has ended. [`ForkServer`] starts
it.
"""

import atexit
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn


DEADLINE = 240
"""Seconds after which a command hangs, far above what the slowest takes on a busy machine."""

IMPORTED = (
    *(f"trl_kd.scripts.{name}" for name in ("pairs", "pbkd", "mm_pbkd", "online_pbkd")),
    *(f"trl_kd.trainers.{name}.trainer" for name in ("pbkd", "mm_pbkd", "online_pbkd")),
    *("trl_kd.trainers.rounds.rounds", "trl_kd.evaluation.rounds_report", "trl_kd.preferences.judge"),
    *("trl_kd.sampling.server", "trl_kd.sampling.local"),
    *("openai.resources.chat.completions", "datasets.io.parquet", "transformers.models.llama.modeling_llama"),
)


@dataclass(frozen=True)
class Kill:
    """
    When a command is ended, and how.

    Parameters:
        signal (`str`): Name of the signal.
        at (`int`): Number of the call, from 1, of those that `call` and `path` match.
        call, path (`str`): Patterns of the calls in `kill_at_write.c` and of paths, relative to the current folder.
        inside (`bool`): Whether half of a write is done.
    """

    signal: str
    at: int
    call: str = "*"
    path: str = "*"
    inside: bool = False

    def earlier(self) -> "Kill":
        return replace(self, at=max(1, self.at * 9 // 10))


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it has written: the calls, and the one at which it was killed."""

    code: int | None
    seconds: float
    err: str
    calls: list[str]
    hit: str | None

    @property
    def told(self) -> str:
        return f"code {self.code}{f', after {self.hit!r}' if self.hit else ''}:\n{self.err[-3000:]}"


class ForkServer:
    """
    A context manager. One command runs at a time.

    Args:
        library (`Path`):
            `kill_at_write.c`, compiled.
    """

    def __init__(self, library: Path):
        environment = os.environ | {"LD_PRELOAD": str(library), "KILL_AT_WRITE": str(library)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.fork_server"],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def run(self, words: list[str], folder: Path, kill: Kill | None = None, **environment: str) -> Ended:
        """Runs a command in `folder`, which holds no links in its path. `code` is negative after a signal, and `None` where
        it did not end by itself."""
        logs = folder.with_name(f"{folder.name}.calls"), folder.with_name(f"{folder.name}.err")
        for log in logs:
            log.write_bytes(b"")
        request = {"words": words, "folder": str(folder), "logs": list(map(str, logs)), "environment": environment}
        request["kill"] = asdict(kill) if kill else None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        begun = time.monotonic()
        answer = self._process.stdout.readline()
        seconds = time.monotonic() - begun
        assert answer, "the fork server has ended"
        calls = logs[0].read_text(encoding="utf-8", errors="replace").splitlines()
        hit = next((call.removeprefix("! ") for call in calls if call.startswith("! ")), None)
        return Ended(json.loads(answer), seconds, logs[1].read_text(errors="replace"), calls, hit)


# ---- In the server -------------------------------------------------------------------------------------------------------


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed while importing
    library = ctypes.CDLL(os.environ["KILL_AT_WRITE"])
    _import()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            answers.close()
            _run(library, request)
        print(json.dumps(_wait(child)), file=answers, flush=True)


def _import() -> None:
    import torch

    for name in IMPORTED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # or each child would look through all that is imported, again and again
    gc.unfreeze = lambda: None  # which a build of pairs calls


def _run(library: ctypes.CDLL, request: dict) -> NoReturn:
    from trl_kd.scripts import cli

    calls, err = request["logs"]
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts behind it ignore Ctrl-C
    os.environ |= request["environment"]
    os.chdir(request["folder"])
    with open(err, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.dump_traceback_later(DEADLINE - 10)
    _use_caches_below(request["folder"])
    kill = request["kill"] or {"call": "*", "path": "*", "at": 0, "signal": "SIGKILL", "inside": False}
    names = (request["folder"], kill["call"], kill["path"])
    number = getattr(signal, kill["signal"])
    library.kill_at(
        *(name.encode() for name in names), ctypes.c_long(kill["at"]), number, int(kill["inside"]), calls.encode()
    )
    try:
        code = cli.main(request["words"])
    except BaseException:
        traceback.print_exc()
        code = 1
    # As the interpreter ends, but for taking all modules apart, which takes longer than the run
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _use_caches_below(folder: str) -> None:
    """A cache that other runs have filled would hide what is written."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(folder, "cache")


def _wait(child: int) -> int | None:
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    serve()
