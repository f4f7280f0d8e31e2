"""Which checkpoint in a folder to go on from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def last_checkpoint(folder: Path, wanted: Callable[[dict[str, Any]], bool] = lambda state: True) -> str | None:
    """
    Args:
        folder (`Path`):
            A trainer's `output_dir`. It need not exist.
        wanted (`Callable`, *optional*):
            Says of a trainer's state whether to go on from it.

    Returns:
        `str`, *optional*: the newest checkpoint that was saved in full. The trainer's state is what it gets last.
    """
    checkpoints = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    for checkpoint in sorted(checkpoints, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if wanted(state):
            return str(checkpoint)
    return None


def is_unfinished(state: dict[str, Any]) -> bool:
    """Whether there is something left to train: `Trainer` would take a step too many from a checkpoint at the very end."""
    return state["global_step"] < state["max_steps"]
