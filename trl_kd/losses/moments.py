"""
White-box matching of a student to its teacher: the divergence of their next-token distributions, and the moment gap under a
Q-function that an adversary holds (https://huggingface.co/papers/2505.18952; docs/method.md).

Three projections onto the vocabulary (student, teacher, Q) run tile by tile and are computed again in the backward, so that
no `[N, V]` tensor ever lives: per token three products of H·V forwards, three again and three for the gradients backwards.

Shapes: N tokens, V words, H width of a model's hidden states (student and teacher may differ), E width of Q's features and
of the words' embeddings.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch

from trl_kd.losses.heads import Head, Precision, Spec
from trl_kd.losses.tiles import Gradients, Projection, RunningSoftmax, cap_slope, in_tile


SATURATION = 0.99
"""|Q| above this share of its bound counts as saturated: the slope of tanh is then under 0.02."""


class MomentOutput(NamedTuple):
    """
    What `moment_matching` returns, each of shape `[N]`, in float32 (float64 if an input is float64).

    Attributes:
        divergence_N: in nats, ≥ 0 but for rounding. Gradient to the student.
        gap_N: the moment gap ⟨μ − π, Q⟩, in [−2B, 2B]. Gradient to the student, with Q fixed.
        q_gap_N: the same numbers. Gradient to Q's features, with π and μ fixed.
        entropy_N: the student's entropy in nats. No gradient, like the next two.
        q_abs_N: E_{a~π}|Q(s, a)|.
        q_saturation_N: P_{a~π}(|Q(s, a)| > 0.99·B), how much of what the student would say has a Q that hardly learns.
        logps_N: log π(a|s) of the words taken. Gradient to the student. Without `actions_N` zero, and no gradient.
    """

    divergence_N: torch.Tensor
    gap_N: torch.Tensor
    q_gap_N: torch.Tensor
    entropy_N: torch.Tensor
    q_abs_N: torch.Tensor
    q_saturation_N: torch.Tensor
    logps_N: torch.Tensor


def moment_matching(
    student: Head,
    teacher: Head,
    q_NE: torch.Tensor | None = None,
    q_embedding_VE: torch.Tensor | None = None,
    *,
    actions_N: torch.Tensor | None = None,
    variation_N: torch.Tensor | None = None,
    q_bound: float = 1.0,
    beta: float = 1.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tile_bytes: int | None = None,
    compile_tiles: bool = False,
    gather: Callable[[], AbstractContextManager] = nullcontext,
) -> MomentOutput:
    """
    Divergence and moment gap of student π and teacher μ at N states, with Q(s, a) = B·tanh(⟨g(s), e_a⟩ / B).

    Who gets which gradient: the student's hidden states, weight and bias get those of `divergence_N`, `gap_N` and
    `logps_N`; Q's features `q_NE` get that of `q_gap_N`. The teacher and `q_embedding_VE` get none. So each player can have
    its own sign, in one backward or in two (the first with `retain_graph=True`).

    Each projection runs in the dtype of its hidden states, or in autocast's, and everything after it in float32.

    Args:
        student, teacher ([`Head`]):
            The two models at the same N states, over the same V words.
        q_NE (`torch.Tensor` of shape `[N, E]`, *optional*):
            g, the features of Q. `None`: there is no Q, its outputs are zero and its products are saved.
        q_embedding_VE (`torch.Tensor` of shape `[V, E]`, *optional*):
            e, the words' embeddings. Needed with `q_NE`.
        actions_N (`torch.Tensor` of shape `[N]`, *optional*):
            Ids of the words taken, int64, each in [0, V): their log-probabilities come with the same projections. `None`:
            `logps_N` is zero.
        variation_N (`torch.Tensor` of shape `[N]`, *optional*):
            s in [0, 1] of each state: the divergence is (1 − s)·D + s·TV(μ, π), with D that of `beta` and total variation
            TV = ½·Σ|μ − π|. The forward projects student and teacher twice. `None`: s = 0.
        q_bound (`float`, *optional*, defaults to `1.0`):
            B > 0.
        beta (`float`, *optional*, defaults to `1.0`):
            In [0, 1], with TRL's meaning: 0 is KL(μ‖π), 1 is KL(π‖μ), and between them β·KL(μ‖m) + (1 − β)·KL(π‖m) with
            m = β·μ + (1 − β)·π, for which the forward projects student and teacher twice.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides both models' logits. > 0.
        vocab_size (`int`, *optional*):
            Only so many first rows of every weight are words (padded vocabularies of different size). `None`: all rows, and
            their numbers must agree.
        tile_bytes (`int`, *optional*):
            Memory for the tiles. `None`: 32 MiB on a CPU, 512 MiB elsewhere. The result depends on it by rounding only.
        compile_tiles (`bool`, *optional*, defaults to `False`):
            Fuses what is done to a tile between the matrix products, by `torch.compile`.
        gather (`Callable`, *optional*):
            Makes a context that is entered around every use of the weights, in the forward and in the backward, for
            weights that are whole only inside it (ZeRO-3).

    Raises:
        `ValueError`: the numbers of words differ, and `vocab_size` does not say how many are shared.
    """
    heads = student.settings, teacher.settings
    spec = Spec(heads, q_bound, temperature, beta, vocab_size, tile_bytes, compile_tiles, gather)
    embedding = None if q_NE is None else q_embedding_VE
    return MomentOutput(
        *_Moments.apply(*student.tensors, q_NE, *teacher.tensors, embedding, actions_N, variation_N, spec)
    )


_OWN, _OTHER, _Q, _Q_ABS, _Q_SATURATED = range(5)
"""What is averaged over the words under a model: its own z, the other model's z, and so on."""


