"""Everything of TRL and transformers that is private to them and used here, in one place.

TRL may move any of these names in a release, and then this file is the only one to change. `require` turns a missing
name into one sentence, and `warn_if_untested` says once when the installed TRL is outside the tested range.
"""

import warnings
from importlib import import_module
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

from accelerate.utils import is_peft_model
from packaging.version import Version


TESTED_TRL = (">=1.16.0", "<1.17")
"""The range of TRL releases that the tests have run with."""


def require(module: str, name: str) -> Any:
    """Returns `module.name`, or raises an `ImportError` that says which TRL this release was tested with."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"`{module}.{name}` is gone in trl {version('trl')} with transformers {version('transformers')}. trl-kd was "
            f"tested with trl{','.join(TESTED_TRL)}: install such a release, or a newer trl-kd."
        ) from error


def require_methods(owner: type, names: tuple[str, ...]) -> None:
    """Raises an `ImportError` unless `owner` still has every private method in `names`, which a trainer of ours calls or
    overrides: an override of a method that nobody calls any more would be silently ignored."""
    for name in names:
        if not hasattr(owner, name):
            raise ImportError(
                f"`{owner.__name__}.{name}` is gone in trl {version('trl')} with transformers {version('transformers')}. "
                f"trl-kd was tested with trl{','.join(TESTED_TRL)}: install such a release, or a newer trl-kd."
            )


def warn_if_untested(installed: str | None = None) -> None:
    """Warns when the installed TRL (or the version given) is outside the tested range."""
    installed = installed or version("trl")
    low, high = (Version(bound.lstrip("<>=")) for bound in TESTED_TRL)
    if not low <= Version(Version(installed).base_version) < high:
        warnings.warn(
            f"trl {installed} is outside the range that trl-kd was tested with (trl{','.join(TESTED_TRL)}).",
            stacklevel=2,
        )


warn_if_untested()

create_model_from_path = require("trl.trainer.utils", "create_model_from_path")
get_config_model_id = require("trl.trainer.utils", "get_config_model_id")
prepare_deepspeed = require("trl.models", "prepare_deepspeed")
prepare_fsdp = require("trl.models", "prepare_fsdp")
main_first = require("trl.trainer.utils", "global_then_local_main_first")
FusedCausalLMOutput = require("trl.trainer.utils", "FusedCausalLMOutput")
ForwardRedirection = require("trl.models.utils", "_ForwardRedirection")

DPOTrainer = require("trl", "DPOTrainer")
DPO_SEAMS = (
    *("_prepare_dataset", "_set_signature_columns_if_needed", "_compute_loss"),
    *("compute_ref_log_probs", "_precompute_ref_logps"),
    *("get_batch_samples", "training_step", "evaluation_loop", "_save", "_save_checkpoint"),
    *("_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler", "_init_training_state"),
)
"""Methods that `PbKDTrainer` overrides. Of the attributes it uses `_metrics`, `_total_train_tokens`, `_signature_columns`,
`_tokenizer`, `_is_vision_dataset` and `_tp_size`."""
require_methods(DPOTrainer, DPO_SEAMS)

TextCollator = require("trl.trainer.sft_trainer", "DataCollatorForLanguageModeling")
VisionCollator = require("trl.trainer.sft_trainer", "DataCollatorForVisionLanguageModeling")


DISTILLATION_SEAMS = (
    *("_generate_and_score_completions", "_generate", "_generate_single_turn", "_tokenize_prompts"),
    *("_get_last_hidden_state", "_compute_loss", "compute_loss", "training_step", "evaluation_loop"),
    *("_set_signature_columns_if_needed", "_get_train_sampler"),
    *("_save", "_save_optimizer_and_scheduler", "_load_optimizer_and_scheduler"),
)
"""Methods that `MMPbKDTrainer` overrides or calls. Of the attributes it uses `_metrics`, `_signature_columns`, `_tokenizer`,
`_forward_redirection`, `eos_token_ids`, `generation_config`, `generation_kwargs`, `teacher_model` and `use_vllm`."""
require_methods(require("trl", "DistillationTrainer"), DISTILLATION_SEAMS)


TRAINER_SEAMS = ("training_step", "_get_grad_norm", "_save_checkpoint", "_init_training_state")
"""Methods of transformers' `Trainer` by which `FiniteTraining` stops; by the one before the last `DualCheckpoints` says
a full disk, by the last one `EndsAtLastStep` ends."""
require_methods(require("transformers", "Trainer"), TRAINER_SEAMS)


def prepare_preference_dataset(dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
    """`DPOTrainer._prepare_dataset`, which needs no trainer, and so no weights: its tokenizer only."""
    trainer: Any = SimpleNamespace(_tokenizer=getattr(processing_class, "tokenizer", processing_class))
    return DPOTrainer._prepare_dataset(trainer, dataset, processing_class, args, name)


def logit_scale(config: Any) -> float:
    """The factor that a model of this config multiplies its logits with, under whichever name its family gives it."""
    config = config.get_text_config()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


def backbone(model: Any) -> Any:
    """The part of a causal language model (PEFT-wrapped or not) that ends before the output embedding."""
    causal_lm = model.get_base_model() if is_peft_model(model) else model
    base = causal_lm.base_model
    return getattr(causal_lm, "model", base) if base is causal_lm else base  # Llama 4's text model names no base
