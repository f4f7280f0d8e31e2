"""Answers of vLLM's offline engine, in this process. (A vLLM server is an OpenAI-compatible one.)"""

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from typing import Any

from accelerate.utils.memory import clear_device_cache
from peft import PeftConfig

from trl_kd.responses.finish_reasons import ending
from trl_kd.responses.special_tokens import turn_end
from trl_kd.sampling.adapters import check_adapter
from trl_kd.sampling.model_errors import named
from trl_kd.sampling.model_files import check_files, read_config
from trl_kd.sampling.prompts import (
    cut_at,
    decode_answer,
    describe_files,
    describe_template,
    encode_prompt,
    load_tokenizer,
)
from trl_kd.sampling.recorded import recorded_description
from trl_kd.sampling.sampler import Answer, Request, SamplingSettings, as_counted


RUNS_ON = (
    "tensor_parallel_size",
    "gpu_memory_utilization",
    "max_num_seqs",
    "enforce_eager",
    "cpu_offload_gb",
    "swap_space",
    *("hf_token", "download_dir", "trust_remote_code"),
)
"""Options of the engine that say where and how it runs and where its files are, and nothing of the answers."""
ATTEMPTS = 3
"""How often an answer that the engine breaks off is asked for, each time with another seed."""

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM allows for `max_lora_rank`."""


class VLLMSampler:
    """
    vLLM's offline engine as a [`Sampler`]: started when the first answer is asked for.

    Prompts are rendered and tokenized as [`LocalSampler`] does. Every answer is a request of its own with its own seed, and
    vLLM's prefix caching runs a shared prompt once. Seeds make an answer repeatable up to vLLM's rounding, which depends on
    what else is in the batch.

    Args:
        model (`str`):
            Name or folder of the model.
        settings (`SamplingSettings`):
            Settings.
        adapter (`str`, *optional*):
            Folder of a LoRA adapter.
        chunk_size (`int`, *optional*, defaults to `512`):
            Requests given to the engine at once; their answers come when all of them are there.
        chat_template_kwargs (`dict`, *optional*):
            Variables for the chat template.
        **engine_kwargs:
            Options of `vllm.LLM`: `dtype`, `quantization`, `tensor_parallel_size`, `gpu_memory_utilization`,
            `max_model_len`, `revision`, ...

    Raises:
        `ValueError`: `chunk_size` below 1.
        `ImportError`: on the first answer, where vLLM is missing.
    """

    is_lookup = False

    def __init__(
        self,
        model: str,
        settings: SamplingSettings,
        *,
        adapter: str | None = None,
        chunk_size: int = 512,
        chat_template_kwargs: dict[str, Any] | None = None,
        **engine_kwargs: Any,
    ):
        if chunk_size < 1:
            raise ValueError(f"`chunk_size` is {chunk_size!r}: it must be at least 1.")
        self.name = model
        self.settings = settings
        self.adapter = adapter
        self._chunk_size = chunk_size
        self._template_options = dict(chat_template_kwargs or {})
        self._engine_kwargs = engine_kwargs
        self._engine: Any = None
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded when first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._engine_kwargs.get("tokenizer", self.name), self._engine_kwargs)
        return self._tokenizer

    def check_model(self) -> None:
        """Raises a `BadModel` if config, weights or tokenizer of the model cannot be used; the engine is not started."""
        with named(f"The model {self.name!r}"):
            config = read_config(self.name, self._engine_kwargs)
            check_files(self.name, config, self._engine_kwargs, by_transformers=False)
            if self.adapter is not None:
                check_adapter(self.adapter, config, self._engine_kwargs)
            _ = self.tokenizer

    @cached_property
    def _turn_ends(self) -> list[int]:
        """The token that the chat template ends turns with, where it is not the tokenizer's end token."""
        return [token for token in [turn_end(self.tokenizer)] if token not in (None, self.tokenizer.eos_token_id)]

    def describe(self) -> dict[str, Any]:
        options = {key: value for key, value in sorted(self._engine_kwargs.items()) if key not in RUNS_ON}
        return recorded_description(
            {
                "sampler": "vllm",
                "model": self.name,
                "adapter": self.adapter,
                "settings": self.settings.describe(),
                **describe_template(self.tokenizer, self._template_options),
                "model_options": options,
                "weights": [describe_files(self.name), describe_files(self.adapter)],
            }
        )

    def load(self) -> None:
        """Starts the engine now."""
        if self._engine is None:
            self._engine = _import_vllm().LLM(model=self.name, **self._engine_options())

    def check_requests(self, requests: Iterable[Request]) -> None:
        """Raises what the tokenizer raises for such prompts, for want of a chat template say. Nothing is loaded for it."""
        for request in requests:
            encode_prompt(self.tokenizer, request, self._template_options)

    def sample(self, requests: Iterable[Request]) -> Iterator[tuple[Request, int, Answer]]:
        reading = iter(requests)
        while chunk := list(islice(reading, self._chunk_size)):
            yield from self._answer(chunk)

    def _answer(self, chunk: list[Request]) -> Iterator[tuple[Request, int, Answer]]:
        vllm = _import_vllm()
        self.load()
        asked = []
        for request in chunk:
            ids = encode_prompt(self.tokenizer, request, self._template_options)
            asked += [(request, sample, ids) for sample in request.samples]
        if not asked:
            return
        answers: dict[int, Answer] = {}
        waiting = list(range(len(asked)))
        for attempt in range(ATTEMPTS):
            for place, answer in zip(waiting, self._generate(vllm, [asked[i] for i in waiting], attempt), strict=True):
                answers[place] = answer
            waiting = [place for place in waiting if ending(answers[place].finish_reason) == "failed"]
            if not waiting:
                break
        for place, (request, sample, _) in enumerate(asked):
            yield request, sample, as_counted(request.prompt, answers[place])

    def _generate(self, vllm: Any, asked: list[tuple[Request, int, list[int]]], attempt: int) -> Iterator[Answer]:
        outputs = self._engine.generate(
            [{"prompt_token_ids": ids} for _, _, ids in asked],
            sampling_params=[self._params(vllm, request, sample, attempt) for request, sample, _ in asked],
            lora_request=self._lora_request(),
            use_tqdm=False,
        )
        for (request, _, ids), output in zip(asked, outputs, strict=True):
            done = output.outputs[0]
            tokens = list(done.token_ids)
            text, has_stop = cut_at(decode_answer(self.tokenizer, request, ids, tokens), self.settings.stop)
            is_ended = has_stop and ending(done.finish_reason) == "cut"
            yield Answer(text, "stop" if is_ended else done.finish_reason, len(tokens))

    def _engine_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"enable_prefix_caching": True}
        if self.adapter is not None:
            rank = PeftConfig.from_pretrained(self.adapter).r
            options |= {"enable_lora": True, "max_lora_rank": min(r for r in LORA_RANKS if r >= rank)}
        return options | self._engine_kwargs

    def _params(self, vllm: Any, request: Request, sample: int, attempt: int) -> Any:
        settings = self.settings
        # Base models may end turns with a token that the engine does not know as an end
        ends = {} if isinstance(request.prompt, str) or not self._turn_ends else {"stop_token_ids": self._turn_ends}
        return vllm.SamplingParams(
            n=1,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_new_tokens,
            stop=list(settings.stop),
            seed=settings.answer_seed(request.key, sample, attempt),
            **ends,
        )

    def _lora_request(self) -> Any:
        if self.adapter is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest("adapter", 1, self.adapter)

    def close(self) -> None:
        """Ends the engine and frees its memory. It is started again if more is asked."""
        if hasattr(self._engine, "shutdown"):  # in newer releases; older ones end with the object
            self._engine.shutdown()
        self._engine = None
        clear_device_cache(garbage_collection=True)


def _import_vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise ImportError(
            "vLLM is missing: install it by `pip install trl-kd[vllm]`, on a machine that it runs on."
        ) from error
    return vllm
