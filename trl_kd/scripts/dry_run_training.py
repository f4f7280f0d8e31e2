"""`--dry_run`: how a run will train and what it will save."""

import math
from dataclasses import fields
from typing import Any

from trl import ModelConfig

from trl_kd.scripts.checks import hub_name
from trl_kd.scripts.dry_run import Table, total_steps
from trl_kd.scripts.hidden import shown
from trl_kd.trainers.common.card import setting


_WIDTH = 100
_LORA_FACTOR = 3
"""Below so many times the default, which is made for training all weights, a learning rate is small for LoRA, which needs
about ten times as much."""


def describe_training(args: Any, model_args: ModelConfig, epoch_steps: int | None) -> Table:
    """
    Args:
        args (`TrainingArguments`):
            Settings of the trainer, of one of our classes.
        model_args ([`~trl.ModelConfig`]):
            The student's LoRA and dtype.
        epoch_steps (`int`, *optional*):
            Optimizer steps of one epoch; `None` for a stream.
    """
    return [
        ("learning rate", _learning_rate(args)),
        *describe_weights(args, model_args),
        *describe_settings(args),
        ("saves", _saves(args, total_steps(epoch_steps, args))),
        *describe_push(args),
    ]


def _learning_rate(args: Any) -> str:
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    warmup = args.warmup_steps
    told = f", warm-up {warmup:g}{' of the' if warmup < 1 else ''} steps" if warmup else ""
    return f"{args.learning_rate:g}, {schedule}{told}"


def describe_weights(args: Any, model_args: ModelConfig) -> Table:
    """In which precision what is trained; and a warning where the learning rate is not made for that."""
    kind = next((kind for kind in ("bf16", "fp16") if getattr(args, kind)), None)
    dtype = (args.model_init_kwargs or {}).get("dtype", model_args.dtype)
    told = f"{kind} mixed precision" if kind else "no mixed precision"
    table = [("precision", f"{told}, weights in {str(dtype or 'auto').removeprefix('torch.')}")]
    if not model_args.use_peft:
        return [*table, ("trains", "all weights")]
    targets = model_args.lora_target_modules
    on = "PEFT's default modules" if targets is None else targets if isinstance(targets, str) else ", ".join(targets)
    kinds = {"use_dora": "DoRA", "use_rslora": "rank-stabilised LoRA"}
    name = next((told for field, told in kinds.items() if getattr(model_args, field)), "LoRA")
    table.append(
        ("trains", f"{name} of rank {model_args.lora_r}, alpha {model_args.lora_alpha}, dropout "
         f"{model_args.lora_dropout:g}, on {on}")
    )  # fmt: skip
    default: Any = next(f.default for f in fields(args) if f.name == "learning_rate")
    if args.learning_rate < _LORA_FACTOR * default:
        table.append(
            ("warning", f"`learning_rate` is {args.learning_rate:g}, made for training all weights (default: {default:g}); "
             f"LoRA needs about ten times as much: try {10 * default:g}")
        )  # fmt: skip
    return table


def describe_settings(args: Any) -> Table:
    """The fields that the method has beside those of TRL's trainer."""
    parent = next(owner for owner in type(args).__mro__ if owner.__module__.startswith("trl."))
    inherited = {f.name for f in fields(parent)}
    own = [f.name for f in fields(args) if f.name not in inherited or f.name in _OF_THE_METHOD]
    lines: list[str] = []
    for name in own:
        said = f"{name} {_value(shown(name, setting(args, name)))}"
        if lines and len(lines[-1]) + len(said) < _WIDTH:
            lines[-1] += f", {said}"
        else:
            lines.append(said)
    return [("" if number else "settings", line) for number, line in enumerate(lines)]


_OF_THE_METHOD = ("beta", "lmbda", "loss_type", "temperature", "num_generations")
"""Fields of TRL's that the methods read too."""


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "+".join(map(_value, value))
    return "unset" if value is None else str(value)


def _saves(args: Any, steps: int) -> str:
    strategy = getattr(args.save_strategy, "value", args.save_strategy)
    at_the_end = f"the student and its card in {args.output_dir}, at the end"
    if strategy == "no":
        return f"{at_the_end}; no checkpoints"
    if strategy == "best":
        return f"a checkpoint whenever {args.metric_for_best_model} is better{_kept(args)}; {at_the_end}"
    if strategy == "epoch":
        return f"a checkpoint after each epoch{_kept(args)}; {at_the_end}"
    if args.save_steps <= 0:  # as transformers takes it
        return f"a checkpoint after the last step alone{_kept(args)}; {at_the_end}"
    every = int(args.save_steps) if args.save_steps >= 1 else math.ceil(args.save_steps * steps)
    told = f"a checkpoint every {every} steps and after the last, {math.ceil(steps / every)} in all"
    return f"{told}{_kept(args)}; {at_the_end}"


def _kept(args: Any) -> str:
    only = ", without the optimizer (none can be resumed)" if args.save_only_model else ""
    limit = args.save_total_limit
    return only + (f", of which the newest {limit} are kept" if limit else "")


def describe_push(args: Any) -> Table:
    """Where the student will be pushed."""
    return [("pushes", f"to {hub_name(args)} on the Hub")] if args.push_to_hub else []
