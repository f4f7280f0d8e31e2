"""One micro-batch of the teacher's texts, as a loss without the preference term:

    L = w · Σ_i a_i Σ_t ℓ_q(π(y_t|s_t)) / (ā · Σ_{a_i>0} |y_i|)

It goes forward once. No reference model and no other text is run.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from trl_kd._trl import seams
from trl_kd.trainers.common.response_rows import PairReader
from trl_kd.trainers.common.teacher import Teacher
from trl_kd.trainers.pbkd.collator import ImitationCollator
from trl_kd.trainers.pbkd.config import PbKDConfig
from trl_kd.trainers.pbkd.data import WEIGHT_KEYS
from trl_kd.trainers.pbkd.step import ImitationWindow


class NoReference(nn.Module):
    """Stands for the reference model in `DPOTrainer.__init__`, which would load one, and is dropped afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PreTrainedConfig()
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("The preference term is off, and something ran its reference model.")


class ImitationStep:
    """
    Mixin before [`~trl_kd.trainers.pbkd.preference_step.PreferenceStep`], in whose place it steps where the preference term
    is off, and [`~trl_kd.trainers.pbkd.imitation_term.ImitationTerm`].
    """

    args: Any
    model: Any
    accelerator: Any
    processing_class: Any
    imitates_alone: bool
    teacher: Teacher | None
    aux_loss_enabled: bool
    _tokenizer: Any
    _tp_size: int
    _metrics: dict[str, defaultdict[str, list[float]]]
    _total_train_tokens: float
    _reader: PairReader | None
    _window_of: Any
    _keep_window: Any
    _auxiliary_loss: Any
    _imitation: Any
    _variation: Any
    _imitation_scale: Any
    _count_imitation: Any
    _mean_imitation: Any
    _log_imitation: Any

    # ---- Before the weights load -----------------------------------------------------------------------------------

    def _imitation_collator(self, processing_class: Any, args: PbKDConfig) -> ImitationCollator:
        """Batches of texts, as TRL's `SFTTrainer` makes them. `DPOTrainer` settles the pad token only with a collator of its
        own."""
        tokenizer = self._tokenizer
        tokenizer.pad_token = args.pad_token or tokenizer.pad_token or tokenizer.eos_token
        if tokenizer.pad_token is None or tokenizer.pad_token not in tokenizer.get_vocab():
            raise ValueError(
                f"`pad_token` is {args.pad_token!r}, which is not in the vocabulary of {tokenizer.name_or_path!r}: give one "
                "of its tokens, or leave it out."
            )
        multiple: Any = args.pad_to_multiple_of
        if self._reader is None:
            inner: Any = seams.TextCollator(tokenizer.pad_token_id, pad_to_multiple_of=multiple)
        else:
            inner = seams.VisionCollator(
                processing_class, args.max_length, completion_only_loss=True, pad_to_multiple_of=multiple
            )
        return ImitationCollator(inner, self._reader)

    # ---- A micro-batch ---------------------------------------------------------------------------------------------

    def _window_over(self, batches):
        if not self.imitates_alone:
            return super()._window_over(batches)  # type: ignore[misc]
        return ImitationWindow.over(batches, self.accelerator)

    def _compute_loss(self, model, inputs, return_outputs):
        if not self.imitates_alone:
            return super()._compute_loss(model, inputs, return_outputs)  # type: ignore[misc]
        window = self._window_of(inputs)
        inputs = dict(inputs)  # the weights must not reach the model's forward
        advantage_B, weight_B, compared_B = (inputs.pop(name) for name in WEIGHT_KEYS)
        labels_BT = inputs["labels"][:, 1:]
        imitated_BT = labels_BT != -100
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True

        if self.teacher is None:
            output = model(**inputs, fused_lm_head=True)
        else:
            variation_BT = self._variation(labels_BT)
            output, imitation = self.teacher.student_forward(
                model, imitated_BT, weight_B, variation_BT, **inputs, fused_lm_head=True
            )
        # Prompt learning puts virtual tokens in front; zero where a label is −100
        logps_BT = output.log_probs[:, -labels_BT.size(1) :].float()
        if self.teacher is None:
            imitation = self._imitation(logps_BT, labels_BT, weight_B)
        auxiliary = self._auxiliary_loss(output)
        share = window.mean(imitation, self._imitation_scale(window))
        loss = self.args.imitation_weight * share + auxiliary

        self._count_imitation(window, imitation, logps_BT, labels_BT, imitated_BT, advantage_B, compared_B)
        window.add(auxiliary=torch.as_tensor(auxiliary, device=loss.device))
        self._record_tokens(output, inputs, imitated_BT)
        self._keep_window(window)
        if not return_outputs:
            return loss
        with torch.no_grad():  # for `compute_metrics`: the fused output layer makes no logits
            return loss, model(**{name: value for name, value in inputs.items() if name != "labels"})

    @torch.no_grad()
    def _record_tokens(self, output, inputs, mask_BT) -> None:
        """TRL's own metrics of a micro-batch of texts."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        entropy_BT, is_top1_BT = (x[:, -mask_BT.size(1) :] * mask_BT for x in (output.entropy, output.is_top1))
        sums = torch.stack([entropy_BT.sum(), is_top1_BT.sum(), mask_BT.sum(), inputs["attention_mask"].sum()])
        entropy, right, count, tokens = self.accelerator.reduce(sums.float(), reduction="sum").tolist()
        metrics["entropy"].append(entropy / max(count, 1))
        metrics["mean_token_accuracy"].append(right / max(count, 1))
        if self.model.training:
            self._total_train_tokens += int(tokens) // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]
        if self.aux_loss_enabled:
            metrics["aux_loss"].append(self.accelerator.gather(output.aux_loss).mean().item())

    # ---- A global batch --------------------------------------------------------------------------------------------

    def _mean_loss(self, window, sums):
        if not self.imitates_alone:
            return super()._mean_loss(window, sums)  # type: ignore[misc]
        return self._mean_imitation(window, sums) + sums["auxiliary"] / window.micro_batches

    def _log_window(self, window):
        if not self.imitates_alone:
            return super()._log_window(window)  # type: ignore[misc]
        self._log_imitation(window, window.reduce(self.accelerator))
        return None
