"""A run that was stopped, and how it goes on: in commands that can be pasted."""

import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl_kd.pairs.lock import check_unclaimed
from trl_kd.scripts.errors import InputError, bad_input, without_credentials
from trl_kd.scripts.hidden import has_hidden
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
    raise InputError(
        f"`output_dir` is {training_args.output_dir!r}, which holds {Path(last).name} of an earlier run: resume it, start "
        "over without its checkpoints, or give another `output_dir`.",
        {"resume": _command(words, *_RESUME), "start over": _command(words, before=remove)},
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
            print(f"\nStopped. To go on from {Path(last).name}:\n  {_command(words, *_RESUME)}", file=sys.stderr)
        raise


def how_to_go_on(output_dir: str) -> str:
    """A sentence on how a training goes on that was stopped, where its command is not known."""
    last = last_checkpoint(Path(output_dir))
    return _BEGINS_ANEW if last is None else f"To go on from {Path(last).name}: {_command(None, *_RESUME)}."


def _command(words: list[str] | None, *more: str, before: str | None = None) -> str:
    """
    The command as it can be pasted, with `more` words at its end, and behind another one. In words, where it was not typed,
    or where a key or a password stands in it.
    """
    command = None if words is None else shell(*_without(words, ("dry_run", "resume_from_checkpoint")), *more)
    if words is None or command is None or has_hidden(words) or without_credentials(command) != command:
        added = f" with {shell(*more)}" if more else ""
        return f"the same command{added}" + (f", after: {before}" if before else "")
    return command if before is None else f"{before} && {command}"


def _without(words: Iterable[str], keys: tuple[str, ...]) -> list[str]:
    """`words` without some keys and their values."""
    kept, is_dropped = [], False
    for word in words:
        if word.startswith("--"):
            is_dropped = word[2:].partition("=")[0].replace("-", "_") in keys
        if not is_dropped:
            kept.append(word)
    return kept
