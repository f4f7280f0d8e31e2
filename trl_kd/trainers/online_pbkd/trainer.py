"""`OnlinePbKDTrainer`: online preference-based knowledge distillation as a drop-in `RLOOTrainer`.

It reads as follows. TRL samples the student's answers and asks for their rewards; there the teacher answers too, a
preference function says who is better, D grows, the reward model (`reward_learner`) takes its steps, and its rewards are
what TRL goes on with. Imitation of the teacher's answers rides in the policy's own forward.
"""

import itertools
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object, send_to_device, set_seed
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl import RLOOConfig, RLOOTrainer
from trl.trainer.rloo_trainer import RewardFunc

from trl_kd._trl.seams import check_seams
from trl_kd.losses.dual import DualVariable
from trl_kd.preferences import Preference
from trl_kd.sampling import Answer, Sampler
from trl_kd.sampling.loading import keep_gradients
from trl_kd.trainers.common.card import PAPER
from trl_kd.trainers.common.config_checks import as_config, settle_end_token
from trl_kd.trainers.common.dual import DualCheckpoints, make_dual
from trl_kd.trainers.common.finite import FiniteTraining, require_finite
from trl_kd.trainers.common.pair_rows import each_dataset
from trl_kd.trainers.common.prompts import EpochOrder
from trl_kd.trainers.common.student_head import FusedStudent, check_student, check_student_tokens
from trl_kd.trainers.online_pbkd.asking import PromptGroup, fill_groups, group_rows, leave_out_unreadable
from trl_kd.trainers.online_pbkd.card import add_online_sections
from trl_kd.trainers.online_pbkd.checks import check_parts, check_student_template
from trl_kd.trainers.online_pbkd.config import OnlinePbKDConfig
from trl_kd.trainers.online_pbkd.data import OnlineParts, reward_columns
from trl_kd.trainers.online_pbkd.imitation import ImitationRows
from trl_kd.trainers.online_pbkd.learner import PAIRS, RewardLearner, WarmUpFailed, check_held_out
from trl_kd.trainers.online_pbkd.loading import check_reward_model, load_reward_model
from trl_kd.trainers.online_pbkd.pool import PairPool
from trl_kd.trainers.online_pbkd.watch import HackingWatch


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig


logger = get_logger(__name__)

check_seams(RLOOTrainer)

LOGGED_HELD_OUT = 100
"""The newest strict held-out pairs whose accuracy is logged in training: all of them would cost too much."""
COMPANIONS = "_online"
"""Folder of what belongs to a run beside the student. Uploads of a model leave out names that begin so, those of whole
checkpoints do not."""


