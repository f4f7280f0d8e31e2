"""What the commands that train share: arguments, a launcher where it matters, training, and the student saved, with its
card, and pushed."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_kd.pairs.full_disk import disk_full, is_disk_full
from trl_kd.pairs.places import StoreError
from trl_kd.scripts.arguments import Parsed, parse
from trl_kd.scripts.checks import check_push, model_error
from trl_kd.scripts.errors import InputError, ProcessError, bad_input, kept_interruption, one_line, report
from trl_kd.scripts.launch import LAUNCHED, launch, needs_launcher, planned_processes, resolve_config
from trl_kd.scripts.resuming import how_to_go_on, refuse_checkpoint, told_how_to_resume


@dataclass(frozen=True)
class TrainingCommand:
    """
    A command that trains, built like `trl dpo`.

    Args:
        name (`str`):
            Name of the command; that of its module, with underscores for hyphens.
        arguments (`tuple[type, ...]`):
            Dataclasses of its arguments: the script's, the trainer's, the model's and the mixture's.
        required (`Mapping[str, str]`):
            Keys that must have a value, with what to say to whom leaves them out.
        check (`Callable`):
            Is given an instance of each, and raises for arguments that do not go together.
        make_trainer (`Callable`):
            Is given the same, and makes the trainer.
        dry_run (`Callable`):
            Is given the same and the number of processes, and returns what is to be printed.
    """

    name: str
    arguments: tuple[type, ...]
    required: Mapping[str, str]
    check: Callable[..., None]
    make_trainer: Callable[..., Any]
    dry_run: Callable[..., str]

    @property
    def prog(self) -> str:
        return f"trl-kd {self.name}"

    @property
    def module(self) -> str:
        return f"trl_kd.scripts.{self.name.replace('-', '_')}"

    def main(self, argv: list[str]) -> int:
        """Checks the arguments, then trains: in this process, or under `accelerate launch` where that matters."""
        words = ["trl-kd", self.name, *argv]
        parsed = self._parse(argv, words)
        script_args, training_args, *_ = parsed.values
        launch_args = resolve_config(script_args.accelerate_config) + parsed.launch_args
        if script_args.dry_run:
            with bad_input():
                processes = planned_processes(launch_args, training_args.use_cpu)
                print(self.dry_run(*parsed.values, processes))
            return 0
        with self._interruptible(script_args, training_args, words):
            if needs_launcher(launch_args, training_args.use_cpu):
                return launch(self.module, parsed.script_args, launch_args)
            return self.train(*parsed.values)

    def run_module(self) -> None:
        """What launchers start: `python -m` of the command's module trains in this process."""
        words = [word for word in sys.argv[1:] if word != "--traceback"]
        raise SystemExit(report(lambda: self.train_here(words), self.prog, "--traceback" in sys.argv))

    def train_here(self, argv: list[str]) -> int:
        """Trains in this process, which a launcher has started or nobody."""
        parsed = self._parse(argv, None)
        if parsed.command_line:
            raise InputError(
                f"`{parsed.command_line[0]}` is for a launcher: use `{self.prog}`, or give it to `accelerate launch` or "
                "torchrun."
            )
        if LAUNCHED in os.environ:  # who has launched this says it all
            return self.train(*parsed.values)
        script_args, training_args, *_ = parsed.values
        with self._interruptible(script_args, training_args, None):
            return self.train(*parsed.values)

    def goes_on(self, script_args: Any) -> bool:
        """Whether the same command goes on where it was stopped, without being told to."""
        return False

    def _interruptible(
        self, script_args: Any, training_args: Any, words: list[str] | None
    ) -> AbstractContextManager[None]:
        return nullcontext() if self.goes_on(script_args) else told_how_to_resume(training_args, words)

    def _parse(self, argv: list[str], words: list[str] | None) -> Parsed:
        # transformers renames an argument that TRL sets; whoever trains can do nothing about it
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
        parsed = parse(self.arguments, argv, self.prog, self.required)
        with bad_input():
            self.check(*parsed.values)
        script_args, training_args, *_ = parsed.values
        if not self.goes_on(script_args):
            refuse_checkpoint(training_args, words)
        check_push(training_args)
        return parsed

    def train(self, script_args: Any, training_args: Any, model_args: ModelConfig, mixture: Any) -> int:
        """Trains in `output_dir`, which is nobody else's meanwhile, saves the student with its card, and pushes it where
        `push_to_hub` says so."""
        from trl_kd.trainers.common.main_process import claim

        with stopped_training(training_args.output_dir), claim(training_args.output_dir):
            return self._train(script_args, training_args, model_args, mixture)

    def _train(self, script_args: Any, training_args: Any, model_args: ModelConfig, mixture: Any) -> int:
        with bad_input():
            trainer = self.make_trainer(script_args, training_args, model_args, mixture)

        if script_args.ignore_bias_buffers:
            import torch

            trainer.model._ddp_params_and_buffers_to_ignore = [
                name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
            ]
        trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.accelerator.print("Training completed.")

        trainer.save_model(training_args.output_dir)
        dataset_name = _hub_dataset(script_args.dataset_name)
        trainer.create_model_card(model_name=Path(training_args.output_dir).name, dataset_name=dataset_name)
        trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
        if training_args.push_to_hub:
            trainer.push_to_hub(dataset_name=dataset_name)
            trainer.accelerator.print(f"Model pushed to the Hub: https://huggingface.co/{trainer.hub_model_id}.")

        # What `trainer.end()` does, but DDP goes before its process group: were its reducer the last to hold a gloo
        # group, it would wait, with the interpreter's lock, for a thread that needs this lock
        accelerator = trainer.accelerator
        del trainer
        accelerator.free_memory()
        accelerator.end_training()
        return 0


