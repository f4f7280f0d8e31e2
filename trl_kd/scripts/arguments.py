"""Arguments of the commands: a YAML file, the command line on top of it, and no key that nobody knows.

They are read by TRL's parser. On top of it: values from the file are checked as those from the command line, a key that
neither the command nor, where that is used, `accelerate launch` knows is an error, and so is an abbreviation.
"""

import argparse
import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any, get_args, get_type_hints

from transformers.trainer_pt_utils import AcceleratorConfig
from trl import ScriptArguments, TrlParser
from trl.scripts.utils import DatasetConfig

from trl_kd.sampling.recorded import NOT_SHOWN
from trl_kd.scripts import paths
from trl_kd.scripts.errors import KINDS, InputError, bad_input, refuse
from trl_kd.scripts.hidden import described, free_name
from trl_kd.scripts.suggestions import advice
from trl_kd.scripts.values import CONVERSIONS, check_kind, check_plain, number, number_or_infinity, optional
from trl_kd.scripts.yaml_files import read_mapping


_FILES = ("accelerator_config", "fsdp_config", "deepspeed")
"""Mappings that may be the name of a file."""

_NOT_FOR_USERS = {"-m", "--module", "--no_python", "--no-python", "-h", "--help"}
"""Options of `accelerate launch` that say what to launch, which is the command's business."""


@dataclass
class TrainingScriptArguments(ScriptArguments):
    """
    Arguments of the training commands, beside those of [`~trl.ScriptArguments`].

    Parameters:
        dry_run (`bool`, *optional*, defaults to `False`):
            Check everything that can be known before weights load, print it as a table, and stop.
        accelerate_config (`str`, *optional*):
            Configuration of `accelerate launch`: a name that TRL ships ("zero2", "fsdp2", …) or a file.
    """

    dry_run: bool = field(
        default=False,
        metadata={"help": "Check everything that can be known before weights load, print it, and stop."},
    )
    accelerate_config: str | None = field(
        default=None,
        metadata={
            "help": "Configuration of accelerate launch: a name that TRL ships ('zero2', 'fsdp2', ...) or a file."
        },
    )


@dataclass
class PreferenceScriptArguments(TrainingScriptArguments):
    """
    Arguments of the training commands whose `dataset_name` and its companions name prompts, and that may be given pairs
    beside them.

    Parameters:
        preference_dataset (`str`, *optional*):
            Preference pairs: a Hub id, a folder that `trl-kd pairs` has written, or a file.
        preference_dataset_config (`str`, *optional*):
            Configuration of the pairs, where the Hub has several.
        preference_dataset_split (`str`, *optional*, defaults to `"train"`):
            Split of the pairs.
    """

    preference_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Preference pairs: a Hub id, a folder of `trl-kd pairs`, or a .jsonl, .json, .parquet file."
        },
    )
    preference_dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the preference pairs, where the Hub has several."}
    )
    preference_dataset_split: str = field(default="train", metadata={"help": "Split of the preference pairs."})


@dataclass
class Parsed:
    """What the arguments say: the `values`, one instance a dataclass; `script_args`, the command line without what is
    meant for `accelerate launch`; `launch_args`, what is; and those of them that came from the `command_line`."""

    values: tuple[Any, ...]
    script_args: list[str]
    launch_args: list[str]
    command_line: list[str]


