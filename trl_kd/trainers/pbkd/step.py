"""What one optimizer step of `PbKDTrainer` needs beside TRL's loss: counts over its global batch, and one forward kept."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any, Self

import torch
from accelerate import Accelerator

from trl_kd.losses.imitation import NO_TEACHER, teacher_rows
from trl_kd.trainers.common.teacher import Teacher


@dataclass
class GlobalBatch:
    """
    The global batch of one optimizer step (ranks × accumulation), or one batch of an evaluation: its counts, known before
    its first micro-batch, and the sums that its micro-batches add up.

    Our normalisers are these counts, so that 2 ranks × 1 micro-batch equal 1 × 2, however the rows are spread. Since
    `Trainer` averages over ranks and micro-batches what each returns, a micro-batch returns its sum × their number / count.

    A subclass has further counts, of which `of_micro_batch` says what one micro-batch adds.
    """

    micro_batches: int
    sums: dict[str, torch.Tensor] = field(default_factory=dict, init=False)

    @classmethod
    def of_micro_batch(cls, batch: Mapping[str, Any]) -> dict[str, torch.Tensor | int]:
        """The counts of one micro-batch, by field."""
        raise NotImplementedError

    @classmethod
    def over(cls, batches: Iterable[Mapping[str, Any]], accelerator: Accelerator) -> Self:
        """Counts over all ranks; `batches` are this rank's."""
        found = [{**cls.of_micro_batch(batch), "micro_batches": 1} for batch in batches]
        names = list(found[0])
        totals = [sum(int(counts[name]) for counts in found) for name in names]
        reduced = accelerator.reduce(torch.tensor(totals, device=accelerator.device), reduction="sum").tolist()
        return cls(**dict(zip(names, reduced, strict=True)))

    @classmethod
    def joined(cls, windows: list[Self]) -> Self:
        """The batches of one evaluation as one window."""
        names = [count.name for count in fields(cls) if count.init]
        whole = cls(**{name: sum(getattr(window, name) for window in windows) for name in names})
        for window in windows:
            whole.add(**window.sums)
        return whole

    def mean(self, total: torch.Tensor, count: int | float) -> torch.Tensor:
        """This micro-batch's share of `total / count` over the global batch, as `Trainer` will average it."""
        return total * (self.micro_batches / (count or 1))

    def add(self, **totals: torch.Tensor) -> None:
        for name, total in totals.items():
            self.sums[name] = self.sums.get(name, 0) + total.detach().float()

    def reduce(self, accelerator: Accelerator) -> dict[str, float]:
        """The sums over all ranks, by name."""
        stacked = accelerator.reduce(torch.stack(list(self.sums.values())), reduction="sum")
        return dict(zip(self.sums, stacked.tolist(), strict=True))


@dataclass
class ImitationWindow(GlobalBatch):
    """A global batch of the teacher's texts: rows with a weight above 0 are `used`, those whose text was `compared` with
    another; and `tokens` of all texts, `used_tokens` of the used ones."""

    used: int
    compared: int
    tokens: int
    used_tokens: int

    @classmethod
    def of_micro_batch(cls, batch: Mapping[str, Any]) -> dict[str, torch.Tensor | int]:
        used_B, tokens_B = batch["advantage"] > 0, cls.imitated(batch).sum(1)
        return {
            "used": used_B.sum(),
            "compared": batch["compared"].sum(),
            "tokens": tokens_B.sum(),
            "used_tokens": (tokens_B * used_B).sum(),
        }

    @staticmethod
    def imitated(batch: Mapping[str, Any]) -> torch.Tensor:
        """The teacher's own tokens, `[B, T−1]`, from the second token on."""
        return batch["labels"][:, 1:] != -100


@dataclass
class Window(ImitationWindow):
    """A global batch of pairs: besides, all of its `rows`, and those with a `known` preference."""

    rows: int
    known: int

    @classmethod
    def of_micro_batch(cls, batch: Mapping[str, Any]) -> dict[str, torch.Tensor | int]:
        preference_B = batch["preference"]
        return super().of_micro_batch(batch) | {"rows": len(preference_B), "known": (~preference_B.isnan()).sum()}

    @staticmethod
    def imitated(batch: Mapping[str, Any]) -> torch.Tensor:
        side_B, own_2BT = batch["teacher_side"], batch.get("own_mask", batch["completion_mask"])[:, 1:]
        return teacher_rows(own_2BT.bool(), side_B) & (side_B != NO_TEACHER).unsqueeze(1)

    @property
    def null(self) -> int:
        """Rows without a known preference, on any rank."""
        return self.rows - self.known


