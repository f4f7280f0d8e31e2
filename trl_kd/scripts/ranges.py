"""Ranges of settings that transformers and TRL take as they come, to fail when they are used, or to train with nonsense."""

from collections.abc import Callable
from typing import Any

from transformers.debug_utils import DebugOption

from trl_kd.scripts.errors import InputError
from trl_kd.trainers.common.config_checks import check_integer, check_number


_Range = tuple[Callable[[float], bool], str]

_NOT_NEGATIVE: _Range = (lambda value: value >= 0, "at least 0")
_POSITIVE: _Range = (lambda value: value > 0, "above 0")
_SHARE: _Range = (lambda value: 0 <= value < 1, "at least 0 and below 1")
_PART: _Range = (lambda value: 0 < value <= 1, "above 0 and at most 1")
_NUMBERS: dict[str, _Range] = {
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor", "lora_dropout"), _SHARE),
    **dict.fromkeys(("adam_epsilon", "weight_decay", "neftune_noise_alpha", "eval_delay"), _NOT_NEGATIVE),
    **dict.fromkeys(("router_aux_loss_coef", "warmup_steps", "num_train_epochs"), _NOT_NEGATIVE),
    **dict.fromkeys(("epsilon", "epsilon_high"), _NOT_NEGATIVE),
    **dict.fromkeys(("repetition_penalty", "vllm_server_timeout"), _POSITIVE),
    **dict.fromkeys(("top_p", "vllm_gpu_memory_utilization"), _PART),
    "min_p": (lambda value: 0 <= value <= 1, "between 0 and 1"),
    "test_split_size": (lambda value: 0 < value < 1, "above 0 and below 1"),
}
_COUNT = (1, 2**63 - 1)
_WORKERS = (1, 1024)
_PORT = (1, 65535)
_INTEGERS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("per_device_eval_batch_size", "eval_accumulation_steps", "gradient_accumulation_steps"), _COUNT),
    **dict.fromkeys(("ddp_timeout", "ddp_bucket_cap_mb", "torch_empty_cache_steps", "pad_to_multiple_of"), _COUNT),
    **dict.fromkeys(("precompute_ref_batch_size", "vllm_max_model_length", "lora_alpha"), _COUNT),
    **dict.fromkeys(("max_tool_calling_iterations", "max_completion_length"), _COUNT),
    **dict.fromkeys(("dataset_num_proc", "vllm_tensor_parallel_size"), _WORKERS),
    **dict.fromkeys(("vllm_server_port", "vllm_group_port"), _PORT),
    **dict.fromkeys(("seed", "data_seed"), (0, 2**32 - 1)),
    "dataloader_num_workers": (0, 1024),
    "num_completions_to_print": (0, 2**63 - 1),
    "lora_r": (1, 2**16),
    "rm_lora_r": (0, 2**16),
    "top_k": (-1, 2**31 - 1),
}


def check_ranges(args: Any) -> None:
    """Raises for a value that none of these fields of `args` can have."""
    for name, (holds, allowed) in _NUMBERS.items():
        if getattr(args, name, None) is not None:
            check_number(name, getattr(args, name), holds, allowed)
    for name, (least, most) in _INTEGERS.items():
        value = getattr(args, name, None)
        if value is not None:
            check_integer(name, value, least)
            if value > most:
                raise InputError(f"`{name}` is {value}: it must be at most {most:,}.")
    for option in getattr(args, "debug", ()):
        if option not in list(DebugOption):
            raise InputError(
                f"`debug` is {option!r}: choose from {', '.join(repr(each.value) for each in DebugOption)}."
            )
    for kind, numbers in (("logging", _POSITIVE), ("eval", _POSITIVE)):
        if getattr(args, f"{kind}_strategy", None) == "steps":
            check_number(f"{kind}_steps", getattr(args, f"{kind}_steps"), *numbers)
