"""What the long run has tried and what was survived, as JSON, and as the tables of docs/reliability.md."""

import hashlib
import json
import os
import platform
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.faults.killed_commands import COMMANDS
from tests.faults.killing import Killed, Whole


ROOT = Path(__file__).parents[2]
TABLE = ROOT / "benchmarks/results/faults.json"
SIGNALS = {"SIGKILL": "`kill -9`", "SIGTERM": "`kill`", "SIGINT": "Ctrl-C"}
PLACES = {
    "the cache of `datasets`": ("cache/",),
    "answers and labels": ("answers.db", ".reserve"),
    "checkpoints": ("checkpoint-",),
    "pairs": ("data.building", "/data", "summary.json", "settings.json", "counts.json", "pairs.html"),
    "the student and other files": ("",),
}
"""Where a kill comes, by a part of the path of what is being written; the first that is found."""


def record(killed: Killed, whole: Whole) -> dict[str, Any]:
    """A case as it is kept."""
    kill = killed.kill
    return {
        "command": killed.name,
        "signal": kill.signal,
        "inside": kill.inside,
        "hit": killed.ended.hit,
        "code": killed.ended.code,
        "seconds": [round(killed.ended.seconds, 1), round(killed.again.seconds, 1)],
        "paid_twice": (killed.asked - whole.asked).total(),
        "faults": killed.faults(whole),
    }


class Kept:
    """
    The cases of a long run that were tried, by their names, so that it can be stopped and gone on with.

    Args:
        path (`Path`, *optional*):
            Where they are kept; nowhere in a short run. Those of other code are forgotten.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self._code = _code()
        self._cases: dict[str, dict[str, Any]] = {}
        if path is not None and path.is_file():
            lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            self._cases = {line["case"]: line for line in lines if line["code_of"] == self._code}

    def __contains__(self, case: str) -> bool:
        return case in self._cases

    def __getitem__(self, case: str) -> dict[str, Any]:
        return self._cases[case]

    def add(self, case: str, found: dict[str, Any]) -> None:
        self._cases[case] = {"case": case, "code_of": self._code, **found}
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                print(json.dumps(self._cases[case]), file=file)

    def write_table(self, cases: list[str]) -> None:
        missing = [case for case in cases if case not in self]
        assert not missing, f"{len(missing)} cases were not tried"
        TABLE.write_text(json.dumps(summary([self[case] for case in cases]), indent=2) + "\n", encoding="utf-8")


def _code() -> str:
    """A hash of the code that is tried, and of what tries it."""
    names = ("cases.py", "killed_commands.py", "fork_server.py", "killing.py", "kill_at_write.c")
    files = [*sorted(ROOT.glob("trl_kd/**/*.py")), *(Path(__file__).with_name(name) for name in names)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def summary(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The table, with versions and hardware."""
    tried, survived = Counter(map(_cell, cases)), Counter(_cell(case) for case in cases if not case["faults"])
    cells = [
        {"command": command, "signal": signal, "where": where, "inside": inside}
        | {"tried": number, "survived": survived[(command, signal, where, inside)]}
        for (command, signal, where, inside), number in sorted(tried.items())
    ]
    stops = [case["seconds"][0] for case in cases if case["signal"] == "SIGINT"]
    return {
        "tried": len(cases),
        "survived": survived.total(),
        "inside_a_write": sum(case["inside"] for case in cases),
        "most_paid_twice": {name: _most(cases, name, "paid_twice") for name in COMMANDS},
        "longest_run_until_ctrl_c_has_ended_it_seconds": max(stops, default=None),
        "cells": cells,
        "date": date.today().isoformat(),
        "code": _code(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("trl-kd", "trl", "transformers", "torch", "datasets", "safetensors")},
        "hardware": f"{platform.system()}, {platform.machine()}, {os.cpu_count()} cores",
    }


def _cell(case: dict[str, Any]) -> tuple[str, str, str, bool]:
    return case["command"], case["signal"], _where(case["hit"] or ""), case["inside"]


def _where(hit: str) -> str:
    path = hit.partition(" ")[2]
    return next(name for name, parts in PLACES.items() if any(part in path for part in parts))


def _most(cases: list[dict[str, Any]], command: str, field: str) -> int:
    return max((case[field] for case in cases if case["command"] == command), default=0)


def told(table: dict[str, Any]) -> str:
    """The page's sentences on it."""
    paid = ", ".join(f"{most} by {_name(command)}" for command, most in table["most_paid_twice"].items() if most)
    return (
        f"{table['survived']} of {table['tried']} kills were survived, {table['inside_a_write']} of them inside a write. "
        f"Requests that one kill has made be paid twice, of 2 under way at a time: at most {paid or 'none'}."
    )


def markdown(table: dict[str, Any]) -> str:
    """The tables of the page."""
    commands = _table(
        ["command", *SIGNALS.values(), "inside a write"],
        {
            _name(name): [
                *(_share(table, command=name, signal=signal) for signal in SIGNALS),
                _share(table, command=name, inside=True),
            ]
            for name in COMMANDS
        },
    )
    places = _table(
        ["while it writes", *SIGNALS.values(), "inside a write"],
        {
            where: [
                *(_share(table, where=where, signal=signal) for signal in SIGNALS),
                _share(table, where=where, inside=True),
            ]
            for where in PLACES
        },
    )
    return f"{commands}\n\n{places}"


def _name(command: str) -> str:
    return f"`trl-kd {'pbkd --rounds' if command == 'rounds' else command}`"


def _share(table: dict[str, Any], **wanted: Any) -> str:
    cells = [cell for cell in table["cells"] if all(cell[name] == value for name, value in wanted.items())]
    return f"{sum(cell['survived'] for cell in cells)} of {sum(cell['tried'] for cell in cells)}"


def _table(head: list[str], rows: dict[str, list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
