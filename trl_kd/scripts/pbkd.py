"""`trl-kd pbkd`: offline preference-based knowledge distillation from the command line, built like `trl dpo`.

```bash
trl-kd pbkd \\
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
    --dataset_name trl-lib/ultrafeedback_binarized \\
    --output_dir runs/qwen2.5-0.5b-pbkd
```

With `--rounds` the student is sampled, labelled and trained again and again, see `trl_kd.scripts.rounds`:

```bash
trl-kd pbkd --rounds 6 --pairs_config pairs.yaml --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --output_dir runs/rounds
```

Run as a module, as launchers do, it trains in this process: `torchrun --nproc_per_node 2 -m trl_kd.scripts.pbkd ...`.
"""

from typing import Any

from trl import DatasetMixtureConfig, ModelConfig

from trl_kd.scripts.checks import check_arguments
from trl_kd.scripts.data import load_datasets
from trl_kd.scripts.pbkd_dry_run import dry_run
from trl_kd.scripts.rounds import PbKDScriptArguments, check_companions, check_rounds, run_rounds
from trl_kd.scripts.rounds_dry_run import dry_run as rounds_dry_run
from trl_kd.scripts.training import TrainingCommand, build_trainer
from trl_kd.trainers.common.teacher import Teacher
from trl_kd.trainers.pbkd.config import PbKDConfig


DATACLASSES = (PbKDScriptArguments, PbKDConfig, ModelConfig, DatasetMixtureConfig)
REQUIRED = {
    "model_name_or_path": "give the student, a Hub id or a folder.",
}


def _check(
    script_args: PbKDScriptArguments,
    training_args: PbKDConfig,
    model_args: ModelConfig,
    mixture: DatasetMixtureConfig,
) -> None:
    if script_args.rounds is not None:
        check_rounds(script_args, training_args, model_args, mixture)
        return
    check_companions(script_args)
    check_arguments(script_args, training_args, model_args, mixture, rows="pairs")
    Teacher.from_args(training_args, None)  # a teacher that is needed and missing, or the other way round


def _make_trainer(
    script_args: PbKDScriptArguments,
    training_args: PbKDConfig,
    model_args: ModelConfig,
    mixture: DatasetMixtureConfig,
) -> Any:
    from trl_kd.trainers.pbkd.trainer import PbKDTrainer

    train_dataset, eval_dataset = load_datasets(script_args, mixture, training_args.eval_strategy != "no")
    datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    return build_trainer(PbKDTrainer, training_args, model_args, **datasets)


def _dry_run(
    script_args: PbKDScriptArguments,
    training_args: PbKDConfig,
    model_args: ModelConfig,
    mixture: DatasetMixtureConfig,
    processes: int = 1,
) -> str:
    if script_args.rounds is not None:
        return rounds_dry_run(script_args, training_args, model_args, processes)
    return dry_run(script_args, training_args, model_args, mixture, processes)


class PbKDCommand(TrainingCommand):
    """Trains on pairs that exist, or in rounds that make them."""

    def goes_on(self, script_args: Any) -> bool:
        return script_args.rounds is not None

    def train(self, script_args: Any, training_args: Any, model_args: ModelConfig, mixture: Any) -> int:
        if script_args.rounds is not None:
            return run_rounds(script_args, training_args, model_args)
        return super().train(script_args, training_args, model_args, mixture)


COMMAND = PbKDCommand("pbkd", DATACLASSES, REQUIRED, _check, _make_trainer, _dry_run)
main = COMMAND.main


if __name__ == "__main__":
    COMMAND.run_module()
