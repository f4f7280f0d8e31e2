"""The checkpoints of a folder: which to go on from, and which are too many."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any


def last_checkpoint(folder: Path) -> str | None:
    """
    Args:
        folder (`Path`):
            A trainer's `output_dir`. It need not exist.

    Returns:
        `str`, *optional*: the newest checkpoint that was saved in full. The trainer's state is what it gets last.
    """
    for checkpoint in reversed(_checkpoints(folder)):
        with suppress(OSError, ValueError):
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
            return str(checkpoint)
    return None


def remove_older(checkpoint: str | Path, limit: int | None, best: str | None = None) -> None:
    """
    Removes checkpoints as `Trainer` does when it has saved one, in case the process that saved this one was killed before.

    Args:
        checkpoint (`str` or `Path`):
            The checkpoint, which stays.
        limit (`int`, *optional*):
            How many of it and those before it may stay (`save_total_limit`); `None` or 0 for all.
        best (`str`, *optional*):
            One that stays in any case.
    """
    checkpoint = Path(checkpoint)
    older = [path for path in _checkpoints(checkpoint.parent) if _step(path) < _step(checkpoint)]
    kept = [path for path in older if best is not None and path.name == Path(best).name]
    others = [path for path in older if path not in kept]
    if limit and limit > 0:
        for path in others[: max(len(others) - max(limit - 1 - len(kept), 0), 0)]:
            shutil.rmtree(path, ignore_errors=True)


class EndsAtLastStep:
    """Mixin before a `Trainer`, which by itself takes one step too many from a checkpoint of the last step in the middle of
    an epoch: it looks whether to stop behind each step."""

    state: Any

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs):
        begun = super()._init_training_state(  # type: ignore[misc]
            max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs
        )
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else begun


def ending(trainer: type) -> Any:
    """A trainer's class, with [`EndsAtLastStep`]."""
    return trainer if issubclass(trainer, EndsAtLastStep) else type(trainer.__name__, (EndsAtLastStep, trainer), {})


def _checkpoints(folder: Path) -> list[Path]:
    """All of a folder, whole or not, from the first to the last."""
    return sorted((path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])
