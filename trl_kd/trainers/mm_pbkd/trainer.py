"""`MMPbKDTrainer`: white-box preference-based knowledge distillation as a drop-in `DistillationTrainer`.

It reads as follows. `mm_pbkd_data` says what the rows are; TRL generates the on-policy completions, and here the teacher's
take the place of the rest; `mm_pbkd_step` makes a loss of a micro-batch, whose backward serves student and Q; `adversary`
steps Q.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from trl_kd._trl.seams import check_seams
from trl_kd.losses.dual import DualVariable
from trl_kd.losses.heads import Head
from trl_kd.responses.special_tokens import set_end_token
from trl_kd.rewards.q_function import QFunction
from trl_kd.sampling.loading import keep_gradients
from trl_kd.trainers.common.card import PAPER
from trl_kd.trainers.common.config_checks import as_config, settle_end_token
from trl_kd.trainers.common.dual import DualCheckpoints, make_dual
from trl_kd.trainers.common.finite import FiniteTraining
from trl_kd.trainers.common.imitation_weights import PairWeights
from trl_kd.trainers.common.output_heads import output_head, output_layer, whole
from trl_kd.trainers.common.pair_rows import each_dataset
from trl_kd.trainers.common.preference_pairs import known_pairs, read_pairs
from trl_kd.trainers.common.prompts import EpochOrder, check_prompts
from trl_kd.trainers.common.student_head import CheckedStudent, check_student, check_student_tokens
from trl_kd.trainers.common.teacher import Teacher
from trl_kd.trainers.common.tokenizer import check_tokenizer, load_processing_class
from trl_kd.trainers.mm_pbkd.adversary import Adversary
from trl_kd.trainers.mm_pbkd.card import add_mm_pbkd_sections
from trl_kd.trainers.mm_pbkd.config import MMPbKDConfig, warn_if_approximate
from trl_kd.trainers.mm_pbkd.data import PairBatches, check_prompt_count, look_at_completions, tokenize_pairs
from trl_kd.trainers.mm_pbkd.generation import MixedStates
from trl_kd.trainers.mm_pbkd.imitation import ImitatedStates
from trl_kd.trainers.mm_pbkd.pair_states import Baseline, PairStates
from trl_kd.trainers.mm_pbkd.step import Played, States, constant, learn_moments, play, reshard


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig


logger = get_logger(__name__)

check_seams(DistillationTrainer)


class MMPbKDTrainer(DualCheckpoints, ImitatedStates, MixedStates, CheckedStudent, FiniteTraining, DistillationTrainer):
    """
    Trainer for white-box preference-based knowledge distillation, from [Online Knowledge Distillation with Reward
    Guidance](https://huggingface.co/papers/2505.18952): the student matches its teacher's next-token distributions, most of
    all where a Q-function that explains the preferences says that it matters.

    It takes what [`~trl.DistillationTrainer`] takes, and does what it does: with `moment_coef=0` it *is* that trainer.

    Example:

    ```python
    from datasets import load_dataset
    from trl_kd import MMPbKDTrainer

    trainer = MMPbKDTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        teacher_model="Qwen/Qwen2.5-7B-Instruct",
        train_dataset=load_dataset("trl-lib/tldr", split="train"),
        preference_dataset=load_dataset("trl-lib/tldr-preference", split="train"),
    )
    trainer.train()
    ```

    Args:
        model, teacher_model, args, train_dataset, eval_dataset, processing_class, callbacks, optimizers, \
quantization_config, peft_config, tools:
            As in [`~trl.DistillationTrainer`]. `args` is a [`MMPbKDConfig`]; a plain [`~trl.DistillationConfig`] is taken
            with our defaults. Without `teacher_model`, `args.teacher_model_name_or_path` is loaded. The teacher has the
            student's tokens; its embedding may be padded to another size. Rows may have a column `completion`, the
            teacher's, for `lmbda` < 1.
        preference_dataset ([`~datasets.Dataset`], *optional*, keyword only):
            Pairs in TRL's preference format, as `trl-kd pairs` writes them, with `preference` = P(chosen ≻ rejected), by
            default 1; equal responses are left out. Without it Q is held by nothing (moment matching).

    Attributes:
        adversary ([`~trl_kd.trainers.mm_pbkd.adversary.Adversary`], *optional*):
            Q with its optimizer; `None` for `moment_coef=0`.
        dual ([`~trl_kd.losses.dual.DualVariable`]):
            λ and its history.
        card_results (`dict[str, float | str]`):
            Results to show in the model card; fill it before `create_model_card`.

    Raises:
        `ValueError`: data, vocabularies or settings that do not fit together, before any weight is loaded.
    """

    _tag_names = ["trl", "distillation", "trl-kd", "mm-pbkd", "knowledge-distillation"]
    _name = "MM-PbKD"
    _paper = PAPER
    _add_card_sections = staticmethod(add_mm_pbkd_sections)

    model_wrapped: Any
    use_vllm: bool
    _metrics: dict[str, defaultdict[str, list[float]]]

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        teacher_model: str | PreTrainedModel | None = None,
        args: DistillationConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        tools: list[Callable] | None = None,
        *,
        preference_dataset: Dataset | None = None,
    ):
        args = as_config(args, model, MMPbKDConfig, "MMPbKD")
        self.card_results: dict[str, float | str] = {}
        self.preference_rows = 0
        teacher = Teacher.for_matching(args, model, teacher_model)
        embeddings = check_student(model, args)
        if preference_dataset is not None and args.moment_coef == args.imitation_weight == 0:
            raise ValueError(
                "`moment_coef` is 0, so that there is no Q for `preference_dataset` to hold, and so is `imitation_weight`: "
                "drop `preference_dataset`, or set one of them above 0."
            )
        if train_dataset is not None:
            check_prompts(train_dataset, "train", args.lmbda, tools)
            check_prompt_count(train_dataset, args, args.world_size)
        each_dataset(eval_dataset, lambda dataset, name: check_prompts(dataset, name, args.lmbda, tools))
        pairs = preference_dataset
        if pairs is not None:
            pairs = read_pairs(pairs, train_dataset)
        if processing_class is None:
            processing_class = load_processing_class(model, args, truncation_side="left", padding_side="left")
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        check_student_tokens(model, tokenizer, embeddings)
        set_end_token(tokenizer, args.eos_token)
        teacher.check_vocabulary(tokenizer, model)

        def look(dataset, name):
            check_tokenizer(tokenizer, dataset, name)
            return look_at_completions(dataset, processing_class, args, name)

        train_dataset = None if train_dataset is None else look(train_dataset, "train")
        eval_dataset = each_dataset(eval_dataset, look)
        self.pair_weights = PairWeights(pairs, args) if args.imitation_weight > 0 else None
        pairs = pairs if args.moment_coef > 0 else None
        if pairs is not None:
            pairs = tokenize_pairs(known_pairs(pairs), processing_class, args)
            self.preference_rows = len(pairs)

        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
        )
        keep_gradients(self.model)
        settle_end_token(processing_class, self.model, args.eos_token, next(iter(train_dataset or []), None))
        warn_if_approximate(args)
        self.teacher = teacher.load(self.accelerator)
        self.teacher_model = self.teacher.model
        self._check_student(model)
        self._check_ends()
        self._settings: dict[str, Any] = {
            "q_bound": args.q_bound,
            "temperature": self.temperature,
            "vocab_size": teacher.shared_tokens,
            "gather": self._whole_heads,
        }
        if teacher.shared_tokens is not None:
            self._suppress_tokens(teacher.shared_tokens)
        self._settle_imitation(train_dataset)
        self._sums_4: torch.Tensor | None = None
        self._played: list[Played] = []
        self._scale: Any = None  # its gradient is the factor that the loss was scaled with
        self._held_out: tuple[int, float] | None = None  # pairs seen when its accuracy was measured, and which
        self._kept: list[States] = []  # of the optimizer step under way, for further steps of Q
        self._baselines = [
            b for b in (Baseline("teacher", args.lmbda), Baseline("student", 1 - args.lmbda)) if b.weight
        ]
        self.dual = DualVariable(value=0.0, maximum=0.0)
        held = args.dual_max > 0 and (args.dual_init > 0 or args.dual_learning_rate > 0 or args.confidence_radius == 0)
        if pairs is not None and not held:
            logger.info("λ is fixed at 0, so that `preference_dataset` does not hold Q: moment matching alone.")
            pairs, self.preference_rows = None, 0
        self.adversary = self._make_adversary(pairs) if args.moment_coef > 0 else None
        set_seed(args.seed, device_specific=True)  # as TRL left it, whatever loading the teacher has drawn

    def _check_ends(self) -> None:
        others = set(self.teacher.end_tokens()) - set(self.eos_token_ids)
        if others:
            names = [self._tokenizer.convert_ids_to_tokens(token) or str(token) for token in sorted(others)]
            logger.warning(
                f"The teacher ends its texts with {' or '.join(names)} too, and the student does not: it will learn "
                "to write it, and not to stop there. Add it to `eos_token_id` of the student's generation config."
            )

    def _suppress_tokens(self, shared: int) -> None:
        """Rows of an output embedding that stand for no token are never sampled, by the student or by the teacher."""
        models: Any = (self.model, self.teacher_model)
        rows = max(model.config.get_text_config().vocab_size for model in models)
        suppressed = [*(self.generation_config.suppress_tokens or []), *range(shared, rows)]
        self.generation_config.suppress_tokens = suppressed
        self.generation_kwargs["suppress_tokens"] = suppressed

    def _make_adversary(self, pairs: Dataset | None) -> Adversary:
        args: Any = self.args
        batches = None
        if pairs is not None:
            batches = PairBatches(pairs, args, self.accelerator, self._tokenizer.pad_token_id)
            self.dual = make_dual(args, len(batches))
        weight = self.model.get_output_embeddings().weight
        with whole([weight]):
            scale = weight.detach()[: self._settings["vocab_size"]].float().square().mean().sqrt().item()
            embedding_size = weight.shape[1]
        q = QFunction(
            args.q_head,
            embedding_size,
            embedding_size,
            scale,
            1 + len(self._baselines) * (pairs is not None),
            torch.Generator().manual_seed(args.seed),
            torch.float64 if weight.dtype == torch.float64 else torch.float32,
        ).to(self.accelerator.device)
        return Adversary(
            q, self.dual, self._baselines, batches, self._read_pairs, self.accelerator, args, self._settings
        )

    def _whole_heads(self) -> AbstractContextManager:
        models = (self.model, self.accelerator.unwrap_model(self.teacher_model))
        return whole([p for model in models for p in model.get_output_embeddings().parameters()])

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        ours = ("completion", "completion_finish_reason", "tools", "chat_template_kwargs")
        self._signature_columns += [c for c in ours if c not in self._signature_columns]

    # ---- One micro-batch ---------------------------------------------------------------------------------------------

    def _hidden_states(self, model, input_ids, attention_mask, keep, **images):
        """Of the teacher, or of the student on pairs: last hidden states at the last `keep` tokens, without gradient."""
        unwrapped = self.accelerator.unwrap_model(model)
        training = unwrapped.training
        unwrapped.eval()
        try:
            with torch.no_grad():  # and without autocast, as TRL runs both: each model in the dtype of its weights
                return self._forward_redirection(
                    model, unwrapped, self._get_last_hidden_state, unwrapped, input_ids, attention_mask, keep, **images
                )
        finally:
            unwrapped.train(training)

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        mask_BT = (inputs["completion_mask"] * inputs.get("tool_mask", 1)).bool()
        keep = mask_BT.size(1)
        known = inspect.signature(self._get_last_hidden_state).parameters.keys() - {"attention_mask"}
        images = {name: inputs[name] for name in known & inputs.keys()}
        student_BTH = self._get_last_hidden_state(unwrapped_student, input_ids, attention_mask, keep, **images)
        teacher_BTH = self._hidden_states(self.teacher_model, input_ids, attention_mask, keep, **images)
        # Once, whatever sources there are: all processes together make weights whole that are sharded
        student = output_head(unwrapped_student, student_BTH)
        teacher = self.teacher.head(teacher_BTH)
        if student.weight_VH.device != teacher.weight_VH.device:
            raise ValueError(
                f"The student's output layer is on {student.weight_VH.device} but the teacher's is on "
                f"{teacher.weight_VH.device}: place both on one device in their `device_map`."
            )

        learning = torch.is_grad_enabled() and self.adversary is not None
        scale = torch.zeros((), device=student_BTH.device, requires_grad=learning)
        loss = student_BTH[:, :0].sum() + scale  # a micro-batch without a token still has a graph
        entropy, played = student_BTH.new_zeros(()), []
        for baseline, (who, _) in enumerate(self._baselines):
            rows = [i for i, on_policy in enumerate(inputs["on_policy"]) if on_policy == (who == "teacher")]
            if not mask_BT[rows].any():
                continue
            states = self._states(student, teacher, inputs, mask_BT, rows, baseline)
            features = None if self.adversary is None else self.adversary.features
            part = play(states, features, self.args, self._settings)
            # The mean over processes and micro-batches that `Trainer` takes is undone; Q's gradients are summed instead
            loss = loss + part.loss * self.accelerator.num_processes + part.q_loss - part.q_loss.detach()
            entropy = entropy + part.entropy.detach()
            played.append(part)
            if learning and self.args.q_steps > 1:
                self._kept.append(states.hidden_alone())
        if not played:
            loss = loss + student.weight_VH[:0].sum()
        self._sums_4 = sum((part.sums_4 for part in played), torch.zeros(4, device=loss.device))
        self._keep_imitation(inputs, played)
        if learning:
            self._played, self._scale = played, scale
        return loss, entropy, mask_BT.sum()

    def _states(self, student: Head, teacher: Head, inputs, mask_BT, rows, baseline) -> States:
        mask_RT = mask_BT[rows]
        device = student.hidden_NH.device
        return States(
            student=replace(student, hidden_NH=student.hidden_NH[rows][mask_RT.to(device)]),
            teacher=replace(teacher, hidden_NH=teacher.hidden_NH[rows][mask_RT.to(teacher.hidden_NH.device)]),
            actions_N=inputs["completion_ids"][rows][mask_RT].to(device),
            mask_RT=mask_RT.to(device),
            weight=inputs["token_weight"][rows[0]],
            q_weight=inputs["row_weight"][rows[0]],
            on_policy=self._baselines[baseline].who == "teacher",
            baseline=baseline,
            imitated=None if inputs["on_policy"][rows[0]] else self._imitated(inputs, mask_RT.to(device), rows),
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        training = self.model.training
        micro_batches = self.current_gradient_accumulation_steps if training else 1
        sums = self.accelerator.reduce(self._sums_4, reduction="sum") * micro_batches
        names = ["kl", "moment_gap", "q_abs_mean", "q_saturation"]
        used = names if self.adversary is not None else names[:1]
        self._record("train" if training else "eval", dict(zip(used, sums.tolist(), strict=False)))
        self._log_imitation(micro_batches)
        return loss

    def _record(self, mode: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._metrics[mode][f"mmpbkd/{name}"].append(value)

    # ---- Q's steps -----------------------------------------------------------------------------------------------------

    def training_step(self, *args, **kwargs):
        self._look_once()  # before the warm-up reads their states
        with self._naming_step():
            if self.adversary is not None and not self.adversary.warmed_up:
                self._record("train", self.adversary.warm_up())
            loss = super().training_step(*args, **kwargs)
            if self.adversary is not None:
                for part in self._played:
                    part.to_q(self._scale.grad)
                self._played = []
                if self.accelerator.sync_gradients:
                    self._step_adversary(self.adversary)
        return loss

    def _step_adversary(self, adversary: Adversary) -> None:
        dual = self.dual.value
        seen = adversary.step()
        if adversary.pairs is not None:
            self._record("train", {**seen, "dual": dual})
        student = self.accelerator.unwrap_model(self.model_wrapped)
        for _ in range(self.args.q_steps - 1):
            layers = output_layer(student), self.teacher.layer()
            learn_moments([kept.with_layers(*layers) for kept in self._kept], adversary.features, self._settings)
            adversary.step()
        self._kept = []
        reshard(student)

    def _read_pairs(self, batch: dict[str, torch.Tensor]) -> PairStates:
        device = self.accelerator.device
        batch = {name: value.to(device) for name, value in batch.items()}
        input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
        mask_RT = batch["completion_mask"][:, 1:].bool()
        hidden = {}
        for who, model in (("student", self.model_wrapped), ("teacher", self.teacher_model)):
            if who == "student" or any(baseline.who == who for baseline in self._baselines):
                hidden[who] = self._hidden_states(model, input_ids, attention_mask, mask_RT.size(1))[mask_RT]
        heads = {}
        with torch.no_grad():
            for who, model in (("student", self.model_wrapped), ("teacher", self.teacher_model)):
                if who in hidden:
                    states_NH = hidden[who].to(hidden["student"].device)
                    if who == "teacher":
                        heads[who] = constant(self.teacher.head(states_NH))
                    else:
                        heads[who] = constant(output_head(self.accelerator.unwrap_model(model), states_NH))
        return PairStates(
            hidden_NH=heads["student"].hidden_NH,
            baselines=[heads[baseline.who] for baseline in self._baselines],
            embedding_VE=heads["student"].weight_VH,
            actions_N=input_ids[:, 1:][mask_RT],
            row_N=torch.arange(len(input_ids), device=device).unsqueeze(1).expand(mask_RT.shape)[mask_RT],
            preference_b=batch["preference"],
        )

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.adversary is not None and self.adversary.pairs is not None and self.adversary.pairs.strict:
            seen = self.adversary.pairs.seen
            if self._held_out is None or self._held_out[0] != seen:  # one for all evaluation sets
                self._held_out = seen, self.adversary.held_out_accuracy()
            self._record("eval", {"held_out_accuracy": self._held_out[1]})
        return output

    # ---- Checkpoints and the model card --------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset=None):
        return EpochOrder(super()._get_train_sampler(dataset), lambda: int(self.state.epoch or 0))

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.adversary is not None and self.args.should_save:
            self.adversary.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.adversary is not None and checkpoint is not None:
            self.adversary.load(checkpoint)