class CapturingForward:
    """
    Stands for the student in `DPOTrainer._compute_loss`, which calls it once, and keeps what our terms need of the output.

    Rows without a known preference reach TRL's loss without a gradient, so that they cannot move the student there. Their
    rows stay in place: TRL gathers tensors of one value a row, whose shapes must agree between ranks.

    Args:
        model (`torch.nn.Module`):
            The student, as wrapped for training.
        teacher (`Teacher`, *optional*):
            For token-level imitation.
        side_B, weight_B, known_B (`torch.Tensor` of shape `[B]`):
            Who wrote what; the weight of the teacher's text; whether the preference is known.
        imitated_BT (`torch.Tensor` of shape `[B, T−1]`):
            The teacher's own tokens, which are imitated.
        variation_BT (`torch.Tensor` of shape `[B, T−1]`, *optional*):
            The share of total variation in the divergence of each.
        detach (`bool`):
            Whether any rank's window has rows without a known preference.

    Attributes:
        output:
            The student's output as TRL sees it.
        logps_2BT (`torch.Tensor` of shape `[2B, T−1]`):
            Log-probability of each token, with its gradient, zero outside the responses.
        divergence (`torch.Tensor`, *optional*):
            Σ of weight × divergence from the teacher's distribution over the teacher's own tokens, nats.
    """

    def __init__(
        self,
        model: Any,
        teacher: Teacher | None,
        side_B: torch.Tensor,
        weight_B: torch.Tensor,
        known_B: torch.Tensor,
        imitated_BT: torch.Tensor,
        variation_BT: torch.Tensor | None,
        detach: bool,
    ):
        self.model, self.teacher, self.detach = model, teacher, detach
        self.side_B, self.weight_B, self.known_B = side_B, weight_B, known_B
        self.imitated_BT, self.variation_BT = imitated_BT, variation_BT
        self.output: Any = None
        self.logps_2BT: torch.Tensor = None  # type: ignore[assignment]
        self.divergence: torch.Tensor | None = None

    def __call__(self, **kwargs: Any) -> Any:
        if not kwargs.get("fused_lm_head"):  # TRL's second call, for the logits of `compute_metrics`
            return self.model(**kwargs)
        if self.teacher is None:
            output = self.model(**kwargs)
        else:
            output, self.divergence = self.teacher.student_forward(
                self.model,
                self.imitated_BT,
                self.weight_B,
                self.variation_BT,
                choose=lambda values_2B: teacher_rows(values_2B, self.side_B),
                **kwargs,
            )
        # Prompt learning puts virtual tokens in front
        self.logps_2BT = output.log_probs[:, 1 - kwargs["input_ids"].size(1) :]
        if self.detach:
            known_2B1 = self.known_B.repeat(2).unsqueeze(1)
            log_probs = torch.where(known_2B1, output.log_probs, output.log_probs.detach())
            output = type(output)(**{**output, "log_probs": log_probs})
        self.output = output
        return output


@torch.no_grad()
def null_rows_total(
    mean_loss: Callable[[Callable[..., Any], dict[str, torch.Tensor]], torch.Tensor],
    output: Any,
    inputs: dict[str, torch.Tensor],
    known_B: torch.Tensor,
) -> torch.Tensor:
    """
    What the rows without a known preference add to a loss that is a mean over rows, without its formula.

    The mean is taken again, from the same forward, with every known row replaced by one and the same row r:
    B·mean = Σ_null f + n_known·f(r), and once more with all rows replaced by r, which gives f(r).

    Args:
        mean_loss (`Callable`):
            TRL's loss of a forward and a batch.
        output, inputs:
            What the student returned for the batch, and the batch, with the reference's log-probabilities.
        known_B (`torch.Tensor` of shape `[B]`):
            Whether the preference is known.

    Returns:
        `torch.Tensor`, a scalar: Σ f over the rows with an unknown preference.
    """
    rows_B = torch.arange(len(known_B), device=known_B.device)
    r = (~known_B).int().argmax()

    def replay(rows_B: torch.Tensor) -> torch.Tensor:
        rows_2B = torch.cat([rows_B, rows_B + len(rows_B)])
        by_row = {name: value[rows_2B] for name, value in output.items() if value.dim() > 0}
        replayed = SimpleNamespace(**by_row, aux_loss=torch.zeros((), device=rows_B.device))
        batch = {name: inputs[name][rows_2B] for name in ("input_ids", "attention_mask", "completion_mask")}
        batch |= {name: inputs[name][rows_B] for name in ("ref_chosen_logps", "ref_rejected_logps")}
        return mean_loss(lambda **_: replayed, batch)

    return len(rows_B) * replay(torch.where(known_B, r, rows_B)) - known_B.sum() * replay(r.expand_as(rows_B))
