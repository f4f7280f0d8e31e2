"""Only a causal language model continues texts: others are refused, most of them before their weights are read."""

import pytest
import torch
from transformers import (
    AutoConfig,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    XLMConfig,
    XLNetConfig,
)

from tests.conftest import CHARACTERS, make_model, make_tokenizer, refuse_weights, save_tiny
from trl_kd import MMPbKDConfig, MMPbKDTrainer, OnlinePbKDConfig, OnlinePbKDTrainer, PbKDConfig, PbKDTrainer
from trl_kd.preferences.likelihood import TeacherLikelihood
from trl_kd.sampling import SamplingSettings
from trl_kd.sampling.causal import check_causality, check_kind
from trl_kd.sampling.local import LocalSampler
from trl_kd.sampling.own_logits import probe


TOKENS = len(CHARACTERS) + 3
BERT = {
    "vocab_size": TOKENS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}

REFUSED = {
    "encoder-decoder": (T5Config(), ["T5ForConditionalGeneration"], "an encoder-decoder"),
    "masked language model": (BertConfig(), ["BertForMaskedLM"], "of the class BertForMaskedLM"),
    "encoder as a decoder": (BertConfig(), ["BertLMHeadModel"], "an encoder .* `is_decoder=False`"),
    "classifier": (LlamaConfig(), ["LlamaForSequenceClassification"], "of the class LlamaForSequenceClassification"),
    "backbone": (LlamaConfig(), ["LlamaModel"], "of the class LlamaModel"),
    "remote code": (LlamaConfig(), ["TheirModelForMaskedLM"], "of the class TheirModelForMaskedLM"),
    "Gemma's embeddings": (
        Gemma3TextConfig(use_bidirectional_attention=True),
        ["Gemma3ForCausalLM"],
        "a bidirectional model",
    ),
    "XLM": (XLMConfig(), ["XLMWithLMHeadModel"], "a bidirectional model"),
    "XLNet": (XLNetConfig(), ["XLNetLMHeadModel"], "a bidirectional model"),
}
TAKEN = {
    "Llama": (LlamaConfig(), ["LlamaForCausalLM"]),
    "GPT-2": (GPT2Config(), ["GPT2LMHeadModel"]),
    "BERT as a decoder": (BertConfig(is_decoder=True), ["BertLMHeadModel"]),
    "half of BART": (
        BartForCausalLM(
            BartConfig(vocab_size=9, d_model=4, decoder_layers=1, decoder_ffn_dim=4, decoder_attention_heads=2)
        ).config,
        ["BartForCausalLM"],
    ),
    "images and text": (LlavaConfig(), ["LlavaForConditionalGeneration"]),
    "remote code": (LlamaConfig(), ["TheirModel"]),
    "unknown": (LlamaConfig(), []),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_are_refused(kind):
    config, architectures, what = REFUSED[kind]
    with pytest.raises(ValueError, match=f"^The teacher is {what}.*: a causal language model is needed"):
        check_kind(config, architectures, "The teacher")


@pytest.mark.parametrize("kind", TAKEN)
def test_language_models_are_taken(kind):
    check_kind(*TAKEN[kind], "The teacher")


# ---- Before weights load, wherever one is expected ------------------------------------------------------------------


def save_bert(folder):
    model = BertLMHeadModel(BertConfig(**BERT))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def save_t5(folder):
    config = T5Config(
        vocab_size=TOKENS, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def no_weights(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("trl_kd._trl.models.create_model_from_path", refuse)
    refuse_weights(monkeypatch, PreTrainedModel)


@pytest.mark.parametrize("save", [save_bert, save_t5])
def test_nobody_loads_them(save, tmp_path, tiny_dir, pairs, settings, no_weights):
    from datasets import Dataset

    name, rows = save(tmp_path / "other"), Dataset.from_list(pairs)
    prompts = rows.select_columns(["prompt"])
    online = OnlinePbKDConfig(**settings, num_generations=2, rm_warmup_accuracy=0.0)
    answered = prompts.add_column("completion", ["2"] * len(prompts))
    ways = {
        "sampler": lambda: LocalSampler(name, SamplingSettings()).load(),
        "likelihood": lambda: TeacherLikelihood(name),
        "teacher, tokens": lambda: PbKDTrainer(
            tiny_dir, args=PbKDConfig(**settings, imitation="token"), train_dataset=rows, teacher_model=name
        ),
        "teacher, matched": lambda: MMPbKDTrainer(
            tiny_dir, name, args=MMPbKDConfig(**settings, moment_coef=0.0), train_dataset=prompts
        ),
        "student, offline": lambda: PbKDTrainer(name, args=PbKDConfig(**settings), train_dataset=rows),
        "student, white-box": lambda: MMPbKDTrainer(
            name, tiny_dir, args=MMPbKDConfig(**settings), train_dataset=prompts
        ),
        "student, online": lambda: OnlinePbKDTrainer(
            name, args=online, train_dataset=answered, preference_dataset=rows
        ),
    }
    for build in ways.values():
        with pytest.raises(ValueError, match="a causal language model is needed|must be a causal language model"):
            build()


def test_a_trunk_of_an_encoder_is_refused(tmp_path, tiny_dir, pairs, settings, no_weights):
    from datasets import Dataset

    rows = Dataset.from_list(pairs)
    args = OnlinePbKDConfig(**settings, num_generations=2, rm_warmup_accuracy=0.0)
    with pytest.raises(ValueError, match="of which `reward_model` is to be made, is an encoder"):
        OnlinePbKDTrainer(
            tiny_dir,
            args=args,
            train_dataset=rows.select_columns(["prompt"]).add_column("completion", ["2"] * len(rows)),
            preference_dataset=rows,
            reward_model=save_bert(tmp_path / "trunk"),
        )


def test_models_in_memory_are_refused_too():
    model = BertForMaskedLM(BertConfig(**BERT))
    with pytest.raises(ValueError, match="of the class BertForMaskedLM"):
        LocalSampler(model, SamplingSettings(), tokenizer=make_tokenizer())


def test_a_missing_model_is_not_called_an_encoder(tmp_path):
    with pytest.raises(OSError, match="cannot be loaded"):
        LocalSampler(str(tmp_path / "nothing"), SamplingSettings()).load()


# ---- What no config says --------------------------------------------------------------------------------------------


def both_ways(model):
    """Lets a Llama attend to both sides, without a word of it in its config."""
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    original = model.model.forward

    def forward(*args, attention_mask=None, input_ids=None, **kwargs):
        length = input_ids.size(1)
        mask = torch.zeros(len(input_ids), 1, length, length, dtype=model.dtype)
        return original(*args, attention_mask=mask, input_ids=input_ids, **kwargs)

    model.model.forward = forward
    return model.eval()


def check(model):
    check_causality(model, probe(model, make_tokenizer(), "The model"), "The model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_reads_later_tokens_is_found(dtype):
    with pytest.raises(ValueError, match="The model reads later tokens .* is LlamaForCausalLM"):
        check(both_ways(make_model().to(dtype)))
    check(make_model().to(dtype))


def test_an_untrained_bidirectional_model_is_found():
    with pytest.raises(ValueError, match="reads later tokens"):
        check(BertLMHeadModel(BertConfig(**BERT)))
    check(BertLMHeadModel(BertConfig(**BERT, is_decoder=True)))


def test_noise_is_no_leak():
    """A model that says something else each time is not told to read later tokens."""
    model = make_model()
    noise = torch.Generator().manual_seed(0)
    model.lm_head.register_forward_hook(
        lambda module, args, output: output + 0.1 * torch.randn(output.shape, generator=noise)
    )
    check(model)


@pytest.mark.parametrize(
    "quantization", [{"quant_method": "bitsandbytes", "load_in_8bit": True}, {"quant_method": "fp8"}]
)
def test_numbers_of_a_whole_batch_are_not_looked_at(quantization):
    model = both_ways(make_model())
    model.config.quantization_config = quantization
    check(model)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ValueError, match="reads later tokens"):
        check(model)


def test_looking_for_leaks_leaves_no_trace():
    model = make_model(attention_dropout=0.5).train()
    before = torch.get_rng_state()
    check(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_a_likelihood_is_refused_where_no_config_says_so():
    model = both_ways(make_model())
    preference = TeacherLikelihood(model, processing_class=make_tokenizer())
    with pytest.raises(ValueError, match="reads later tokens"):
        preference.score(["1+1="], ["2"])


def test_a_saved_model_is_taken(tmp_path):
    name = save_tiny(tmp_path / "model")
    assert AutoConfig.from_pretrained(name).architectures == ["LlamaForCausalLM"]
    LocalSampler(name, SamplingSettings()).load()
