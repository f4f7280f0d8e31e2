"""How TRL and transformers load, wrap and read models. Importing this imports no trainer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import is_peft_model
from transformers.integrations import deepspeed

from trl_kd._trl.tested import require


create_model_from_path = require("trl.trainer.utils", "create_model_from_path")
get_config_model_id = require("trl.trainer.utils", "get_config_model_id")
prepare_deepspeed = require("trl.models", "prepare_deepspeed")
prepare_fsdp = require("trl.models", "prepare_fsdp")
main_first = require("trl.trainer.utils", "global_then_local_main_first")
FusedCausalLMOutput = require("trl.trainer.utils", "FusedCausalLMOutput")
ForwardRedirection = require("trl.models.utils", "_ForwardRedirection")


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


@contextmanager
def whole_models() -> Iterator[None]:
    """Models are made here as if there were no ZeRO-3, which splits every model that is made."""
    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held
