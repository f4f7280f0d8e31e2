"""Advantages of the words that were taken: what a Q-function says of a text (https://huggingface.co/papers/2505.18952)."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from trl_kd.losses.heads import Head, Precision, Spec
from trl_kd.losses.tiles import Gradients, RunningSoftmax, cap_slope, in_tile


def advantages(
    baseline: Head,
    q_KNE: torch.Tensor,
    q_embedding_VE: torch.Tensor,
    actions_N: torch.Tensor,
    *,
    q_bound: float,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    tile_bytes: int | None = None,
    gather: Callable[[], AbstractContextManager] = nullcontext,
) -> torch.Tensor:
    """
    A(s, a) = Q(s, a) − E_{b~baseline} Q(s, b) with Q(s, a) = B·tanh(⟨g(s), e_a⟩ / B), for K Q-functions on the same states.
    Their sum over a text is the reward that Q induces (docs/method.md). No `[N, V]` tensor lives, as in `moment_matching`.

    Args:
        baseline ([`Head`]):
            The teacher, or the student. It gets no gradient.
        q_KNE (`torch.Tensor` of shape `[K, N, E]`):
            g, the features of each Q-function. They alone get a gradient.
        q_embedding_VE (`torch.Tensor` of shape `[V, E]`):
            e, the words' embeddings.
        actions_N (`torch.Tensor` of shape `[N]`):
            Ids of the words taken, below the number of words that count.
        q_bound, temperature, vocab_size, tile_bytes, gather:
            As in [`~trl_kd.losses.moments.moment_matching`].

    Returns:
        `torch.Tensor` of shape `[K, N]`, in [−2B, 2B], in float32 (float64 if an input is float64).

    Raises:
        `ValueError`: the numbers of words differ, and `vocab_size` does not say how many are shared.
    """
    spec = Spec(
        (baseline.settings,),
        q_bound,
        temperature,
        vocab_size=vocab_size,
        tile_bytes=tile_bytes,
        gather=gather,
    )
    return _Advantages.apply(q_KNE, *baseline.tensors, q_embedding_VE, actions_N, spec)


class _Advantages(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, hidden, weight, bias, embedding, actions, spec: Spec):
        ctx.spec, ctx.precision = spec, Precision.of(hidden, features)
        count, tokens = features.shape[:2]
        with spec.gather():
            words = spec.words(weight, embedding)
            baseline = spec.model(0, (hidden, weight, bias), ctx.precision)
            q = spec.q(features.flatten(0, 1), embedding, ctx.precision)
            grid = spec.grid(words, 4, baseline)
            softmax = RunningSoftmax.start(count, baseline)
            taken = torch.zeros_like(softmax.sums)
            for columns in grid.columns():
                baseline.load(columns)
                q.load(columns)
                for rows in grid.rows():
                    z, weights, values, scratch = grid.buffers(rows, columns)
                    index, here = in_tile(actions[rows], columns, values.dtype)
                    running = softmax.at(rows)
                    running.enter(baseline.project(rows, z), out=weights)
                    for k in range(count):
                        q.project(_below(k, tokens, rows), values)
                        running.add(k, weights, values, scratch)
                        taken[k, rows] += (values.gather(1, index) * here).squeeze(1)
        ctx.save_for_backward(features, hidden, weight, bias, embedding, actions, softmax.log_total())
        return taken - softmax.sums / softmax.total

    @staticmethod
    def backward(ctx, gradient):
        features, hidden, weight, bias, embedding, actions, log_total = ctx.saved_tensors
        spec, precision = ctx.spec, ctx.precision
        count, tokens = features.shape[:2]
        with spec.gather():
            words = spec.words(weight, embedding)
            baseline = spec.model(0, (hidden, weight, bias), precision)
            q = spec.q(features.flatten(0, 1), embedding, precision)
            of_q = Gradients(q, of_hidden=True)
            grid = spec.grid(words, 3, baseline)
            for columns in grid.columns():
                for part in (baseline, q, of_q):
                    part.load(columns)
                for rows in grid.rows():
                    weights, values, tile = grid.buffers(rows, columns)
                    index, here = in_tile(actions[rows], columns, values.dtype)
                    baseline.project(rows, weights).sub_(log_total[rows].unsqueeze(-1)).exp_()
                    for k in range(count):
                        q.project(_below(k, tokens, rows), values)
                        torch.neg(weights, out=tile).scatter_add_(1, index, here)
                        of_q.add(_below(k, tokens, rows), tile.mul_(cap_slope(values, q.cap_ratio, out=values)))
        return torch.reshape(of_q.hidden_result(gradient.flatten()), features.shape), *(None,) * 6


def _below(k: int, tokens: int, rows: slice) -> slice:
    """Where those tokens are when the K Q-functions stand one below the other."""
    return slice(k * tokens + rows.start, k * tokens + rows.stop)
