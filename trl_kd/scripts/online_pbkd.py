"""`trl-kd online-pbkd`: online preference-based knowledge distillation from the command line, built like `trl rloo`.

```bash
trl-kd online-pbkd \\
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
    --dataset_name trl-lib/ultrafeedback-prompt \\
    --pairs_config pairs_online.yaml \\
    --output_dir runs/qwen2.5-0.5b-online-pbkd
```

Run as a module, as launchers do, it trains in this process: `torchrun --nproc_per_node 2 -m trl_kd.scripts.online_pbkd ...`.
"""

from typing import Any

from trl import DatasetMixtureConfig, ModelConfig

from trl_kd.scripts.online_pbkd_build import OnlinePbKDScriptArguments, check, fit_rewards, make_parts, said
from trl_kd.scripts.online_pbkd_dry_run import dry_run
from trl_kd.scripts.training import TrainingCommand, build_trainer
from trl_kd.trainers.online_pbkd.config import OnlinePbKDConfig


DATACLASSES = (OnlinePbKDScriptArguments, OnlinePbKDConfig, ModelConfig, DatasetMixtureConfig)
REQUIRED = {
    "model_name_or_path": "give the student, a Hub id or a folder.",
}


def _make_trainer(
    script_args: OnlinePbKDScriptArguments,
    training_args: OnlinePbKDConfig,
    model_args: ModelConfig,
    mixture: DatasetMixtureConfig,
) -> Any:
    from trl_kd.trainers.online_pbkd.trainer import OnlinePbKDTrainer

    with said():
        parts = make_parts(script_args, training_args, model_args, mixture)
        named = {"reward_model_name_or_path": parts.reward_model} if parts.reward_model is not None else {}
        return build_trainer(OnlinePbKDTrainer, training_args, model_args, named, **parts.arguments())


class OnlinePbKDCommand(TrainingCommand):
    """Refuses a reward model that is not fit to be climbed as it refuses any input."""

    def train(self, script_args: Any, training_args: Any, model_args: ModelConfig, mixture: Any) -> int:
        with fit_rewards():
            return super().train(script_args, training_args, model_args, mixture)


COMMAND = OnlinePbKDCommand("online-pbkd", DATACLASSES, REQUIRED, check, _make_trainer, dry_run)
main = COMMAND.main


if __name__ == "__main__":
    COMMAND.run_module()
