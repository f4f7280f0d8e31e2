"""What was meant by a key that no command has: first what other libraries call it, then the key that it is
a misspelling or the beginning of."""

import re
from collections.abc import Iterable
from difflib import SequenceMatcher


_ALIASES = {
    # Models
    "model_name_or_path student": "model model_name model_id model_path model_name_path base_model policy_model "
    "student_model student_model_name_or_path student_name_or_path student pretrained_model_name_or_path",
    "teacher_model_name_or_path teacher pairs_config": "teacher teacher_model teacher_name teacher_model_name "
    "teacher_model_id teacher_model_path teacher_name_or_path teacher_path ref_teacher",
    "reward_model_name_or_path preference": "reward_model reward_model_path reward_model_name rm_model rm_path rm",
    "reward_funcs preference": "reward_function reward_functions reward_func reward rewards verifier",
    "attn_implementation": "attn attention attn_impl attention_implementation flash_attn flash_attention "
    "use_flash_attn use_flash_attention use_flash_attention_2 use_flash_attn_2 flash_attention_2 sdpa_attention",
    "dtype": "torch_dtype model_dtype",
    "bf16": "precision",
    "model_revision": "revision student_revision",
    "load_in_4bit": "qlora use_4bit load_4bit load_in_4bits int4",
    "load_in_8bit": "use_8bit load_8bit load_in_8bits int8",
    "load_in_4bit/load_in_8bit": "quantization quantization_bit quantize bits",
    "use_peft": "peft lora use_lora lora_enable enable_lora finetuning_type train_type",
    "lora_r": "lora_rank lora_dim lora_size rank r peft_r",
    "lora_target_modules": "lora_target lora_modules lora_target_linear target_modules lora_linear_layers",
    "lora_alpha": "peft_alpha",
    "use_liger_kernel": "use_liger liger liger_kernel enable_liger_kernel",
    "use_vllm": "vllm with_vllm",
    # Data
    "dataset_name": "dataset data data_path dataset_path dataset_id dataset_name_or_path train_file train_data "
    "train_dataset train_files data_files prompts prompt_data",
    "preference_dataset dataset_name": "preference_data preference_dataset_name preferences pairs pairs_dataset",
    "dataset_config": "dataset_config_name dataset_subset subset config_name",
    "dataset_train_split dataset_split": "train_split split dataset_train",
    "dataset_test_split": "test_split eval_split validation_split dataset_eval_split val_split",
    "max_prompts": "max_samples num_prompts n_prompts limit max_train_samples max_examples",
    "max_length": "max_seq_length max_seq_len seq_length seq_len sequence_len sequence_length cutoff_len "
    "model_max_length context_length max_len",
    "dataset_streaming": "stream stream_dataset",
    "max_completion_length teacher_max_new_tokens/student_max_new_tokens": "max_new_tokens completion_length "
    "max_response_length max_target_length max_output_tokens generation_max_length response_length",
    "dataloader_num_workers max_concurrency": "num_workers workers max_workers n_workers",
    # Steps and learning rate
    "per_device_train_batch_size max_concurrency": "batch_size train_batch_size micro_batch_size "
    "per_device_batch_size per_gpu_train_batch_size per_gpu_batch_size mini_batch_size bs",
    "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size val_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum grad_acc grad_acc_steps grad_accum_steps "
    "accumulation_steps accumulate_grad_batches",
    "learning_rate": "lr peak_lr base_lr init_lr initial_learning_rate learn_rate policy_lr",
    "lr_scheduler_type": "lr_scheduler scheduler lr_schedule scheduler_type lr_decay_style learning_rate_scheduler",
    "warmup_steps": "warmup warmup_ratio lr_warmup_steps num_warmup_steps warmup_iters lr_warmup_ratio "
    "warmup_fraction",
    "num_train_epochs": "epochs num_epochs n_epochs max_epochs epoch total_epochs",
    "max_steps": "steps num_steps max_train_steps num_train_steps total_steps train_iters max_iters n_steps "
    "training_steps",
    "max_grad_norm": "grad_clip clip_grad clip_grad_norm gradient_clip gradient_clip_val max_norm grad_norm "
    "grad_norm_clip",
    "optim": "optimizer optimizer_type optimizer_name",
    "optim_args": "optimizer_args optimizer_kwargs optim_kwargs",
    "weight_decay": "wd",
    "adam_beta1": "beta1 adam_b1",
    "adam_beta2": "beta2 adam_b2",
    "activation_checkpointing": "recompute grad_checkpoint use_gradient_checkpointing checkpoint_activations",
    "use_cpu": "no_cuda cpu_only on_cpu",
    "deepspeed/accelerate_config": "ds_config deepspeed_config deepspeed_config_path ds",
    "seed": "random_seed random_state",
    # The method, by what related trainers call it
    "imitation_weight": "sft_weight sft_coef sft_loss_weight sft_alpha rpo_alpha nll_weight nll_loss_weight ce_weight "
    "kd_weight distill_weight imitation_coef",
    "dual_init/lmbda dual_init": "lambda lam",
    "dual_init": "dual lagrange_multiplier lambda_init",
    "kl_coef beta": "kl_coeff kl_penalty init_kl_coef kl_beta kl",
    "beta": "dpo_beta",
    "num_generations num_student_samples": "num_samples n_samples num_return_sequences group_size rollout_n "
    "num_rollouts samples_per_prompt num_completions",
    "temperature teacher_temperature/student_temperature": "temp temperature sampling_temperature "
    "generation_temperature",
    "loss_type": "loss dpo_loss pref_loss preference_loss",
    # Servers
    "teacher_base_url/student_base_url/judge_base_url": "base_url api_base api_url openai_api_base openai_base_url "
    "server_url endpoint",
    "teacher_api_key_env/student_api_key_env/judge_api_key_env": "api_key api_key_env openai_api_key key",
    "teacher_api_key_env": "teacher_api_key",
    "student_api_key_env": "student_api_key",
    "judge_api_key_env": "judge_api_key",
    "teacher_system_prompt/student_system_prompt": "system_prompt system system_message",
    "preference": "judge judge_model preference_model preference_function label labels",
    "max_concurrency": "concurrency parallel n_parallel num_concurrent max_parallel",
    # Output
    "output_dir": "output out out_dir output_path output_folder save_dir save_path checkpoint_dir dir ckpt_dir",
    "save_steps": "save_every save_interval save_freq checkpoint_every checkpointing_steps save_every_n_steps",
    "save_total_limit": "save_limit keep_checkpoints max_checkpoints keep_last_n_checkpoints max_to_keep",
    "eval_steps": "eval_every eval_interval eval_freq val_check_interval",
    "eval_strategy": "evaluation_strategy evaluate eval_policy",
    "logging_steps": "log_every log_interval log_steps log_freq log_every_n_steps logging_interval",
    "report_to": "report logger loggers log_with log_to log_backend tracker trackers use_wandb wandb tensorboard",
    "run_name": "run experiment_name exp_name wandb_run_name wandb_name wandb_run",
    "resume_from_checkpoint": "resume resume_from resume_training from_checkpoint resume_path load_checkpoint",
    "push_to_hub": "push upload push_to_hf upload_to_hub",
    "hub_model_id hub_dataset_id": "hub_repo hub_repo_id repo_id hub_name hub_model_name hub_id repo_name "
    "push_to_hub_model_id",
    "hub_private_repo": "private hub_private private_repo",
    "hub_token": "token hf_token use_auth_token auth_token push_to_hub_token",
    "dry_run": "dry dryrun validate_only check_only",
    "config": "config_path cfg yaml",
}
"""Keys, and what TRL's older releases, transformers, Axolotl, LLaMA-Factory, Unsloth, ms-swift, torchtune, verl and people
call them. Of several keys the first counts that the command has; `a/b` are two that may be meant, if it has both."""