def parse(
    dataclass_types: Iterable[type],
    argv: list[str],
    prog: str,
    required: Mapping[str, str] | None = None,
    is_launched: bool = True,
) -> Parsed:
    """
    Reads the arguments of a command.

    Args:
        dataclass_types (`Iterable[type]`):
            Dataclasses to fill.
        argv (`list[str]`):
            Command line. `--config FILE` names a YAML file whose values it overrides.
        prog (`str`):
            Name of the command in messages.
        required (`Mapping[str, str]`, *optional*):
            Keys that must have a value, with what to say to whom leaves them out.
        is_launched (`bool`, *optional*, defaults to `True`):
            Whether the command may run under `accelerate launch`, so that it takes its keys too.

    Raises:
        `InputError`: an unknown key, or a value that a field cannot have.
    """
    parser = _Parser(dataclass_types, prog, is_launched)
    path, rest = _take_config(argv, prog)
    from_file = [] if path is None else parser.read_config(path)
    # Keys first: a dataclass may refuse a value for the very reason that a key was misspelt
    found, remaining = parser.parse_known_args(rest)
    parser.check_command_line(remaining, rest)
    for name, told in (required or {}).items():
        if not getattr(found, name):
            raise InputError(f"`{name}` is not set: {told}")
    for name, value in vars(found).items():
        check_plain(name, value)
    _check_mappings(parser.types, found)
    _check_deepspeed(getattr(found, "deepspeed", None))
    _check_multiple(getattr(found, "pad_to_multiple_of", None))
    with bad_input():
        values = _fill(parser, rest)
    script_args = [] if path is None else paths.option("config", path)
    script_args += _without(rest, remaining)
    return Parsed(values, script_args, from_file + remaining, remaining)


def _fill(parser: "_Parser", words: list[str]) -> tuple[Any, ...]:
    try:
        return parser.parse_args_into_dataclasses(words, return_remaining_strings=True, look_for_args_file=False)[:-1]
    except ValueError as error:
        if "bf16/gpu" not in str(error):
            raise
        raise InputError(
            "`bf16` is True, or `bf16_full_eval`, but no GPU here can do it: leave it out, or set `use_cpu` to true to do "
            "it on the CPU."
        ) from error


def _check_mappings(types: Iterable[type], found: argparse.Namespace) -> None:
    """Raises for a value of a field that transformers reads as JSON and takes for a mapping, and that is none."""
    for name in dict.fromkeys(name for t in types for name in getattr(t, "_VALID_DICT_FIELDS", ())):
        value = given = getattr(found, name, None)
        if isinstance(value, str) and (name not in _FILES or value.startswith("{")):
            with suppress(ValueError):
                value = json.loads(value)
        if not (value is None or isinstance(value, dict) or (name in _FILES and isinstance(value, str))):
            raise InputError(f'{described(name, given)}: it must be a mapping, as in JSON: \'{{"name": "value"}}\'.')
        known = [f.name for f in fields(AcceleratorConfig)] if name == "accelerator_config" else None
        for key in value if isinstance(value, dict) else ():
            if not isinstance(key, str) or (known is not None and key not in known):
                raise InputError(
                    f"{described(name, given)}, with the name {key!r}: "
                    + ("it must be text." if known is None else f"choose from {', '.join(known)}.")
                )


def _check_deepspeed(value: Any) -> None:
    """Raises where its package is missing."""
    if value and find_spec("deepspeed") is None:
        raise InputError("`deepspeed` is set, which needs its package: pip install deepspeed, or drop it.")


def _check_multiple(value: Any) -> None:
    """Raises for a text that TRL cannot read as `pad_to_multiple_of`."""
    if isinstance(value, str) and value.lower() not in ("auto", "none", "null") and not value.isdecimal():
        raise InputError(f"`pad_to_multiple_of` is {value!r}: it must be a whole number, at least 1, or 'auto'.")


def _take_config(argv: list[str], prog: str) -> tuple[str | None, list[str]]:
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.error = refuse  # type: ignore[method-assign, assignment]
    parser.add_argument("--config", type=paths.reader("config"))
    known, rest = parser.parse_known_args(argv)
    return known.config, rest


def _without(words: list[str], taken: list[str]) -> list[str]:
    """`words` without its ordered subsequence `taken`, which argparse left over."""
    taken = list(taken)
    kept = []
    for word in words:
        if taken and word == taken[0]:
            taken.pop(0)
        else:
            kept.append(word)
    return kept


