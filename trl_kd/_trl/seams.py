"""The seams of TRL's trainers: methods and attributes that ours override, call and read. Any release of TRL may change them.

`SEAMS` has the parameters of each method as they are in the tested releases. A test compares them, and finds any override
that is not listed. Each module of a trainer calls `check_seams` when it is imported.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from trl import DPOTrainer

from trl_kd._trl.tested import require, require_methods


TextCollator = require("trl.trainer.sft_trainer", "DataCollatorForLanguageModeling")
VisionCollator = require("trl.trainer.sft_trainer", "DataCollatorForVisionLanguageModeling")

_LOOP = "dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix"

_EVERY_TRAINER = {  # of transformers' `Trainer`: `DualCheckpoints`, `EndsAtLastStep` and `FiniteTraining`
    "train": "resume_from_checkpoint, trial, ignore_keys_for_eval",
    "_init_training_state": "max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial",
    "_get_grad_norm": "model, grad_norm",
    "_save": "output_dir, state_dict",
    "_save_checkpoint": "model, trial",
    "_save_optimizer_and_scheduler": "output_dir",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_set_signature_columns_if_needed": "",
    "create_model_card": "model_name, dataset_name, tags",
    "save_model": "output_dir, _internal_call",
    "evaluation_loop": _LOOP,
}
SEAMS: dict[str, dict[str, str]] = {
    "DPOTrainer": {
        **_EVERY_TRAINER,
        "training_step": "args, kwargs",
        "get_batch_samples": "epoch_iterator, num_batches, device",
        "evaluate": "eval_dataset, ignore_keys, metric_key_prefix",
        "_prepare_dataset": "dataset, processing_class, args, dataset_name",
        "_compute_loss": "model, inputs, return_outputs",
        "compute_ref_log_probs": "model, inputs",
        "_precompute_ref_logps": "dataset, name, batch_size",
    },
    "DistillationTrainer": {
        **_EVERY_TRAINER,
        "training_step": "model, inputs, num_items_in_batch",
        "compute_loss": "model, inputs, return_outputs, num_items_in_batch",
        "_compute_loss": "unwrapped_student, inputs, num_items_in_batch",
        "_get_train_sampler": "dataset",
        "_generate_and_score_completions": "inputs",
        "_generate": "prompts",
        "_generate_single_turn": "prompt_ids, images, multimodal_fields, has_tool_images",
        "_tokenize_prompts": "prompts",
        "_get_last_hidden_state": (
            "unwrapped_model, input_ids, attention_mask, logits_to_keep, pixel_values, image_grid_thw, pixel_attention_mask,"
            " spatial_shapes, image_sizes, token_type_ids, mm_token_type_ids, image_position_ids"
        ),
    },
    "RLOOTrainer": {
        **_EVERY_TRAINER,
        "training_step": "model, inputs, num_items_in_batch",
        "_compute_loss": "model, inputs",
        "_get_train_sampler": "dataset",
        "_generate_and_score_completions": "inputs",
        "_generate": "prompts",
        "_calculate_rewards": "inputs, prompts, completions, completion_ids_list",
        "_log_completion_extra": "column, values",
        "_save_rng_state": "output_dir",
        "log": "logs, start_time",
    },
}
"""By TRL's trainer: methods that ours overrides or calls, and their parameters after `self`."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "DPOTrainer": (
        *("_is_vision_dataset", "_metrics", "_signature_columns", "_tokenizer", "_total_train_tokens", "_tp_size"),
        *("aux_loss_enabled", "beta", "f_divergence_type", "ld_alpha", "loss_types", "loss_weights"),
        *("precompute_ref_logps", "ref_model", "router_aux_loss_coef", "use_weighting"),
    ),
    "DistillationTrainer": (
        *("_forward_redirection", "_metrics", "_signature_columns", "_tokenizer", "chat_template"),
        *("chat_template_kwargs", "eos_token_ids", "generation_config", "generation_kwargs", "max_completion_length"),
        *("teacher_model", "temperature", "use_vllm"),
    ),
    "RLOOTrainer": (
        *("_buffered_inputs", "_metrics", "_signature_columns", "_step", "_tokenizer", "chat_template_kwargs"),
        *("eos_token_ids", "max_completion_length", "num_iterations", "reward_func_names"),
    ),
}
"""By TRL's trainer: attributes that ours reads or sets."""


def check_seams(trainer: type) -> None:
    """Raises an `ImportError` if a method of [`SEAMS`] is gone from this trainer of TRL's."""
    require_methods(trainer, SEAMS[trainer.__name__])


@contextmanager
def temporarily(owner: Any, **values: Any) -> Iterator[None]:
    """
    Gives attributes of `owner` other values, and puts the former ones back, also after an error. It is for methods of TRL's
    that read an attribute and take no argument in its place:

    - `DPOTrainer._compute_loss` reads `precompute_ref_logps` to find the reference's log-probabilities in the batch, and
      writes into `_metrics` and `_total_train_tokens`, which a second pass over one batch must leave as they are;
    - `DistillationTrainer._generate_single_turn` samples from `model_wrapped` with `use_vllm`, `eos_token_ids`,
      `generation_config` and `generation_kwargs`;
    - `Trainer._save` writes `args` to `training_args.bin`.
    """
    former = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in former.items():
            setattr(owner, name, value)


def prepare_preference_dataset(dataset: Any, processing_class: Any, args: Any, name: str) -> Any:
    """`DPOTrainer._prepare_dataset`, which needs no trainer, and so no weights: its tokenizer only."""
    trainer: Any = SimpleNamespace(_tokenizer=getattr(processing_class, "tokenizer", processing_class))
    return DPOTrainer._prepare_dataset(trainer, dataset, processing_class, args, name)
