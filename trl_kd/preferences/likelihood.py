"""The teacher's weights decide: the response that it finds more likely is preferred."""

from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from trl_kd._trl import models as trl_models
from trl_kd.preferences.batches import ModelPreference
from trl_kd.preferences.tokens import template_options
from trl_kd.responses.finish_reasons import has_end
from trl_kd.responses.reasoning import REASONING
from trl_kd.responses.special_tokens import turn_end
from trl_kd.sampling import Text
from trl_kd.sampling.causal import check_causality, check_kind
from trl_kd.sampling.own_logits import OwnLogits, not_own, probe


class TeacherLikelihood(ModelPreference):
    """
    Scores responses with log μ(y|x) of a white-box teacher μ, in nats.

    Rows are tokenized as `DPOTrainer` does. What a chat template writes after the last end token is left out, since no
    model has to say it, and so is what a user or a tool says within a response. Teacher and student may have different
    tokenizers: only texts are read.

    Args:
        model (`str` or `PreTrainedModel`):
            The teacher, a causal language model, or its name or folder.
        scale (`float`, *optional*):
            Above 0, in nats (nats per token if `length_normalized`): P = σ(difference / scale). By default the more likely
            response wins outright.
        length_normalized (`bool`, *optional*, defaults to `True`):
            Whether the score is the mean over the response's tokens rather than the sum, which prefers short responses.
        processing_class, max_batch_tokens, max_length, model_init_kwargs:
            See [`~trl_kd.preferences.batches.ModelPreference`]. A row longer than `max_length` loses the beginning of its
            prompt, and the end of a response that is longer by itself.
        reasoning (`str`, *optional*):
            What is scored where the teacher's chat template changes a response, as those of reasoning models do. By default
            the template's rendering, with a warning. `"keep"`: the response as it was sampled. `"strip"`: the response
            without `<think>` blocks. `"error"`: a `ValueError`.
        chunk_tokens (`int`, *optional*, defaults to `512`):
            Tokens whose logits are in memory at once: `chunk_tokens × vocabulary × 4` bytes, a few times over.

    Raises:
        `ValueError`: the model is not a causal language model; before its weights are read, where its config says so.
    """

    kind = "teacher_likelihood"

    def __init__(
        self,
        model: str | PreTrainedModel,
        scale: float | None = None,
        length_normalized: bool = True,
        processing_class: Any = None,
        max_batch_tokens: int = 8192,
        max_length: int | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
        chunk_tokens: int = 512,
        reasoning: str | None = None,
    ):
        super().__init__(model, scale, processing_class, max_batch_tokens, max_length, model_init_kwargs)
        if chunk_tokens < 1:
            raise ValueError(f"`chunk_tokens` is {chunk_tokens!r}: it must be at least 1.")
        if reasoning not in REASONING:
            raise ValueError(f"`reasoning` is {reasoning!r}: use 'keep', 'strip' or 'error', or leave it out.")
        self.length_normalized = length_normalized
        self.reasoning = reasoning
        self.chunk_tokens = chunk_tokens
        self._own: OwnLogits | None = None  # where they are not those of hidden states and output layer

    def check_kind(self, config: Any, architectures: list[str]) -> None:
        if config.is_encoder_decoder or any("Classification" in name for name in architectures):
            raise ValueError(
                f"{self.name!r} is {' or '.join(architectures) or 'an encoder-decoder'}, which gives no likelihood of a "
                "text that follows another: the teacher must be a causal language model."
            )
        check_kind(config, architectures, f"The model {self.name!r}")

    def check_loaded(self, model: Any) -> None:
        who = f"The model {self.name!r}"
        found = probe(model, self.tokenizer, who)
        check_causality(model, found, who)
        differs = not_own(model, found, lambda hidden_NH: self._head_logits(model, hidden_NH))
        self._own = None if differs is None else differs.logits

    @cached_property
    def _turn_end(self) -> int | None:
        return turn_end(self.tokenizer)

    def describe(self) -> dict[str, Any]:
        reasoning = {} if self.reasoning is None else {"reasoning": self.reasoning}
        return super().describe() | {"length_normalized": self.length_normalized, **reasoning}

    def __call__(
        self, prompts: list[Text], first: list[Text], second: list[Text], **columns: list[Any]
    ) -> list[float | None]:
        """As every preference; `first_finish_reason` and `second_finish_reason`, where given, say which responses were
        cut off."""
        scores: list[list[float | None]] = []
        responses: list[list[tuple[Text, Any]]] = []
        for side, completions in (("first", first), ("second", second)):
            reasons = columns.get(f"{side}_finish_reason")
            own = columns if reasons is None else {**columns, "finish_reason": reasons}
            scores.append(self.score(prompts, completions, **own))
            responses.append(list(zip(completions, reasons or [None] * len(completions), strict=True)))
        return self.compare(responses[0], responses[1], scores[0], scores[1])

    def score(self, prompts: list[Text], completions: list[Text], **columns: list[Any]) -> list[float | None]:
        """
        log μ(y|x) of each completion: mean or sum over the model's own tokens, their end tokens among them.

        Args:
            prompts, completions (`list[str]` or `list[list[dict]]`):
                Prompts and responses.
            **columns (`list`):
                `finish_reason`, where given, says which completions were cut off and so have no end token, see
                [`~trl_kd.responses.finish_reasons.ending`].
                `tools` and `chat_template_kwargs` go to the chat template.

        Returns:
            `list[float | None]`: at most 0; `None` for a completion without tokens, or one that cannot be rendered.

        Raises:
            `ValueError`: a score is NaN or infinite.
        """
        reasons = columns.get("finish_reason") or [None] * len(prompts)
        rows, own = [], []
        for index, (prompt, completion, reason) in enumerate(zip(prompts, completions, reasons, strict=True)):
            ids, scored = self._tokens(prompt, completion, template_options(columns, index), reason)
            rows.append(ids)
            own.append(scored)
        return self.in_batches(
            prompts,
            [len(row) for row in rows],
            lambda batch: self._run([rows[index] for index in batch], [own[index] for index in batch]),
        )

    def _tokens(
        self, prompt: Text, completion: Text, options: dict[str, Any], reason: str | None
    ) -> tuple[list[int], list[bool]]:
        """Tokens of prompt and response, and which of them are scored."""
        encoded = self.encode(prompt, completion, options, reason, self.reasoning)
        if encoded is None:
            return [], []
        context, response, own = encoded.prompt_ids, encoded.ids, encoded.own
        ends = {self.tokenizer.eos_token_id} | (set() if isinstance(prompt, str) else {self._turn_end})
        last = max((place for place, token in enumerate(response) if token in ends), default=None)
        if has_end(reason) and last is not None:
            response = response[: last + 1]
        if self.max_length is not None and len(context) + len(response) > self.max_length:
            self.note_truncation()
            context = context[-max(self.max_length - len(response), 1) :]
            response = response[: self.max_length - len(context)]
        scored = [False] * len(context) + own[: len(response)]
        return context + response, [False, *scored[1:]]  # nothing predicts the first token of all

    def _run(self, rows: list[list[int]], own: list[list[bool]]) -> list[float | None]:
        ids_BT, mask_BT = self.pad(rows)
        hidden_BTH = trl_models.backbone(self.model)(
            input_ids=ids_BT, attention_mask=mask_BT, use_cache=False
        ).last_hidden_state
        width = ids_BT.size(1)
        scored_BT = torch.tensor([[*row, *[False] * (width - len(row))] for row in own], device=ids_BT.device)[:, 1:]
        logps_N = self._logps(hidden_BTH[:, :-1][scored_BT.to(hidden_BTH.device)], ids_BT[:, 1:][scored_BT])
        # In double precision, so that the sum does not depend on its order
        counts = scored_BT.sum(1).tolist()
        sums = [float(logps.double().sum()) for logps in logps_N.cpu().split(counts)]
        return [
            None if not count else total / count if self.length_normalized else total
            for total, count in zip(sums, counts, strict=True)
        ]

    def _logps(self, hidden_NH: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """log μ of each target `[N]` from the hidden state before it `[N, H]`: logits exist for `chunk_tokens` at a time."""
        logps = []
        for hidden, targets in zip(
            hidden_NH.split(self.chunk_tokens), targets_N.split(self.chunk_tokens), strict=True
        ):
            logits = self._head_logits(self.model, hidden) if self._own is None else self._own(hidden).float()
            targets = targets.to(logits.device)
            logps.append(-torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
        return torch.cat(logps) if logps else hidden_NH.new_zeros(0)

    def _head_logits(self, model: Any, hidden_NH: torch.Tensor) -> torch.Tensor:
        config = model.config
        logits = model.get_output_embeddings()(hidden_NH).float() * trl_models.logit_scale(config)
        cap = getattr(config.get_text_config(), "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap
