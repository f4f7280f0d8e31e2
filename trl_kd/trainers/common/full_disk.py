"""A disk that fills up while a training is saved: said with what is missing, and without a checkpoint in part."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model

from trl_kd.pairs.full_disk import disk_full, is_disk_full
from trl_kd.trainers.common.checkpoints import last_checkpoint


@contextmanager
def saving(trainer: Any, checkpoint: str | Path | None = None) -> Iterator[None]:
    """
    Around what a trainer saves.

    Args:
        trainer (`Trainer`):
            The trainer.
        checkpoint (`str` or `Path`, *optional*):
            Folder of the checkpoint; `None` for the model alone, in the end. A checkpoint in part is removed: it is of no
            use, and takes room. So are files beside it that were begun and got nothing.

    Raises:
        `DiskFull`: the disk is full.
    """
    output_dir = Path(trainer.args.output_dir)
    empty = set(_empty_files(output_dir))
    try:
        yield
    except Exception as error:
        if not is_disk_full(error, output_dir, is_saving=True):
            raise
        if trainer.args.should_save:
            if checkpoint is not None:
                shutil.rmtree(checkpoint, ignore_errors=True)
            for path in set(_empty_files(output_dir)) - empty:
                path.unlink(missing_ok=True)
        last = last_checkpoint(output_dir)
        needed = saved_bytes(trainer, with_optimizer=checkpoint is not None)
        if checkpoint is not None and last is not None:
            needed = max(needed, sum(file.stat().st_size for file in Path(last).rglob("*") if file.is_file()))
        what = "The model" if checkpoint is None else f"`{Path(checkpoint).name}`"
        before = f"`{Path(last).name}` is the last whole checkpoint" if last else "nothing before"
        way_out = "free some space, and go on from it (`resume_from_checkpoint`)" if last else "free some space"
        raise disk_full(output_dir, needed, f"{what} was not saved, and {before}", way_out) from error


def _empty_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("*") if path.is_file() and not path.stat().st_size)


def saved_bytes(trainer: Any, with_optimizer: bool) -> int:
    """About how much a trainer saves: the weights, of an adapter those that are trained, and the optimizer's state."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapts = is_peft_model(model)
    tensors = [p for p in model.parameters() if p.requires_grad or not adapts]
    if with_optimizer and trainer.optimizer is not None:
        states = getattr(trainer.optimizer, "state", {}).values()
        tensors += [value for state in states for value in state.values() if hasattr(value, "numel")]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
