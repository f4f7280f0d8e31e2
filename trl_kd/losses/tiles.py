"""
Work on `[N, V]` tables that are never whole: a grid of tiles, words in the outer loop and tokens in the inner one, so that a
weight's rows are read (and converted) once and its gradient is finished before the next rows come.

Everything after a projection is float32, or float64 if an input is, and in place: a tile written is a tile less to move.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch


CPU_TILE_BYTES = 32 * 2**20
OTHER_TILE_BYTES = 512 * 2**20
"""Memory of all tiles together where none is given: what stays in a CPU's cache; what keeps an accelerator busy."""


def compute_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype of a projection's operands: autocast's where it is on, else that of the hidden states."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def cap_slope(z: torch.Tensor, cap_ratio: float, out: torch.Tensor) -> torch.Tensor:
    """1 − tanh²(raw / cap) of a [`Projection`], into `out`, which may be z."""
    return torch.mul(z, cap_ratio, out=out).square_().neg_().add_(1)


class Projection:
    """
    z = logits / temperature, where logits = cap·tanh(raw / cap), or raw where there is no cap; raw = scale·(h Wᵀ + b).

    Args:
        hidden, weight, bias:
            h `[N, H]`, W `[V, H]` and b `[V]` or `None`.
        operand, dtype (`torch.dtype`):
            Of the matrix product's operands, and of its result.
        scale, cap, temperature:
            As above.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        operand: torch.dtype,
        dtype: torch.dtype,
        scale: float = 1.0,
        cap: float | None = None,
        temperature: float = 1.0,
    ):
        self.hidden, self.weight, self.bias, self.dtype = hidden, weight, bias, dtype
        self.scale, self.cap, self.temperature = scale, cap, temperature
        # Only CUDA multiplies 16-bit operands into a 32-bit result; elsewhere the rounded operands are widened first
        narrow = hidden.device.type == "cuda" and operand.itemsize == 2 and dtype == torch.float32
        self.rounded, self.operand = operand, operand if narrow else dtype

    @property
    def slope(self) -> float:
        """dz / d(h Wᵀ + b), but for the cap."""
        return self.scale / self.temperature

    @property
    def cap_ratio(self) -> float | None:
        """z·`cap_ratio` = tanh(raw / cap). `None` without a cap."""
        return None if self.cap is None else self.temperature / self.cap

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.rounded).to(self.operand)

    def load(self, words: slice) -> None:
        """Makes ready the rows of the weight that the next calls are about."""
        self.rows = self.cast(self.weight[words])
        self.offset = None if self.bias is None else self.bias[words].to(self.dtype)

    def project(self, tokens: slice, out: torch.Tensor) -> torch.Tensor:
        hidden = self.cast(self.hidden[tokens])
        if self.operand == self.dtype:
            torch.mm(hidden, self.rows.t(), out=out)
        else:
            torch.mm(hidden, self.rows.t(), out_dtype=self.dtype, out=out)
        if self.offset is not None:
            out.add_(self.offset)
        if self.cap is not None:
            return out.mul_(self.scale / self.cap).tanh_().mul_(self.cap / self.temperature)
        return out if self.slope == 1 else out.mul_(self.slope)

    def accumulate(self, into: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """into += left @ right, without rounding the product to 16 bits before the sum."""
        if self.operand == self.dtype:
            into.addmm_(left, right)
        else:
            torch.addmm(into, left, right, out_dtype=self.dtype, out=into)


class OwnProjection(Projection):
    """
    z = logits / temperature of a model whose logits are no projection: it says itself what they are.

    Args:
        hidden (`torch.Tensor` of shape `[N, H]`):
            Hidden states.
        own (`Callable`):
            Logits `[n, V]` of n of them.
        dtype, temperature:
            As above.
    """

    LEAST = -1e4
    """A word that the model masks by −∞ has this: its product with a probability of zero is zero, and not NaN."""

    def __init__(
        self,
        hidden: torch.Tensor,
        own: Callable[[torch.Tensor], torch.Tensor],
        dtype: torch.dtype,
        temperature: float = 1.0,
    ):
        super().__init__(hidden, hidden[:0], None, hidden.dtype, dtype, temperature=temperature)
        self.own = own

    def load(self, words: slice) -> None:
        self.words = words

    def project(self, tokens: slice, out: torch.Tensor) -> torch.Tensor:
        out.copy_(self.own(self.hidden[tokens])[:, self.words])
        return out.div_(self.temperature).clamp_(min=self.LEAST)


class Gradients:
    """
    Gradients of a projection's hidden states, weight and bias from those of the tiles of h Wᵀ + b.

    Args:
        projection (`Projection`):
            Whose.
        of_hidden, of_weight, of_bias (`bool`):
            Which are wanted.
    """

    def __init__(self, projection: Projection, of_hidden: bool, of_weight: bool = False, of_bias: bool = False):
        self.projection, self.any = projection, of_hidden or of_weight or of_bias
        self.hidden = torch.zeros_like(projection.hidden, dtype=projection.dtype) if of_hidden else None
        # Whole only in its own dtype: the sums of a tile's rows alone are in float32. Rows beyond the words stay zero
        self.weight = torch.zeros_like(projection.weight) if of_weight else None
        self.bias = torch.zeros_like(projection.bias) if of_bias else None

    def load(self, words: slice) -> None:
        dtype = self.projection.dtype
        self.weight_rows = None if self.weight is None else self.weight[words].to(dtype)
        self.bias_rows = None if self.bias is None else self.bias[words].to(dtype)

    def add(self, tokens: slice, tile: torch.Tensor) -> None:
        if self.bias_rows is not None:
            self.bias_rows.add_(tile.sum(0))
        tile = tile.to(self.projection.operand)
        if self.hidden is not None:
            self.projection.accumulate(self.hidden[tokens], tile, self.projection.rows)
        if self.weight_rows is not None:
            hidden = self.projection.cast(self.projection.hidden[tokens])
            self.projection.accumulate(self.weight_rows, tile.t(), hidden)

    def store(self, words: slice) -> None:
        for whole, rows in ((self.weight, self.weight_rows), (self.bias, self.bias_rows)):
            if whole is not None and rows is not None and rows.dtype != whole.dtype:  # else `rows` is a view of it
                whole[words] = rows

    def hidden_result(self, factor_N: torch.Tensor | None = None) -> torch.Tensor | None:
        """In the hidden states' dtype, each token's times its factor."""
        if self.hidden is None:
            return None
        if factor_N is not None:
            self.hidden.mul_(factor_N.unsqueeze(-1))
        return self.hidden.to(self.projection.hidden.dtype)


class Grid:
    """
    Cuts `[tokens, words]` into tiles and lends the memory for `buffers` of them at once.

    Args:
        tokens, words (`int`):
            The table's shape.
        buffers (`int`):
            How many tiles are alive at the same time.
        like (`Projection`):
            Gives device and dtype.
        tile_bytes (`int`, *optional*):
            Memory for all buffers. A tile has at least 64 words of one token.
        whole_rows (`bool`, *optional*, defaults to `False`):
            Whether a tile has all words of its tokens.
    """

    def __init__(
        self, tokens: int, words: int, buffers: int, like: Projection, tile_bytes: int | None, whole_rows: bool = False
    ):
        device = like.hidden.device
        if tile_bytes is None:
            tile_bytes = CPU_TILE_BYTES if device.type == "cpu" else OTHER_TILE_BYTES
        elements = tile_bytes // (buffers * like.dtype.itemsize)
        # About square: hidden states and weights are then read, and their gradients written, as seldom as can be
        rows = max(1, min(tokens, math.isqrt(elements)))
        self.words_step = words if whole_rows else min(words, max(64, elements // rows // 64 * 64))
        self.tokens_step = max(1, min(tokens, elements // self.words_step))
        self.tokens, self.words = tokens, words
        self.memory = torch.empty((buffers, self.tokens_step * self.words_step), device=device, dtype=like.dtype)

    def columns(self) -> Iterator[slice]:
        return _slices(self.words, self.words_step)

    def rows(self) -> Iterator[slice]:
        return _slices(self.tokens, self.tokens_step)

    def buffers(self, tokens: slice, words: slice) -> tuple[torch.Tensor, ...]:
        shape = tokens.stop - tokens.start, words.stop - words.start
        return tuple(flat[: shape[0] * shape[1]].view(shape) for flat in self.memory)


def _slices(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def in_tile(actions: torch.Tensor, columns: slice, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """For each word its column in the tile, and 1; or any column, and 0, if it is not in the tile. Both `[n, 1]`."""
    here = (actions >= columns.start) & (actions < columns.stop)
    index = (actions - columns.start).clamp(0, columns.stop - columns.start - 1)
    return index.unsqueeze(-1), here.to(dtype).unsqueeze(-1)


class RunningSoftmax(NamedTuple):
    """
    Softmax statistics of each token, while its words come tile by tile.

    Attributes:
        top (`torch.Tensor` of shape `[N]`):
            The largest z so far.
        total (`torch.Tensor` of shape `[N]`):
            Σ exp(z − top).
        sums (`torch.Tensor` of shape `[values, N]`):
            Σ exp(z − top)·value, for each value that is averaged.
    """

    top: torch.Tensor
    total: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def start(cls, values: int, like: Projection) -> "RunningSoftmax":
        sums = torch.zeros((values, len(like.hidden)), device=like.hidden.device, dtype=like.dtype)
        return cls(torch.full_like(sums[0], -math.inf), torch.zeros_like(sums[0]), sums)

    def at(self, tokens: slice) -> "RunningSoftmax":
        """A view of some tokens. What follows changes it, and so the whole."""
        return RunningSoftmax(self.top[tokens], self.total[tokens], self.sums[:, tokens])

    def enter(self, z: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Takes a tile in and returns its exp(z − top) in `out`."""
        top = torch.maximum(self.top, z.amax(-1))
        shrink = torch.exp(self.top - top)
        self.top.copy_(top)
        torch.sub(z, top.unsqueeze(-1), out=out).exp_()
        self.total.mul_(shrink).add_(out.sum(-1))
        self.sums.mul_(shrink)
        return out

    def add(self, index: int, weights: torch.Tensor, value: torch.Tensor, scratch: torch.Tensor) -> None:
        """Adds a tile of a value under the weights that `enter` returned."""
        self.sums[index].add_(torch.mul(weights, value, out=scratch).sum(-1))

    def log_total(self) -> torch.Tensor:
        return self.top + self.total.log()

    def mean(self, index: int) -> torch.Tensor:
        return self.sums[index] / self.total
