"""Checks of the trainers' settings, with messages that name the field, its value and the fix."""

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from transformers import get_scheduler
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

from trl_kd._trl.models import get_config_model_id
from trl_kd.preferences.tokens import is_conversational
from trl_kd.responses.reasoning import REASONING
from trl_kd.responses.special_tokens import set_end_token, stop_at_end_token, unlearnable_end
from trl_kd.sampling.recorded import MODEL_FIELDS, read_object, recorded


REASONING_METADATA: dict[str, Any] = {
    "help": "What is learnt where the chat template changes a response: 'keep' (the response as it was sampled), 'strip' "
    "(without <think> blocks), 'error' (stop), or by default the template's rendering, with a warning.",
    "choices": ["keep", "strip", "error"],
}
EOS_TOKEN_METADATA: dict[str, Any] = {
    "help": "Token that ends a turn, saved in the student's tokenizer and generation config; by default the tokenizer's."
}


logger = logging.getLogger(__name__)  # accelerate's waits for a state, which `TrainingArguments` makes


def parse_radius(value: float | str | None, name: str = "confidence_radius", default: float = 0.0) -> float | str:
    """The field `name` as a number or 'theory'. The command line and YAML hand over a union with `str` as a string."""
    if value is None:
        return default
    if isinstance(value, str) and value != "theory":
        try:
            return float(value)
        except ValueError:
            allowed = "at least 0 (or 'inf')" if name == "imitation_radius" else "at least 0"
            raise ValueError(
                f"`{name}` is {value!r}: give a number of nats per pair, {allowed}, or 'theory'."
            ) from None
    return value


def check_number(name: str, value: Any, holds: Callable[[Any], bool], allowed: str) -> None:
    """Raises a `ValueError` that names the field, its value and what is `allowed`, unless `holds` of a finite number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not abs(value) <= sys.float_info.max or not holds(value):  # of NaN too
        raise ValueError(f"`{name}` is {value!r}: it must be a finite number, {allowed}.")


def check_integer(name: str, value: Any, least: int) -> None:
    """As `check_number`, for whole numbers."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"`{name}` is {value!r}: it must be a whole number, at least {least}.")


def check_reasoning(value: Any) -> None:
    """Raises a `ValueError` unless it is a value of `reasoning`."""
    if value not in REASONING:
        raise ValueError(f"`reasoning` is {value!r}: use 'keep', 'strip' or 'error', or leave it out.")


def settle_end_token(processing_class: Any, model: Any, eos_token: str | None, row: dict[str, Any] | None) -> None:
    """
    Lets a model stop at the end token that was asked for; without one warns where it cannot learn to stop.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            The student's.
        model (`PreTrainedModel` or `PeftModel`):
            The student.
        eos_token (`str`, *optional*):
            The setting.
        row (`dict`, *optional*):
            A row that is trained on: texts end with the tokenizer's own end token, messages as their template says.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if eos_token is not None:
        set_end_token(tokenizer, eos_token)
        stop_at_end_token(model, tokenizer)
    elif row is not None and is_conversational(row):
        said = unlearnable_end(processing_class, model.generation_config)
        if said is not None:
            logger.warning(said)


def check_json(name: str, value: Any) -> None:
    """Raises a `ValueError` where the text of a dictionary field is no JSON object and, where it may be one, no file."""
    if not isinstance(value, str):
        return
    if name not in _FILES or value.startswith("{"):
        read_object(name, value)
    elif not os.path.isfile(value):
        raise ValueError(f"`{name}` is {value!r}: no such file.")


_FILES = ("accelerator_config", "fsdp_config", "deepspeed")
"""Dictionary fields that may be the name of a file."""


def settle_bf16(args: Any) -> None:
    """Makes `bf16` False, and says so, where it is left unset (`None`) and nothing here can do it: TRL would make it True,
    which `TrainingArguments` then refuses, or runs slowly on the CPU. To be called before their `__post_init__`."""
    can = is_torch_bf16_gpu_available() or is_torch_xla_available()
    args.bf16_is_settled = args.bf16 is None and not args.fp16 and (args.use_cpu or not can)
    if args.bf16_is_settled:
        args.bf16 = False
        if os.environ.get("RANK", "0") == "0":
            logger.warning("`bf16` is not set, and False, since this run has no GPU that can do it.")


def check_schedule(args: Any) -> Any:
    """A learning-rate scheduler as `args` (`TrainingArguments`) describe it, of very many steps, to look at.

    Raises:
        `ValueError`: it cannot be made, since `lr_scheduler_kwargs` lack one that it needs, or have another.
    """
    kind, options = args.lr_scheduler_type, args.lr_scheduler_kwargs or {}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    steps = 1_000_000  # whatever is warm-up or decay has room
    try:
        return get_scheduler(
            kind, optimizer, args.get_warmup_steps(steps), steps, scheduler_specific_kwargs=dict(options)
        )
    except (TypeError, ValueError) as error:
        name = getattr(kind, "value", kind)
        raise ValueError(
            f"`lr_scheduler_type` is {name!r}, with `lr_scheduler_kwargs` = {options}: {error}. Give what it takes in "
            "`lr_scheduler_kwargs`, or another scheduler."
        ) from error


def extend_config(args: Any, target: type, **changed: Any) -> Any:
    """`args` as a `target`, a subclass of its TRL class, with some fields `changed`.

    Raises:
        `ValueError`: `args` has fields that `target` does not have.
    """
    lost = {f.name for f in fields(args)} - {f.name for f in fields(target)}
    if lost:
        raise ValueError(
            f"`args` is a {type(args).__name__}, whose {', '.join(sorted(lost))} `{target.__name__}` does not have: pass a "
            f"`{target.__name__}`, or derive your class from it."
        )
    settings = args.to_dict()
    masked = ("_token", "model_init_kwargs")  # in `to_dict`
    settings |= {name: getattr(args, name) for name in settings if name.endswith(masked)}
    kept = {f.name: settings[f.name] for f in fields(target) if f.init and f.name in settings}
    return target(**kept | changed)


def as_config(args: Any, model: Any, target: type, suffix: str, **changed: Any) -> Any:
    """
    The settings of a run.

    Args:
        args (`TrainingArguments`, *optional*):
            A `target`, or one of its TRL class, to which the defaults of `target` are added. `None`: all defaults.
        model (`str` or `PreTrainedModel`):
            The student, after which the output folder is named where there are no `args`.
        target (`type`):
            Our class of settings, derived from TRL's.
        suffix (`str`):
            What else the folder is called.
        **changed:
            Fields to change in settings of the TRL class.

    Raises:
        `ValueError`: settings of another class.
    """
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return target(f"{name.split('/')[-1]}-{suffix}")
    if isinstance(args, target):
        return args
    if not isinstance(args, target.__mro__[1]):
        ours, theirs = target.__name__, target.__mro__[1].__name__
        raise ValueError(f"`args` is of the class {type(args).__name__}: pass one of {ours}, or of {theirs}.")
    return extend_config(args, target, **changed)


def without_keys(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of `settings` that hold keywords of `from_pretrained` (`…model_init_kwargs`), with the keywords alone that
    [`~trl_kd.sampling.recorded.MODEL_FIELDS`] lists: for files that may be pushed, for trackers, and for messages."""
    return {
        name: {
            key: recorded(option, MODEL_FIELDS.of(key)) if isinstance(option, dict | list | str) else option
            for key, option in value.items()
            if key in MODEL_FIELDS.rules
        }
        for name, value in settings.items()
        if name.endswith("model_init_kwargs") and isinstance(value, dict)
    }
