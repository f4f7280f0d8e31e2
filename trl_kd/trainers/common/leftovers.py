"""What a process that was killed has left in an output folder, and no later run would write over or remove."""

import re
from contextlib import suppress
from pathlib import Path

from trl_kd.pairs.full_disk import RESERVE
from trl_kd.pairs.places import StoreError
from trl_kd.pairs.store import AnswerStore


_BEGUN_WEIGHTS = re.compile(r"\.tmp[A-Za-z0-9]{6}")
"""Names under which safetensors writes a file, until it is whole."""

_OURS = ("checkpoint-*", "round-*", "_online")
"""Folders below an output folder that nobody else writes to."""


def remove_leftovers(folder: str | Path) -> None:
    """
    Removes files of weights that were begun, and closes stores of answers that were open, with their reserves.

    Args:
        folder (`str` or `Path`):
            An output folder that this process has claimed.
    """
    folder = Path(folder)
    ours = [place for name in _OURS for place in folder.glob(name) if place.is_dir()]
    for path in [*folder.glob(".*"), *(path for place in ours for path in place.rglob(".*"))]:
        if path.name == RESERVE:
            with suppress(StoreError):  # somebody else has it open; or it is damaged, which is said when it is needed
                AnswerStore(path.parent).close()
        elif _BEGUN_WEIGHTS.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)
