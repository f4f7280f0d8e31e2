"""A run that was stopped, and how it goes on: in commands that can be pasted."""

import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl_kd.pairs.lock import check_unclaimed
from trl_kd.scripts.errors import InputError, bad_input, without_credentials
from trl_kd.scripts.paths import shell
from trl_kd.trainers.common.checkpoints import last_checkpoint


_RESUME = ("--resume_from_checkpoint", "true")
_BEGINS_ANEW = "There is no checkpoint yet: the same command begins anew."


def refuse_checkpoint(training_args: Any, words: list[str] | None) -> None:
    """
    Raises where a run would begin anew beside a checkpoint of an earlier one.

    Args:
        training_args (`TrainingArguments`):
            Settings of the run.
        words (`list[str]`, *optional*):
            The command as it was typed; `None` where it is a launcher's of the user's own.

    Raises:
        `InputError`: with the commands that resume and that start over, or without them while the earlier run goes on.
    """
    last = None if training_args.resume_from_checkpoint else last_checkpoint(Path(training_args.output_dir))
    if last is None:
        return
    with bad_input():
        check_unclaimed(training_args.output_dir)
    remove = f"rm -r -- {shlex.quote(training_args.output_dir)}/checkpoint-[0-9]*"
    again = "the same command" if words is None else _command(words)
    raise InputError(
        f"`output_dir` is {training_args.output_dir!r}, which holds {Path(last).name} of an earlier run: resume it, start "
        "over without its checkpoints, or give another `output_dir`.",
        {"resume": _resuming(words), "start over": f"{remove} && {again}"},
    )


@contextmanager
def told_how_to_resume(training_args: Any, words: list[str] | None) -> Iterator[None]:
    """Around a training: says after Ctrl-C how it goes on. The arguments are those of [`refuse_checkpoint`]."""
    try:
        yield
    except KeyboardInterrupt:
        last = last_checkpoint(Path(training_args.output_dir))
        if last is None:
            print(f"\nStopped. {_BEGINS_ANEW}", file=sys.stderr)
        else:
            print(f"\nStopped. To go on from {Path(last).name}:\n  {_resuming(words)}", file=sys.stderr)
        raise


def how_to_go_on(output_dir: str) -> str:
    """A sentence on how a training goes on that was stopped, where its command is not known."""
    last = last_checkpoint(Path(output_dir))
    return _BEGINS_ANEW if last is None else f"To go on from {Path(last).name}: {_resuming(None)}."


def _resuming(words: list[str] | None) -> str:
    return f"the same command with {shell(*_RESUME)}" if words is None else _command(words, *_RESUME)


def _command(words: list[str], *more: str) -> str:
    kept = _without(words, ("dry_run", "resume_from_checkpoint"))
    return without_credentials(shell(*kept, *more))


def _without(words: Iterable[str], keys: tuple[str, ...]) -> list[str]:
    """`words` without some keys and their values."""
    kept, is_dropped = [], False
    for word in words:
        if word.startswith("--"):
            is_dropped = word[2:].partition("=")[0].replace("-", "_") in keys
        if not is_dropped:
            kept.append(word)
    return kept
