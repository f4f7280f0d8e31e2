"""`PbKDTrainer`: offline preference-based knowledge distillation as a drop-in `DPOTrainer`.

It reads as follows. Everything before the weights load is in `pbkd_data` and `imitation_texts`; the mathematics is in
`trl_kd.losses`. One micro-batch becomes a loss in `preference_step`, or in `imitation_step` where the preference term is
off; here a global batch begins and ends.
"""

from collections import defaultdict, deque
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

from trl_kd._trl.seams import check_seams
from trl_kd.losses.dual import DualVariable
from trl_kd.responses.special_tokens import set_end_token
from trl_kd.sampling.loading import keep_gradients
from trl_kd.trainers.common.card import PAPER
from trl_kd.trainers.common.config import imitation_radius
from trl_kd.trainers.common.config_checks import settle_end_token
from trl_kd.trainers.common.dual import DualCheckpoints, make_dual
from trl_kd.trainers.common.finite import FiniteTraining
from trl_kd.trainers.common.pair_rows import RowCounts, each_dataset, has_images, names_teacher
from trl_kd.trainers.common.response_rows import PairReader, tokenize_rows
from trl_kd.trainers.common.student_head import FusedStudent, check_student, check_student_tokens
from trl_kd.trainers.common.teacher import Teacher
from trl_kd.trainers.common.tokenizer import check_tokenizer, load_processing_class
from trl_kd.trainers.pbkd.card import add_pbkd_sections
from trl_kd.trainers.pbkd.config import PbKDConfig, settle_config
from trl_kd.trainers.pbkd.counts import TextCounts
from trl_kd.trainers.pbkd.data import ADVANTAGE, OUR_COLUMNS, PbKDCollator, prepare_rows
from trl_kd.trainers.pbkd.imitation_step import ImitationStep, NoReference
from trl_kd.trainers.pbkd.imitation_term import STEPS, ImitationTerm
from trl_kd.trainers.pbkd.preference_step import PreferenceStep
from trl_kd.trainers.pbkd.step import GlobalBatch
from trl_kd.trainers.pbkd.texts import weigh_texts
from trl_kd.trainers.pbkd.tokens import TEXT_COLUMNS, mean_advantage, tokenize_texts


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig


logger = get_logger(__name__)

check_seams(DPOTrainer)


