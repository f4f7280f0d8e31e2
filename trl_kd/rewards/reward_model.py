"""A reward model with two heads on one backbone: one explains the preferences, the other looks for the student's gap."""

import copy
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


MLE, ADVERSARY = 0, 1
WEIGHTS_FILE = "reward_model.safetensors"


class OtherRewardModel(ValueError):
    """A checkpoint has the weights of a reward model of another form."""


class TwoHeads(nn.Module):
    """
    In place of a classification layer of one label: two of them, whose outputs are `[..., 2]`, in float32.

    Attributes:
        adversary_trains_trunk (`bool`):
            Whether the gradient of the adversarial output goes on into the backbone.
        last (`torch.Tensor` of shape `[rows]`, *optional*):
            Where each row ends. A decoder's outputs are those of this place, wherever in the row they are looked for.
    """

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.mle = head
        self.adversary = nn.Linear(head.in_features, 1, bias=head.bias is not None)
        self.adversary.load_state_dict(head.state_dict())
        self.adversary.to(head.weight.device, head.weight.dtype)
        self.adversary_trains_trunk = False
        self.last: torch.Tensor | None = None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        length = features.size(1) if features.dim() == 3 and self.last is not None else None
        if length is not None:
            features = features[torch.arange(len(features), device=features.device), self.last]
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.mle.weight.dtype)  # float32 on a backbone of less
            seen = features if self.adversary_trains_trunk else features.detach()
            outputs = torch.cat([self.mle(features), self.adversary(seen)], dim=-1)
        return outputs if length is None else outputs.unsqueeze(1).expand(-1, length, -1)


