"""The adversary of white-box PbKD: a Q-function, its optimizer, and the dual variable that holds it to the preferences."""

import json
import math
import os
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from safetensors.torch import load_file, save_file

from trl_kd.losses.advantages import advantages
from trl_kd.losses.dual import DualVariable
from trl_kd.losses.preference import bradley_terry_nll, label_entropy
from trl_kd.rewards.q_function import QFunction
from trl_kd.trainers.common.finite import require_finite
from trl_kd.trainers.common.held_out import LEAST_HELD_OUT
from trl_kd.trainers.common.optim import descend
from trl_kd.trainers.mm_pbkd.data import PairBatches
from trl_kd.trainers.mm_pbkd.pair_states import Baseline, PairStates, PairSums


logger = get_logger(__name__)

WEIGHTS_FILE = "q_function.safetensors"
OPTIMIZER_FILE = "q_optimizer.pt"
STATE_FILE = "q_state.json"

FIRST_LOOK = 10
"""Steps of the warm-up before the first look at the held-out pairs. The next looks come at twice as many steps each, since a
look may cost more than the steps before it."""

ADVERSARY = 0
"""Place of the adversary among the Q-functions; the maximum-likelihood twin of baseline b has place 1 + b."""


def looks_of(steps: int) -> list[int]:
    """After which steps of a warm-up of at most `steps` its accuracy is measured, the last time at its end."""
    looks, step = [], FIRST_LOOK
    while step < steps:
        looks.append(step)
        step *= 2
    return [*looks, steps]