class OnlinePbKDTrainer(DualCheckpoints, ImitationRows, FusedStudent, FiniteTraining, RLOOTrainer):
    """
    Trainer for online preference-based knowledge distillation, from [Online Knowledge Distillation with Reward
    Guidance](https://huggingface.co/papers/2505.18952): a reward model looks for the gap between student and teacher, within
    what growing preferences allow, and the student climbs it.

    It takes what [`~trl.RLOOTrainer`] takes, and does what it does: with `adversary="off"` it *is* that trainer.

    Example:

    ```python
    from datasets import load_dataset
    from trl_kd import OnlinePbKDTrainer
    from trl_kd.preferences.reward_model import RewardModelPreference
    from trl_kd.sampling.local import LocalSampler

    trainer = OnlinePbKDTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        teacher=LocalSampler("Qwen/Qwen2.5-7B-Instruct"),
        preference_function=RewardModelPreference("Skywork/Skywork-Reward-V2-Qwen3-0.6B"),
        train_dataset=load_dataset("trl-lib/ultrafeedback-prompt", split="train"),
    )
    trainer.train()
    ```

    Args:
        model, reward_funcs, args, train_dataset, eval_dataset, processing_class, reward_processing_classes, callbacks, \
optimizers, quantization_config, peft_config:
            As in [`~trl.RLOOTrainer`]. `args` is an [`OnlinePbKDConfig`]; a plain [`~trl.RLOOConfig`] keeps its `beta` and
            gets our other defaults. Rewards of `reward_funcs`, by default none, are added to the reward model's, which comes
            last in `reward_weights`, and whose tokenizer may be last in `reward_processing_classes`, one more than there are
            reward functions; by default it is that of the reward model's checkpoint.
        teacher ([`~trl_kd.sampling.Sampler`], *optional*, keyword only):
            Who answers for the teacher. By default the column `args.teacher_column` of the rows does.
        preference_function ([`~trl_kd.preferences.Preference`], *optional*, keyword only):
            Who says which of two answers is better; each comparison is asked for once. Without it D is `preference_dataset`
            and does not grow.
        preference_dataset ([`~datasets.Dataset`], *optional*, keyword only):
            Pairs in TRL's preference format, with which D begins.
        reward_model (`str` or [`~transformers.PreTrainedModel`], *optional*, keyword only):
            What the reward model starts from: a sequence-classification checkpoint of one label, a causal language model's
            by its name, such as a local teacher's, or a model in memory, which is changed. By default the student.

    Attributes:
        learner ([`~trl_kd.trainers.online_pbkd.learner.RewardLearner`], *optional*):
            The reward model with D, its optimizer and λ; `None` for `adversary="off"`.
        dual ([`~trl_kd.losses.dual.DualVariable`]):
            λ and its history.
        card_results (`dict[str, float | str]`):
            Results to show in the model card; fill it before `create_model_card`.

    Raises:
        `ValueError`: data, parts or settings that do not fit together, before any weight is loaded.
        `trl_kd.trainers.online_pbkd.learner.WarmUpFailed`: in `train`, a reward model that is not fit to be climbed.
    """

    _tag_names = ["trl", "rloo", "trl-kd", "online-pbkd", "knowledge-distillation"]
    _name = "Online PbKD"
    _paper = PAPER
    _add_card_sections = staticmethod(add_online_sections)

    _metrics: dict[str, defaultdict[str, list[float]]]

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: RewardFunc | list[RewardFunc] | None = None,
        args: RLOOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        *,
        teacher: Sampler | None = None,
        preference_function: Preference | None = None,
        preference_dataset: Dataset | None = None,
        reward_model: str | PreTrainedModel | None = None,
    ):
        # `steps_per_generation` follows from it, and only one of the two may be given
        args = as_config(args, model, OnlinePbKDConfig, "OnlinePbKD", generation_batch_size=None)
        self.card_results: dict[str, float | str] = {}
        reward_funcs = (
            [] if reward_funcs is None else reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        )
        parts = OnlineParts(args, teacher, preference_function, preference_dataset, reward_model)
        check_parts(parts, reward_funcs, train_dataset, "train")
        embeddings = check_student(model, args)
        each_dataset(eval_dataset, lambda dataset, name: check_parts(parts, reward_funcs, dataset, name))
        processing_class = check_student_template(model, processing_class, train_dataset, args)
        check_student_tokens(model, getattr(processing_class, "tokenizer", processing_class), embeddings)
        train_dataset = parts.look_at_answers(train_dataset, processing_class)
        functions, classes, tokenizer = reward_columns(args, reward_funcs, reward_processing_classes)
        rows = {"train dataset": train_dataset, "`preference_dataset`": preference_dataset}
        tokenizer = check_reward_model(reward_model, tokenizer, rows, args)
        pool = PairPool(args.rm_held_out, args.seed)
        pool.add(parts.given_pairs(tokenizer or processing_class, train_dataset))
        if args.warms_up:
            check_held_out(pool, None if parts.preference is None else train_dataset, args)

        super().__init__(
            model=model,
            reward_funcs=functions,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        keep_gradients(self.model)
        settle_end_token(self.processing_class, self.model, args.eos_token, next(iter(train_dataset or []), None))
        self._check_student(model)
        self.parts = parts
        self._asker = parts.asker(os.path.join(args.output_dir, COMPANIONS), self.accelerator)
        self._watch = HackingWatch()
        self._groups: list[PromptGroup] = []
        self._looked = False
        self.dual = DualVariable(value=0.0, maximum=0.0)
        self.learner: RewardLearner | None = None
        if args.adversary != "off":
            self.dual = make_dual(args, max(len(pool.train), 1))
            tokenizer = self._tokenizer if tokenizer is None else tokenizer
            reward = load_reward_model(reward_model, tokenizer, self.model, args)
            self.learner = RewardLearner(
                reward.to(self.accelerator.device), pool, self.dual, tokenizer, self.accelerator, args
            )
        set_seed(args.seed, device_specific=True)  # as TRL left it, whatever making the reward model has drawn

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        column = self.args.teacher_column
        ours = (column, f"{column}_finish_reason")
        self._signature_columns += [c for c in ours if c not in self._signature_columns]

    # ---- One generation batch --------------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        if rewards.isinf().any():  # NaN says that a function gives no reward to this answer
            place = rewards.isinf().any(0).nonzero()[0].item()
            require_finite(**{f"rewards/{self.reward_func_names[place]}": math.inf})
        if not self.parts.asks:
            return rewards
        mode = "train" if self.model.training else "eval"
        groups = self._ask(inputs, prompts, completions, completion_ids_list)
        count, rank = len(prompts) * self.accelerator.num_processes, self.accelerator.process_index
        mine = slice(rank * len(prompts), (rank + 1) * len(prompts))
        texts: list[Any] = [None] * count
        for group in groups:
            for place in group.places:
                text = group.teacher.text
                texts[place] = text if text is None or isinstance(text, str) else text[-1].get("content")
        self._log_completion_extra("teacher", texts[mine])
        wins = [win for group in groups for win in group.wins]
        if wins:
            self._record(mode, {"teacher_win_rate": sum(wins) / len(wins)})
        self._groups = groups if mode == "train" else []
        if mode == "train" and not self._looked:
            self._looked = True
            self.parts.warn_of_nothing(groups, wins, self.learner.pool.train if self.learner else [])
        if self.learner is None:
            return rewards
        encoded = self._encode(groups, count)
        answered = [group for group in groups if group.teacher.text is not None]
        theirs = [self._encode_teacher(group) for group in answered]
        if mode == "train":
            self._update_reward_model(self.learner, answered, theirs, encoded)
        rewards[:, -1] = self.accelerator.gather(self.learner.score(encoded[mine]))
        require_finite(**{f"rewards/{self.reward_func_names[-1]}": rewards[:, -1].sum().item()})
        if theirs:
            world, places = self.accelerator.num_processes, [place for group in answered for place in group.places]
            total = self.accelerator.reduce(self.learner.score(theirs[rank::world]).sum(), reduction="sum")
            self._record(mode, {"imitation_gap": (total / len(theirs) - rewards[places, -1].mean()).item()})
        return rewards

    def _ask(self, inputs, prompts, completions, completion_ids_list) -> list[PromptGroup]:
        """The batch of all processes by prompts, with the teacher's answers and the pairs that they make: the same on all
        processes, of which one asks."""
        complete = [bool(ids) and ids[-1] in self.eos_token_ids for ids in completion_ids_list]
        answers = [
            Answer(completion, "stop" if ended else "length")
            for completion, ended in zip(completions, complete, strict=True)
        ]
        rows = gather_object([(row, answer) for row, answer in zip(inputs, answers, strict=True)])
        groups = group_rows(rows)
        error = None
        if self._asker is not None:
            try:
                fill_groups(groups, self._asker)
                leave_out_unreadable(groups, self._readers(), self.args)
            except Exception as failed:  # whatever it is, nobody must wait for it
                error = failed
            if not self.is_in_train:
                self._asker.close()
        if self.accelerator.num_processes > 1:
            groups, said = broadcast_object_list([groups, None if error is None else str(error)])
            if error is None and said is not None:
                raise RuntimeError(f"The main process could not ask teacher or preference function: {said}")
        if error is not None:
            raise error
        return groups

    def _readers(self) -> list[Any]:
        """Tokenizers that must be able to render the teacher's answers."""
        readers = [self._tokenizer] if self.args.imitates else []
        return readers + ([] if self.learner is None else [self.learner.tokenizer])

    def _encode_teacher(self, group: PromptGroup) -> list[int]:
        assert self.learner is not None
        assert group.teacher.text is not None
        return self.learner.encode(group.row.prompt, group.teacher.text, group.teacher.finish_reason)

    def _encode(self, groups: list[PromptGroup], count: int) -> list[list[int]]:
        """The student's answers for the reward model, in the order of the batch."""
        assert self.learner is not None
        encoded: list[list[int]] = [[] for _ in range(count)]
        for group in groups:
            for place, answer in zip(group.places, group.student, strict=True):
                assert answer.text is not None
                encoded[place] = self.learner.encode(group.row.prompt, answer.text, answer.finish_reason)
        return encoded

    def _update_reward_model(self, learner: RewardLearner, answered: list[PromptGroup], theirs, encoded) -> None:
        learner.pool.add([pair for group in answered for pair in group.pairs])
        held_out = learner.pool.holds_out if self.args.uses_preferences else lambda prompt: False
        learnt = [pair for pair in zip(answered, theirs, strict=True) if not held_out(pair[0].row.prompt)]
        ours = [encoded[place] for group, _ in learnt for place in group.places]
        for _ in range(self.args.rm_steps):
            dual = self.dual.value
            seen = learner.step([row for _, row in learnt], ours)
            self._record("train", seen | ({"dual": dual} if "violation" in seen else {}))
        self._record("train", {"dataset_size": float(len(learner.pool))})

    def _record(self, mode: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._metrics[mode][f"pbkd/{name}"].append(value)

    # ---- Training and evaluation -----------------------------------------------------------------------------------------

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._asker is not None:
                self._asker.close()

    def training_step(self, *args, **kwargs):
        self._look_once()  # before the warm-up samples the student
        with self._naming_step():
            if self.learner is not None and not self.learner.warmed_up:
                self._warm_up(self.learner)
            return super().training_step(*args, **kwargs)

    def _warm_up(self, learner: RewardLearner) -> None:
        self.model.train()  # or its answers would count as an evaluation's
        if self.parts.preference is None:
            seen = learner.warm_up(None)
        else:
            prompts: Any = self.get_train_dataloader()
            try:
                seen = learner.warm_up(partial(self._grow, learner, self._batches(prompts)))
            except WarmUpFailed:
                if self.args.should_save:
                    learner.pool.save(Path(self.args.output_dir, COMPANIONS, PAIRS))
                raise
            finally:
                prompts.end()  # it may be half read, and would stay what accelerate counts by
        self._metrics["train"].clear()  # its answers are no step's
        if self.is_world_process_zero():
            tqdm.write(
                f"The reward model is ready after {seen['warmup_steps']:.0f} steps on {len(learner.pool)} pairs: it "
                f"orders {seen['rm_held_out_accuracy']:.1%} of the held-out ones rightly."
            )
        self._record("train", {"warmup_steps": seen["warmup_steps"]})

    def _batches(self, prompts: Iterable[list[dict[str, Any]]]) -> Iterator[list[dict[str, Any]]]:
        """The generation batches of the warm-up's epochs, without TRL's repetitions."""
        for _ in range(self.args.rm_warmup_epochs):
            yield from itertools.islice(prompts, 0, None, self.num_iterations * self.args.steps_per_generation)

    def _grow(self, learner: RewardLearner, batches: Iterator[list[dict[str, Any]]]) -> bool:
        """The student answers the next prompts, without learning from it, and D grows, until all have been answered as
        often as they are to be; returns whether there were some left."""
        inputs = next(batches, None)
        if inputs is None:
            learner.pool.add([])  # nothing is fresh any more
            return False
        prompts = [row["prompt"] for row in inputs]
        _, completion_ids, completions = self._generate(prompts)
        groups = self._ask(inputs, prompts, completions, completion_ids)
        learner.pool.add([pair for group in groups for pair in group.pairs])
        return True

    def log(self, logs, start_time=None):
        if self.learner is not None and self.learner.holds_out and self.model.training and self._metrics["train"]:
            self._record("train", {"rm_held_out_accuracy": self.learner.held_out_accuracy(LOGGED_HELD_OUT)})
        super().log(logs, start_time)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if not metric_key_prefix.startswith("eval"):
            self._metrics["eval"].clear()  # of `predict`, which logs nothing: the next evaluation would
        elif self.learner is not None:
            if self.learner.holds_out:
                self._record("eval", {"rm_held_out_accuracy": self.learner.held_out_accuracy()})
            rewards = self._metrics["eval"].get(f"rewards/{self.reward_func_names[-1]}/mean")
            losses = self._metrics["eval"].get("pbkd/teacher_win_rate")
            if rewards and losses:
                self._watch.look(metric_key_prefix, sum(rewards) / len(rewards), 1 - sum(losses) / len(losses))
        return output

    # ---- Checkpoints -----------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset=None):
        return EpochOrder(super()._get_train_sampler(dataset), lambda: int(self.state.epoch or 0))

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.learner is not None and self.args.should_save:  # newer transformers call this on every process
            self.learner.save_for_use(os.path.join(output_dir or self.args.output_dir, COMPANIONS))

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.learner is not None and self.args.should_save:
            self.learner.save(os.path.join(output_dir, COMPANIONS))

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        state = {"step": self._step, "buffer": self._buffered_inputs, "watch": vars(self._watch)}
        torch.save(state, os.path.join(output_dir, self._buffer_file()))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self.learner is not None:
            self.learner.load(os.path.join(checkpoint, COMPANIONS))
        path = os.path.join(checkpoint, self._buffer_file())
        if not os.path.isfile(path):
            logger.warning(f"No {self._buffer_file()} in the checkpoint: the student answers anew where it stopped.")
            return
        # By itself `load` does not know a device such as DDP's 'cpu:0'
        state = send_to_device(torch.load(path, map_location="cpu", weights_only=True), self.accelerator.device)
        self._step, self._buffered_inputs = state["step"], self._read_buffer(state["buffer"])
        vars(self._watch).update(state["watch"])

    def _buffer_file(self) -> str:
        return f"generation_buffer_{self.accelerator.process_index}.pt"
