"""One micro-batch of the teacher's texts, as a loss without the preference term:

    L = w · Σ_i a_i Σ_t ℓ_q(π(y_t|s_t)) / (ā · Σ_{a_i>0} |y_i|)

It goes forward once. No reference model and no other text is run.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedConfig

from trl_kd import _trl
from trl_kd.losses.imitation import imitation_losses
from trl_kd.trainers.dual_checkpoints import DUAL_FILE
from trl_kd.trainers.imitation_collator import ImitationCollator
from trl_kd.trainers.imitation_schedule import ImitationSchedule
from trl_kd.trainers.imitation_texts import mean_advantage
from trl_kd.trainers.pbkd_config import PbKDConfig
from trl_kd.trainers.pbkd_data import each_dataset
from trl_kd.trainers.pbkd_step import GlobalBatch
from trl_kd.trainers.response_rows import PairReader
from trl_kd.trainers.teacher import Teacher


logger = get_logger(__name__)

IMITATION_FILE = "pbkd_imitation.json"


@dataclass
class ImitationWindow(GlobalBatch):
    """A global batch of the teacher's texts: rows with a weight above 0 are `used`, those whose text was `compared` with
    another; and `tokens` of all texts, `used_tokens` of the used ones."""

    used: int
    compared: int
    tokens: int
    used_tokens: int

    @staticmethod
    def of_micro_batch(batch: Mapping[str, Any]) -> dict[str, torch.Tensor | int]:
        used_B, tokens_B = batch["advantage"] > 0, (batch["labels"][:, 1:] != -100).sum(1)
        return {
            "used": used_B.sum(),
            "compared": batch["compared"].sum(),
            "tokens": tokens_B.sum(),
            "used_tokens": (tokens_B * used_B).sum(),
        }

    @property
    def is_uneven(self) -> bool:
        return True  # texts are of different lengths


class NoReference(nn.Module):
    """Stands for the reference model in `DPOTrainer.__init__`, which would load one, and is dropped afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PreTrainedConfig()
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("The preference term is off, and something ran its reference model.")


class ImitationStep(ImitationSchedule):
    """
    Mixin before [`~trl_kd.trainers.preference_step.PreferenceStep`], in whose place it steps where the preference term is
    off.

    Attributes:
        imitates_alone (`bool`):
            Whether it is. Settled at construction.
        mean_advantage (`float`):
            ā. It is saved in checkpoints.
        imitation_radius (`float`):
            ζ of a(p, ζ), nats per pair.
    """

    accelerator: Any
    is_world_process_zero: Any
    teacher: Teacher | None
    aux_loss_enabled: bool
    router_aux_loss_coef: float
    _tp_size: int
    _metrics: dict[str, defaultdict[str, list[float]]]
    _total_train_tokens: float
    _is_vision_dataset: bool
    _reader: PairReader | None
    _window_of: Any
    _keep_window: Any
    _auxiliary_loss: Any

    imitates_alone = False
    mean_advantage = 1.0
    imitation_radius = 0.0

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
            inner: Any = _trl.TextCollator(tokenizer.pad_token_id, pad_to_multiple_of=multiple)
        else:
            inner = _trl.VisionCollator(
                processing_class, args.max_length, completion_only_loss=True, pad_to_multiple_of=multiple
            )
        return ImitationCollator(inner, self._reader)

    def _settle_imitation(self, dataset: Dataset | IterableDataset) -> None:
        """What the steps need to know of the training rows, which have been read."""
        self.mean_advantage = mean_advantage(dataset, self._reader)
        logger.info(
            "The preference term is off (`dual_init` = `dual_learning_rate` = 0): no reference model is loaded, and "
            "`rewards/*` and `pbkd/preference_nll` are not logged."
        )

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
        advantage_B, compared_B = inputs.pop("advantage"), inputs.pop("compared")
        labels_BT = inputs["labels"][:, 1:]
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True

        if self.teacher is None:
            output = model(**inputs, fused_lm_head=True)
        else:
            output, imitation = self.teacher.weighted_forward(model, advantage_B, **inputs, fused_lm_head=True)
        # Prompt learning puts virtual tokens in front; zero where a label is −100
        logps_BT = output.log_probs[:, -labels_BT.size(1) :].float()
        if self.teacher is None:
            losses_BT = imitation_losses(logps_BT, self._is_end(labels_BT), self.imitation_q)
            imitation = (advantage_B * losses_BT.sum(1)).sum()
        auxiliary = self._auxiliary_loss(output)
        share = window.mean(imitation, window.used_tokens * self.mean_advantage)
        loss = self.args.imitation_weight * share + auxiliary

        window.add(
            imitation=imitation,
            nll=-logps_BT.sum(),
            advantage=(advantage_B * compared_B).sum(),
            auxiliary=torch.as_tensor(auxiliary, device=loss.device),
        )
        self._record_tokens(output, inputs, labels_BT != -100)
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

    def _imitation_of(self, window, sums: dict[str, float]) -> float:
        return sums["imitation"] / (window.used_tokens * self.mean_advantage or 1)

    def _mean_loss(self, window, sums):
        if not self.imitates_alone:
            return super()._mean_loss(window, sums)  # type: ignore[misc]
        imitation = self.args.imitation_weight * self._imitation_of(window, sums)
        return imitation + sums["auxiliary"] / window.micro_batches

    def _log_window(self, window):
        if not self.imitates_alone:
            return super()._log_window(window)  # type: ignore[misc]
        metrics = self._metrics["train" if self.model.training else "eval"]
        sums = window.reduce(self.accelerator)
        metrics["pbkd/rows_used"].append(float(window.used))
        metrics["pbkd/q"].append(self.imitation_q)
        if window.used_tokens:
            metrics["pbkd/imitation"].append(self._imitation_of(window, sums))
        if window.tokens:
            metrics["pbkd/teacher_nll"].append(sums["nll"] / window.tokens)
        if window.compared:
            metrics["pbkd/advantage"].append(sums["advantage"] / window.compared)
        return None

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        # `DPOTrainer` prepares what is given here, but for images
        if (
            self.imitates_alone
            and self._is_vision_dataset
            and eval_dataset is not None
            and not isinstance(eval_dataset, str)
        ):
            prepare = self._prepare_dataset  # type: ignore[attr-defined]
            eval_dataset = each_dataset(
                eval_dataset, lambda dataset, name: prepare(dataset, self.processing_class, self.args, name)
            )
        return super().evaluate(eval_dataset, *args, **kwargs)  # type: ignore[misc]

    # ---- Checkpoints -----------------------------------------------------------------------------------------------

    def _imitation_state(self) -> dict[str, float]:
        return {
            "mean_advantage": self.mean_advantage,
            "imitation_radius": self.imitation_radius,
            "imitation_q": self.args.final_imitation_q,
            "imitation_q_warmup": self.args.imitation_q_warmup,
        }

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.imitates_alone and self.args.should_save:
            with open(os.path.join(output_dir, IMITATION_FILE), "w", encoding="utf-8") as file:
                json.dump(self._imitation_state(), file)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is not None:
            self._check_checkpoint(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        saved = _read_json(checkpoint, IMITATION_FILE) if self.imitates_alone else None
        if saved is None:
            return
        for name, now in self._imitation_state().items():
            if saved[name] != now and name != "mean_advantage":
                logger.warning(f"`{name}` was {saved[name]} in the checkpoint and is now {now}.")
        self.mean_advantage = saved["mean_advantage"]

    def _check_checkpoint(self, checkpoint: str) -> None:
        """Raises a `ValueError` for a checkpoint of the other loss."""
        dual = (_read_json(checkpoint, DUAL_FILE) or {}).get("value", 0.0)
        if self.imitates_alone and dual > 0:
            raise ValueError(
                f"The checkpoint {checkpoint!r} was saved with the preference term, λ = {dual}, and that is off in this "
                "run, since `dual_init` and `dual_learning_rate` are 0: give them as they were, or begin anew."
            )
        if not self.imitates_alone and _read_json(checkpoint, IMITATION_FILE) is not None:
            raise ValueError(
                f"The checkpoint {checkpoint!r} was saved without the preference term, and this run has it, with "
                f"`dual_init` = {self.args.dual_init}: set `dual_init=0` and `dual_learning_rate=0`, or begin anew."
            )


def _read_json(folder: str | None, name: str) -> dict[str, Any] | None:
    path = None if folder is None else os.path.join(folder, name)
    if path is None or not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)
