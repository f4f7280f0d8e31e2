"""One micro-batch of `MMPbKDTrainer`: student and adversary at the states of its completions."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from trl_kd.losses.heads import Head
from trl_kd.losses.imitation import imitation_losses
from trl_kd.losses.moments import MomentOutput, moment_matching
from trl_kd.trainers.common.output_heads import whole
from trl_kd.trainers.mm_pbkd.config import MMPbKDConfig


@dataclass
class Imitated:
    """
    What imitation needs of the teacher's states in a micro-batch.

    Args:
        advantage_N (`torch.Tensor` of shape `[N]`):
            a of each token's completion.
        tokens (`int`):
            How many tokens with an advantage above 0 the global batch has.
        mean_advantage (`float`):
            ā.
        is_end_N (`torch.Tensor` of shape `[N]`):
            Whether it is an end token.
        q (`float`):
            Of ℓ_q.
        share (`float`):
            The source's share of the loss.
    """

    advantage_N: torch.Tensor
    tokens: int
    mean_advantage: float
    is_end_N: torch.Tensor
    q: float
    share: float

    def loss(self, logps_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the words taken: L_imit, and the mean of −log π without a gradient; each as far as these states go."""
        losses_N = imitation_losses(logps_N, self.is_end_N, self.q)
        imitation = (self.advantage_N * losses_N).sum() / (self.tokens * self.mean_advantage)
        return imitation, -logps_N.detach()[self.advantage_N > 0].sum() / self.tokens


@dataclass
class States:
    """
    The states of one source (on-policy, or the teacher's) in a micro-batch.

    Args:
        student, teacher (`Head`):
            Both models at its N states.
        actions_N (`torch.Tensor` of shape `[N]`):
            The words taken.
        mask_RT (`torch.Tensor` of shape `[R, T]`):
            Where in its rows the states are, of which there are N.
        weight (`float`):
            Each token's weight in the student's loss: the source's share by the number of its tokens in the global batch.
        q_weight (`float`):
            Each token's weight in the adversary's: one by the number of the global batch's sequences.
        on_policy (`bool`):
            Whether the student sampled its completions.
        baseline (`int`):
            Place of its baseline among the adversary's.
        imitated (`Imitated`, *optional*):
            For the teacher's states, where they are imitated.
    """

    student: Head
    teacher: Head
    actions_N: torch.Tensor
    mask_RT: torch.Tensor
    weight: float
    q_weight: float
    on_policy: bool
    baseline: int
    imitated: Imitated | None = None

    def hidden_alone(self) -> "States":
        """Without a gradient, and without the output layers: where they are sharded, they are whole for a time only."""
        nothing = self.student.weight_VH.new_empty(0)
        heads = (replace(head, weight_VH=nothing, bias_V=None) for head in (self.student, self.teacher))
        return self.with_layers(*heads)

    def with_layers(self, student: Head, teacher: Head) -> "States":
        """Without a gradient, and with the output layers of these heads."""
        return replace(
            self,
            student=constant(replace(student, hidden_NH=self.student.hidden_NH)),
            teacher=constant(replace(teacher, hidden_NH=self.teacher.hidden_NH)),
        )


def constant(head: Head) -> Head:
    """The same without a gradient. Of weights that ZeRO-3 has split it is a copy: a tensor detached from one has no more in
    it than there is now."""
    weights = [weight for weight in (head.weight_VH, head.bias_V) if weight is not None]
    with whole(weights):
        found = [weight.detach().clone() if hasattr(weight, "ds_id") else weight.detach() for weight in weights]
    return replace(head, hidden_NH=head.hidden_NH.detach(), weight_VH=found[0], bias_V=found[1] if found[1:] else None)