_OF_THE_ENVIRONMENT = {
    "logging_dir": "TENSORBOARD_LOGGING_DIR",
    "tensorboard_dir": "TENSORBOARD_LOGGING_DIR",
    "wandb_project": "WANDB_PROJECT",
    "wandb_entity": "WANDB_ENTITY",
    "wandb_dir": "WANDB_DIR",
    "wandb_mode": "WANDB_MODE",
    "cache_dir": "HF_HOME",
    "gpu": "CUDA_VISIBLE_DEVICES",
    "cuda_visible_devices": "CUDA_VISIBLE_DEVICES",
    "local_files_only": "HF_HUB_OFFLINE",
    "offline": "HF_HUB_OFFLINE",
}

_CLOSE = 0.75
"""Share of the letters of two words that must be the same, in their order, for one to be the other misspelt."""

_MOST_BEGUN = 3

_OF_OTHERS = ("label_smoothing", "max_prompt_length", "ref_model", "reference")
"""Keys of other trainers, and of some of ours, that the others have under no name."""

_NOT_MEANT = ("local_rank", "help")
"""Keys that nobody sets by hand."""

ALIASES: dict[str, list[list[str]]] = {
    alias: [group.split("/") for group in keys.split()]
    for keys, aliases in _ALIASES.items()
    for alias in aliases.split()
}


def advice(key: str, known: Iterable[str]) -> str | None:
    """
    Args:
        key (`str`):
            A key that the command does not have.
        known (`Iterable[str]`):
            Those that it has, without those of a launcher: they change how it runs, and never what is learnt.

    Returns:
        `str`, *optional*: the end of a message; `None` where nothing is near.
    """
    names = list(dict.fromkeys(name for name in known if name not in _NOT_MEANT))
    key = key.lower().replace("-", "_")
    variable = _OF_THE_ENVIRONMENT.get(key)
    if variable is not None:
        return f"set {variable} in the environment, or under `env` in the YAML file."
    meant = next((group for group in ALIASES.get(key, ()) if set(group) <= set(names)), None)
    if key in _OF_OTHERS and meant is None:
        return None
    misspelt, begun = [name for name in names if _is_misspelt(key, name)][:1], _begun(key, names)
    meant = meant or (begun or misspelt if key.endswith("_") else misspelt or begun)
    return f"did you mean {' or '.join(f'`{name}`' for name in meant)}?" if meant else None


def _is_misspelt(key: str, name: str) -> bool:
    """Whether `key` is `name`, misspelt, and not the name of another quantity. A word more, a word that is another one, and
    another digit make another quantity; a mistake seldom is in the first letter."""
    if key.replace("_", "") == name.replace("_", ""):
        return True
    pairs = zip(key.split("_"), name.split("_"), strict=False)
    is_alike = key.count("_") == name.count("_") and re.sub(r"\D", "", key) == re.sub(r"\D", "", name)
    return is_alike and all(one[:1] == other[:1] and _is_close(one, other) for one, other in pairs)


def _is_close(one: str, other: str) -> bool:
    return SequenceMatcher(None, one, other).ratio() >= _CLOSE or sorted(one) == sorted(other)


def _begun(key: str, names: list[str]) -> list[str]:
    """The few names that `key` is the beginning of. Where it ends with a word, it may itself be the name of something, and
    one name alone may be meant."""
    found = [name for name in names if name.startswith(key)]
    cut = [name for name in found if key.endswith("_") or name[len(key) :][:1] != "_"]
    if not cut and "_" in key and len(found) == 1:
        return found
    return cut if len(cut) <= _MOST_BEGUN else []
