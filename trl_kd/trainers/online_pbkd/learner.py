"""The reward model's side of `OnlinePbKDTrainer`: what it learns from preferences and batches, and when it is fit to be
climbed."""

import json
import math
import os
from array import array
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from datasets import Dataset
from tqdm.auto import tqdm

from trl_kd.losses.dual import DualVariable, theory_radius
from trl_kd.losses.preference import bradley_terry_nll, label_entropy
from trl_kd.pairs.prompts import read_prompts
from trl_kd.preferences.tokens import encode_answer
from trl_kd.rewards.reward_model import ADVERSARY, MLE, RewardModel
from trl_kd.sampling import Text
from trl_kd.trainers.common.finite import require_finite
from trl_kd.trainers.common.held_out import LEAST_HELD_OUT, MOST_HELD_OUT
from trl_kd.trainers.common.optim import descend
from trl_kd.trainers.online_pbkd.config import OnlinePbKDConfig
from trl_kd.trainers.online_pbkd.pool import PairPool


logger = get_logger(__name__)

CHECK_EVERY = 10
SETTINGS = ("adversary", "reward_bound")
"""Settings of which a resumed run says that they have changed; λ's are told beside λ."""
OPTIMIZER_FILE, STATE_FILE, PAIRS = "reward_optimizer.pt", "reward_state.json", "pairs"


class WarmUpFailed(RuntimeError):
    """The reward model is not fit to be climbed."""


def check_held_out(pool: PairPool, prompts: Any, args: OnlinePbKDConfig) -> int | None:
    """
    Args:
        pool (`PairPool`):
            D at the start.
        prompts (`Dataset` or `IterableDataset`, *optional*):
            Those that the student answers for the warm-up. `None`: D stays.
        args (`OnlinePbKDConfig`):
            Settings.

    Returns:
        `int`, *optional*: how many strict held-out pairs there will be when all prompts have been answered, at most; `None`
        where that is not known, of a stream.

    Raises:
        `ValueError`: too few to tell when the warm-up ends.
    """
    most = len(pool.strict)
    if isinstance(prompts, Dataset):
        each = args.num_generations * args.rm_warmup_epochs
        for rows in read_prompts(prompts.select_columns(["prompt"])):
            most += each * sum(pool.holds_out(row.prompt) for row in rows)
            if most >= MOST_HELD_OUT:
                break
    elif prompts is not None:
        return None
    if most < LEAST_HELD_OUT:
        raise ValueError(
            f"`rm_held_out` is {args.rm_held_out}, which holds out {'' if prompts is None else 'at most '}{most} pairs that "
            f"are no ties, and the warm-up needs {LEAST_HELD_OUT} of them to tell whether the reward model has learnt: give "
            "more prompts or pairs, raise it, or do without the check by `rm_warmup_accuracy=0`."
        )
    return min(most, MOST_HELD_OUT)