def _projections(
    spec: Spec, precision: Precision, tensors: Sequence
) -> tuple[Projection, Projection, Projection | None]:
    *student, features, t_hidden, t_weight, t_bias, embedding = tensors
    q = None if features is None else spec.q(features, embedding, precision)
    return spec.model(0, student, precision), spec.model(1, (t_hidden, t_weight, t_bias), precision), q


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)


def _statistics(
    student, teacher, q, actions: torch.Tensor | None, words: int, spec: Spec
) -> tuple[RunningSoftmax, RunningSoftmax, torch.Tensor]:
    """Both models' softmax statistics, in one pass over the words, and the student's z of the words taken, `[N]`."""
    grid = spec.grid(words, 4 if q is None else 5, student)
    pi, mu = RunningSoftmax.start(5, student), RunningSoftmax.start(5, student)
    taken = torch.zeros_like(pi.total)
    fold = _compiled(_fold) if spec.compile_tiles else _fold
    for columns in grid.columns():
        for part in filter(None, (student, teacher, q)):
            part.load(columns)
        for rows in grid.rows():
            z_pi, z_mu, weights, scratch, *spare = grid.buffers(rows, columns)
            student.project(rows, z_pi)
            teacher.project(rows, z_mu)
            values = None if q is None else q.project(rows, spare[0])
            if actions is not None:
                index, here = in_tile(actions[rows], columns, student.dtype)
                taken[rows] += (z_pi.gather(1, index) * here).squeeze(1)
            fold(pi.at(rows), mu.at(rows), z_pi, z_mu, values, weights, scratch, spec.beta, SATURATION * spec.q_bound)
    return pi, mu, taken


def _fold(pi, mu, z_pi, z_mu, values, weights, scratch, beta: float, saturated: float) -> None:
    """Takes a tile into both models' statistics. Destroys `values`."""
    mu.enter(z_mu, out=weights)
    if beta == 0:
        mu.add(_OWN, weights, z_mu, scratch)
        mu.add(_OTHER, weights, z_pi, scratch)
    if values is not None:
        mu.add(_Q, weights, values, scratch)

    pi.enter(z_pi, out=weights)
    pi.add(_OWN, weights, z_pi, scratch)
    if beta == 1:
        pi.add(_OTHER, weights, z_mu, scratch)
    if values is not None:
        pi.add(_Q, weights, values, scratch)
        pi.add(_Q_ABS, weights, values.abs_(), scratch)
        pi.add(_Q_SATURATED, weights, values.gt_(saturated), scratch)


