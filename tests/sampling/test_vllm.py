"""What `VLLMSampler` asks of vLLM and makes of its answers.

The engine itself is not run here: it needs a GPU. A stand-in module with the interface of `vllm.LLM`, `vllm.SamplingParams`
and `vllm.lora.request.LoRARequest` takes its place, which refuses any other argument than vLLM 0.33 knows.
"""

import random
import sys
from dataclasses import dataclass, field
from itertools import count, islice
from types import ModuleType, SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model

from tests.conftest import make_model, make_tokenizer, save_tiny
from tests.responses.templates import CHATML, tokenizer_with
from trl_kd.sampling import Request, SamplingSettings
from trl_kd.sampling.vllm import VLLMSampler


SETTINGS = SamplingSettings(temperature=0.7, top_p=0.9, max_new_tokens=6, seed=3)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int | None = 16
    stop: list[str] = field(default_factory=list)
    seed: int | None = None
    stop_token_ids: list[int] | None = None


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class LLM:
    """Answers with digits that depend on the seed; an odd seed ends with the end token."""

    made: list["LLM"] = []

    def __init__(self, model: str, **options):
        self.model, self.options, self.calls = model, options, []
        LLM.made.append(self)

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None, priority=None):
        assert isinstance(prompts, list)
        assert len(prompts) == len(sampling_params)
        self.calls.append((prompts, sampling_params, lora_request))
        outputs = []
        for params in sampling_params:
            rng = random.Random(params.seed)
            ids = [rng.randrange(3, 13) for _ in range(params.max_tokens)]
            ended = params.seed % 2 == 1
            if ended:
                ids[-1] = 1
            done = SimpleNamespace(token_ids=tuple(ids), finish_reason="stop" if ended else "length", text="unused")
            outputs.append(SimpleNamespace(outputs=[done]))
        return outputs


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    LLM.made = []
    package, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    package.LLM, package.SamplingParams, request.LoRARequest = LLM, SamplingParams, LoRARequest
    for module in (package, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def test_every_answer_is_a_request_with_its_own_seed(tiny_dir):
    sampler = VLLMSampler(tiny_dir, SETTINGS)
    requests = [Request("a", "1+1=", (0, 2)), Request("b", CHAT, (1,))]
    drawn = list(sampler.sample(requests))
    (engine,) = LLM.made
    ((prompts, params, lora),) = engine.calls
    tokenizer = make_tokenizer()
    assert [tokenizer.decode(prompt["prompt_token_ids"]) for prompt in prompts] == [
        *("1+1=", "1+1="),
        "s?Be brief.u?1+1?a?",
    ]
    seeds = [SETTINGS.answer_seed(*place) for place in (("a", 0), ("a", 2), ("b", 1))]
    assert params == [SamplingParams(1, 0.7, 0.9, 6, [], seed) for seed in seeds]
    assert lora is None
    assert (engine.model, engine.options) == (tiny_dir, {"enable_prefix_caching": True})
    assert [(request.key, sample) for request, sample, _ in drawn] == [("a", 0), ("a", 2), ("b", 1)]
    for (_, _, answer), seed in zip(drawn, seeds, strict=True):
        assert answer.tokens == 6
        assert answer.finish_reason == ("stop" if seed % 2 else "length")
        assert answer.text.isdigit()
        assert len(answer.text) == 6 - seed % 2  # the end token is no text


def test_turns_end_where_the_chat_template_ends_them(tmp_path):
    """Also with a base model, whose end token is another one."""
    tokenizer = tokenizer_with(CHATML)
    folder = save_tiny(tmp_path / "base", tokenizer, vocab_size=len(tokenizer))
    list(VLLMSampler(folder, SETTINGS).sample([Request("a", CHAT), Request("b", "1+1=")]))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [params.stop_token_ids for params in LLM.made[0].calls[0][1]] == [[end], None]


def test_stop_texts_are_passed_on_and_cut_off(tiny_dir):
    settings = SamplingSettings(max_new_tokens=20, stop=("1", "2"))
    drawn = [answer for _, _, answer in VLLMSampler(tiny_dir, settings).sample([Request("a", "1+1=", (0, 1, 2))])]
    assert LLM.made[0].calls[0][1][0].stop == ["1", "2"]
    assert not any("1" in answer.text or "2" in answer.text for answer in drawn)


@pytest.mark.parametrize("breaks", [1, 5])
def test_an_answer_that_is_broken_off_is_asked_for_again(tiny_dir, monkeypatch, breaks):
    generate = LLM.generate

    def breaking(self, prompts, **options):
        outputs = generate(self, prompts, **options)
        if len(self.calls) <= breaks:
            outputs[0].outputs[0].finish_reason = "abort"
        return outputs

    monkeypatch.setattr(LLM, "generate", breaking)
    drawn = [answer for _, _, answer in VLLMSampler(tiny_dir, SETTINGS).sample([Request("a", "1+1=", (0, 1))])]
    (engine,) = LLM.made
    seeds = [[params.seed for params in sampling_params] for _, sampling_params, _ in engine.calls]
    again = [[SETTINGS.answer_seed("a", 0, attempt)] for attempt in range(1, min(breaks, 2) + 1)]
    assert seeds == [[SETTINGS.answer_seed("a", sample) for sample in (0, 1)], *again]
    assert (drawn[0].text is None) == (breaks > 2)
    assert drawn[1].text is not None


def test_it_reads_a_chunk_at_a_time_and_starts_one_engine(tiny_dir):
    sampler = VLLMSampler(tiny_dir, SETTINGS, chunk_size=3)
    drawing = sampler.sample(Request(str(i), "1+1=") for i in count())
    assert LLM.made == []
    assert [request.key for request, _, _ in islice(drawing, 7)] == [str(i) for i in range(7)]
    (engine,) = LLM.made
    assert [len(prompts) for prompts, _, _ in engine.calls] == [3, 3, 3]
    sampler.close()
    list(sampler.sample([Request("a", "1")]))
    assert len(LLM.made) == 2


def test_an_adapter_is_asked_with_its_rank(tiny_dir, tmp_path):
    folder = str(tmp_path)
    get_peft_model(make_model(), LoraConfig(r=12, target_modules=["q_proj"])).save_pretrained(folder)
    list(VLLMSampler(tiny_dir, SETTINGS, adapter=folder).sample([Request("a", "1")]))
    (engine,) = LLM.made
    assert engine.options == {"enable_prefix_caching": True, "enable_lora": True, "max_lora_rank": 16}
    assert engine.calls[0][2] == LoRARequest("adapter", 1, folder)


def test_options_of_the_engine(tiny_dir):
    options = {"dtype": "bfloat16", "tensor_parallel_size": 2, "gpu_memory_utilization": 0.5, "max_model_len": 64}
    sampler = VLLMSampler(tiny_dir, SETTINGS, quantization="bitsandbytes", **options)
    list(sampler.sample([Request("a", "1")]))
    assert LLM.made[0].options == {"enable_prefix_caching": True, "quantization": "bitsandbytes", **options}


def test_descriptions(tiny_dir, tmp_path):
    plain = VLLMSampler(tiny_dir, SETTINGS).describe()
    fast = VLLMSampler(tiny_dir, SETTINGS, chunk_size=3, tensor_parallel_size=2, hf_token="hf_secret").describe()
    assert fast == plain
    others = [
        VLLMSampler(tiny_dir, SETTINGS, dtype="bfloat16").describe(),
        VLLMSampler(tiny_dir, SamplingSettings(), quantization="fp8").describe(),
        VLLMSampler(tiny_dir, SETTINGS, chat_template_kwargs={"enable_thinking": False}).describe(),
        VLLMSampler(save_tiny(tmp_path, seed=1), SETTINGS).describe(),
    ]
    assert all(other != plain for other in others)
    assert LLM.made == []


def test_a_missing_vllm_is_one_sentence(tiny_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"vLLM is missing: install it by `pip install trl-kd\[vllm\]`"):
        list(VLLMSampler(tiny_dir, SETTINGS).sample([Request("a", "1")]))
    with pytest.raises(ValueError, match="`chunk_size` is 0"):
        VLLMSampler(tiny_dir, SETTINGS, chunk_size=0)
