"""A model's own logits are what is scored and matched, whatever it does behind its backbone."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    ModernBertDecoderConfig,
    OPTConfig,
    RecurrentGemmaConfig,
    xLSTMConfig,
)
from transformers.modeling_outputs import CausalLMOutput

from tests.conftest import CHARACTERS, make_model, make_tokenizer
from trl_kd.losses.heads import Head
from trl_kd.preferences.likelihood import TeacherLikelihood
from trl_kd.sampling.own_logits import OwnLogits, difference, evaluating, not_own, probe, text_ids
from trl_kd.trainers.common.output_heads import head_logits, output_head


TOKENS = len(CHARACTERS) + 3
SIZES = {
    "vocab_size": TOKENS,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
LAYERS = {"intermediate_size": 48, "num_hidden_layers": 3}
OTHERS = {
    "a layer before the output layer": lambda: ModernBertDecoderConfig(
        **SIZES, **LAYERS, cls_token_id=1, sep_token_id=1
    ),
    "a cap of another name": lambda: RecurrentGemmaConfig(
        **SIZES, **LAYERS, num_key_value_heads=2, head_dim=8, lru_width=32, attention_window_size=64
    ),
    "a cap of a third name": lambda: xLSTMConfig(
        **{
            name: SIZES[name] for name in ("vocab_size", "hidden_size", "pad_token_id", "eos_token_id", "bos_token_id")
        },
        num_hidden_layers=2,
        num_heads=2,
        qk_dim_factor=0.5,
        v_dim_factor=1.0,
        chunk_size=16,
        max_inference_chunksize=64,
    ),
}


def make_other(kind: str, seed: int = 0, scale: float = 0.4):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(OTHERS[kind]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, scale)
    return model.eval()


def with_head_adapter(seed: int = 0):
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    return get_peft_model(make_model(seed), config).eval()


class Masked(nn.Linear):
    """Some words are never said."""

    def forward(self, hidden):
        logits = super().forward(hidden)
        logits[..., 5:9] = -math.inf
        return logits


def masked_model(bias: float):
    """`bias` is what the masked words have in the output layer."""
    model = make_model()
    head = Masked(model.lm_head.in_features, TOKENS)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[5:9] = bias
    model.lm_head = head
    return model.eval()


ORDINARY = {
    "Llama": lambda: make_model(),
    "Llama in bfloat16": lambda: make_model().bfloat16(),
    "LoRA elsewhere": lambda: get_peft_model(
        make_model(), LoraConfig(target_modules="all-linear", init_lora_weights=False)
    ),
    "a cap": lambda: AutoModelForCausalLM.from_config(
        Gemma2Config(
            **SIZES, **LAYERS, head_dim=8, num_key_value_heads=2, final_logit_softcapping=1.5, initializer_range=0.5
        )
    ),
    "a decoder inside its backbone": lambda: AutoModelForCausalLM.from_config(
        OPTConfig(**SIZES, num_hidden_layers=2, ffn_dim=48, word_embed_proj_dim=32)
    ).eval(),
    "masked words that are never said": lambda: masked_model(-50.0),
}


def look(model):
    found = probe(model, make_tokenizer(), "The model")
    return found, not_own(model, found, lambda hidden_NH: head_logits(model, hidden_NH))


@pytest.mark.parametrize("kind", ORDINARY)
def test_an_ordinary_model_is_its_output_layer(kind):
    found, differs = look(ORDINARY[kind]())
    assert differs is None
    assert len(found.logits) >= 17


@pytest.mark.parametrize("kind", OTHERS)
def test_another_model_says_what_it_says(kind):
    model = make_other(kind)
    found, differs = look(model)
    assert differs is not None
    ids = text_ids(make_tokenizer(), model.config)
    with torch.no_grad():
        torch.testing.assert_close(
            differs.logits(found.hidden), model(ids, use_cache=False).logits[0], rtol=1e-5, atol=1e-5
        )
        parts = torch.cat([differs.logits(part) for part in found.hidden.split(5)])
        torch.testing.assert_close(parts, found.logits, rtol=1e-5, atol=1e-5)
    assert "forward" not in vars(model.base_model)


@pytest.mark.parametrize("kind", ["a cap of another name", "a cap of a third name"])
def test_a_cap_is_known_before_it_can_be_seen(kind):
    _, differs = look(make_other(kind, scale=1e-3))
    assert "capped by `" in differs.reason


def test_an_adapter_on_the_output_layer_counts():
    model = with_head_adapter()
    found, differs = look(model)
    assert "nats" in differs.reason
    with torch.no_grad():
        torch.testing.assert_close(differs.logits(found.hidden), model(input_ids=found.ids, use_cache=False).logits[0])


def test_masked_words_that_the_output_layer_would_say_are_found():
    _, differs = look(masked_model(0.0))
    assert differs is not None


def test_a_mask_is_finite():
    own = torch.tensor([[0.0, 1.0, -math.inf]])
    assert difference(torch.tensor([[0.0, 1.0, -60.0]]), own) < 1e-6
    assert 1 < difference(torch.tensor([[0.0, 1.0, 3.0]]), own) < 3


def test_a_packed_output_layer_is_no_matrix():
    model = make_model()
    found = probe(model, make_tokenizer(), "The model")
    differs = not_own(model, found, lambda hidden_NH: Head(hidden_NH, torch.zeros(7, 1)).logits())
    assert "is no matrix" in differs.reason


def test_looking_leaves_no_trace():
    model = make_model(attention_dropout=0.5).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    weights = [p.clone() for p in model.parameters()]
    look(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    with evaluating(model):
        assert not any(module.training for module in model.modules())


def test_dropout_is_off_meanwhile():
    model = get_peft_model(
        make_model(), LoraConfig(lora_dropout=0.5, init_lora_weights=False, target_modules="all-linear")
    )
    logits = [probe(model.train(mode), make_tokenizer(), "The model").logits for mode in (True, False)]
    assert torch.equal(*logits)


def test_a_model_without_a_backbone_is_told():
    """It can be sampled, but no loss can be computed."""

    model = make_model().eval()
    words, head = model.model.embed_tokens, model.lm_head
    model.forward = lambda input_ids, **kwargs: CausalLMOutput(logits=head(words(input_ids)))
    found = probe(model, make_tokenizer(), "The model")
    with pytest.raises(ValueError, match="The class LlamaForCausalLM calls no backbone"):
        not_own(model, found, lambda hidden_NH: hidden_NH)


def test_broken_weights_are_told():
    model = make_model()
    model.lm_head.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="The model gives logits that are NaN or infinite"):
        probe(model, make_tokenizer(), "The model")


# ---- The likelihood of responses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*(lambda kind=kind: make_other(kind) for kind in OTHERS), with_head_adapter])
def test_likelihood_is_the_models_own(make):
    model, tokenizer = make(), make_tokenizer()
    prompts, completions = ["1+1=", "Why"], ["25", " so, and no more"]
    scores = TeacherLikelihood(
        model, length_normalized=False, processing_class=tokenizer, max_length=100, chunk_tokens=5
    ).score(prompts, completions)
    for prompt, completion, score in zip(prompts, completions, scores, strict=True):
        ids = torch.tensor([[*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]])
        start = len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logps = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].log_softmax(-1)
        assert score == pytest.approx(logps.gather(-1, ids[0, start:, None]).sum().item(), abs=1e-4)


def test_own_logits_under_autocast_are_the_same_in_a_backward():
    model = make_other("a layer before the output layer")
    found, _ = look(model)
    own = OwnLogits(model, found)
    with torch.autocast("cpu", torch.bfloat16):
        head = output_head(model, found.hidden, own)
        inside = head.own_logits(found.hidden)
    assert inside.dtype == torch.bfloat16
    assert torch.equal(head.own_logits(found.hidden), inside)
