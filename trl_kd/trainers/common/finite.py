"""Training stops at the first number that is none: a loss, a gradient, a reward or a weight of NaN or infinity."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class NotFinite(RuntimeError):
    """
    A number of the training is NaN or infinite.

    Args:
        metric (`str`):
            Which.
        value (`float`):
            What it is.
        step (`int`, *optional*):
            The optimizer step, from 1.
    """

    def __init__(self, metric: str, value: float = math.nan, step: int | None = None):
        self.metric, self.value, self.step = metric, value, step
        at = "" if step is None else f" at step {step}"
        super().__init__(
            f"Training stopped{at}: {metric} is {value}. Nothing was saved after the last checkpoint, which stays as it is: "
            "go on from it with a lower learning rate, or look for the rows, weights or rewards that are no numbers."
        )


def require_finite(**metrics: float) -> None:
    """Raises a `NotFinite` for the first that is not finite."""
    for metric, value in metrics.items():
        if not math.isfinite(value):
            raise NotFinite(f"`{metric}`", value)


class FiniteTraining:
    """Mixin before a TRL trainer: its training stops before an update by, and before a checkpoint of, what is not finite."""

    model: Any
    args: Any
    state: Any
    accelerator: Any

    @contextmanager
    def _naming_step(self) -> Iterator[None]:
        """Whatever is not finite here is said with the step that is under way."""
        step = self.state.global_step + 1
        try:
            yield
        except NotFinite as error:
            if error.step is not None:
                raise
            raise NotFinite(error.metric, error.value, step) from error
        except RuntimeError as error:
            # Broken weights cannot be sampled: torch refuses their probabilities
            if self._has_broken_weights():
                raise NotFinite("a weight of the student", step=step) from error
            raise

    def training_step(self, *args, **kwargs):
        with self._naming_step():
            loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
            broken = (~loss.detach().isfinite()).float()
            if self.accelerator.num_processes > 1:  # all processes stop together
                broken = self.accelerator.reduce(broken, reduction="sum")
            if broken.item():
                raise NotFinite("the loss", loss.item() if not loss.isfinite() else math.nan)
            return loss

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)  # type: ignore[misc]
        # In fp16 a step overflows now and then, and is left out
        if norm is not None and self.accelerator.mixed_precision != "fp16" and not math.isfinite(float(norm)):
            raise NotFinite("the gradient's norm", float(norm), self.state.global_step + 1)
        return norm

    def _save_checkpoint(self, *args, **kwargs):
        self._check_weights()
        return super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def train(self, *args, **kwargs):
        output = super().train(*args, **kwargs)  # type: ignore[misc]
        self._check_weights()
        return output

    def _check_weights(self) -> None:
        broken = torch.tensor(float(self._has_broken_weights()), device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            broken = self.accelerator.reduce(broken, reduction="sum")
        if broken.item():
            raise NotFinite("a weight of the student", step=self.state.global_step)

    @torch.no_grad()
    def _has_broken_weights(self) -> bool:
        """Whether some weight that is trained is not finite, of those that this process holds."""
        trained = [getattr(p, "ds_tensor", p) for p in self.model.parameters() if p.requires_grad]
        local = [p.to_local() if hasattr(p, "to_local") else p for p in trained]
        seen = [p.isfinite().all() for p in local if p.is_floating_point() and p.numel()]
        return bool(seen) and not torch.stack([flag.to(seen[0].device) for flag in seen]).all().item()
