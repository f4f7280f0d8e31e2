"""An estimate of the memory that a training run needs, from the configurations of its models, without weights."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from trl_kd.rewards.q_function import ADAPTER_WIDTH
from trl_kd.rewards.reward_model import RewardModel
from trl_kd.sampling import model_files
from trl_kd.sampling.causal import check_kind
from trl_kd.sampling.model_errors import reading
from trl_kd.sampling.model_files import read_config


BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Q_BYTES = 16
"""Of each parameter of Q: in float32 itself, its gradient, and Adam's two moments."""

# bitsandbytes keeps linear layers in 4 or 8 bits; the scales of each block of 64 weights add an eighth of the 4 bits
_QUANTIZED = {"load_in_4bit": 0.5 + 4 / 64, "load_in_8bit": 1.0}


@dataclass
class ModelSize:
    """`parameters` of a model, those in `linear` layers, which quantisation reaches, and the `bytes` of all."""

    parameters: int
    linear: int
    bytes: float


def empty_model(
    name: str, trust_remote_code: bool = False, revision: str | None = None, causal: bool = True
) -> PreTrainedModel:
    """The model that `name` describes, on the meta device: shapes, no weights. Unless told otherwise it must be a causal
    language model."""
    config = read_config(name, {"trust_remote_code": trust_remote_code, "revision": revision})
    if causal:
        check_kind(config, config.architectures or [], f"The model {name!r}")
    return model_files.empty_model(config, trust_remote_code)


def model_size(model: PreTrainedModel, dtype: Any, quantization: str | None = None) -> ModelSize:
    """
    Args:
        model (`PreTrainedModel`):
            A model, weights not needed.
        dtype (`str` or `torch.dtype`):
            What the weights are loaded as; "auto" as the configuration says.
        quantization (`str`, *optional*):
            "load_in_4bit" or "load_in_8bit".
    """
    if dtype in (None, "auto"):
        dtype = getattr(model.config, "dtype", None) or "float32"
    width = BYTES.get(str(dtype).removeprefix("torch."), 4)
    head = model.get_output_embeddings()
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    if quantization is None:
        return ModelSize(total, linear, total * width)
    return ModelSize(total, linear, (total - linear) * width + linear * _QUANTIZED[quantization])


def optimizer_bytes(optim: str) -> float:
    """Bytes of state for each parameter trained in float32, by the optimizer's name; Adam's where it is not known."""
    optim = str(getattr(optim, "value", optim)).lower()
    if "adafactor" in optim:
        return 0.1  # a row and a column for each matrix
    if optim == "sgd":
        return 0
    if "8bit" in optim:
        return 1 if "lion" in optim else 2
    return 4 if "lion" in optim or "rmsprop" in optim or "adagrad" in optim else 8


def trainable_parameters(model: PreTrainedModel, peft_config: Any) -> int:
    """How many parameters are trained: all of them, or those that PEFT adds."""
    if peft_config is None:
        return sum(parameter.numel() for parameter in model.parameters())
    from peft import get_peft_model

    with init_empty_weights():
        adapted = get_peft_model(model, peft_config)
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


def empty_reward_model(name: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """A sequence-classification model of one label with the backbone that `name` describes, on the meta device."""
    config = read_config(name, {"trust_remote_code": trust_remote_code}, num_labels=1)
    with reading("config.json"), init_empty_weights():
        return AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)


def reward_parameters(model: PreTrainedModel, bound: float, lora_r: int) -> tuple[int, int]:
    """How many parameters [`~trl_kd.rewards.reward_model.RewardModel`] has with this backbone, which it changes, and how
    many of them are trained."""
    with init_empty_weights():
        reward = RewardModel(model, bound, lora_r, pad_token_id=0)
    parameters = list(reward.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def q_parameters(head: str, width: int, count: int) -> int:
    """
    How many parameters [`~trl_kd.rewards.q_function.QFunction`] has.

    Args:
        head (`str`):
            Its kind.
        width (`int`):
            Of the student's hidden states and embeddings.
        count (`int`):
            Q-functions that share its trunk: the adversary and, with preferences, a twin for each source of states.
    """
    hidden = {"linear": None, "mlp": width, "adapter": min(ADAPTER_WIDTH, width)}[head]
    trunk = 0 if hidden is None else hidden * (width + 1)
    return trunk + count * width * ((width if hidden is None else hidden) + 1)


def readable(size: float) -> str:
    """Bytes as GiB, or MiB and KiB where that is too small to see."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale / 10:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1024:.1f} KiB"
