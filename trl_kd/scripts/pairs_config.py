"""`pairs_config`: how a training makes its own pairs, as a file of the arguments of `trl-kd pairs`."""

from collections.abc import Callable, Mapping
from pathlib import Path

from trl_kd.scripts.arguments import parse
from trl_kd.scripts.errors import InputError
from trl_kd.scripts.pairs_arguments import PairsArguments, check, refuse_set


def read_file(path: str, refused: Mapping[str, str], complete: Callable[[PairsArguments], None]) -> PairsArguments:
    """
    Args:
        path (`str`):
            A YAML or JSON file of arguments of `trl-kd pairs`.
        refused (`Mapping[str, str]`):
            Arguments that it may not set, and why.
        complete (`Callable`):
            Fills in what the training knows itself: student, prompts, folder.

    Returns:
        The arguments, checked as `trl-kd pairs` checks its own.

    Raises:
        `InputError`: no such file, or arguments that are wrong; the message names the file.
    """
    if not Path(path).is_file():
        raise InputError(f"`pairs_config` is {path!r}: no such file.")
    try:
        args: PairsArguments = parse((PairsArguments,), ["--config", path], "trl-kd pairs", is_launched=False).values[
            0
        ]
        for name, why in refused.items():
            refuse_set(args, [name], f"{why}.")
        complete(args)
        check(args)
    except InputError as error:
        said = str(error).replace(f"`config` is {path!r}", f"`pairs_config` is {path!r}")
        raise InputError(said if "`pairs_config`" in said else f"{said} (in `pairs_config` = {path!r})") from error
    return args
