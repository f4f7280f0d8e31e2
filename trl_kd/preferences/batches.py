"""What the preferences that run a model share: its loading, and batches of rows of like length."""

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import PreTrainedModel

from trl_kd._trl import models as trl_models
from trl_kd.preferences.preference import ScoredPreference
from trl_kd.preferences.tokens import altered, encode_answer, template_options, tokenize_response
from trl_kd.responses.rendering import CannotRender
from trl_kd.responses.tokens import Encoded
from trl_kd.sampling import Text
from trl_kd.sampling.loading import load_model
from trl_kd.sampling.model_errors import named
from trl_kd.sampling.model_files import check_files, check_tokens, read_config
from trl_kd.sampling.names import check_no_adapter
from trl_kd.sampling.prompts import describe_files, describe_template, load_tokenizer
from trl_kd.sampling.recorded import recorded_description
from trl_kd.sampling.sampler import beginning


logger = logging.getLogger(__name__)

_NO_MATTER = {"token", "cache_dir", "local_files_only", "proxies", "device_map", "max_memory", "offload_folder"}
"""Keywords of `from_pretrained` that labels do not depend on."""


class ModelPreference(ScoredPreference):
    """
    A preference whose scores a model gives. Config and tokenizer are read at once, weights at the first score.

    Subclasses have `check_kind(config, architectures)`, which refuses a wrong kind of model before its weights are read, and
    `score`.

    Args:
        model (`str` or `PreTrainedModel`):
            The model, or its name or folder. A model passed as an object is put into evaluation mode, and is known to
            `describe` by its name alone.
        scale (`float`, *optional*):
            See [`ScoredPreference`].
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            The model's tokenizer; by default the one beside its weights.
        max_batch_tokens (`int`):
            Most tokens of a forward, padding included. A longer row goes alone. It is lowered when memory runs out.
        max_length (`int`, *optional*):
            Longest row in tokens; by default what the model has positions for.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keywords of `from_pretrained`: `revision`, `dtype` (float32 by default, as in TRL), `trust_remote_code`, and
            for bitsandbytes `load_in_4bit`, `load_in_8bit`, `bnb_4bit_quant_type`, …

    Attributes:
        truncated (`int`): Rows that were longer than `max_length`, each time they were scored.
        unrendered (`int`): Rows that the chat template could not render, likewise. They have no score.
        altered (`int`): Rows of which the template made another response than was sampled, likewise.
    """

    reads = ("tools", "chat_template_kwargs")
    kind: str
    architecture: Any = None
    """Auto class to load with; `None` takes the one that the config names."""

    def __init__(
        self,
        model: str | PreTrainedModel,
        scale: float | None,
        processing_class: Any,
        max_batch_tokens: int,
        max_length: int | None,
        model_init_kwargs: dict[str, Any] | None,
    ):
        super().__init__(scale)
        for name, value in (("max_batch_tokens", max_batch_tokens), ("max_length", max_length)):
            if value is not None and value < 2:
                raise ValueError(f"`{name}` is {value!r}: it is a number of tokens, at least 2.")
        self.init_kwargs = dict(model_init_kwargs or {})
        if isinstance(model, str):
            check_no_adapter("model", model)
            self.name = model
            self._given = None
            with named(f"The model {model!r}"):
                config = read_config(model, self.init_kwargs)
            architectures = config.architectures or []
        else:
            architectures = [type(model).__name__]
            self.name = trl_models.get_config_model_id(model.config) or architectures[0]
            self._given = model
            config = model.config
        self.check_kind(config, architectures)
        if processing_class is None:
            processing_class = load_tokenizer(self.name, self.init_kwargs)
        self.tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
        if self._given is None:
            with named(f"The model {self.name!r}"):
                check_tokens(self.tokenizer, check_files(self.name, config, self.init_kwargs))
        self.pad_id: int | None = self.tokenizer.pad_token_id
        if self.pad_id is None:
            self.pad_id = self.tokenizer.eos_token_id
        if self.pad_id is None:
            raise ValueError(
                f"The tokenizer of {self.name!r} has neither a padding nor an end token: set `tokenizer.pad_token` and pass "
                "it as `processing_class`."
            )
        self.max_batch_tokens = max_batch_tokens
        self.max_length = max_length or self._longest(config)
        self.truncated = self.unrendered = self.altered = 0
        self._model: Any = None

    def check_kind(self, config: Any, architectures: list[str]) -> None:
        """Raises a `ValueError` if a model of this config, of a class so named, cannot give scores."""
        raise NotImplementedError

    def check_loaded(self, model: Any) -> None:
        """Raises a `ValueError` if the loaded model cannot give scores."""

    def _longest(self, config: Any) -> int | None:
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        known = [n for n in (positions, self.tokenizer.model_max_length) if n is not None and 0 < n < 10**9]
        return min(known, default=None)

    @property
    def model(self) -> Any:
        """The model, loaded when it is first needed."""
        if self._model is None:
            model = self._given
            if model is None:
                model = load_model(self.name, self.init_kwargs, self.architecture)
            # Sequence classification finds a row's last token by comparing with this
            model.config.get_text_config().pad_token_id = self.pad_id
            self._model = model.eval()
            self.check_loaded(self._model)
        return self._model

    def load(self) -> None:
        """Loads the model now."""
        _ = self.model

    def check_rows(self, prompts: list[Text], **columns: list[Any]) -> None:
        """Raises what the tokenizer raises for such prompts, for want of a chat template say."""
        for index, prompt in enumerate(prompts):
            tokenize_response(self.tokenizer, prompt, ".", template_options(columns, index))

    def close(self) -> None:
        """Gives the memory of the weights back. A later score loads them again."""
        if self.altered:
            logger.warning(f"{self.altered} responses that {self.name!r} has read were not as they had been sampled.")
        self._model = None
        clear_device_cache(garbage_collection=True)

    def describe(self) -> dict[str, Any]:
        kwargs = {name: value for name, value in sorted(self.init_kwargs.items()) if name not in _NO_MATTER}
        return recorded_description(
            {
                "preference": self.kind,
                "model": self.name,
                "weights": describe_files(self.name),
                "model_init_kwargs": kwargs,
                "tokenizer": self.tokenizer.name_or_path,
                **describe_template(self.tokenizer, {}),
                "max_length": self.max_length,
                "scale": self.scale,
            }
        )

    def note_truncation(self) -> None:
        if not self.truncated:
            logger.warning(
                f"A row is longer than `max_length` = {self.max_length} tokens of {self.name!r}: such rows lose the "
                "beginning of their prompt. This is said once; `truncated` counts them."
            )
        self.truncated += 1

    def encode(
        self,
        prompt: Text,
        completion: Text,
        options: dict[str, Any],
        finish_reason: str | None = None,
        reasoning: str | None = None,
    ) -> Encoded | None:
        """See [`~trl_kd.preferences.tokens.encode_answer`]; `None` for a row that cannot be rendered."""
        try:
            encoded = encode_answer(self.tokenizer, prompt, completion, finish_reason, options, reasoning)
        except CannotRender as error:
            if not self.unrendered:
                logger.warning(
                    f"A row has no score, since {self.name!r} cannot read it: {error}. This is said once; `unrendered` "
                    "counts such rows."
                )
            self.unrendered += 1
            return None
        if encoded.altered is not None:
            if not self.altered:
                logger.warning(
                    f"{altered(encoded.altered, prompt)} This is said once, `altered` counts such rows, and `reasoning` "
                    "says what to do with them."
                )
            self.altered += 1
        return encoded

    def pad(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids `[B, T]` and attention mask `[B, T]` of rows, padded on the right, on the model's device."""
        longest = max(map(len, rows))
        device = next(self.model.parameters()).device
        ids_BT = torch.tensor([[*row, *[self.pad_id] * (longest - len(row))] for row in rows], device=device)
        mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        return ids_BT, mask_BT

    @torch.no_grad()
    def in_batches(
        self, prompts: list[Text], lengths: list[int], run: Callable[[list[int]], list[float | None]]
    ) -> list[float | None]:
        """
        Runs rows in batches of like length, longest first, so that memory runs out at once or never.

        Args:
            prompts (`list[str]` or `list[list[dict]]`):
                The rows' prompts, for messages.
            lengths (`list[int]`):
                Length of each row in tokens. A row of none is not run.
            run (`Callable[[list[int]], list[float | None]]`):
                The score of each of the rows whose indices it is given.

        Returns:
            `list[float | None]`: the scores in the order of `lengths`.

        Raises:
            `ValueError`: a score is NaN or infinite.
        """
        scores: list[float | None] = [None] * len(lengths)
        order = sorted((index for index, length in enumerate(lengths) if length), key=lambda index: -lengths[index])
        start = 0
        while start < len(order):
            longest = lengths[order[start]]
            batch = order[start : start + max(self.max_batch_tokens // longest, 1)]
            try:
                values = run(batch)
            except RuntimeError as error:
                out_of_memory = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
                if len(batch) == 1 or not out_of_memory:
                    raise
                self.max_batch_tokens = longest * (len(batch) // 2)
                logger.warning(f"Out of memory: going on with `max_batch_tokens` = {self.max_batch_tokens}.")
                continue
            for index, value in zip(batch, values, strict=True):
                self._check_score(prompts[index], value)
                scores[index] = value
            start += len(batch)
        return scores

    def _check_score(self, prompt: Text, score: float | None) -> None:
        """A preference function may return NaN for an unknown score; from a model NaN is a fault."""
        if score is not None and not math.isfinite(score):
            raise ValueError(
                f"The model {self.name!r} gives the score {score} to a response to {beginning(prompt)!r}: its weights are "
                "broken, or too large for its `dtype` (load it in 'bfloat16' or 'float32')."
            )
