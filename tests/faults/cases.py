"""Which commands are killed, how, and at which of their writes."""

import os
import random
from dataclasses import dataclass

from tests.faults.fork_server import Kill
from tests.faults.killed_commands import COMMANDS
from tests.faults.killing import Whole, place


KILL, TERM, INT = "SIGKILL", "SIGTERM", "SIGINT"


@dataclass(frozen=True)
class Case:
    """
    A command and where it is killed: at the call that `call`, `path` and `at` of [`Kill`] say, or, given a `share`, as
    [`place`] says.
    """

    command: str
    signal: str
    call: str = "*"
    path: str = "*"
    at: int = 1
    inside: bool = False
    share: float | None = None
    by_runs: bool = False

    @property
    def id(self) -> str:
        where = f"{self.call} {self.path} {self.at}" if self.share is None else f"{self.call} {self.share:.4f}"
        return (
            f"{self.command}-{self.signal}-{where}{' inside' if self.inside else ''}{' runs' if self.by_runs else ''}"
        )

    def kill(self, whole: Whole) -> Kill:
        at = self.at if self.share is None else place(whole.calls, self.call, self.share, self.by_runs)
        return Kill(self.signal, at, self.call, self.path, self.inside)


def chosen() -> list[Case]:
    """Where something is at stake."""
    wal, labels = "out/answers.db-wal", "out/_online/labels/answers.db-wal"
    return [
        Case("pairs", KILL, "write", wal, 60, inside=True),  # answers
        Case("pairs", TERM, "write", wal, 150),  # labels
        Case("pairs", INT, "write", wal, 160),
        Case("pairs", KILL, "write", "out/answers.db", 3, inside=True),  # the log goes into the database
        Case("pairs", KILL, "rename", "out/data"),
        Case("pairs", TERM, "write", "out/settings.json.building", inside=True),
        Case("pairs", INT, "sync", "out/answers.db"),
        Case("pbkd", KILL, "write", "out/_lock"),
        Case("pbkd", KILL, "write", "out/checkpoint-4/.tmp*", inside=True),  # weights of a checkpoint that stays
        Case("pbkd", TERM, "write", "out/checkpoint-2/optimizer.pt", 5, inside=True),
        Case("pbkd", KILL, "write", "out/checkpoint-4/trainer_state.json", inside=True),
        Case("pbkd", INT, "write", "out/checkpoint-4/trainer_state.json"),
        Case("pbkd", TERM, "remove", "out/checkpoint-2/model.safetensors"),
        Case("pbkd", KILL, "write", "out/.tmp*", inside=True),  # all is trained
        Case("mm-pbkd", KILL, "write", "out/checkpoint-1/q_optimizer.pt", inside=True),
        Case("mm-pbkd", TERM, "write", "out/checkpoint-2/pbkd_dual.json"),
        Case("mm-pbkd", INT, "write", "out/tokenizer.json", inside=True),
        Case("online-pbkd", KILL, "write", "out/_online/teacher/answers.db-wal", 30, inside=True),
        Case("online-pbkd", KILL, "write", "out/checkpoint-2/generation_buffer_0.pt", inside=True),
        Case("online-pbkd", TERM, "write", "out/checkpoint-2/_online/pairs/data.building/*", 3, inside=True),
        Case("online-pbkd", INT, "sync", labels, 2),
        Case("rounds", INT, "write", "cache/parquet/*/tmp*"),  # of `datasets`, which then fails at something else
        Case("rounds", KILL, "write", "out/round-1/metrics.json.building", inside=True),
        Case("rounds", TERM, "write", "out/round-1/carried.pt.building", 5, inside=True),
        Case("rounds", KILL, "rename", "out/round-1/metrics.json", 2),
        Case("rounds", KILL, "remove", "out/round-2/student/checkpoint-2/trainer_state.json"),  # the older one of two
        Case("rounds", KILL, "remove", "out/round-1/student/checkpoint-3/model.safetensors"),
        Case("rounds", INT, "write", "out/model.safetensors", inside=True),
    ]


def spread() -> list[Case]:
    """`TRL_KD_KILLS` further ones over whole runs, half of them inside a write, drawn by `TRL_KD_SEED`."""
    draw = random.Random(int(os.environ.get("TRL_KD_SEED", "18")))
    count = -(-int(os.environ.get("TRL_KD_KILLS", "250")) // len(COMMANDS))
    cases = []
    for command in COMMANDS:
        for number in range(count):
            inside = number % 2 == 1
            cases.append(
                Case(
                    command,
                    draw.choice((KILL, KILL, TERM, INT)),
                    "write" if inside else "*",
                    inside=inside,
                    share=(number + draw.random()) / count,
                    by_runs=number % 4 < 2,
                )
            )
    return cases
