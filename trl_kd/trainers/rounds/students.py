"""The models of rounds: how a round's student is sampled and trained on, its reference, its optimizer's state, and
its part of the learning-rate schedule."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache
from peft import load_peft_weights, set_peft_model_state_dict
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from trl_kd.pairs.places import written_whole
from trl_kd.sampling import Sampler, SamplingSettings, adapters
from trl_kd.sampling.loading import load_model
from trl_kd.sampling.local import LocalSampler
from trl_kd.trainers.pbkd.trainer import PbKDTrainer


CARRIED = "carried.pt"
_OF_THE_START = ("revision", "subfolder", "variant", "gguf_file")
"""Loading options that say which files of the start's to take: what is saved here has no others."""


def round_seed(seed: int, number: int) -> int:
    """The seed of round `number` = 1, 2, …: that of the first is `seed` itself, and no two are alike."""
    return seed + 10_000 * (number - 1)


def init_kwargs(args: Any, is_start: bool) -> dict[str, Any]:
    """`model_init_kwargs` for the start, or for a student that was saved in a folder here."""
    options = dict(args.model_init_kwargs or {})
    return options if is_start else {name: value for name, value in options.items() if name not in _OF_THE_START}


def default_student(
    settings: SamplingSettings, args: Any, quantization_config: Any, with_adapter: bool
) -> Callable[[str, int], Sampler]:
    """Samples a round's student with transformers, loaded as it is for training, by the round's own seed."""

    def student(model: str, number: int) -> Sampler:
        options = init_kwargs(args, is_start=with_adapter or number == 1)
        if args.trust_remote_code:
            options.setdefault("trust_remote_code", True)
        if quantization_config is not None:
            options["quantization_config"] = quantization_config
        seeded = replace(settings, seed=round_seed(settings.seed, number))
        return LocalSampler(model, seeded, model_init_kwargs=options)

    return student


def load_reference(name: str, args: Any, is_start: bool, adapter: str | None = None) -> Any:
    """A frozen model as TRL would load it, with an adapter merged into it where there is one."""
    options = {"trust_remote_code": args.trust_remote_code} | init_kwargs(args, is_start)
    if PartialState().distributed_type != DistributedType.NO:
        options["device_map"] = None  # each process places its own
    model: Any = load_model(name, options)
    if adapter is not None:
        model = adapters.load_adapter(model, adapter).merge_and_unload()
    return model


def load_adapter(model: Any, folder: str) -> None:
    """Gives the adapter of a PEFT model the weights of one that was saved."""
    outcome = set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"))
    if outcome.unexpected_keys:
        raise ValueError(f"The adapter in {folder!r} has weights that `peft_config` has no place for: it was changed.")


class RoundTrainer(PbKDTrainer):
    """
    Trains one of several rounds with its part of one learning-rate schedule, and of one warm-up of q: as if each had as many
    steps as this one.

    Attributes:
        number, rounds (`int`):
            Which round, from 1, of how many. 1 of 1 is a [`PbKDTrainer`].
    """

    number, rounds = 1, 1

    def _progress(self):
        return (self.number - 1 + super()._progress()) / self.rounds

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.rounds == 1 or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        scheduler = super().create_scheduler(self.rounds * num_training_steps, optimizer)
        _move_on(scheduler, (self.number - 1) * num_training_steps)
        return scheduler


def _move_on(scheduler: LambdaLR, steps: int) -> None:
    """Lets a schedule begin where it would be after so many steps."""
    scheduler.lr_lambdas = [partial(_later, factor, steps) for factor in scheduler.lr_lambdas]
    rates = [rate * factor(0) for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates  # what is logged of the first step


def _later(factor: Callable[[int], float], steps: int, step: int) -> float:
    return factor(steps + step)


class LastStepLogged(TrainerCallback):
    """Logs at the last step of a round, wherever `logging_steps` falls: a round's record tells how it ended."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = True


class Carried(TrainerCallback):
    """
    What one round's training leaves to the next: the optimizer's moments, and λ. Learning rates are the new training's own.

    Args:
        path (`Path`):
            File that `save` has written.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise ValueError(
                f"The optimizer is to be carried on, but there is no `{path}`: it is removed when two more rounds are "
                "finished, and a round before the last cannot be done again. Put back a copy of its `metrics.json`, or "
                "begin in another `output_dir`, with a copy of the folder `teacher`."
            )
        self.state = torch.load(path, map_location="cpu", weights_only=True)

    def check(self, args: Any) -> None:
        """Raises a `ValueError` for a λ that the training has no term for."""
        dual = self.state["dual"]["value"]
        if dual > 0 and not args.has_preference_term:
            raise ValueError(
                f"The optimizer is to be carried on with λ = {dual}, and the preference term is off in this run, since "
                "`dual_init` and `dual_learning_rate` are 0: give them as they were, or begin in another `output_dir`."
            )

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step:  # a checkpoint has brought its own
            return
        assert optimizer is not None
        optimizer.load_state_dict(optimizer.state_dict() | {"state": self.state["optimizer"]})

    @staticmethod
    def save(trainer: Any, path: Path) -> None:
        state = {"optimizer": trainer.optimizer.state_dict()["state"], "dual": trainer.dual.state_dict()}
        with written_whole(path) as building:
            torch.save(state, building)


def free(trainer: Any) -> None:
    """Gives back what a trainer holds, before the next round's models are loaded."""
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.ref_model = trainer.optimizer = trainer.lr_scheduler = None
    trainer.callback_handler.model = trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
    clear_device_cache(garbage_collection=True)
