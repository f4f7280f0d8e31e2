"""How a command tells bad input from a bug: one line and exit code 2 for the first, a traceback for the second."""

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from trl_kd.sampling.recorded import NOT_SHOWN
from trl_kd.scripts.hidden import is_free


INPUT_ERROR = 2
"""Exit code of a command whose input was refused, argparse's own."""

show_traceback: ContextVar[bool] = ContextVar("show_traceback", default=False)

_LONGEST = 700

KINDS = {
    **{"int": "a whole number", "float": "a number", "string_to_bool": "true or false"},
    **{"whole_number": "a whole number", "number": "a number, and finite", "number_or_infinity": "a number"},
    "mapping": "a mapping, as in JSON: '{\"name\": true}'",
}
"""Types of arguments by the names that argparse gives them, in words."""


class InputError(Exception):
    """
    Input that a command refuses.

    Args:
        message (`str`):
            A sentence that names the field, its value and the way out.
        commands (`Mapping[str, str]`, *optional*):
            Ways out that are commands to be pasted, by what they do.
    """

    def __init__(self, message: str, commands: Mapping[str, str] | None = None):
        super().__init__(message)
        self.commands = dict(commands or {})


class ProcessError(InputError):
    """What ends one process of several and not the others: it is said by this process, whichever it is."""


@contextmanager
def bad_input() -> Iterator[None]:
    """
    Takes the errors with which libraries refuse what they are given as bad input.

    It belongs around everything before the first training step, where these errors come from arguments, files and
    data. An error after that is a bug or a broken machine, and keeps its traceback.
    """
    try:
        with kept_interruption():
            yield
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        raise InputError(one_line(error)) from error
    except TypeError as error:  # an argument of the wrong kind far more often than a bug, but it may be one
        raise InputError(f"{one_line(error)} (a TypeError: --traceback shows where)") from error
    except Exception as error:
        # A chat template that refuses a conversation; jinja2 is imported by whoever rendered it
        if type(error).__module__.startswith("jinja2."):
            raise InputError(f"The chat template refused a row: {one_line(error)}") from error
        if type(error).__module__.startswith("safetensors"):
            raise InputError(f"A file of weights cannot be read: {one_line(error)}") from error
        raise


@contextmanager
def kept_interruption() -> Iterator[None]:
    """Ctrl-C stays Ctrl-C where a library fails at something else on its way out, as `datasets` at a file it has closed."""
    try:
        yield
    except Exception as error:
        if _was_interrupted(error):
            raise KeyboardInterrupt from error
        raise


def _was_interrupted(error: BaseException | None) -> bool:
    return error is not None and (isinstance(error, KeyboardInterrupt) or _was_interrupted(error.__context__))


def one_line(error: BaseException | str) -> str:
    """The text of an error on one line, without credentials."""
    text = without_credentials(" ".join(str(error).split()) or type(error).__name__)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


def without_credentials(text: str) -> str:
    """A text without the Hub's tokens, and without the passwords of addresses and what stands behind their '?'."""
    text = re.sub(r"://[^/@\s]+@", "://***@", text)
    text = re.sub(r"(://[^\s?'\"]+\?)[^\s'\"]+", r"\1***", text)
    text = re.sub(r"(--hub[_-]token[ =])\S+", r"\1***", text)
    return re.sub(r"\bhf_[A-Za-z0-9]{8,}", "hf_***", text)


def refuse(message: str) -> None:
    """An argument parser's `error`, which raises: the sentence names the field and says what it takes."""
    match = re.fullmatch(r"argument (?:--)?([\w-]+)\S*: (.*)", message, flags=re.DOTALL)
    if match is None:
        raise InputError(message)
    name, reason = match.groups()
    value = re.fullmatch(r"invalid (\w+) value: (.*)", reason)
    if value is not None:
        given = NOT_SHOWN if is_free(name.replace("-", "_")) else f"is {value[2]}"
        raise InputError(f"`{name}` {given}: it must be {KINDS.get(value[1], value[1])}.")
    raise InputError(f"`{name}`: {reason}")


def report(command: Callable[[], int], prog: str, with_traceback: bool = False) -> int:
    """
    Runs a command and returns its exit code; refused input becomes one line on stderr.

    Args:
        command (`Callable[[], int]`):
            What to run.
        prog (`str`):
            Name in front of the line.
        with_traceback (`bool`, *optional*, defaults to `False`):
            Whether to print the traceback of refused input too.
    """
    token = show_traceback.set(with_traceback)
    try:
        return command()
    except InputError as error:
        # Under a launcher every process fails alike; one of them says so
        if os.environ.get("LOCAL_RANK", "0") == "0" or isinstance(error, ProcessError):
            if with_traceback:
                traceback.print_exception(error)
            print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
            for name, words in error.commands.items():
                print(f"  {name}: {words}", file=sys.stderr)
        return INPUT_ERROR
    except SystemExit as stop:  # argparse's way out of --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        return 130
    finally:
        show_traceback.reset(token)
