"""One micro-batch of pairs, as a loss with the preference term: L = w·L_imit + λ·L_DPO.

It goes forward once, through `DPOTrainer`'s own loss, and what that forward computed is reused for our terms.
"""

from collections import defaultdict
from typing import Any

import torch

from trl_kd._trl.seams import temporarily
from trl_kd.losses.dual import DualVariable
from trl_kd.losses.imitation import teacher_rows
from trl_kd.losses.preference import bradley_terry_nll, label_entropy, sequence_logps
from trl_kd.sampling.loading import keep_gradients
from trl_kd.trainers.common.teacher import Teacher
from trl_kd.trainers.pbkd.data import BATCH_KEYS, WEIGHT_KEYS, check_labels
from trl_kd.trainers.pbkd.step import CapturingForward, Window, null_rows_total


class PreferenceStep:
    """Mixin before [`~trl_kd.trainers.pbkd.imitation_term.ImitationTerm`] and `DPOTrainer`: the loss of a micro-batch, and
    what is logged of a global batch."""

    args: Any
    model: Any
    ref_model: Any
    accelerator: Any
    teacher: Teacher | None
    dual: DualVariable
    beta: float
    ld_alpha: float | None
    loss_types: list[str]
    loss_weights: list[float]
    f_divergence_type: str
    use_weighting: bool
    aux_loss_enabled: bool
    router_aux_loss_coef: float
    precompute_ref_logps: bool
    _metrics: dict[str, defaultdict[str, list[float]]]
    _total_train_tokens: float
    _streams: bool
    _window: Any
    _evaluation: list[Any] | None
    _extend_collator: Any
    _imitation: Any
    _variation: Any
    _imitation_scale: Any
    _count_imitation: Any
    _mean_imitation: Any
    _log_imitation: Any

    def _window_over(self, batches):
        return Window.over(batches, self.accelerator)

    def _window_of(self, batch):
        """The window that a micro-batch is in: that of the step under way, or of an evaluation one of its own."""
        if self.model.training and self._window is not None:
            return self._window
        return self._window_over([batch])

    def _keep_window(self, window) -> None:
        """Records what a micro-batch of an evaluation has added up: now, or with the others at its end."""
        if self.model.training:
            return
        if self._evaluation is not None:
            self._evaluation.append(window)
        else:
            self._log_window(window)

    def _compute_loss(self, model, inputs, return_outputs):
        window = self._window_of(inputs)
        inputs = dict(inputs)  # the labels must not reach the model's forward
        imitated_BT = window.imitated(inputs)
        preference_B, side_B = inputs.pop("preference"), inputs.pop("teacher_side")
        advantage_B, weight_B, compared_B = (inputs.pop(name) for name in WEIGHT_KEYS)
        inputs.pop("own_mask", None)
        known_B, preference_B = ~preference_B.isnan(), preference_B.nan_to_num(1.0)
        if self._streams:
            check_labels(self.args, soft=bool((preference_B != 1).any()), null=window.null > 0, name="streamed")

        reference, reference_2BT = self._reference_logps(inputs)
        inputs |= reference
        tokens_BT = teacher_rows(inputs["input_ids"][:, 1:], side_B)
        labels = side_B, weight_B, known_B, imitated_BT, self._variation(tokens_BT)
        forward = CapturingForward(model, self.teacher, *labels, detach=window.null > 0)
        loss, outputs = self._trl_loss(forward, inputs, return_outputs)

        mask_2BT = inputs["completion_mask"][:, 1:]
        margin_B = self._margin(sequence_logps(forward.logps_2BT, mask_2BT, self.ld_alpha), reference.values())
        preference_loss = self._preference_loss(loss, forward, inputs, margin_B, preference_B, known_B, window)
        theirs_BT = teacher_rows(forward.logps_2BT, side_B).float() * imitated_BT
        imitation = forward.divergence
        if imitation is None:
            imitation = self._imitation(theirs_BT, tokens_BT, weight_B)
        auxiliary = self._auxiliary_loss(forward.output)
        share = window.mean(imitation, self._imitation_scale(window))
        loss = self.dual.value * preference_loss + auxiliary + self.args.imitation_weight * share

        if self.ld_alpha is not None and reference_2BT is not None:  # the constraint is on the unweighted log-ratios
            with torch.no_grad():
                plain = reference_2BT.sum(1).chunk(2)
                margin_B = self._margin(forward.logps_2BT.sum(1).chunk(2), plain)
        excess_B = bradley_terry_nll(margin_B.detach(), preference_B) - label_entropy(preference_B)
        self._count_imitation(window, imitation, theirs_BT, tokens_BT, imitated_BT, advantage_B, compared_B)
        window.add(
            preference=preference_loss * (window.known / window.micro_batches),
            auxiliary=torch.as_tensor(auxiliary, device=loss.device),
            preference_nll=(excess_B * known_B).sum(),
        )
        self._keep_window(window)
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
        return super()._precompute_ref_logps(*args, **kwargs)  # type: ignore[misc]

    def compute_ref_log_probs(self, model, inputs):
        inputs = {k: v for k, v in inputs.items() if k not in BATCH_KEYS}
        return super().compute_ref_log_probs(model, inputs)  # type: ignore[misc]

    def _trl_loss(self, forward, inputs, return_outputs=False):
        """TRL's loss with the reference's log-probabilities read from `inputs`, so that they are computed once."""
        with temporarily(self, precompute_ref_logps=True):
            result = super()._compute_loss(forward, inputs, return_outputs)  # type: ignore[misc]
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
        unlogged: dict[str, Any] = {mode: defaultdict(list) for mode in self._metrics}
        with temporarily(self, _metrics=unlogged, _total_train_tokens=self._total_train_tokens):
            return null_rows_total(lambda *replayed: self._trl_loss(*replayed)[0], forward.output, inputs, known_B)

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

    def _mean_loss(self, window: Window, sums: dict[str, float]) -> float:
        """The loss of a whole window."""
        preference = sums["preference"] / max(window.known, 1)
        auxiliary = sums["auxiliary"] / window.micro_batches
        return self.dual.value * preference + auxiliary + self._mean_imitation(window, sums)

    def _log_window(self, window: Window) -> float | None:
        """Records our metrics of a global batch; returns the constraint's violation, if a preference is known."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        sums = window.reduce(self.accelerator)
        metrics["pbkd/dual"].append(self.dual.value)
        metrics["pbkd/known_preferences"].append(float(window.known))
        slack = self.dual.target + self.dual.radius
        metrics["pbkd/lagrangian"].append(self._mean_loss(window, sums) - self.dual.value * slack)
        self._log_imitation(window, sums)
        if not window.known:
            return None
        nll = sums["preference_nll"] / window.known
        violation = self.dual.violation(nll)
        metrics["pbkd/preference_nll"].append(nll)
        metrics["pbkd/violation"].append(violation)
        return violation
