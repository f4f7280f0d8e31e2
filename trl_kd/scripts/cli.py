"""The `trl-kd` command: finds the command asked for and runs it.

Nothing heavy is imported here, so that `trl-kd --help` answers at once.
"""

import sys
from difflib import get_close_matches
from importlib import import_module

from trl_kd import __version__
from trl_kd.scripts.errors import InputError, report


# name: (module with `main(argv) -> int`, what it does)
COMMANDS = {
    "pairs": ("trl_kd.scripts.pairs", "make preference pairs from teacher's and student's answers"),
    "pbkd": ("trl_kd.scripts.pbkd", "distil a student from preference pairs and teacher responses"),
    "mm-pbkd": (
        "trl_kd.scripts.mm_pbkd",
        "match a student to the weights of a teacher where preferences say it matters",
    ),
    "online-pbkd": (
        "trl_kd.scripts.online_pbkd",
        "let a student climb a reward model that learns from its comparisons with its teacher",
    ),
    "demo": ("trl_kd.scripts.demo", "see the method at work on a small task, on this machine"),
}


def main(argv: list[str] | None = None) -> int:
    """
    Runs `trl-kd`.

    Args:
        argv (`list[str]`, *optional*):
            Arguments, by default those of the process.

    Returns:
        The exit code: 0, or 2 for input that was refused. Errors that are not in the input are raised.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    with_traceback = "--traceback" in argv
    argv = [argument for argument in argv if argument != "--traceback"]
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        print(f"trl-kd {__version__}")
        return 0
    prog = f"trl-kd {argv[0]}" if argv[0] in COMMANDS else "trl-kd"
    return report(lambda: _run(argv[0], argv[1:]), prog, with_traceback)


def _run(command: str, argv: list[str]) -> int:
    if command not in COMMANDS:
        close = get_close_matches(command, COMMANDS, n=1)
        advice = f"did you mean '{close[0]}'?" if close else "`trl-kd --help` lists the commands."
        raise InputError(f"unknown command {command!r}: {advice}")
    module, _ = COMMANDS[command]
    return import_module(module).main(argv)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: trl-kd COMMAND [options]",
            "",
            "Preference-based knowledge distillation for TRL.",
            "",
            *lines,
            "",
            "  trl-kd COMMAND --help  shows the options of a command",
            "  --version              shows the version",
            "  --traceback            shows where an error comes from",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
