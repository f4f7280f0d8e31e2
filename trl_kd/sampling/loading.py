"""Loading a model by its name: what local sources, preferences that run a model and the white-box teacher share."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from trl_kd._trl import models as trl_models
from trl_kd.sampling.causal import check_named
from trl_kd.sampling.model_errors import MODEL_ERRORS, BadModel, reason
from trl_kd.sampling.model_files import FINDING, QUANTIZATION
from trl_kd.sampling.weight_files import check_missing, find_weights


def load_model(name: str, options: Mapping[str, Any], architecture: Any = None) -> PreTrainedModel:
    """
    Loads a model, in float32 unless `dtype` says otherwise, as TRL does.

    Args:
        name (`str`):
            Name or folder.
        options (`Mapping[str, Any]`):
            Options of `from_pretrained`. Fields of `BitsAndBytesConfig` may stand among them: `load_in_4bit`,
            `load_in_8bit` and what else begins with `bnb_` or `llm_int8_`.
        architecture (`type`, *optional*):
            Class to load with; by default the one that the model's config names, which must be a causal language model's.

    Raises:
        `ValueError`: it is no causal language model; before its weights are read.
        `ImportError`: it is to be quantized and bitsandbytes is missing.
        `BadModel`: its files cannot be used, or lack weights.
    """
    quantization = {key: value for key, value in options.items() if key.startswith(QUANTIZATION)}
    kwargs = {key: value for key, value in options.items() if key not in quantization}
    if quantization:
        if not is_bitsandbytes_available():
            raise ImportError(
                f"{', '.join(quantization)}: bitsandbytes is missing, install it by `pip install trl-kd[bnb]`."
            )
        kwargs["quantization_config"] = BitsAndBytesConfig(**quantization)
    if architecture is None:
        check_named(name, f"The model {name!r}", **{key: kwargs[key] for key in FINDING if key in kwargs})
    try:
        model, found = trl_models.create_model_from_path(
            name, architecture=architecture, output_loading_info=True, **kwargs
        )
    except (OSError, ValueError, TypeError, ImportError, torch.OutOfMemoryError):  # of the options, or the machine
        raise
    except MODEL_ERRORS as error:
        raise BadModel(reason(error)) from error
    check_loaded(name, model, found, kwargs)
    return model


def check_loaded(name: str, model: Any, found: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raises a `BadModel` if parameters of a loaded model are random: see `check_missing`. Of a folder it is known before,
    but for quantised weights and remote code."""
    weights = find_weights(name, options)
    check_missing(model, found, "its files of weights" if weights is None else weights.name)


def keep_gradients(model: Any) -> None:
    """Lets no 4-bit layer of a model that is trained be packed for inference, which bitsandbytes does at the first answer or
    evaluation on a CPU with AVX512-BF16: what lies below it would have no gradient any more."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
