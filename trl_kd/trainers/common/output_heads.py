"""Output layers of loaded models, as the losses over the whole vocabulary take them, whole even where they are sharded."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from trl_kd._trl.models import logit_scale
from trl_kd.losses.heads import Head
from trl_kd.sampling.own_logits import OwnLogits


def output_head(model: Any, hidden_NH: torch.Tensor, own: OwnLogits | None = None) -> Head:
    """The output layer of a causal language model at some hidden states, whole even where its weights are sharded (FSDP).
    With `own` it is the model's own logits there."""
    if own is not None:
        return Head(hidden_NH, hidden_NH.new_empty(own.words, 0), own_logits=own.under_autocast())
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    weight, bias = layer.weight, layer.bias
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor().to(hidden_NH.dtype)
        bias = None if bias is None else bias.full_tensor()
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(hidden_NH.to(weight.device), weight, bias, logit_scale(model.config), cap)


def output_layer(model: Any, own: OwnLogits | None = None) -> Head:
    """The same at no state."""
    return output_head(model, torch.empty(0, dtype=model.get_output_embeddings().weight.dtype), own)


def head_logits(model: Any, hidden_NH: torch.Tensor) -> torch.Tensor:
    """Logits `[N, V]` as the losses make them."""
    layer = model.get_output_embeddings()
    with whole([p for p in (layer.weight, layer.bias) if p is not None]):
        return output_head(model, hidden_NH).logits()


def whole(weights: Sequence[torch.Tensor]) -> AbstractContextManager:
    """In which weights that DeepSpeed's ZeRO-3 has split are whole. One that is whole already is in use, and not to be split
    again at the end."""
    split = [weight for weight in weights if hasattr(weight, "ds_id") and weight.ds_status.name != "AVAILABLE"]
    if not split:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(split)


def is_split(accelerator: Any) -> bool:
    """Whether the weights of models are shared out among the processes (ZeRO-3, FSDP): none is whole outside a forward."""
    deepspeed, fsdp = (getattr(accelerator.state, f"{name}_plugin", None) for name in ("deepspeed", "fsdp"))
    return fsdp is not None or (deepspeed is not None and deepspeed.zero_stage == 3)