class PbKDTrainer(
    ImitationStep, PreferenceStep, ImitationTerm, DualCheckpoints, FusedStudent, FiniteTraining, DPOTrainer
):
    """
    Trainer for offline preference-based knowledge distillation, from [Online Knowledge Distillation with Reward
    Guidance](https://huggingface.co/papers/2505.18952): the student imitates the teacher's responses, each weighed with how
    much better it may be than the student's, as far as preferences tell,

        L(θ, λ) = w·L_imit(θ) + λ·L_DPO(θ)

    By default λ = 0: the preference term is off, and a step costs what one of [`~trl.SFTTrainer`] costs. With `dual_init`
    above 0 the implicit reward has to explain the preferences, too. With `imitation_weight=0` and `dual_init=1` it *is*
    [`~trl.DPOTrainer`], whose arguments it takes.

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
        text_counts (`dict[str, TextCounts]`):
            How many of its rows are imitated.
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
        args = settle_config(args, model)
        self.imitates_alone = not args.has_preference_term
        self.row_counts: dict[str, RowCounts] = {}
        self.text_counts: dict[str, TextCounts] = {}
        self.card_results: dict[str, float | str] = {}
        self.card_teacher: str | None = None
        self.unnamed_teacher: list[str] = []  # datasets of which every chosen answer is taken as the teacher's
        self._window: GlobalBatch | None = None  # of the optimizer step under way
        self._evaluation: list[GlobalBatch] | None = None  # of the evaluation under way, one a batch
        self._streams = False  # whether any dataset has labels that nobody has seen
        self._reader: PairReader | None = None  # of rows with images
        self._left = deque(maxlen=STEPS)
        if teacher_model is not None and teacher_model is model:
            raise ValueError("`teacher_model` and `model` are the same object: load the teacher for itself.")
        if self.imitates_alone:
            refuse_for_preferences(ref_model=ref_model, data_collator=data_collator)
        teacher = Teacher.from_args(args, teacher_model)
        if isinstance(train_dataset, (Dataset, IterableDataset)):
            # In the order in which a user can mend them: rows, then tokenizers, then (in `DPOTrainer`) weights
            train_dataset = self._read_rows(train_dataset, args, "train")
            eval_dataset = each_dataset(eval_dataset, lambda dataset, name: self._read_rows(dataset, args, name))
            embeddings = check_student(model, args)
            if processing_class is None:
                processing_class = load_processing_class(model, args)
            self._tokenizer = getattr(processing_class, "tokenizer", processing_class)
            check_student_tokens(model, self._tokenizer, embeddings)
            set_end_token(self._tokenizer, args.eos_token)
            if teacher is not None:
                teacher.check_vocabulary(self._tokenizer, model)
            self.imitation_radius = imitation_radius(args, self._count_known())
            train_dataset = self._tokenize_rows(train_dataset, processing_class, args, "train")
            eval_dataset = each_dataset(
                eval_dataset, lambda dataset, name: self._tokenize_rows(dataset, processing_class, args, name)
            )
            self.mean_advantage = mean_advantage(train_dataset, args, self._reader)
            if self.imitates_alone:
                data_collator = self._imitation_collator(processing_class, args)
                logger.warning(
                    "The preference term is off (`dual_init` = `dual_learning_rate` = 0): no reference model is loaded, and "
                    "`rewards/*` and `pbkd/preference_nll` are not logged."
                )
        self.dual = self._make_dual(args)

        super().__init__(
            model=model,
            ref_model=NoReference() if self.imitates_alone else ref_model,
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
        if self.imitates_alone:
            self.ref_model = None
        keep_gradients(self.model)
        self._extend_collator()
        settle_end_token(self.processing_class, self.model, args.eos_token, next(iter(self.train_dataset), None))
        self._check_student(model, reference=ref_model)
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

    def _count_known(self) -> int | None:
        """Training rows with a known preference, before any is merged or left out; `None` for a stream."""
        counts = self.row_counts.get("train")
        return None if counts is None else counts.known

    def _tokenize_rows(self, dataset, processing_class, args, name, count=True):
        training = count and name == "train"
        dataset, texts = weigh_texts(dataset, name, args, self.imitation_radius, training=training)
        if count and texts is not None:
            self.text_counts[name] = texts
        if has_images(next(iter(dataset))):  # tokenized batch by batch, in the collator
            self._reader = PairReader(processing_class, args, name)
            return self._reader.look(dataset)
        check_tokenizer(self._tokenizer, dataset, name)
        if self.imitates_alone:
            return tokenize_texts(dataset, processing_class, args, name, training=training)
        dataset = tokenize_rows(dataset, processing_class, args, name)
        counts = self.row_counts.get(name) if count else None
        if counts is not None and counts.rows > len(dataset):  # `max_length` has taken some
            self.row_counts[name] = RowCounts.of_labels(dataset, counts.empty)
        return dataset

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        first: dict[str, Any] = next(iter(dataset), {})
        if ADVANTAGE in first:
            return dataset  # prepared in `__init__`, and asked for again by `DPOTrainer`
        dataset = self._read_rows(dataset, args, dataset_name, count=False)  # given to `evaluate`
        return self._tokenize_rows(dataset, processing_class, args, dataset_name, count=False)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        ours = (*OUR_COLUMNS, *TEXT_COLUMNS)
        self._signature_columns += [c for c in ours if c not in self._signature_columns]

    def _extend_collator(self) -> None:
        if not self.imitates_alone and not isinstance(self.data_collator, PbKDCollator):
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
            self._window = self._window_over(batches)
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

    def evaluate(self, eval_dataset=None, *args, **kwargs):
        # `DPOTrainer` prepares what is given here, but for images
        if self._is_vision_dataset and eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = each_dataset(
                eval_dataset,
                lambda dataset, name: self._prepare_dataset(dataset, self.processing_class, self.args, name),
            )
        return super().evaluate(eval_dataset, *args, **kwargs)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        windows: list[GlobalBatch] = []
        self._evaluation = windows
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        finally:
            self._evaluation = None
        if windows:
            whole = type(windows[0]).joined(windows)
            self._log_window(whole)
            # A mean over all rows, which `Trainer` takes, weighs batches by their rows, not by what counts of them
            output.metrics[f"{metric_key_prefix}_loss"] = self._mean_loss(whole, whole.reduce(self.accelerator))
        return output


def refuse_for_preferences(**given: Any) -> None:
    """Raises a `ValueError` for an argument that only the preference term would use, where that is off."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"`{name}` is given, which only the preference term uses, and that is off, since `dual_init` and "
                f"`dual_learning_rate` are 0: drop `{name}`, or set `dual_init` above 0."
            )