class RewardLearner:
    """
    Args:
        model (`RewardModel`):
            Both heads; a copy on each process.
        pool (`PairPool`):
            D, the same on each process.
        dual (`DualVariable`):
            λ.
        tokenizer (`PreTrainedTokenizerBase`):
            The reward model's.
        accelerator (`Accelerator`):
            For sums over the processes.
        args (`OnlinePbKDConfig`):
            Settings.

    Attributes:
        head (`int`):
            The head that the student climbs.
    """

    def __init__(
        self,
        model: RewardModel,
        pool: PairPool,
        dual: DualVariable,
        tokenizer: Any,
        accelerator: Accelerator,
        args: OnlinePbKDConfig,
    ):
        self.model, self.pool, self.dual, self.tokenizer = model, pool, dual, tokenizer
        self._accelerator, self._args = accelerator, args
        self.head = MLE if args.follows_mle else ADVERSARY
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=args.rm_learning_rate)
        self.warmed_up = not args.warms_up
        self._encoded: dict[int, tuple[array, ...]] = {}  # by place in D

    @property
    def holds_out(self) -> bool:
        """Whether there are pairs to measure accuracy on: a discriminator learns from all prompts."""
        return self._args.uses_preferences and bool(self.pool.strict)

    # ---- Texts as rewards ------------------------------------------------------------------------------------------------

    def encode(self, prompt: Text, response: Text, finish_reason: str | None) -> list[int]:
        """Tokens of prompt and response, without an end token behind one that was cut off. A row that is too long loses the
        beginning of its prompt, but for its first token, which may open every row."""
        template: Any = self._args.chat_template_kwargs
        encoded = encode_answer(self.tokenizer, prompt, response, finish_reason, template, self._args.reasoning)
        row, limit = encoded.prompt_ids + encoded.ids, self._args.rm_max_length
        if limit is not None and len(row) > limit:
            opening = row[:1] if row[0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id) else []
            row = opening + row[len(row) - limit + len(opening) :]
        return row

    @torch.no_grad()
    def score(self, rows: list[list[int]]) -> torch.Tensor:
        """Rewards `[rows]` of the head that the student climbs."""
        parts = [self._rewards(chunk)[:, self.head] for chunk in self._chunks(rows, 2)]
        return torch.cat(parts) if parts else torch.zeros(0, device=self._accelerator.device)

    def _rewards(self, rows: list) -> torch.Tensor:
        """Both heads', the backbone in bfloat16 where the student's is. (float16 would need a scaled loss.)"""
        with self._accelerator.autocast() if self._args.bf16 else nullcontext():
            return self.model(rows)

    def _chunks(self, rows: list, factor: int) -> Iterator[list]:
        size = factor * self._args.per_device_train_batch_size
        return (rows[start : start + size] for start in range(0, len(rows), size))

    def _mine(self, rows: list) -> list:
        return rows[self._accelerator.process_index :: self._accelerator.num_processes]

    def _encode_pairs(self, places: list[int]) -> list[array]:
        """Chosen responses of D, then rejected ones. A pair is drawn many times, and tokenised once."""
        for place in places:
            if place not in self._encoded:
                pair = self.pool.rows[place]
                self._encoded[place] = tuple(
                    array("i", self.encode(pair["prompt"], pair[side], pair[f"{side}_finish_reason"]))
                    for side in ("chosen", "rejected")
                )
        return [self._encoded[place][side] for side in (0, 1) for place in places]

    # ---- Steps -----------------------------------------------------------------------------------------------------------

    def step(self, teacher: list[list[int]], student: list[list[int]], moves: bool = True) -> dict[str, float]:
        """
        One step of both heads on a batch of D, and of the adversarial one on the gap; then one of λ.

        Args:
            teacher, student (`list[list[int]]`):
                Encoded responses to the prompts of the newest batch, over all processes.
            moves (`bool`, *optional*, defaults to `True`):
                Whether the adversarial head and λ move. Otherwise the other one learns the preferences alone.

        Returns:
            `dict[str, float]`: `rm_nll_mle`, `rm_nll_adv` (nats per pair in excess of the labels' entropy), `rm_accuracy`,
            `violation`, as seen before the step.
        """
        args = self._args
        pairs: list[int] = []
        if args.uses_preferences:
            size = args.rm_batch_size or args.generation_batch_size
            pairs = self.pool.draw(size, args.rm_fresh_share)  # type: ignore[arg-type]
        lambda_ = self.dual.value if moves else 0.0
        self.model.heads.adversary_trains_trunk = lambda_ == 0 or not pairs  # nothing else does, then
        seen = self._learn_pairs(pairs, lambda_) if pairs else {}
        if moves and self.head == ADVERSARY and teacher and student:
            for rows, sign in ((teacher, -1.0), (student, 1.0)):
                for chunk in self._chunks(self._mine(rows), 2):
                    (sign / len(rows) * self._rewards(chunk)[:, ADVERSARY].sum()).backward()
        for p in self.optimizer.param_groups[0]["params"]:  # a process without a row takes part
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        descend(self.optimizer, self._accelerator, "the reward model")
        violation = seen.get("violation", math.nan)
        if moves and self.head == ADVERSARY and math.isfinite(violation) and self.dual.step(violation):
            logger.warning(
                f"The dual variable has been at its cap, dual_max={self.dual.maximum}, for {self.dual.CAP_PATIENCE} steps: "
                "the preference constraint is not being met. Raise dual_max or confidence_radius."
            )
        return seen

    def _learn_pairs(self, pairs: list[int], lambda_: float) -> dict[str, float]:
        """Adds the gradient of NLL of the one head and λ·NLL of the other."""
        device = self._accelerator.device
        sums_5 = torch.zeros(5, device=device)
        for chunk in self._chunks(self._mine(pairs), 1):
            preferences = [self.pool.rows[place]["preference"] for place in chunk]
            preference_b = torch.tensor(preferences, device=device, dtype=torch.float32)
            chosen_b2, rejected_b2 = self._rewards(self._encode_pairs(chunk)).chunk(2)
            margin_2b = (chosen_b2 - rejected_b2).T
            nll_2b = bradley_terry_nll(margin_2b, preference_b)
            weight = lambda_ if self.head == ADVERSARY else 0.0
            ((nll_2b[MLE] + weight * nll_2b[ADVERSARY]).sum() / len(pairs)).backward()
            strict_b = preference_b != 0.5
            met_b = margin_2b[self.head].detach()
            right_b = strict_b & (met_b != 0) & ((met_b > 0) == (preference_b > 0.5))
            nll_2 = nll_2b.detach().sum(1)
            sums_5 += torch.stack([*nll_2, label_entropy(preference_b).sum(), right_b.sum(), strict_b.sum()])
        mle, adversary, entropy, right, strict = self._accelerator.reduce(sums_5, reduction="sum").tolist()
        mle, adversary = (mle - entropy) / len(pairs), (adversary - entropy) / len(pairs)
        require_finite(**{"pbkd/rm_nll_mle": mle, "pbkd/rm_nll_adv": adversary})
        seen = {"rm_nll_mle": mle, "rm_accuracy": right / strict if strict else math.nan}
        if self.head == ADVERSARY:
            radius = self.dual.radius
            if self._args.confidence_radius == "theory":  # D has grown
                radius = theory_radius(
                    len(self.pool.train), self._args.confidence_constant, self._args.confidence_delta
                )
            seen |= {"rm_nll_adv": adversary, "violation": adversary - mle - radius}
        return seen

    @torch.no_grad()
    def held_out_accuracy(self, most: int = MOST_HELD_OUT) -> float:
        """Share of the strict held-out pairs, of the `most` newest ones, that are ordered rightly by the head which the
        student climbs, or in the warm-up by the one that learns; NaN if there is none."""
        head = self.head if self.warmed_up else MLE
        sums_2 = torch.zeros(2, device=self._accelerator.device)
        for chunk in self._chunks(self._mine(self.pool.strict[-most:]), 1):
            chosen_b, rejected_b = self._rewards(self._encode_pairs(chunk))[:, head].chunk(2)
            first_b = torch.tensor(
                [self.pool.rows[place]["preference"] > 0.5 for place in chunk], device=chosen_b.device
            )
            right_b = ((chosen_b > rejected_b) == first_b) & (chosen_b != rejected_b)
            sums_2 += torch.stack([right_b.sum(), torch.tensor(len(chunk), device=chosen_b.device)])
        right, count = self._accelerator.reduce(sums_2, reduction="sum").tolist()
        return right / count if count else math.nan

    # ---- Warm-up ---------------------------------------------------------------------------------------------------------

    def warm_up(self, grow: Callable[[], bool] | None) -> dict[str, float]:
        """
        Steps on the preferences alone, until the held-out accuracy is `rm_warmup_accuracy` at two looks in a row: one alone
        may be luck, for there are many. The adversarial head begins as the other one then is, within the confidence set. The
        main process shows a bar.

        Args:
            grow (`Callable`, *optional*):
                Adds a batch of pairs to D, as before every `rm_steps` steps of the training, and says whether there were
                prompts left. `None`: D is given and stays.

        Raises:
            `WarmUpFailed`: there are too few pairs to tell, after `rm_warmup_steps` or when no prompt is left, or the
                accuracy is not reached in `rm_warmup_steps`.
        """
        args, left = self._args, True
        accuracies: list[float] = []  # at each look
        hidden = args.disable_tqdm or not self._accelerator.is_main_process
        with tqdm(total=args.rm_warmup_steps, desc="Warm-up", leave=False, dynamic_ncols=True, disable=hidden) as bar:
            for steps in range(args.rm_warmup_steps + 1):  # it may have learnt already
                last = steps == args.rm_warmup_steps
                if len(self.pool.strict) < LEAST_HELD_OUT:
                    bar.set_postfix_str(f"{len(self.pool.strict)} of {LEAST_HELD_OUT} held-out pairs", refresh=False)
                elif steps % CHECK_EVERY == 0 or last:
                    accuracies.append(self.held_out_accuracy())
                    bar.set_postfix_str(f"held-out accuracy {accuracies[-1]:.1%}")
                if last or self._has_learnt(accuracies):
                    break
                if grow is not None and steps % args.rm_steps == 0:
                    left = grow()
                if not left and len(self.pool.strict) < LEAST_HELD_OUT:
                    break
                if self.pool.train:
                    self.step([], [], moves=False)
                bar.update()
        self._check_warm_up(accuracies, left)
        self.model.heads.adversary.load_state_dict(self.model.heads.mle.state_dict())
        for p in self.model.heads.adversary.parameters():
            self.optimizer.state.pop(p, None)  # Adam would take as many zeros for its gradients' scale
        self.warmed_up = True
        return {"warmup_steps": float(steps), "rm_held_out_accuracy": accuracies[-1]}

    def _has_learnt(self, accuracies: list[float]) -> bool:
        return len(accuracies) > 1 and min(accuracies[-2:]) >= self._args.rm_warmup_accuracy

    def _check_warm_up(self, accuracies: list[float], left: bool) -> None:
        """Raises a `WarmUpFailed` after looks of such accuracies, and with prompts left or not."""
        args, strict = self._args, len(self.pool.strict)
        if strict < LEAST_HELD_OUT:
            after = f"`rm_warmup_steps` = {args.rm_warmup_steps}" if left else "all prompts have been answered"
            fix = "Raise `rm_warmup_steps` or the batch, or" if left else "Give more prompts or pairs,"
            raise WarmUpFailed(
                f"After {after} there are {len(self.pool)} pairs, of which {strict} are held out and no ties: it "
                f"takes {LEAST_HELD_OUT} to tell whether the reward model has learnt what they say, and a student that "
                f"climbs one which has not is destroyed. {fix} raise `rm_held_out` = {args.rm_held_out}, or do without "
                "the check by `rm_warmup_accuracy=0`."
            )
        if not self._has_learnt(accuracies):
            looks = " and ".join(f"{accuracy:.1%}" for accuracy in accuracies[-2:])
            raise WarmUpFailed(
                f"After `rm_warmup_steps` = {args.rm_warmup_steps} the reward model orders {looks} of {strict} held-out "
                f"pairs rightly at its last looks, and `rm_warmup_accuracy` is {args.rm_warmup_accuracy}, at two in a row: "
                "a student that climbs such a reward is destroyed. Start from a stronger `reward_model`, try another "
                "`rm_learning_rate` (often a smaller one), give more pairs (`rm_warmup_epochs`) or steps, or set the "
                "accuracy that you are content with."
            )

    # ---- Checkpoints -----------------------------------------------------------------------------------------------------

    def save_for_use(self, folder: str) -> None:
        """The reward model as a sequence-classification checkpoint, and D."""
        self.model.save_pretrained(os.path.join(folder, "reward_model"), self.head)
        self.tokenizer.save_pretrained(os.path.join(folder, "reward_model"))
        self.pool.save(Path(folder) / PAIRS)

    def save(self, folder: str) -> None:
        """What else goes on in a resumed run."""
        self.model.save_weights(folder)
        torch.save(self.optimizer.state_dict(), os.path.join(folder, OPTIMIZER_FILE))
        settings = {name: getattr(self._args, name) for name in SETTINGS}
        state = {"settings": settings, "warmed_up": self.warmed_up, "pool": self.pool.state_dict()}
        with open(os.path.join(folder, STATE_FILE), "w", encoding="utf-8") as file:
            json.dump(state, file)

    def load(self, folder: str) -> None:
        """
        Goes on from a checkpoint; says so if it has no reward model, or if it was climbed by other [`SETTINGS`].

        Raises:
            `ValueError`: it is of another reward model, or held out another share of the prompts.
        """
        path = os.path.join(folder, STATE_FILE)
        if not os.path.isfile(path):
            logger.warning(f"No {STATE_FILE} in the checkpoint: the reward model starts anew.")
            return
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
        self.pool.load(Path(folder) / PAIRS, state["pool"])
        for name, then in state["settings"].items():
            now = getattr(self._args, name)
            if now != then:
                logger.warning(f"`{name}` was {then!r} in the checkpoint and is now {now!r}.")
        self.model.load_weights(folder)
        optimizer = torch.load(os.path.join(folder, OPTIMIZER_FILE), map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(optimizer)
        self.warmed_up = state["warmed_up"]
        self._encoded.clear()
