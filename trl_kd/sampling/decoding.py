"""Decoding of rows side by side, each with random numbers of its own.

A row ends and leaves the batch, and others take its place, without a change in what any row answers: its tokens depend on
its prompt and its seed alone. (Batches of other shapes round differently, at about 1e-6 of a probability in float32.)
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from trl_kd.sampling.sampler import SamplingSettings


def pick_tokens(logits_BV: torch.Tensor, uniforms_B: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """
    Samples a token a row by inverting the cumulative distribution, in the order of the vocabulary.

    Args:
        logits_BV (`torch.Tensor` of shape `[B, V]`):
            Logits.
        uniforms_B (`torch.Tensor` of shape `[B]`):
            Random numbers in [0, 1), in the precision in which probabilities are summed.
        temperature (`float`):
            At least 0; `0` takes the most likely token.
        top_p (`float`):
            In (0, 1]. Less likely tokens are left out once those before them have this share of the probability. Of
            tokens with the same probability all are kept or none.

    Returns:
        `torch.Tensor` of shape `[B]`: tokens, −1 where the logits are not numbers.
    """
    if temperature == 0:
        best_B, tokens_B = logits_BV.max(-1)
        return tokens_B.masked_fill(best_B.isnan(), -1)
    probs_BV = (logits_BV.float() / temperature).softmax(-1)
    if top_p < 1:
        sorted_BV = probs_BV.sort(descending=True).values
        before_BV = sorted_BV.cumsum(-1, dtype=uniforms_B.dtype) - sorted_BV
        least_B1 = sorted_BV.masked_fill(before_BV >= top_p, torch.inf).amin(-1, keepdim=True)
        # A threshold, not the sorted order itself, in which near-equal tokens change places with the last bit
        probs_BV = probs_BV.masked_fill(probs_BV < least_B1, 0)
    summed_BV = probs_BV.cumsum(-1, dtype=uniforms_B.dtype)
    total_B = summed_BV[:, -1]
    # The first token whose sum exceeds the number, so that one of probability 0 is never taken
    tokens_B = torch.searchsorted(summed_BV, (uniforms_B * total_B).unsqueeze(1), right=True).squeeze(1)
    return tokens_B.clamp(max=logits_BV.size(1) - 1).masked_fill(total_B.isnan(), -1)


@dataclass
class Row:
    """One answer under way: its `place` among those asked for, its `seed`, the longest it may be (`limit`), its `tokens` so
    far, and why it ended."""

    place: Any
    seed: int
    limit: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class Prompt:
    """Token ids of a prompt, and the answers wanted to it."""

    ids: list[int]
    rows: list[Row]


class Batch:
    """
    Rows that are decoded side by side. Prompts are padded on the left.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            Causal language model in evaluation mode.
        settings (`SamplingSettings`):
            Settings.
        end_tokens (`set[int]`):
            Tokens that end an answer.
        is_stopped (`Callable[[list[int]], bool]`):
            Whether an answer of these tokens has come to a stop text.
    """

    def __init__(
        self, model: Any, settings: SamplingSettings, end_tokens: set[int], is_stopped: Callable[[list[int]], bool]
    ):
        self._model = model
        self._settings = settings
        self._end_tokens = end_tokens
        self._is_stopped = is_stopped
        self._accepts = signature(getattr(model, "get_base_model", lambda: model)().forward).parameters
        # Devices without float64 sum in float32
        self._precision = torch.float32 if model.device.type == "mps" else torch.float64
        self.rows: list[Row] = []
        # Of each row: its prompt; mask of prompt and tokens; length of them, which is the next position; the last token,
        # not yet run; random numbers
        self._prompts: list[Prompt] = []
        self._mask_BT: torch.Tensor
        self._lengths_B: torch.Tensor
        self._next_B: torch.Tensor
        self._uniforms_BN: torch.Tensor
        self._cache: Any = None

    def clear(self) -> list[Prompt]:
        """Takes out all rows, to be begun anew, and forgets what was computed."""
        left: dict[int, Prompt] = {}
        for prompt, row in zip(self._prompts, self.rows, strict=True):
            row.tokens, row.finish_reason = [], None
            left.setdefault(id(prompt), Prompt(prompt.ids, [])).rows.append(row)
        self.rows, self._prompts, self._cache = [], [], None
        return list(left.values())

    @property
    def is_open(self) -> bool:
        """Whether rows can join: always if there are none, else if every layer keeps all of its keys and values."""
        return not self.rows or all(type(layer) is DynamicLayer for layer in self._cache.layers)

    def shape_with(self, prompts: list[Prompt]) -> tuple[int, int]:
        """Rows, and the tokens that each can come to hold, if these prompts join."""
        rows = len(self.rows) + sum(len(prompt.rows) for prompt in prompts)
        longest = max((len(prompt.ids) for prompt in [*prompts, *self._prompts]), default=0)
        return rows, longest + self._settings.max_new_tokens

    @torch.no_grad()
    def admit(self, prompts: list[Prompt]) -> list[Row]:
        """Runs each prompt once, and samples the first token of each of its answers. Returns the rows that end with it."""
        new = len(self.rows)
        rows = [row for prompt in prompts for row in prompt.rows]
        self.rows = self.rows + rows  # first of all: if memory ends below, `clear` gives them back
        self._prompts = self._prompts + [prompt for prompt in prompts for _ in prompt.rows]
        width = max(len(prompt.ids) for prompt in prompts)
        ids_PT = torch.tensor([[0] * (width - len(p.ids)) + p.ids for p in prompts], device=self._model.device)
        mask_PT = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for p in prompts], device=ids_PT.device)
        logits_PV, cache = self._forward(ids_PT, mask_PT, (mask_PT.cumsum(1) - 1).clamp(min=0), None)

        of_prompt_B = torch.tensor([i for i, p in enumerate(prompts) for _ in p.rows], device=ids_PT.device)
        if len(rows) > len(prompts):
            cache.reorder_cache(of_prompt_B)
        uniforms_BN = torch.stack([self._uniforms(row) for row in rows]).to(ids_PT.device)
        mask_BT = mask_PT[of_prompt_B]
        lengths_B = mask_BT.sum(1)
        if new:
            cache, mask_BT = _join(self._cache, self._mask_BT, cache, mask_BT)
            lengths_B = torch.cat([self._lengths_B, lengths_B])
            uniforms_BN = torch.cat([self._uniforms_BN, uniforms_BN])
        self._cache, self._mask_BT, self._lengths_B, self._uniforms_BN = cache, mask_BT, lengths_B, uniforms_BN
        tokens_B = self._pick(logits_PV[of_prompt_B.to(logits_PV.device)], new)
        self._next_B = torch.cat([self._next_B, tokens_B]) if new else tokens_B
        return self._take_finished(tokens_B, new)

    @torch.no_grad()
    def step(self) -> list[Row]:
        """Samples one token of every row. Returns the rows that end with it."""
        self._mask_BT = torch.cat([self._mask_BT, self._mask_BT.new_ones(len(self.rows), 1)], dim=1)
        logits_BV, self._cache = self._forward(
            self._next_B.unsqueeze(1), self._mask_BT, self._lengths_B.unsqueeze(1), self._cache
        )
        self._lengths_B = self._lengths_B + 1
        self._next_B = self._pick(logits_BV, 0)
        return self._take_finished(self._next_B, 0)

    def _forward(self, ids_BT, mask_BT, positions_BT, cache) -> tuple[torch.Tensor, Any]:
        optional = {"position_ids": positions_BT, "logits_to_keep": 1}
        output = self._model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self._accepts},
        )
        return output.logits[:, -1], output.past_key_values

    def _uniforms(self, row: Row) -> torch.Tensor:
        """All random numbers of an answer: made on the CPU, so that every device draws the same."""
        generator = torch.Generator().manual_seed(row.seed)
        numbers_N = torch.rand(self._settings.max_new_tokens, generator=generator, dtype=torch.float64)
        return numbers_N.to(self._precision).clamp(max=1 - torch.finfo(self._precision).eps)

    def _pick(self, logits_BV: torch.Tensor, first: int) -> torch.Tensor:
        done = torch.tensor([len(row.tokens) for row in self.rows[first:]], device=self._uniforms_BN.device)
        uniforms_B = self._uniforms_BN[first:].gather(1, done.unsqueeze(1)).squeeze(1)
        tokens_B = pick_tokens(
            logits_BV, uniforms_B.to(logits_BV.device), self._settings.temperature, self._settings.top_p
        )
        return tokens_B.to(self._uniforms_BN.device)

    def _take_finished(self, tokens_B: torch.Tensor, first: int) -> list[Row]:
        for row, token in zip(self.rows[first:], tokens_B.tolist(), strict=True):
            if token < 0:
                raise ValueError(
                    "The model's logits are not numbers (NaN), which float16 gives where values exceed its range: load it "
                    "with `dtype` 'bfloat16' or 'float32'."
                )
            row.tokens.append(token)
            if token in self._end_tokens or self._is_stopped(row.tokens):
                row.finish_reason = "stop"
            elif len(row.tokens) == row.limit:
                row.finish_reason = "length"
        finished = [row for row in self.rows if row.finish_reason is not None]
        if finished:
            self._keep([i for i, row in enumerate(self.rows) if row.finish_reason is None])
        return finished

    def _keep(self, indices: list[int]) -> None:
        rows, prompts = [self.rows[i] for i in indices], [self._prompts[i] for i in indices]
        if rows:
            self._keep_tensors(indices, rows, prompts)
        else:
            self._cache = None
        self.rows, self._prompts = rows, prompts  # last of all, see `admit`

    def _keep_tensors(self, indices: list[int], rows: list[Row], prompts: list[Prompt]) -> None:
        kept_B = torch.tensor(indices, device=self._mask_BT.device)
        self._next_B, self._lengths_B = self._next_B[kept_B], self._lengths_B[kept_B]
        self._uniforms_BN, self._mask_BT = self._uniforms_BN[kept_B], self._mask_BT[kept_B]
        if self.is_open:
            # Padding that the longest rows needed goes with them
            longest = max(len(p.ids) + len(row.tokens) - 1 for p, row in zip(prompts, rows, strict=True))
            spare = self._mask_BT.size(1) - longest
            self._mask_BT = self._mask_BT[:, spare:]
            _select(self._cache, kept_B, spare)
        else:
            self._cache.reorder_cache(kept_B)


def _select(cache: Any, kept_B: torch.Tensor, spare: int) -> None:
    """Keeps some rows, without their first `spare` places."""
    for layer in cache.layers:
        index_B = kept_B.to(layer.keys.device)
        layer.keys = layer.keys[:, :, spare:].index_select(0, index_B)
        layer.values = layer.values[:, :, spare:].index_select(0, index_B)


def _join(cache: Any, mask_BT: torch.Tensor, more: Any, more_BT: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Puts rows below rows, all padded on the left to one length."""
    width = max(mask_BT.size(1), more_BT.size(1))

    def pad(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, 0) * (-1 - dim) + (width - tensor.size(dim), 0))

    for layer, new in zip(cache.layers, more.layers, strict=True):
        layer.keys = torch.cat([pad(layer.keys, -2), pad(new.keys, -2)])
        layer.values = torch.cat([pad(layer.values, -2), pad(new.values, -2)])
    return cache, torch.cat([pad(mask_BT, -1), pad(more_BT, -1)])
