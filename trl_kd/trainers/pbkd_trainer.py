"""`PbKDTrainer`: offline preference-based knowledge distillation as a drop-in `DPOTrainer`.

It reads as follows. Everything before the weights load is in `pbkd_data`; the mathematics is in `trl_kd.losses`; here one
micro-batch goes forward once, through `DPOTrainer`'s own loss, and what that forward computed is reused for our terms.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import (
    DataCollator,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer

from trl_kd.losses.dual import DualVariable
from trl_kd.losses.imitation import sequence_imitation
from trl_kd.losses.preference import bradley_terry_nll, label_entropy, sequence_logps
from trl_kd.responses.special_tokens import set_end_token
from trl_kd.sampling.loading import keep_gradients
from trl_kd.trainers.dual_checkpoints import DualCheckpoints, make_dual
from trl_kd.trainers.fields import as_config, settle_end_token
from trl_kd.trainers.finite import FiniteTraining
from trl_kd.trainers.model_card import PAPER, add_pbkd_sections
from trl_kd.trainers.pbkd_config import PbKDConfig
from trl_kd.trainers.pbkd_data import (
    BATCH_KEYS,
    OUR_COLUMNS,
    PbKDCollator,
    RowCounts,
    check_labels,
    check_tokenizer,
    each_dataset,
    has_images,
    load_processing_class,
    names_teacher,
    prepare_rows,
)
from trl_kd.trainers.pbkd_step import CapturingForward, Window, null_rows_total
from trl_kd.trainers.response_rows import PairReader, tokenize_rows
from trl_kd.trainers.student_head import FusedStudent, check_student
from trl_kd.trainers.teacher import Teacher


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig


logger = get_logger(__name__)


class PbKDTrainer(DualCheckpoints, FusedStudent, FiniteTraining, DPOTrainer):
    """
    Trainer for offline preference-based knowledge distillation, from [Online Knowledge Distillation with Reward
    Guidance](https://huggingface.co/papers/2505.18952): the student imitates the teacher's responses under the
    constraint that its implicit reward explains the preferences,

        L(θ, λ) = w·β·L_imit(θ) + λ·L_DPO(θ)

    It takes what [`~trl.DPOTrainer`] takes, and does what it does: with `imitation_weight=0` and `dual_init=1` it *is* DPO.

    Example:

    ```python
    from datasets import load_dataset
    from trl_kd import PbKDTrainer

    trainer = PbKDTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    )
    trainer.train()
    ```

    Args:
        model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks, \
optimizers, quantization_config, peft_config:
            As in [`~trl.DPOTrainer`]. `args` is a [`PbKDConfig`]; a plain [`~trl.DPOConfig`] is taken with our defaults.
            Rows may have the columns `preference`, `teacher_side` and `teacher`, see docs/data_format.md.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*, keyword only):
            The teacher, for `imitation="token"`, in place of `args.teacher_model_name_or_path`.

    Attributes:
        dual ([`~trl_kd.losses.dual.DualVariable`]):
            λ and its history.
        row_counts (`dict[str, RowCounts]`):
            Statistics of each dataset that is not a stream.
        card_results (`dict[str, float | str]`):
            Results to show in the model card; fill it before `create_model_card`.
        card_teacher (`str`, *optional*):
            The teacher's name for the model card, where only its responses are known here.

    Raises:
        `ValueError`: data, labels, tokenizers or settings that do not fit together, before any weight is loaded.
    """

    _tag_names = ["trl", "dpo", "trl-kd", "pbkd", "knowledge-distillation"]
    _name = "PbKD"
    _paper = PAPER
    _add_card_sections = staticmethod(add_pbkd_sections)

    data_collator: Any
    precompute_ref_logps: bool
    _metrics: dict[str, defaultdict[str, list[float]]]
    _total_train_tokens: float

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        *,
        teacher_model: str | PreTrainedModel | None = None,
    ):
        args = as_config(args, model, PbKDConfig, "PbKD")
        self.row_counts: dict[str, RowCounts] = {}
        self.card_results: dict[str, float | str] = {}
        self.card_teacher: str | None = None
        self.unnamed_teacher: list[str] = []  # datasets of which every chosen answer is taken as the teacher's
        self._window: Window | None = None  # of the optimizer step under way
        self._evaluation: list[Window] | None = None  # of the evaluation under way, one a batch
        self._streams = False  # whether any dataset has labels that nobody has seen
        self._reader: PairReader | None = None  # of rows with images
        if teacher_model is not None and teacher_model is model:
            raise ValueError("`teacher_model` and `model` are the same object: load the teacher for itself.")
        teacher = Teacher.from_args(args, teacher_model)
        check_student(model, args)
        if isinstance(train_dataset, (Dataset, IterableDataset)):
            # In the order in which a user can mend them: rows, then tokenizers, then (in `DPOTrainer`) weights
            train_dataset = self._read_rows(train_dataset, args, "train")
            eval_dataset = each_dataset(eval_dataset, lambda dataset, name: self._read_rows(dataset, args, name))
            if processing_class is None:
                processing_class = load_processing_class(model, args)
            self._tokenizer = getattr(processing_class, "tokenizer", processing_class)
            set_end_token(self._tokenizer, args.eos_token)
            if teacher is not None:
                teacher.check_vocabulary(self._tokenizer, model)
            train_dataset = self._tokenize_rows(train_dataset, processing_class, args, "train")
            eval_dataset = each_dataset(
                eval_dataset, lambda dataset, name: self._tokenize_rows(dataset, processing_class, args, name)
            )
        self.dual = self._make_dual(args)

        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        keep_gradients(self.model)
        self._extend_collator()
        settle_end_token(self.processing_class, self.model, args.eos_token, next(iter(self.train_dataset), None))
        self._check_student(reference=ref_model)
        self.teacher = teacher.load(self.accelerator) if teacher is not None else None

    # ---- Data, before any weight is loaded -------------------------------------------------------------------------

    def _read_rows(self, dataset, args, name, count=True):
        first: dict[str, Any] = next(iter(dataset), {})
        if has_images(first) and ("teacher" in first or args.imitation == "token"):
            raise ValueError(
                f"The {name} dataset has images, with which a third `teacher` text and `imitation='token'` are not "
                "supported: say `teacher_side`, and use `imitation='sequence'`."
            )
        if has_images(first) and args.reasoning == "keep":
            raise ValueError(
                f"The {name} dataset has images, whose rows TRL's collator tokenizes, so that `reasoning='keep'` is not "
                "supported: use 'strip' or 'error', or leave it out."
            )
        dataset, counts = prepare_rows(dataset, name, args)
        if count and not names_teacher(first):
            self.unnamed_teacher.append(name)
        if counts is None:
            self._streams = True
        elif count:
            self.row_counts[name] = counts
        return dataset

    def _tokenize_rows(self, dataset, processing_class, args, name, count=True):
        if has_images(next(iter(dataset))):  # tokenized batch by batch, in the collator
            self._reader = PairReader(processing_class, args, name)
            return self._reader.look(dataset)
        check_tokenizer(self._tokenizer, dataset, name)
        dataset = tokenize_rows(dataset, processing_class, args, name)
        counts = self.row_counts.get(name) if count else None
        if counts is not None and counts.rows > len(dataset):  # `max_length` has taken some
            self.row_counts[name] = counts = RowCounts.of_labels(dataset, counts.empty)
            counts.check(name)
        return dataset

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if "prompt_ids" in next(iter(dataset), {}):  # prepared in `__init__`, and asked for again by `DPOTrainer`
            return dataset
        dataset = self._read_rows(dataset, args, dataset_name, count=False)  # given to `evaluate`
        return self._tokenize_rows(dataset, processing_class, args, dataset_name, count=False)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [c for c in OUR_COLUMNS if c not in self._signature_columns]

    def _extend_collator(self) -> None:
        if not isinstance(self.data_collator, PbKDCollator):
            self.data_collator = PbKDCollator(self.data_collator, self._reader)

    def _make_dual(self, args: PbKDConfig) -> DualVariable:
        counts = self.row_counts.get("train")
        known = counts.known if counts is not None else 0
        if args.confidence_radius == "theory" and not known:
            raise ValueError(
                "`confidence_radius` is 'theory', which needs the number of training rows with a known preference, and "
                f"there is {'none' if counts else 'no telling from a stream'}: give a number of nats per pair."
            )
        return make_dual(args, known, args.preference_nll_target or 0.0)

    # ---- One optimizer step ----------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            labels = ((batch["preference"], batch["teacher_side"]) for batch in batches)
            self._window = Window.over(labels, self.accelerator)
        return batches, num_items

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and self._window is not None:
            violation = self._log_window(self._window)
            if violation is not None and self.dual.step(violation):
                logger.warning(
                    f"The dual variable has been at its cap, dual_max={self.dual.maximum}, for {self.dual.CAP_PATIENCE} "
                    "steps: the preference constraint is not being met. The student may be too small for "
                    f"preference_nll_target={self.dual.target}; raise the target or confidence_radius, or fix λ."
                )
            self._window = None
        return loss

    def _compute_loss(self, model, inputs, return_outputs):
        inputs = dict(inputs)  # the labels must not reach the model's forward
        preference_B, side_B = inputs.pop("preference"), inputs.pop("teacher_side")
        own_2BT = inputs.pop("own_mask", inputs["completion_mask"])[:, 1:]
        training = self.model.training
        if training and self._window is not None:
            window = self._window
        else:
            window = Window.over([(preference_B, side_B)], self.accelerator)
        known_B, preference_B = ~preference_B.isnan(), preference_B.nan_to_num(1.0)
        if self._streams:
            check_labels(self.args, soft=bool((preference_B != 1).any()), null=window.null > 0, name="streamed")

        reference, reference_2BT = self._reference_logps(inputs)
        inputs |= reference
        forward = CapturingForward(model, self.teacher, side_B, known_B, own_2BT, detach=window.null > 0)
        loss, outputs = self._trl_loss(forward, inputs, return_outputs)

        mask_2BT = inputs["completion_mask"][:, 1:]
        margin_B = self._margin(sequence_logps(forward.logps_2BT, mask_2BT, self.ld_alpha), reference.values())
        preference_loss = self._preference_loss(loss, forward, inputs, margin_B, preference_B, known_B, window)
        logps_2B, own_2B = forward.logps_2BT.sum(1), (forward.logps_2BT * own_2BT).sum(1)
        imitation = sequence_imitation(own_2B, side_B).sum() if self.teacher is None else forward.divergence
        auxiliary = self._auxiliary_loss(forward.output)
        weight = self.args.imitation_weight * self.beta
        loss = self.dual.value * preference_loss + auxiliary + weight * window.mean(imitation, window.teacher)

        if self.ld_alpha is not None and reference_2BT is not None:  # the constraint is on the unweighted log-ratios
            with torch.no_grad():
                plain = reference_2BT.sum(1).chunk(2)
                margin_B = self._margin(logps_2B.chunk(2), plain)
        excess_B = bradley_terry_nll(margin_B.detach(), preference_B) - label_entropy(preference_B)
        window.add(
            preference=preference_loss * (window.known / window.micro_batches),
            auxiliary=torch.as_tensor(auxiliary, device=loss.device),
            imitation=imitation,
            teacher_logps=-sequence_imitation(own_2B.detach(), side_B).sum(),
            preference_nll=(excess_B * known_B).sum(),
        )
        if not training and self._evaluation is not None:
            self._evaluation.append(window)
        elif not training:
            self._log_window(window)
        return (loss, outputs) if return_outputs else loss

    def _reference_logps(self, inputs) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """The reference's log-probabilities as TRL's loss takes them, `[B]`, and by token, `[2B, T]`, if made here."""
        names = ("ref_chosen_logps", "ref_rejected_logps")
        if self.precompute_ref_logps:
            return {name: inputs[name] for name in names}, None
        model = self.ref_model if self.ref_model is not None else self.model
        captured = []

        def forward(**kwargs):
            captured.append(model(**kwargs))
            return captured[0]

        logps = self.compute_ref_log_probs(forward, inputs)
        return dict(zip(names, logps, strict=True)), captured[0].log_probs

    def _precompute_ref_logps(self, *args, **kwargs):
        keep_gradients(self.model)  # this is within TRL's `__init__`, before ours goes on
        self._extend_collator()
        return super()._precompute_ref_logps(*args, **kwargs)

    def compute_ref_log_probs(self, model, inputs):
        return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k not in BATCH_KEYS})

    def _trl_loss(self, forward, inputs, return_outputs=False):
        """TRL's loss with the reference's log-probabilities read from `inputs`, so that they are computed once."""
        precomputed = self.precompute_ref_logps
        self.precompute_ref_logps = True
        try:
            result = super()._compute_loss(forward, inputs, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        return result if return_outputs else (result, None)

    def _rewards(self, logps, reference_logps) -> tuple[torch.Tensor, torch.Tensor]:
        """The implicit rewards β·log π/π_ref of chosen and rejected, each `[B]`."""
        chosen_B, rejected_B = (self.beta * (ours - ref) for ours, ref in zip(logps, reference_logps, strict=True))
        return chosen_B, rejected_B

    def _margin(self, logps, reference_logps) -> torch.Tensor:
        chosen_B, rejected_B = self._rewards(logps, reference_logps)
        return chosen_B - rejected_B

    def _auxiliary_loss(self, output) -> torch.Tensor | float:
        return self.router_aux_loss_coef * output.aux_loss if self.aux_loss_enabled else 0.0

    def _preference_loss(self, loss, forward, inputs, margin_B, preference_B, known_B, window) -> torch.Tensor:
        """TRL's loss without the router's, made right for soft labels (p ≠ 1) and for rows without a known preference."""
        loss = loss - self._auxiliary_loss(forward.output)
        weights = dict(zip(self.loss_types, self.loss_weights, strict=True))
        # −p·log σ(z) − (1−p)·log σ(−z) = −log σ(z) + (1−p)·z, of which TRL's mean has the first term
        loss = loss + weights.get("sigmoid", 0.0) * ((1 - preference_B) * margin_B).mean()
        if window.null == 0:
            return loss
        if self.loss_types == ["sigmoid"] and self.f_divergence_type == "reverse_kl" and not self.use_weighting:
            null_total = weights["sigmoid"] * (bradley_terry_nll(margin_B.detach(), preference_B) * ~known_B).sum()
        else:
            null_total = self._null_total(forward, inputs, known_B)
        self._correct_rewards(inputs, forward, known_B)
        return window.mean(loss * len(known_B) - null_total, window.known)

    def _null_total(self, forward, inputs, known_B) -> torch.Tensor:
        metrics, tokens = self._metrics, self._total_train_tokens
        self._metrics = {mode: defaultdict(list) for mode in metrics}  # a replay is no step
        try:
            return null_rows_total(lambda *replayed: self._trl_loss(*replayed)[0], forward.output, inputs, known_B)
        finally:
            self._metrics, self._total_train_tokens = metrics, tokens

    def _correct_rewards(self, inputs, forward, known_B) -> None:
        """Leaves the rows without a known preference out of TRL's `rewards/*`."""
        logps = sequence_logps(forward.logps_2BT.detach(), inputs["completion_mask"][:, 1:], self.ld_alpha)
        chosen_B, rejected_B = self._rewards(logps, (inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]))
        values = {
            "chosen": chosen_B,
            "rejected": rejected_B,
            "accuracies": (chosen_B > rejected_B).float(),
            "margins": chosen_B - rejected_B,
        }
        sums = torch.stack([*((value * known_B).sum() for value in values.values()), known_B.sum().float()])
        *sums, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, total in zip(values, sums, strict=True):
            history = metrics[f"rewards/{name}"]
            history.pop()
            if count:
                history.append(total / count)
            if not history:
                del metrics[f"rewards/{name}"]

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        windows: list[Window] = []
        self._evaluation = windows
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self._evaluation = None
        if windows:
            whole = Window.joined(windows)
            self._log_window(whole)
            # A mean over all rows, which `Trainer` takes, weighs batches by their rows, not by what is known of them
            if whole.null or whole.teacher < whole.rows:
                output.metrics[f"{metric_key_prefix}_loss"] = self._mean_loss(whole, whole.reduce(self.accelerator))
        return output

    def _mean_loss(self, window: Window, sums: dict[str, float]) -> float:
        """The loss of a whole window."""
        preference = sums["preference"] / max(window.known, 1)
        imitation = sums["imitation"] / max(window.teacher, 1)
        auxiliary = sums["auxiliary"] / window.micro_batches
        return self.dual.value * preference + auxiliary + self.args.imitation_weight * self.beta * imitation

    def _log_window(self, window: Window) -> float | None:
        """Records our metrics of a global batch; returns the constraint's violation, if a preference is known."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        sums = window.reduce(self.accelerator)
        metrics["pbkd/dual"].append(self.dual.value)
        metrics["pbkd/known_preferences"].append(float(window.known))
        slack = self.dual.target + self.dual.radius
        metrics["pbkd/lagrangian"].append(self._mean_loss(window, sums) - self.dual.value * slack)
        if window.teacher:
            metrics["pbkd/imitation"].append(sums["imitation"] / window.teacher)
            metrics["pbkd/teacher_logps"].append(sums["teacher_logps"] / window.teacher)
        if not window.known:
            return None
        nll = sums["preference_nll"] / window.known
        violation = self.dual.violation(nll)
        metrics["pbkd/preference_nll"].append(nll)
        metrics["pbkd/violation"].append(violation)
        return violation