class Adversary:
    """
    Q ascends the moment gap less λ·(NLL − NLL* − ζ), where NLL is that of the preferences under the reward that Q induces,
    and NLL* that of a maximum-likelihood twin on the same pairs (docs/method.md). It is small, whole on every process, and
    never passes through the student's accelerator: gradients are summed over the processes here.

    Args:
        q (`QFunction`):
            With one output for the adversary, and one more for each baseline's twin if there are pairs.
        dual (`DualVariable`):
            λ. A radius ζ of zero makes the twins themselves the adversary.
        baselines (`Sequence[Baseline]`):
            One of them, or both.
        pairs (`PairBatches`, *optional*):
            The preferences.
        read_pairs (`Callable`):
            Turns a micro-batch of pairs into `PairStates`.
        accelerator (`Accelerator`):
            For sums over the processes.
        args (`MMPbKDConfig`):
            Settings.
        reward_settings (`dict[str, Any]`):
            Keyword arguments of `trl_kd.losses.advantages.advantages`.
    """

    def __init__(
        self,
        q: QFunction,
        dual: DualVariable,
        baselines: Sequence[Baseline],
        pairs: PairBatches | None,
        read_pairs: Callable[[dict[str, torch.Tensor]], PairStates],
        accelerator: Accelerator,
        args: Any,
        reward_settings: dict[str, Any],
    ):
        self.q, self.dual, self.baselines, self.pairs = q, dual, list(baselines), pairs
        self._read_pairs, self._accelerator, self._args = read_pairs, accelerator, args
        self._reward_settings = reward_settings
        self.optimizer = torch.optim.Adam(q.parameter_groups(args.q_learning_rate))
        self.warmed_up = pairs is None or args.q_warmup_steps == 0
        self._follows_twins = pairs is not None and dual.radius == 0

    # ---- The moment gap ----------------------------------------------------------------------------------------------

    def features(self, hidden_NH: torch.Tensor, baseline: int) -> torch.Tensor:
        """g `[N, E]` of the Q that the student meets at states of this baseline, with the graph to Q's parameters."""
        if self._follows_twins:
            return self.q(hidden_NH, [1 + baseline])[0].detach()
        held = self.pairs is not None and self.dual.value > 0  # then the twins' likelihood alone shapes the trunk
        return self.q(hidden_NH, [ADVERSARY], train_trunk=not held)[0]

    # ---- The preferences ---------------------------------------------------------------------------------------------

    def learn_preferences(self, dual: float) -> dict[str, float]:
        """
        Adds the gradient of λ·NLL of the adversary, and of the twins' NLL, on the next batch of pairs.

        Args:
            dual (`float`):
                λ.

        Returns:
            `dict[str, float]`: what was seen on the whole batch, before any step: `preference_nll`, `preference_nll_mle`
            (nats per pair in excess of the labels' entropy), `violation`, `advantage_std` and `accuracy`.
        """
        assert self.pairs is not None
        sums: torch.Tensor | float = 0.0
        for batch in self.pairs.draw():
            states = self._read_pairs(batch)
            total, seen = torch.zeros((), device=states.hidden_NH.device), []
            for k, (_, weight) in enumerate(self.baselines):
                # With λ = 0 the preferences must not reach the adversary, not even by way of the trunk
                found = self._likelihoods(states, k, train_trunk=dual > 0 or self._follows_twins)
                total = total + (dual * weight * found.nll + found.nll_mle) / self.pairs.size
                seen.append(weight * torch.stack(found).detach())
            total.backward()
            entropy = label_entropy(states.preference_b).sum()
            so_far = PairSums(*(sums + torch.stack(seen).sum(0)))
            sums = torch.stack(so_far._replace(nll=so_far.nll - entropy, nll_mle=so_far.nll_mle - entropy))
        whole = PairSums(*self._accelerator.reduce(sums, reduction="sum").tolist())
        nll, nll_mle = whole.nll / self.pairs.size, whole.nll_mle / self.pairs.size
        require_finite(**{"mmpbkd/preference_nll": nll, "mmpbkd/preference_nll_mle": nll_mle})
        words = max(whole.words, 1)
        return {
            "preference_nll": nll,
            "preference_nll_mle": nll_mle,
            "violation": nll - nll_mle - self.dual.radius,
            "advantage_std": max(whole.advantage_squared / words - (whole.advantage / words) ** 2, 0.0) ** 0.5,
            "accuracy": whole.right / whole.strict if whole.strict else float("nan"),
        }

    def _likelihoods(self, states: PairStates, baseline: int, train_trunk: bool) -> PairSums:
        """Of a micro-batch under one baseline; the likelihoods with their graph."""
        twin = self.q(states.hidden_NH, [1 + baseline], train_trunk=train_trunk)
        held = twin.detach() if self._follows_twins else self.q(states.hidden_NH, [ADVERSARY], train_trunk=False)
        advantage_2N = advantages(
            states.baselines[baseline],
            torch.cat([held, twin]),
            states.embedding_VE,
            states.actions_N,
            **self._reward_settings,
        )
        b = len(states.preference_b)
        rewards_2R = advantage_2N.new_zeros(2, 2 * b).index_add(1, states.row_N, advantage_2N)
        margin_2b = rewards_2R[:, :b] - rewards_2R[:, b:]
        preference_b = states.preference_b.to(margin_2b.dtype)
        nll_2b = bradley_terry_nll(margin_2b, preference_b.expand_as(margin_2b))
        met = 1 if self._follows_twins else 0
        strict_b = preference_b != 0.5
        right_b = ((margin_2b[met] > 0) == (preference_b > 0.5)) & (margin_2b[met] != 0) & strict_b
        taken_N = advantage_2N[met].detach()
        return PairSums(
            nll=nll_2b[0].sum(),
            nll_mle=nll_2b[1].sum(),
            right=right_b.sum().to(nll_2b.dtype),
            strict=strict_b.sum().to(nll_2b.dtype),
            words=taken_N.new_tensor(len(taken_N)),
            advantage=taken_N.sum(),
            advantage_squared=taken_N.square().sum(),
        )

    @torch.no_grad()
    def held_out_accuracy(self) -> float:
        """Share of the strict held-out pairs that the Q which the student meets orders rightly, over all baselines."""
        assert self.pairs is not None
        sums = torch.zeros(2, device=self._accelerator.device)
        for batch in self.pairs.held_out():
            states = self._read_pairs(batch)
            for k, baseline in enumerate(self.baselines):
                found = self._likelihoods(states, k, train_trunk=False)
                sums += baseline.weight * torch.stack([found.right, found.strict]).to(sums)
        right, strict = self._accelerator.reduce(sums, reduction="sum").tolist()
        return right / strict if strict else float("nan")

    # ---- Steps -------------------------------------------------------------------------------------------------------

    def step(self, moments: bool = True) -> dict[str, float]:
        """One step of Q on the gradients that are there and on a batch of pairs, then one of λ; returns what was seen."""
        seen = {}
        if self.pairs is not None:
            seen = self.learn_preferences(self.dual.value if moments else 1.0)
        descend(self.optimizer, self._accelerator, "Q")
        moves = self.pairs is not None and moments and not self._follows_twins and math.isfinite(seen["violation"])
        if moves and self.dual.step(seen["violation"]):
            logger.warning(
                f"The dual variable has been at its cap, dual_max={self.dual.maximum}, for {self.dual.CAP_PATIENCE} steps: "
                "the preference constraint is not being met. Raise dual_max or confidence_radius, or lower moment_coef or "
                "q_learning_rate."
            )
        return seen

    def warm_up(self) -> dict[str, float]:
        """Steps on the preferences alone, until the held-out accuracy is above chance or `q_warmup_steps` are done."""
        self.warmed_up = True
        assert self.pairs is not None
        strict = self.pairs.strict
        measured = strict >= LEAST_HELD_OUT
        if not measured:
            logger.info(
                f"{strict} strict pairs are held out, which is too few to tell when Q has learnt (it takes "
                f"{LEAST_HELD_OUT}): its warm-up takes all {self._args.q_warmup_steps} steps."
            )
        looks = looks_of(self._args.q_warmup_steps)
        # They share the 5 % (Bonferroni)
        threshold = 0.5 + NormalDist().inv_cdf(1 - 0.05 / len(looks)) * 0.5 / max(strict, 1) ** 0.5
        accuracy, steps = float("nan"), 0
        for steps in range(1, looks[-1] + 1):
            self.step(moments=False)
            if measured and steps in looks:
                accuracy = self.held_out_accuracy()
                if steps == looks[0]:
                    logger.info(
                        f"After {steps} steps of its warm-up Q orders {accuracy:.1%} of {strict} held-out pairs rightly; "
                        f"above {threshold:.1%} the warm-up ends."
                    )
                if accuracy > threshold:
                    break
        logger.info(f"Q's warm-up took {steps} steps{f' and ended at {accuracy:.1%}' if measured else ''}.")
        if measured and not accuracy > threshold:
            logger.warning(
                f"After q_warmup_steps={steps} Q orders {accuracy:.1%} of {strict} held-out pairs rightly, which is not "
                "above chance: the preferences do not guide the student yet. Raise q_warmup_steps or q_learning_rate, or "
                "give more pairs."
            )
        return {"warmup_steps": float(steps)} | ({"held_out_accuracy": accuracy} if measured else {})

    # ---- Checkpoints -------------------------------------------------------------------------------------------------

    def save(self, folder: str) -> None:
        self.save_weights(folder)
        torch.save(self.optimizer.state_dict(), os.path.join(folder, OPTIMIZER_FILE))
        state = {"warmed_up": self.warmed_up, "pairs_seen": 0 if self.pairs is None else self.pairs.seen}
        with open(os.path.join(folder, STATE_FILE), "w", encoding="utf-8") as file:
            json.dump(state, file)

    def save_weights(self, folder: str) -> None:
        weights = {name: value.contiguous() for name, value in self.q.state_dict().items()}
        save_file(weights, os.path.join(folder, WEIGHTS_FILE))

    def load(self, folder: str) -> None:
        """Goes on from a checkpoint; says so if it has no Q, or one of another form."""
        path = os.path.join(folder, STATE_FILE)
        if not os.path.isfile(path):
            logger.warning(f"No {STATE_FILE} in the checkpoint: Q starts anew.")
            return
        weights = load_file(os.path.join(folder, WEIGHTS_FILE))
        shapes = {name: tuple(value.shape) for name, value in self.q.state_dict().items()}
        if {name: tuple(value.shape) for name, value in weights.items()} != shapes:
            raise ValueError(
                f"The checkpoint's Q has other layers than `q_head` = {self._args.q_head!r} gives (or its run had pairs and "
                "this one has not, or another `lmbda`): resume with the settings and data of that run."
            )
        self.q.load_state_dict(weights)
        optimizer = torch.load(os.path.join(folder, OPTIMIZER_FILE), map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(optimizer)
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
        self.warmed_up = state["warmed_up"]
        if self.pairs is not None:
            self.pairs.seen = state["pairs_seen"]
