"""Steps of models that the trainer's own optimizer does not know of."""

import torch
from accelerate import Accelerator

from trl_kd.trainers.common.finite import NotFinite


def descend(optimizer: torch.optim.Optimizer, accelerator: Accelerator, who: str) -> None:
    """
    A step on the sum of all processes' gradients, for a model that the accelerator does not know of.

    Raises:
        `NotFinite`: the gradient of `who` is not finite, and its loss was not scaled.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not parameters:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    flat = accelerator.reduce(flat, reduction="sum")
    finite = bool(flat.isfinite().all())
    if not finite and accelerator.mixed_precision != "fp16":
        raise NotFinite(f"the gradient of {who}")
    if finite:  # with fp16 a step overflows now and then, and is left out, as the student's is
        for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = gradient.view_as(p)
        optimizer.step()
    optimizer.zero_grad()