class _Parser(TrlParser):
    def __init__(self, dataclass_types: Iterable[type], prog: str, is_launched: bool):
        self.types = list(dataclass_types)
        self.is_launched = is_launched
        passed_on = "Keys of `accelerate launch` (--num_processes, --gpu_ids, ...) are passed on to it. "
        super().__init__(
            self.types,
            prog=prog,
            allow_abbrev=False,
            usage=f"{prog} [--config FILE.yaml] [--key value ...]",
            epilog="Every key may stand in the YAML file of --config; the command line wins. "
            f"{passed_on if is_launched else ''}--traceback shows where an error is from.",
        )
        for action in self._actions:
            if action.dest in paths.FIELDS:
                action.type = paths.reader(action.dest)
            elif action.dest == "datasets":
                action.type = _dataset_of_path
            else:
                _check_conversion(action)

    def error(self, message: str):
        refuse(message)

    def _launch_options(self) -> dict[str, argparse.Action]:
        return launch_options() if self.is_launched else {}

    # ---- The file --------------------------------------------------------------------------------

    def read_config(self, path: str) -> list[str]:
        """Makes the values of a YAML file the defaults; returns those for `accelerate launch`, as a command line."""
        config = read_mapping("config", path, " of keys to values, as in `beta: 0.1`.")
        _set_environment(config.pop("env", None), path)
        actions = {action.dest: action for action in reversed(self._actions)}  # `--x` comes before its `--no_x`
        hints = {name: hint for t in reversed(self.types) for name, hint in get_type_hints(t).items()}
        nullable = {name for name, hint in hints.items() if type(None) in get_args(hint)}
        defaults: dict[str, Any] = {}
        launch_args = []
        for key, value in config.items():
            check_plain(key, value, f" in {path}")
            if key in actions and key != "help":
                if value is None and key not in nullable:
                    raise InputError(f"`{key}` is null in {path}: give a value, or leave it out.")
                if key == "resume_from_checkpoint" and isinstance(value, bool):
                    value = str(value).lower()
                if key == "fsdp" and isinstance(value, bool | list):  # as transformers takes it
                    defaults[key] = value
                    continue
                if not _is_converted(actions[key]):
                    check_kind(key, value, hints.get(key), path)
                defaults[key] = None if value is None else _converted(key, value, actions[key], path)
            else:
                launch_args += self._launch_words(key, value, path)
        self.set_defaults(**defaults)
        return launch_args

    def _launch_words(self, key: Any, value: Any, path: str) -> list[str]:
        action = self._launch_options().get(f"--{key}")
        if action is None:
            raise InputError(f"unknown key `{key}` in {path}: {self._advice(str(key))}")
        if value is None or (action.nargs == 0 and value is False):
            return []
        return [f"--{key}"] if action.nargs == 0 else [f"--{key}", _as_choice(value, action.choices)]

    # ---- The command line ------------------------------------------------------------------------

    def check_command_line(self, remaining: list[str], words: list[str]) -> None:
        """Raises for what neither the command nor `accelerate launch` takes: what is `remaining` of all `words`."""
        owner: argparse.Action | None = None
        for word in remaining:
            if word.startswith("-") and not re.fullmatch(r"-\.?\d.*", word):
                name = word.split("=")[0]
                owner = self._launch_options().get(name)
                if owner is None:
                    raise InputError(f"unknown key `{name}`: {self._advice(name.lstrip('-').replace('-', '_'))}")
                if "=" in word:
                    owner = None
            elif owner is None or owner.nargs == 0:
                free = free_name(words, word)
                if free is not None:
                    raise InputError(
                        f"`{free}` has several words as its value {NOT_SHOWN}: put the whole of it into single quotes."
                    )
                raise InputError(f"unexpected word {word!r}: every value follows its key, as in `--beta 0.1`.")

    def _advice(self, key: str) -> str:
        ours = [option for action in self._actions for option in action.option_strings]
        names = [option[2:] for option in [*ours, "--config", "--traceback"]]
        return advice(key, (n for n in names if "-" not in n)) or f"`{self.prog} --help` lists the keys."


def launch_options() -> dict[str, argparse.Action]:
    """The options of `accelerate launch`, by their spelling."""
    from accelerate.commands.launch import launch_command_parser

    actions = launch_command_parser()._actions
    return {o: a for a in actions for o in a.option_strings if o not in _NOT_FOR_USERS}


def _set_environment(variables: Any, path: str) -> None:
    if variables is None:
        return
    if not isinstance(variables, dict):
        raise InputError(f"`env` in {path} must be a mapping of names to values.")
    check_plain("env", variables, f" in {path}")
    for name, value in variables.items():
        try:
            os.environ[str(name)] = str(value)
        except (ValueError, OSError):
            raise InputError(
                f"`env` in {path} sets {str(name)!r} to what no variable can be {NOT_SHOWN}: write another value."
            ) from None


def _check_conversion(action: argparse.Action) -> None:
    """Lets a word of the command line be refused that Python would take, and nothing behind it."""
    name = getattr(action.type, "__name__", "")
    if name == "tuple":
        action.type, action.nargs = number, 2
    elif action.dest == "max_grad_norm":  # infinity: the norm is logged, and nothing is clipped
        action.type = number_or_infinity
    elif name in CONVERSIONS:
        action.type = CONVERSIONS[name] if isinstance(action.type, type) else optional(CONVERSIONS[name])


def _is_converted(action: argparse.Action) -> bool:
    """Whether a value of a file goes the way of a word of the command line."""
    is_read = action.choices is not None or action.dest == "datasets"
    return is_read or getattr(action.type, "__name__", "") in KINDS


def _as_choice(value: Any, choices: Iterable[Any] | None) -> str:
    # YAML reads a bare `no` as false, and `eval_strategy: no` is what one writes
    return "no" if value is False and choices is not None and "no" in choices else str(value)


def _converted(key: str, value: Any, action: argparse.Action, path: str) -> Any:
    """A value of the file, as the command line would have it."""
    where = described(key, value, f" in {path}")
    if key == "datasets":
        return [_dataset_config(entry, path) for entry in (value if isinstance(value, list) else [value])]
    if action.nargs is not None and action.nargs != "?":
        items = value if isinstance(value, list) else [value]
        if isinstance(action.nargs, int) and len(items) != action.nargs:
            raise InputError(f"{where}: it must be a list of {action.nargs}.")
        return [_scalar(item, action, where) for item in items]
    return _scalar(value, action, where)


def _scalar(value: Any, action: argparse.Action, where: str) -> Any:
    if action.dest in paths.FIELDS:
        return paths.resolved(action.dest, value) if isinstance(value, str) else value
    if action.choices is not None:
        choices = list(action.choices)
        chosen = {str(choice): choice for choice in choices}.get(_as_choice(value, choices))
        if chosen is None:
            raise InputError(f"{where}: choose from {', '.join(map(repr, map(str, choices)))}.")
        return chosen
    if not _is_converted(action) or not callable(action.type):
        return value
    kind = getattr(action.type, "__name__", "")
    try:
        return action.type(json.dumps(value) if isinstance(value, dict) else str(value))
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        raise InputError(f"{where}: it must be {KINDS[kind]}.") from None


def _dataset_of_path(path: str) -> DatasetConfig:
    return DatasetConfig(path=paths.resolved("datasets", path))


def _dataset_config(entry: Any, path: str) -> DatasetConfig:
    known = [f.name for f in fields(DatasetConfig)]
    if isinstance(entry, str):
        return _dataset_of_path(entry)
    if not isinstance(entry, dict) or "path" not in entry:
        raise InputError(
            f"`datasets` in {path} holds {entry!r}: each entry needs a `path` (keys: {', '.join(known)})."
        )
    for key in entry:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            advice = f"did you mean `{close[0]}`?" if close else f"the keys are {', '.join(known)}."
            raise InputError(f"unknown key `{key}` in an entry of `datasets` in {path}: {advice}")
    hints = get_type_hints(DatasetConfig)
    for key, value in entry.items():
        check_kind(key, value, hints[key], f"an entry of `datasets` in {path}")
    named = ("path", "data_dir", "data_files")
    resolved = {k: paths.resolved("datasets", v) for k, v in entry.items() if k in named and isinstance(v, str)}
    return DatasetConfig(**entry | resolved)