def _log_mixture(z_pi, z_mu, log_pi, log_mu, beta: float, out: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """log((1 − β)·π + β·μ) of a tile; the normalisers are `[n, 1]`."""
    torch.sub(z_pi, log_pi - math.log(1 - beta), out=out)
    torch.sub(z_mu, log_mu - math.log(beta), out=scratch)
    return torch.logaddexp(out, scratch, out=out)


def _mixture(student, teacher, log_pi, log_mu, words: int, spec: Spec) -> tuple[torch.Tensor, torch.Tensor]:
    """The Jensen–Shannon divergence and its part KL(π‖m), in a second pass: m needs both normalisers."""
    grid = spec.grid(words, 4, student)
    kl_pi, kl_mu = torch.zeros_like(log_pi), torch.zeros_like(log_mu)
    for columns in grid.columns():
        student.load(columns)
        teacher.load(columns)
        for rows in grid.rows():
            z_pi, z_mu, log_m, scratch = grid.buffers(rows, columns)
            student.project(rows, z_pi)
            teacher.project(rows, z_mu)
            totals = log_pi[rows].unsqueeze(-1), log_mu[rows].unsqueeze(-1)
            _log_mixture(z_pi, z_mu, *totals, spec.beta, log_m, scratch)
            for kl, z, log_total in zip((kl_pi, kl_mu), (z_pi, z_mu), totals, strict=True):
                log_p = z.sub_(log_total)
                torch.exp(log_p, out=scratch)
                kl[rows] += scratch.mul_(log_p.sub_(log_m)).sum(-1)
    return spec.beta * kl_mu + (1 - spec.beta) * kl_pi, kl_pi


def _above(z_pi, z_mu, level, out: torch.Tensor) -> torch.Tensor:
    """[π > μ] of a tile, with a short ramp from 0 to 1 above π = μ. Rounding differs between the passes, and a jump there
    would change the gradient of a token of which both models are certain by its whole range. `level`: log π's normaliser
    less that of log μ, `[n, 1]`."""
    width = 1e-3 if out.dtype == torch.float32 else 1e-9
    return torch.sub(z_pi, z_mu, out=out).sub_(level).div_(width).clamp_(0, 1)


def _variation(student, teacher, log_pi, log_mu, words: int, spec: Spec) -> tuple[torch.Tensor, torch.Tensor]:
    """TV(μ, π) and P_{a~π}(π(a) > μ(a)), in a second pass: both need both normalisers."""
    grid = spec.grid(words, 3, student)
    variation, above = torch.zeros_like(log_pi), torch.zeros_like(log_pi)
    for columns in grid.columns():
        student.load(columns)
        teacher.load(columns)
        for rows in grid.rows():
            z_pi, z_mu, scratch = grid.buffers(rows, columns)
            student.project(rows, z_pi)
            teacher.project(rows, z_mu)
            of_pi, of_mu = log_pi[rows].unsqueeze(-1), log_mu[rows].unsqueeze(-1)
            is_above = _above(z_pi, z_mu, of_pi - of_mu, scratch)
            pi, mu = z_pi.sub_(of_pi).exp_(), z_mu.sub_(of_mu).exp_()
            above[rows] += is_above.mul_(pi).sum(-1)
            variation[rows] += pi.sub_(mu).abs_().sum(-1) / 2
    return variation, above


class _Known(NamedTuple):
    """
    What the backward knows of each token. The student's gradient, but for the slope of its cap, is
    π·(`slope`·x + `variation`·[π > μ] − `gap`·Q + `constant`) − `teacher`·μ, where x = z_π − z_μ, or z_π − log m, or 0 at
    beta = 0; plus `taken` at the word that was taken. `taken` is `None` where nobody asks for the gradient of its
    log-probability, `variation` where TV has no share.
    """

    log_pi: torch.Tensor
    log_mu: torch.Tensor
    slope: torch.Tensor
    gap: torch.Tensor
    constant: torch.Tensor
    teacher: torch.Tensor
    taken: torch.Tensor | None
    variation: torch.Tensor | None

    @classmethod
    def of(cls, d, w, u, log_pi, log_mu, kl, pi_q, beta: float, variation=None, above=None) -> "_Known":
        """
        `d`, `w`, `u` [N]: gradients of the divergence, of the gap and (or `None`) of the word's log-probability;
        `kl` = KL(π‖μ) or KL(π‖m); `pi_q` = ⟨π, Q⟩; `variation` and `above`: TV's share, and P_{a~π}(π(a) > μ(a)).
        """
        v = None if variation is None else d * variation
        d = d if v is None else d - v
        zero = torch.zeros_like(d)
        if beta == 0:
            slope, constant, teacher = zero, d, d
        elif beta == 1:
            slope, constant, teacher = d, -d * (log_pi - log_mu + kl), zero
        else:
            slope, teacher = (1 - beta) * d, zero
            constant = -slope * (log_pi + kl)
        constant = constant + w * pi_q
        if v is not None:
            constant = constant - v * above
        return cls(log_pi, log_mu, slope, w, constant if u is None else constant - u, teacher, u, v)

    def at(self, rows: slice) -> "_Known":
        return _Known(*(None if column is None else column[rows].unsqueeze(-1) for column in self))


def _gradient_tiles(
    known: _Known, z_pi, z_mu, pi, values, spare, beta: float, caps: tuple, players: tuple[bool, bool], taken
):
    """
    Writes the gradient of the student's raw logits over `z_pi` and that of ⟨g, e⟩ over `z_mu`. The latter is still to be
    multiplied with each token's gradient of `q_gap`.

    `spare` has two tiles for a mixture, one for total variation and one for the student's cap, each where there is such.
    `caps` are the student's and Q's `cap_ratio`, `players` says which of the two wants a gradient, `taken` is `in_tile` of
    the words taken, or `None`.
    """
    to_student, to_q = players
    torch.sub(z_pi, known.log_pi, out=pi).exp_()
    if to_student:
        slope_of_cap = None if caps[0] is None else cap_slope(z_pi, caps[0], out=spare[-1])
        if known.variation is not None:
            above = _above(z_pi, z_mu, known.log_pi - known.log_mu, out=spare[2 * (0 < beta < 1)])
        if beta == 0:
            z_pi.zero_()
        elif beta == 1:
            z_pi.sub_(z_mu).mul_(known.slope)
        else:
            z_pi.sub_(_log_mixture(z_pi, z_mu, known.log_pi, known.log_mu, beta, *spare[:2])).mul_(known.slope)
        if known.variation is not None:
            z_pi.addcmul_(above, known.variation)
        if values is not None:
            z_pi.addcmul_(values, known.gap, value=-1)
        z_pi.add_(known.constant).mul_(pi)
    if to_q or beta == 0:
        mu = z_mu.sub_(known.log_mu).exp_()
    if to_student and beta == 0:
        z_pi.addcmul_(mu, known.teacher, value=-1)
    if to_student and taken is not None:
        index, here = taken
        z_pi.scatter_add_(1, index, here * known.taken)
    if to_student and slope_of_cap is not None:
        z_pi.mul_(slope_of_cap)
    if to_q:
        mu.sub_(pi).mul_(cap_slope(values, caps[1], out=values))


def _project_back(
    student, teacher, q, of_student: Gradients, of_q: Gradients | None, known: _Known, actions, words: int, spec: Spec
):
    """Projects again and adds every tile to the gradients."""
    mixture, capped = 0 < spec.beta < 1, student.cap_ratio is not None
    varied = known.variation is not None
    grid = spec.grid(words, 3 + (q is not None) + 2 * mixture + varied + capped, student)
    caps, players = (student.cap_ratio, q and q.cap_ratio), (of_student.any, of_q is not None)
    work = _compiled(_gradient_tiles) if spec.compile_tiles else _gradient_tiles
    for columns in grid.columns():
        for part in filter(None, (student, teacher, q, of_student, of_q)):
            part.load(columns)
        for rows in grid.rows():
            z_pi, z_mu, pi, *spare = grid.buffers(rows, columns)
            student.project(rows, z_pi)
            teacher.project(rows, z_mu)
            values = None if q is None else q.project(rows, spare.pop())
            taken = None if known.taken is None else in_tile(actions[rows], columns, student.dtype)
            work(known.at(rows), z_pi, z_mu, pi, values, spare, spec.beta, caps, players, taken)
            of_student.add(rows, z_pi)
            if of_q is not None:
                of_q.add(rows, z_mu)
        of_student.store(columns)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, features, t_hidden, t_weight, t_bias, embedding, actions, share, spec: Spec
    ):
        ctx.set_materialize_grads(False)
        ctx.spec, ctx.precision = spec, Precision.of(hidden, t_hidden, features)
        tensors = (hidden, weight, bias, features, t_hidden, t_weight, t_bias, embedding)
        with spec.gather():
            words = spec.words(weight, t_weight, embedding)
            student, teacher, q = _projections(spec, ctx.precision, tensors)
            pi, mu, taken = _statistics(student, teacher, q, actions, words, spec)
            log_pi, log_mu = pi.log_total(), mu.log_total()
            if spec.beta == 0:
                divergence = kl = (mu.mean(_OWN) - log_mu) - (mu.mean(_OTHER) - log_pi)
            elif spec.beta == 1:
                divergence = kl = (pi.mean(_OWN) - log_pi) - (pi.mean(_OTHER) - log_mu)
            else:
                divergence, kl = _mixture(student, teacher, log_pi, log_mu, words, spec)
            above = None
            if share is not None:
                share = share.to(divergence.dtype)
                variation, above = _variation(student, teacher, log_pi, log_mu, words, spec)
                divergence = torch.lerp(divergence, variation, share)
        gap = mu.mean(_Q) - pi.mean(_Q)
        ctx.save_for_backward(*tensors, actions, log_pi, log_mu, kl, pi.mean(_Q), share, above)
        constant = log_pi - pi.mean(_OWN), pi.mean(_Q_ABS), pi.mean(_Q_SATURATED)
        logps = taken if actions is None else taken - log_pi
        ctx.mark_non_differentiable(*constant, *([logps] if actions is None else []))
        return divergence, gap, gap.clone(), *constant, logps

    @staticmethod
    def backward(ctx, grad_divergence, grad_gap, grad_q_gap, *rest):
        *tensors, actions, log_pi, log_mu, kl, pi_q, share, above = ctx.saved_tensors
        grad_logps = None if actions is None else rest[-1]  # torch.compile traces with a gradient for each output
        spec, needed = ctx.spec, ctx.needs_input_grad
        to_student = any(g is not None for g in (grad_divergence, grad_gap, grad_logps))
        to_q = needed[3] and grad_q_gap is not None
        d, w = (torch.zeros_like(kl) if g is None else g.to(kl.dtype) for g in (grad_divergence, grad_gap))
        with spec.gather():
            words = spec.words(tensors[1], tensors[5], tensors[7])
            student, teacher, q = _projections(spec, ctx.precision, tensors)
            of_student = Gradients(student, *(to_student and n for n in needed[:3]))
            of_q = Gradients(q, of_hidden=True) if q is not None and to_q else None
            if of_student.any or to_q:
                u = None if grad_logps is None else grad_logps.to(kl.dtype) * student.slope
                known = _Known.of(
                    d * student.slope, w * student.slope, u, log_pi, log_mu, kl, pi_q, spec.beta, share, above
                )
                q = q if to_q or grad_gap is not None else None
                _project_back(student, teacher, q, of_student, of_q, known, actions, words, spec)
        features = None if of_q is None else of_q.hidden_result(grad_q_gap)
        return of_student.hidden_result(), of_student.weight, of_student.bias, features, *(None,) * 7