def reshard(model: Any) -> None:
    """Between a backward and the optimizer's step FSDP2 keeps whole what a pass has made so, and would not see the step."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


class Played(NamedTuple):
    """
    What came of a source's states.

    Attributes:
        loss (`torch.Tensor`):
            The student's, a scalar.
        q_loss (`torch.Tensor`):
            The adversary's, −Σ m: its gradient goes to `leaf`.
        sums_4 (`torch.Tensor` of shape `[4]`):
            Weighted sums of divergence, moment gap, |Q| and whether |Q| is at its bound.
        imitation_2 (`torch.Tensor` of shape `[2]`):
            L_imit and the mean of −log π of imitated tokens, as far as these states go.
        entropy (`torch.Tensor`):
            Sum of the student's entropies, nats.
        features, leaf (`torch.Tensor`, *optional*):
            g with its graph to Q's parameters, and the copy of it that the loss saw.
    """

    loss: torch.Tensor
    q_loss: torch.Tensor
    sums_4: torch.Tensor
    imitation_2: torch.Tensor
    entropy: torch.Tensor
    features: torch.Tensor | None
    leaf: torch.Tensor | None

    def to_q(self, scale: torch.Tensor) -> None:
        """After the backward: hands the gradient on to Q's parameters, less the factor that the loss was scaled with."""
        if self.features is not None and self.leaf is not None and self.leaf.grad is not None:
            torch.autograd.backward(self.features, self.leaf.grad / scale)


def play(
    states: States,
    features: Callable[[torch.Tensor, int], torch.Tensor] | None,
    args: MMPbKDConfig,
    settings: dict[str, Any],
) -> Played:
    """
    Student and adversary at the states of one source: one pass over the vocabulary gives the gradients of both.

    Args:
        states (`States`):
            Where.
        features (`Callable`, *optional*):
            Q's features at hidden states of a baseline. `None`: there is no Q.
        args (`MMPbKDConfig`):
            Weights of the terms.
        settings (`dict[str, Any]`):
            Further keyword arguments of [`~trl_kd.losses.moments.moment_matching`].
    """
    graph = None if features is None else features(states.student.hidden_NH, states.baseline)
    leaf = None if graph is None else graph.detach().requires_grad_(torch.is_grad_enabled() and graph.requires_grad)
    imitated = states.imitated
    through_states = args.state_gradient and states.on_policy
    parts = moment_matching(
        states.student,
        states.teacher,
        leaf,
        None if leaf is None else states.student.weight_VH,
        beta=args.beta if states.on_policy else args.off_policy_beta,
        actions_N=states.actions_N if imitated is not None or through_states else None,
        **settings,
    )
    cost_N = args.kl_coef * parts.divergence_N + args.moment_coef * parts.gap_N
    loss = states.weight * cost_N.sum()
    imitation_2 = loss.new_zeros(2)
    if imitated is not None:
        imitation, nll = imitated.loss(parts.logps_N)
        loss = loss + args.imitation_weight * imitated.share * imitation
        imitation_2 = torch.stack([imitation.detach(), nll])
    if through_states:
        # Its value is no part of the loss, only its gradient
        surrogate = states.weight * (parts.logps_N * _later(cost_N.detach(), states.mask_RT)).sum()
        loss = loss + surrogate - surrogate.detach()
    sums_4, entropy = _sums(parts, states.weight), parts.entropy_N.sum()
    return Played(loss, adversary_loss(parts, states), sums_4, imitation_2, entropy, graph, leaf)


def adversary_loss(parts: MomentOutput, states: States) -> torch.Tensor:
    """−Σ m, the moments summed over each sequence and averaged over the sequences."""
    return -states.q_weight * parts.q_gap_N.sum()


def learn_moments(kept: list[States], features: Callable[[torch.Tensor, int], torch.Tensor], settings: Any) -> None:
    """Adds Q's gradient once more, for a further step of Q at states that the student has met. Arguments as in `play`."""
    for states in kept:
        features_NE = features(states.student.hidden_NH, states.baseline)
        if features_NE.requires_grad:
            parts = moment_matching(states.student, states.teacher, features_NE, states.student.weight_VH, **settings)
            adversary_loss(parts, states).backward()


def _sums(parts: MomentOutput, weight: float) -> torch.Tensor:
    columns = (parts.divergence_N, parts.gap_N, parts.q_abs_N, parts.q_saturation_N)
    return weight * torch.stack([column.detach().sum() for column in columns])


def _later(cost_N: torch.Tensor, mask_RT: torch.Tensor) -> torch.Tensor:
    """Σ over t' > t of the costs in the same row."""
    cost_RT = cost_N.new_zeros(mask_RT.shape)
    cost_RT[mask_RT] = cost_N
    return (cost_RT.flip(1).cumsum(1).flip(1) - cost_RT)[mask_RT]