@contextmanager
def stopped_training(output_dir: str, goes_on: bool = False) -> Iterator[None]:
    """
    What stops a training from outside, at NaN or infinity, since the disk is full, or since another of its processes has
    ended, is one line.

    Args:
        output_dir (`str`):
            The folder that is written to.
        goes_on (`bool`, *optional*, defaults to `False`):
            Whether the same command goes on where it was stopped, without being told to.
    """
    from trl_kd.trainers.common.finite import NotFinite
    from trl_kd.trainers.common.main_process import GOES_ON, MainProcessEnded, lost_process

    try:
        with kept_interruption():
            yield
    except (NotFinite, StoreError) as error:
        raise InputError(one_line(error)) from error
    except MainProcessEnded as error:
        raise ProcessError(one_line(error)) from error
    except Exception as error:
        lost = lost_process(error, GOES_ON if goes_on else how_to_go_on(output_dir))
        if lost is not None:
            raise ProcessError(one_line(lost)) from error
        if is_disk_full(error, output_dir):  # a log, say
            raise InputError(one_line(disk_full(output_dir, 2**20, "Checkpoints that are whole stay so"))) from error
        raise


def build_trainer(
    trainer_class: type,
    training_args: Any,
    model_args: ModelConfig,
    other_models: Mapping[str, str] | None = None,
    **arguments: Any,
) -> Any:
    """
    Makes a trainer of the student that the arguments name.

    Args:
        trainer_class (`type`):
            Class of the trainer.
        training_args (`TrainingArguments`):
            Its settings, which get the student's `model_init_kwargs`.
        model_args ([`~trl.ModelConfig`]):
            The student, its quantisation and LoRA.
        other_models (`Mapping[str, str]`, *optional*):
            Models beside student and teacher that the trainer loads, by the fields that name them.
        **arguments:
            Its other keyword arguments, such as datasets.

    Raises:
        `InputError`: a model cannot be read; the message names its field.
        `ValueError`: what else the trainer refuses, in its own words.
    """
    training_args.model_init_kwargs = model_init_kwargs(training_args, model_args)
    models = _models(training_args, model_args) | dict(other_models or {})
    try:
        return trainer_class(
            model=model_args.model_name_or_path,
            args=training_args,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
            **arguments,
        )
    except (OSError, ValueError) as error:
        unreadable = isinstance(error, (OSError, HFValidationError)) or "Unrecognized" in str(error)
        if not unreadable:  # the trainer's own sentence
            raise
        raise _explained(error, models, training_args.push_to_hub) from error


def model_init_kwargs(training_args: Any, model_args: ModelConfig) -> dict[str, Any]:
    """Arguments of the student's `from_pretrained`; `model_init_kwargs` wins over the fields of `ModelConfig`."""
    return {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def _models(training_args: Any, model_args: ModelConfig) -> dict[str, str]:
    """The models that are named, by their fields."""
    named = {
        "teacher_model_name_or_path": getattr(training_args, "teacher_model_name_or_path", None),
        "model_name_or_path": model_args.model_name_or_path,
    }
    return {field: name for field, name in named.items() if name is not None}


def _explained(error: Exception, models: dict[str, str], pushes: bool) -> Exception:
    """What the trainer refused, with the field to look at where a model cannot be read."""
    teacher, student = "teacher_model_name_or_path", "model_name_or_path"
    for field, start in ((teacher, f"`{teacher}` is "), (student, "`model` is ")):
        if field in models and str(error).startswith(start):  # it says so itself
            return model_error(field, models[field], error.__cause__ or error)  # type: ignore[arg-type]
    if str(error).startswith("`reward_model` is "):
        return error
    named = [field for field, name in models.items() if name in str(error)]
    if named:  # the name of one may be the beginning of the other's
        field = max(named, key=lambda field: len(models[field]))
    elif "couldn't connect" in str(error) or (len(models) == 1 and not pushes):
        field = student
    else:  # better no field than a wrong one
        return error
    return model_error(field, models[field], error)


def _hub_dataset(name: str | None) -> str | None:
    """The dataset's name for the model card, which knows those of the Hub only."""
    return None if name is None or Path(name).exists() else name
