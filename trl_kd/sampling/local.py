"""Answers of a transformers model on this machine."""

import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import PreTrainedModel

from trl_kd._trl import models as trl_models
from trl_kd.responses.special_tokens import end_tokens, turn_end
from trl_kd.sampling.adapters import check_adapter, load_adapter, split_adapter
from trl_kd.sampling.causal import check_causality, check_named
from trl_kd.sampling.decoding import Batch, Prompt, Row
from trl_kd.sampling.loading import load_model
from trl_kd.sampling.model_errors import BadModel, named
from trl_kd.sampling.model_files import QUANTIZATION, check_files, check_tokens, read_config
from trl_kd.sampling.own_logits import evaluating, probe
from trl_kd.sampling.prompts import (
    cut_at,
    decode_answer,
    describe_files,
    describe_template,
    encode_prompt,
    load_tokenizer,
)
from trl_kd.sampling.recorded import recorded_description
from trl_kd.sampling.sampler import Answer, Request, SamplingSettings


logger = logging.getLogger(__name__)


class LocalSampler:
    """
    A transformers model as a [`Sampler`]: loaded when the first answer is asked for.

    An answer is drawn from the model's own distribution under `settings` (what the model's generation config says of
    sampling is not applied). It depends on the prompt, the sample's number and the settings alone, not on what is drawn
    beside it, nor on where a run was stopped and started again. The global random state is not touched, and a model given
    is left in the modes (training or evaluation) that it was in.

    Each prompt is run once, however many answers are wanted. Prompts of about one length are decoded side by side, an answer
    that ends makes room for another, and on running out of memory the batch is halved for good. A prompt that fills the
    model's positions gets no answer (`text` is `None`, `finish_reason` `"prompt_too_long"`).

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or `PeftModel`):
            Name or folder of a causal language model, a folder with a PEFT adapter, or the model itself.
        settings (`SamplingSettings`):
            Settings.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Tokenizer, by default the one at the model's name.
        model_init_kwargs (`dict`, *optional*):
            Options of `from_pretrained` for a model given by name: `dtype` (float32 by default), `device_map`, `revision`,
            `load_in_4bit` or `load_in_8bit` and what else begins with `bnb_` or `llm_int8_`, ...
        adapter (`str`, *optional*):
            LoRA adapter, for a model given by name.
        max_batch_tokens (`int`, *optional*, defaults to `32768`):
            Most tokens of prompts and answers held at once.
        read_ahead (`int`, *optional*, defaults to `512`):
            Requests read at once, among which those of like length are found.
        chat_template_kwargs (`dict`, *optional*):
            Variables for the chat template, e.g. `{"enable_thinking": False}`.

    Attributes:
        on_tokens (`Callable[[int], None]`, *optional*): Is told how many tokens were drawn since it was told last; fewer
            than none where memory has run out, so that answers are begun anew.

    Raises:
        `ValueError`: options that contradict each other, or that the model cannot serve.
    """

    is_lookup = False

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        settings: SamplingSettings,
        *,
        tokenizer: Any = None,
        model_init_kwargs: dict[str, Any] | None = None,
        adapter: str | None = None,
        max_batch_tokens: int = 32768,
        read_ahead: int = 512,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        for name, value in (("max_batch_tokens", max_batch_tokens), ("read_ahead", read_ahead)):
            if value < 1:
                raise ValueError(f"`{name}` is {value!r}: it must be at least 1.")
        named = isinstance(model, str)
        given = {"model_init_kwargs": model_init_kwargs, "adapter": adapter}
        unused = [name for name, value in given.items() if value and not named]
        if unused:
            raise ValueError(
                f"`{unused[0]}` is for a model given by name, and `model` is a {type(model).__name__}: drop it."
            )
        self.name: str
        self.adapter: str | None = None
        self._given: Any = None
        if isinstance(model, str):
            self.name, self.adapter = split_adapter(model, adapter)
        else:
            self.name, self._given = trl_models.get_config_model_id(model.config), model
            check_named(model, f"The model {self.name!r}")
        self.settings = settings
        self._model = self._given
        self._tokenizer = tokenizer
        self._is_checked = False
        self._options = dict(model_init_kwargs or {})
        self._template_options = dict(chat_template_kwargs or {})
        self._max_batch_tokens = max_batch_tokens
        self._read_ahead = read_ahead
        self.on_tokens: Callable[[int], None] | None = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded when first asked for."""
        if self._tokenizer is None:
            if self.adapter is not None and Path(self.adapter, "tokenizer_config.json").is_file():
                self._tokenizer = load_tokenizer(self.adapter, {})
            else:
                self._tokenizer = load_tokenizer(self.name, self._options)
        return self._tokenizer

    @property
    def model(self) -> Any:
        """The model, loaded when first asked for.

        Raises:
            `ValueError`: it is no causal language model, or its adapter is not LoRA-like.
            `ImportError`: it is to be quantized and bitsandbytes is missing.
        """
        if self._model is None:
            self._model = self._load()
        if any(config.is_prompt_learning for config in getattr(self._model, "peft_config", {}).values()):
            raise ValueError(
                f"The adapter of {self.name!r} learns a prompt: only adapters of weights (LoRA) can be sampled."
            )
        return self._model

    @property
    def _who(self) -> str:
        return f"The model {self.name!r}" + (f" with the adapter {self.adapter!r}" if self.adapter else "")

    def load(self) -> None:
        """Loads the model now."""
        _ = self.model

    def check_model(self) -> None:
        """Raises a `BadModel` if the files of a model given by name cannot be used, or its tokenizer has more tokens than it
        has embeddings. Nothing is loaded for it."""
        if self._given is not None or self._is_checked:
            return
        with named(self._who):
            config = read_config(self.name, self._options)
            rows = check_files(self.name, config, self._options)
            if self.adapter is not None:
                check_adapter(self.adapter, config, self._options)
                rows = None  # it may have embeddings of its own
            check_tokens(self.tokenizer, rows)
        self._is_checked = True

    def check_requests(self, requests: Iterable[Request]) -> None:
        """Raises what the tokenizer raises for such prompts, for want of a chat template say. Nothing is loaded for it."""
        for request in requests:
            encode_prompt(self.tokenizer, request, self._template_options)

    def _load(self) -> Any:
        try:
            model: Any = load_model(self.name, self._options)
            if self.adapter is not None:
                model = load_adapter(model, self.adapter)
        except OSError as error:
            raise BadModel(f"{self._who} cannot be loaded: {error}") from error
        model.eval()
        who = f"The model {self.name!r}"
        check_causality(model, probe(model, None, who), who)
        return model

    def close(self) -> None:
        """Frees the memory of a model that was loaded here. It is loaded again if more is asked."""
        self._model = self._given
        clear_device_cache(garbage_collection=True)

    def describe(self) -> dict[str, Any]:
        description = {
            "sampler": "local",
            "model": self.name,
            "adapter": self.adapter,
            "settings": self.settings.describe(),
            **describe_template(self.tokenizer, self._template_options),
        }
        weights: list[str | None]
        if self._given is not None:
            quantization = getattr(self._given.config, "quantization_config", None)
            options = {"dtype": str(self._given.dtype), "quantization_config": quantization}
            weights = [_weights_hash(self._given)]
        else:
            named = ("revision", "subfolder", "variant", "gguf_file", "quantization_config")
            options = {"dtype": "float32"} | {
                key: value
                for key, value in self._options.items()
                if key in (*named, "dtype") or key.startswith(QUANTIZATION)
            }
            weights = [describe_files(self.name), describe_files(self.adapter)]
        options = json.loads(json.dumps(options, sort_keys=True, default=_plain))
        return recorded_description(description | {"model_options": options, "weights": weights})

    def sample(self, requests: Iterable[Request]) -> Iterator[tuple[Request, int, Answer]]:
        reading = iter(requests)
        batch = None
        waiting: deque[Prompt] = deque()
        while True:
            if not waiting:
                window = list(islice(reading, self._read_ahead))
                if not window and (batch is None or not batch.rows):
                    return
                if batch is None:
                    ends = self._end_tokens(in_turns=not isinstance(window[0].prompt, str))
                    batch = Batch(self.model, self.settings, ends, self._is_stopped)
                waiting, refused = self._encode(window)
                yield from refused
            if batch is not None and (waiting or batch.rows):
                with evaluating(self.model):
                    finished = self._advance(batch, waiting)
                for row in finished:
                    request, sample, ids = row.place
                    yield request, sample, self._answer(request, ids, row)

    def _encode(self, window: list[Request]) -> tuple[deque[Prompt], list[tuple[Request, int, Answer]]]:
        """Prompts, the longest first (if memory is short, that shows at the start), and answers that cannot be had: to
        prompts that leave the model no position."""
        prompts, refused = [], []
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for request in window:
            ids = encode_prompt(self.tokenizer, request, self._template_options)
            limit = min(self.settings.max_new_tokens, (positions or 2**31) - len(ids))
            if limit < 1:
                refused += [(request, sample, Answer(None, "prompt_too_long")) for sample in request.samples]
            elif request.samples:
                seeds = [(sample, self.settings.answer_seed(request.key, sample)) for sample in request.samples]
                prompts.append(Prompt(ids, [Row((request, sample, ids), seed, limit) for sample, seed in seeds]))
        return deque(sorted(prompts, key=lambda prompt: -len(prompt.ids))), refused

    def _advance(self, batch: Batch, waiting: deque[Prompt]) -> list[Row]:
        """Goes on until some rows are finished."""
        while True:
            failed = False
            try:
                # Prompts join some at a time: running a few costs almost what running many does
                rows, width = batch.shape_with([])
                has_room = not rows or (batch.is_open and rows * width < 0.75 * self._max_batch_tokens)
                joining = self._take(batch, waiting) if has_room else []
                drawn = sum(len(prompt.rows) for prompt in joining) or rows
                finished = batch.admit(joining) if joining else batch.step()
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError) and not should_reduce_batch_size(error):
                    raise
                failed = True  # handled below: until here the error holds on to what filled the memory
            if failed:
                self._halve(batch, waiting)
                continue
            self._tell(drawn)
            if finished:
                return finished

    def _tell(self, tokens: int) -> None:
        if self.on_tokens is not None:
            self.on_tokens(tokens)

    def _take(self, batch: Batch, waiting: deque[Prompt]) -> list[Prompt]:
        """Takes what fits from the front of `waiting`, at least one row if the batch is empty."""
        taken: list[Prompt] = []
        while waiting:
            prompt = waiting.popleft()
            rows, width = batch.shape_with([*taken, Prompt(prompt.ids, [])])
            fitting = max(self._max_batch_tokens // width - rows, 0 if rows else 1)
            if fitting:
                taken.append(Prompt(prompt.ids, prompt.rows[:fitting]))
            if fitting < len(prompt.rows):
                waiting.appendleft(Prompt(prompt.ids, prompt.rows[fitting:]))
                break
        return taken

    def _halve(self, batch: Batch, waiting: deque[Prompt]) -> None:
        rows, width = batch.shape_with([])
        size = rows * width
        if rows == 1:
            raise RuntimeError(
                f"Out of memory with a single answer of {size} tokens, its prompt included: lower `max_new_tokens`, leave "
                "out long prompts, or load the model smaller (`dtype`, `load_in_4bit`)."
            )
        self._max_batch_tokens = size // 2
        self._tell(-sum(len(row.tokens) for row in batch.rows))
        waiting.extendleft(reversed(batch.clear()))
        clear_device_cache()
        logger.warning(f"Out of memory with {rows} answers at once: going on with `max_batch_tokens` = {size // 2}.")

    def _end_tokens(self, in_turns: bool) -> set[int]:
        """Tokens that end an answer; of messages also the one that the chat template ends turns with, which base models that
        know no such token as their end have learnt all the same."""
        ends = set(end_tokens(self.tokenizer, getattr(self.model, "generation_config", None)))
        turn = turn_end(self.tokenizer) if in_turns else None
        return ends if turn is None else ends | {turn}

    def _is_stopped(self, tokens: list[int]) -> bool:
        if not self.settings.stop:
            return False
        # A character has at most four tokens, and the last token may have gone on after the stop text
        last = tokens[-4 * max(len(stop) for stop in self.settings.stop) - 4 :]
        return cut_at(self.tokenizer.decode(last, skip_special_tokens=True), self.settings.stop)[1]

    def _answer(self, request: Request, ids: list[int], row: Row) -> Answer:
        text, _ = cut_at(decode_answer(self.tokenizer, request, ids, row.tokens), self.settings.stop)
        return Answer(text, row.finish_reason, len(row.tokens))


def _weights_hash(model: Any) -> str:
    """A hash of sixteen weights of each tensor, by which two students of one name differ."""
    read = hashlib.sha256()
    for name, weight in model.named_parameters():
        some = weight.detach().flatten()[:: max(1, weight.numel() // 16)][:16]
        read.update(f"{name} {tuple(weight.shape)} ".encode())
        read.update(some.double().cpu().numpy().tobytes())
    return read.hexdigest()[:16]


def _plain(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else str(value)