class RewardModel(nn.Module):
    """
    r_mle and r_adv of a response, each in (−B, B).

    Args:
        model (`PreTrainedModel`):
            A sequence-classification model of one label. It is changed, not copied: its last layer becomes a [`TwoHeads`].
        bound (`float`):
            B > 0: a reward is B·tanh(output / B), in nats of preference.
        lora_r (`int`):
            Rank of LoRA adapters at all linear layers of the backbone; `0` trains all its weights.
        pad_token_id (`int`):
            Fills up rows.

    Raises:
        `ValueError`: the model's last layer is not a linear one of one label.
    """

    def __init__(self, model: PreTrainedModel, bound: float, lora_r: int, pad_token_id: int):
        super().__init__()
        self.bound, self._pad = bound, pad_token_id
        name, head = classifier(model)
        self.heads = TwoHeads(head)
        model.set_submodule(name, self.heads)
        model.config.num_labels = 2
        if hasattr(model, "num_labels"):
            model.num_labels = 2
        model.config.get_text_config().pad_token_id = pad_token_id
        self._name = name
        self.model: Any = model
        if lora_r:
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(
                r=lora_r,
                lora_alpha=2 * lora_r,
                target_modules="all-linear",
                exclude_modules=rf"(.*\.)?{re.escape(name)}(\..*)?",
            )
            self.model = get_peft_model(model, config)
        self.heads.float().requires_grad_(True)
        model.config.get_text_config().use_cache = False
        self.eval()  # without dropout: a step of λ compares two heads
        for layer in self.modules():
            if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
                layer.training = True  # or it would not; the modules in it stay as they are
                own = {name: 0.0 for name, p in vars(layer).items() if "dropout" in name and isinstance(p, float)}
                vars(layer).update(own)

    def forward(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """
        A decoder is read at the last token of a row, the end token too where that is also the padding: transformers by
        itself looks for the last one that is no padding, and would not see whether a response ended.

        Args:
            rows (`Sequence[Sequence[int]]`):
                Tokens of prompt and response, as `trl_kd.preferences.tokens.tokenize_response` gives them.

        Returns:
            `torch.Tensor` of shape `[rows, 2]`: r_mle and r_adv, in float32.
        """
        device = self.heads.mle.weight.device
        ids = [torch.tensor(row, device=device) for row in rows]
        input_ids = pad_sequence(ids, batch_first=True, padding_value=self._pad)
        lengths = torch.tensor([[len(row)] for row in rows], device=device)
        attention_mask = (torch.arange(input_ids.size(1), device=device) < lengths).long()
        self.heads.last = lengths[:, 0] - 1
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits.float()
        return self.bound * torch.tanh(logits / self.bound)

    def trainable(self) -> dict[str, torch.Tensor]:
        """What is trained, by name: all that a checkpoint needs."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def save_weights(self, folder: str) -> None:
        save_file({name: p.contiguous() for name, p in self.trainable().items()}, os.path.join(folder, WEIGHTS_FILE))

    def load_weights(self, folder: str) -> None:
        """
        Raises:
            `OtherRewardModel`: the weights are of a model of another form.
        """
        weights = load_file(os.path.join(folder, WEIGHTS_FILE))
        ours = self.trainable()
        if {name: p.shape for name, p in ours.items()} != {name: p.shape for name, p in weights.items()}:
            raise OtherRewardModel(
                f"{WEIGHTS_FILE} in {folder} is of another reward model: resume with the `reward_model` and `rm_lora_r` of "
                "that run."
            )
        for name, p in ours.items():
            p.copy_(weights[name])

    def save_pretrained(self, folder: str, head: int) -> None:
        """As a sequence-classification checkpoint of one label with the weights of one head, `MLE` or `ADVERSARY`, and
        LoRA merged. The model itself is not touched."""
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        kept = [(name, p) for name, p in model.state_dict().items() if not name.startswith(f"{self._name}.")]
        weights = {name.replace(".base_layer.", "."): p.clone() for name, p in kept if ".lora_" not in name}
        for name, layer in model.named_modules():
            if hasattr(layer, "get_delta_weight"):
                weights[f"{name}.weight"] += layer.get_delta_weight("default").to(weights[f"{name}.weight"].dtype)
        chosen = self.heads.mle if head == MLE else self.heads.adversary
        weights |= {f"{self._name}.{name}": p.clone() for name, p in chosen.state_dict().items()}
        model.config.num_labels = 1
        try:
            model.save_pretrained(folder, state_dict=weights)
        finally:
            model.config.num_labels = 2


def classifier(model: PreTrainedModel) -> tuple[str, nn.Linear]:
    """Name and layer of the last linear one, which gives the labels."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    name, layer = layers[-1]
    if layer.out_features != 1:
        raise ValueError(
            f"The reward model {model.config._name_or_path!r} ends in a layer `{name}` of {layer.out_features} outputs: "
            "give a sequence-classification checkpoint with one label."
        )
    return name, layer


def from_student(
    student: PreTrainedModel, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A sequence-classification model of one label with the weights of a causal language model, and a head that is zero: at
    the start every response has the same reward. Of layers with adapters it takes the weights beneath; of what lies between
    backbone and head (ModernBERT's decoder), the layers of the same form.

    Raises:
        `ValueError`: the classifier of this type has layers that the language model has not.
    """
    config = copy.deepcopy(student.config)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    weights = {
        re.sub(r"\.(base_layer|original_module)\.", ".", name): p
        for name, p in getattr(student, student.base_model_prefix).state_dict().items()
    }
    backbone = getattr(model, model.base_model_prefix)
    backbone.load_state_dict({name: weights[name] for name in backbone.state_dict()})
    _take_between(student, model)
    zero_head(model)
    return model


def _take_between(student: PreTrainedModel, model: PreTrainedModel) -> None:
    """Copies the layers between backbone and head, which the two classes may name differently (`lm_head.dense.weight`,
    `head.dense.weight`)."""
    name, _ = classifier(model)
    inside = (f"{model.base_model_prefix}.", f"{name}.")
    theirs = {key: p for key, p in student.state_dict().items() if not key.startswith(f"{student.base_model_prefix}.")}
    for key, p in model.state_dict().items():
        if key.startswith(inside):
            continue
        like = [
            other
            for other, q in theirs.items()
            if other.split(".", 1)[-1] == key.split(".", 1)[-1] and q.shape == p.shape
        ]
        if len(like) != 1:
            raise ValueError(
                f"A reward model of the type {model.config.model_type!r} has a layer `{key}`, which the language model has "
                "not: give a sequence-classification checkpoint with one label as `reward_model`."
            )
        p.copy_(theirs[like[0]])


def zero_head(model: PreTrainedModel) -> None:
    """The last layer of a sequence-classification model of one label gives 0."""
    for p in classifier(model)[1].parameters():
        nn.init.zeros_(p)
