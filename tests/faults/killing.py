"""A command is run to its end, or killed and gone on with."""

import shlex
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import ndiff
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.faults.fork_server import Ended, ForkServer, Kill
from tests.faults.killed_commands import AT_ONCE, COMMANDS, asked, counted, read_result, work_folder, write_inputs
from tests.sampling.fault_server import FaultServer


CODES = {"SIGKILL": -9, "SIGTERM": -15, "SIGINT": 130}
"""How a command ends by a signal: a negative number is that of a signal, which a shell shows with 128 added."""


@dataclass(frozen=True)
class Whole:
    """A run that was not killed."""

    calls: list[str]
    result: dict[str, Any] = field(repr=False)
    asked: Counter = field(repr=False)


class Killing:
    """Runs commands, each in a folder of its own below `folder`."""

    def __init__(self, forks: ForkServer, server: FaultServer, folder: Path):
        self._forks, self._server, self._folder = forks, server, folder
        self._inputs = folder / "inputs"
        self._inputs.mkdir()
        write_inputs(self._inputs)
        self._whole: dict[str, Whole] = {}

    def whole(self, name: str) -> Whole:
        """The unkilled run of a command, made once."""
        if name not in self._whole:
            with _folder(self._folder / f"{name}-whole", self._inputs) as folder:
                self._server.bodies.clear()
                ended = self._run(COMMANDS[name].words, folder)
                assert ended.code == 0, ended.told
                self._whole[name] = Whole(ended.calls, read_result(folder), asked(self._server.bodies))
                assert counted(folder) == self._server.count
        return self._whole[name]

    def kill(self, name: str, kill: Kill) -> "Killed":
        """Kills a command, and goes on as its messages say."""
        with _folder(self._folder / name, self._inputs) as folder:
            self._server.bodies.clear()
            words = COMMANDS[name].words
            killed = self._run(words, folder, kill)
            again = self._run(words, folder)
            if again.code == 2 and "  resume: " in again.err:
                again = self._run(resuming(again.err), folder)
            result = read_result(folder) if again.code == 0 else {}
            return Killed(name, kill, killed, again, result, asked(self._server.bodies), counted(folder))

    def _run(self, words: list[str], folder: Path, kill: Kill | None = None) -> Ended:
        return self._forks.run(words, folder, kill, OPENAI_BASE_URL=self._server.url, OPENAI_API_KEY="none")


def resuming(err: str) -> list[str]:
    """The words of the command that a message gives to resume with."""
    line = next(line for line in err.splitlines() if line.startswith("  resume: "))
    return shlex.split(line.removeprefix("  resume: "))[1:]


@dataclass(frozen=True)
class Killed:
    """A run that was killed, and what came of going on."""

    name: str
    kill: Kill
    ended: Ended
    again: Ended
    result: dict[str, Any] = field(repr=False)
    asked: Counter = field(repr=False)
    counted: int

    def faults(self, whole: Whole) -> list[str]:
        """What is not as after a run that was not killed, in words."""
        found = []
        if self.ended.hit is None:
            return [f"it was not killed: {self.ended.told}"]
        if self.ended.code is None:
            found.append(f"it did not end by itself: {self.ended.told}")
        elif self.ended.code != CODES[self.kill.signal]:
            found.append(f"it ended with {self.ended.told}")
        if "Traceback" in self.ended.err and self.ended.code is not None:
            found.append(f"it ended with a traceback: {self.ended.told}")
        if self.again.code != 0:
            return [*found, f"it did not go on: {self.again.told}"]
        for path in sorted({*whole.result, *self.result}):
            if path not in self.result:
                found.append(f"{path} is missing")
            elif path not in whole.result:
                found.append(f"{path} is left behind")
            elif self.result[path] != whole.result[path]:
                found.append(f"{path} is another: {_difference(self.result[path], whole.result[path])}")
        paid_twice = (self.asked - whole.asked).total()
        if paid_twice > COMMANDS[self.name].paid_twice:
            found.append(f"{paid_twice} requests were paid twice")
        if whole.asked - self.asked:
            found.append(f"not asked: {whole.asked - self.asked}")
        # One that is given up on its way is counted too
        if not whole.asked.total() <= self.counted <= self.asked.total() + AT_ONCE:
            found.append(f"{self.counted} requests were counted of {self.asked.total()}")
        return found


def _difference(found: Any, wanted: Any) -> str:
    return "\n".join(ndiff(str(wanted).splitlines(), str(found).splitlines()))[:3000]


@contextmanager
def _folder(path: Path, inputs: Path) -> Iterator[Path]:
    """A work folder, removed in the end."""
    try:
        yield work_folder(path, inputs)
    finally:
        shutil.rmtree(path)


def place(calls: list[str], call: str, share: float, by_runs: bool) -> int:
    """
    The number of a call, from 1, among those of a run that are called `call`.

    Args:
        calls (`list[str]`):
            What the run has logged.
        call (`str`):
            Name of a call, or `"*"`.
        share (`float`):
            In [0, 1), how far into the run.
        by_runs (`bool`):
            Whether calls of a kind to the same file, one after another, count as one place: a large file weighs as much as a
            small one.
    """
    meant = [line for line in calls if call in ("*", line.split(" ")[0])]
    if not by_runs:
        return 1 + int(share * len(meant))
    runs = [len(list(group)) for _, group in groupby(meant)]
    number, rest = divmod(share * len(runs), 1)
    return 1 + sum(runs[: int(number)]) + int(rest * runs[int(number)])
