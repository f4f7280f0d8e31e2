"""`trl-kd mm-pbkd`: white-box preference-based knowledge distillation from the command line, built like `trl distillation`.

```bash
trl-kd mm-pbkd \\
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
    --teacher_model_name_or_path Qwen/Qwen2.5-7B-Instruct \\
    --dataset_name trl-lib/ultrafeedback-prompt \\
    --preference_dataset runs/qwen2.5/pairs \\
    --output_dir runs/qwen2.5-0.5b-mm-pbkd
```

Run as a module, as launchers do, it trains in this process: `torchrun --nproc_per_node 2 -m trl_kd.scripts.mm_pbkd ...`.
"""

from dataclasses import dataclass
from typing import Any

from trl import DatasetMixtureConfig, ModelConfig

from trl_kd.scripts.arguments import PreferenceScriptArguments
from trl_kd.scripts.checks import check_arguments, check_preference_dataset
from trl_kd.scripts.data import load_preferences, load_prompts
from trl_kd.scripts.errors import InputError
from trl_kd.scripts.mm_pbkd_dry_run import dry_run
from trl_kd.scripts.training import TrainingCommand, build_trainer
from trl_kd.trainers.mm_pbkd.config import MMPbKDConfig


@dataclass
class MMPbKDScriptArguments(PreferenceScriptArguments):
    """Arguments of `trl-kd mm-pbkd` beside those of its models and its trainer."""


DATACLASSES = (MMPbKDScriptArguments, MMPbKDConfig, ModelConfig, DatasetMixtureConfig)
REQUIRED = {
    "model_name_or_path": "give the student, a Hub id or a folder.",
    "teacher_model_name_or_path": "give the teacher, a Hub id or a folder. Without its weights, use `trl-kd pbkd`.",
}


def _check(
    script_args: MMPbKDScriptArguments,
    training_args: MMPbKDConfig,
    model_args: ModelConfig,
    mixture: DatasetMixtureConfig,
) -> None:
    check_arguments(script_args, training_args, model_args, mixture, rows="prompts")
    check_preference_dataset(script_args)
    unused = training_args.moment_coef == training_args.imitation_weight == 0
    if script_args.preference_dataset is not None and unused:
        raise InputError(
            f"`preference_dataset` is {script_args.preference_dataset!r}, but `moment_coef` is 0, so that there is no Q for "
            "the pairs to hold, and so is `imitation_weight`: drop `preference_dataset`, or set one of them above 0."
        )


def _make_trainer(
    script_args: MMPbKDScriptArguments,
    training_args: MMPbKDConfig,
    model_args: ModelConfig,
    mixture: DatasetMixtureConfig,
) -> Any:
    from trl_kd.trainers.mm_pbkd.trainer import MMPbKDTrainer

    with_eval, off_policy = training_args.eval_strategy != "no", training_args.lmbda < 1
    train_dataset, eval_dataset = load_prompts(script_args, mixture, with_eval, with_completions=off_policy)
    datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
    datasets["preference_dataset"] = load_preferences(script_args)
    return build_trainer(MMPbKDTrainer, training_args, model_args, **datasets)


COMMAND = TrainingCommand("mm-pbkd", DATACLASSES, REQUIRED, _check, _make_trainer, dry_run)
main = COMMAND.main


if __name__ == "__main__":
    COMMAND.run_module()
