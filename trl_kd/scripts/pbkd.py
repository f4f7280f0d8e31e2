"""`trl-kd pbkd`: offline preference-based knowledge distillation from the command line, built like `trl dpo`.

```bash
trl-kd pbkd \\
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
    --dataset_name trl-lib/ultrafeedback_binarized \\
    --output_dir runs/qwen2.5-0.5b-pbkd
```

Run as a module, as launchers do, it trains in this process: `torchrun --nproc_per_node 2 -m trl_kd.scripts.pbkd ...`.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from trl import DatasetMixtureConfig, ModelConfig, get_peft_config, get_quantization_config

from trl_kd.scripts.arguments import Parsed, TrainingScriptArguments, parse
from trl_kd.scripts.checks import check_arguments, model_error
from trl_kd.scripts.data import load_pairs
from trl_kd.scripts.errors import InputError, bad_input, report
from trl_kd.scripts.launch import launch, needs_launcher, planned_processes, resolve_config
from trl_kd.trainers.pbkd_config import PbKDConfig
from trl_kd.trainers.teacher import Teacher


PROG = "trl-kd pbkd"
DATACLASSES = (TrainingScriptArguments, PbKDConfig, ModelConfig, DatasetMixtureConfig)
REQUIRED = {
    "model_name_or_path": "give the student, a Hub id or a folder.",
}


def main(argv: list[str]) -> int:
    """Checks the arguments, then trains: in this process, or under `accelerate launch` where that matters."""
    parsed = _parse(argv)
    script_args, training_args, model_args, mixture = parsed.values
    launch_args = resolve_config(script_args.accelerate_config) + parsed.launch_args
    if script_args.dry_run:
        from trl_kd.scripts.dry_run import dry_run

        with bad_input():
            processes = planned_processes(launch_args, training_args.use_cpu)
            print(dry_run(script_args, training_args, model_args, mixture, processes))
        return 0
    if needs_launcher(launch_args, training_args.use_cpu):
        return launch("trl_kd.scripts.pbkd", parsed.script_args, launch_args)
    return train(script_args, training_args, model_args, mixture)


def _parse(argv: list[str]) -> Parsed:
    # transformers renames an argument that TRL sets; whoever trains can do nothing about it
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    parsed = parse(DATACLASSES, argv, PROG, REQUIRED)
    with bad_input():
        check_arguments(*parsed.values)
        Teacher.from_args(parsed.values[1], None)  # a teacher that is needed and missing, or the other way round
    return parsed


def _train_here(argv: list[str]) -> int:
    parsed = _parse(argv)
    if parsed.command_line:
        raise InputError(
            f"`{parsed.command_line[0]}` is for a launcher: use `{PROG}`, or give it to `accelerate launch` or "
            "torchrun."
        )
    return train(*parsed.values)


def train(
    script_args: TrainingScriptArguments,
    training_args: PbKDConfig,
    model_args: ModelConfig,
    mixture: DatasetMixtureConfig,
) -> int:
    """Trains, saves the student with its card, and pushes it where `push_to_hub` says so."""
    with bad_input():
        trainer = _make_trainer(script_args, training_args, model_args, mixture)

    if script_args.ignore_bias_buffers:
        import torch

        trainer.model._ddp_params_and_buffers_to_ignore = [
            name for name, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool
        ]
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.accelerator.print("Training completed.")

    trainer.save_model(training_args.output_dir)
    dataset_name = _hub_dataset(script_args)
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


def _make_trainer(
    script_args: TrainingScriptArguments,
    training_args: PbKDConfig,
    model_args: ModelConfig,
    mixture: DatasetMixtureConfig,
) -> Any:
    from trl_kd.trainers.pbkd_trainer import PbKDTrainer

    train_dataset, eval_dataset = load_pairs(script_args, mixture, with_eval=training_args.eval_strategy != "no")
    training_args.model_init_kwargs = model_init_kwargs(training_args, model_args)
    models = _models(training_args, model_args)
    try:
        return PbKDTrainer(
            model=model_args.model_name_or_path,
            args=training_args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    except (OSError, ValueError) as error:
        unreadable = isinstance(error, (OSError, HFValidationError)) or "Unrecognized" in str(error)
        if not unreadable:  # the trainer's own sentence
            raise
        raise _explained(error, models, training_args.push_to_hub) from error


def _models(training_args: PbKDConfig, model_args: ModelConfig) -> dict[str, str]:
    """The models that are named, by their fields."""
    named = {
        "teacher_model_name_or_path": training_args.teacher_model_name_or_path,
        "model_name_or_path": model_args.model_name_or_path,
    }
    return {field: name for field, name in named.items() if name is not None}


def _explained(error: Exception, models: dict[str, str], pushes: bool) -> Exception:
    """What the trainer refused, with the field to look at where a model cannot be read."""
    named = [field for field, name in models.items() if name in str(error)]
    if not named and (len(models) > 1 or pushes):  # better no field than a wrong one
        return error
    field = (named or list(models))[0]
    return model_error(field, models[field], error)


def model_init_kwargs(training_args: PbKDConfig, model_args: ModelConfig) -> dict[str, Any]:
    """Arguments of the student's `from_pretrained`; `model_init_kwargs` wins over the fields of `ModelConfig`."""
    return {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def _hub_dataset(script_args: TrainingScriptArguments) -> str | None:
    """The dataset's name for the model card, which knows those of the Hub only."""
    name = script_args.dataset_name
    return None if name is None or Path(name).expanduser().exists() else name


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--traceback"]
    raise SystemExit(report(lambda: _train_here(words), PROG, "--traceback" in sys.argv))
