import json
import logging
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
)
from trl import DPOConfig, DPOTrainer

from tests.conftest import CHARACTERS, make_model, make_tokenizer, save_tiny
from tests.reference.pbkd import sequence_logps
from trl_kd.preferences.likelihood import TeacherLikelihood
from trl_kd.preferences.tokens import tokenize_response


USER = [{"role": "user", "content": "how many?"}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}]
PROMPTS = ["1+1=", "100 - 1 = ", USER, [{"role": "system", "content": "be brief"}, *USER], "9*9="]
COMPLETIONS = ["2", "it is 99, of course", "none", [{"role": "assistant", "content": "a great many"}], ""]


@pytest.fixture(scope="module")
def teacher():
    return make_model(seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def family(name):
    """A tiny model of a family that does something to its logits."""
    settings = {
        "vocab_size": len(CHARACTERS) + 3,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.5,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    if name == "cohere":
        return CohereForCausalLM(CohereConfig(**settings, logit_scale=0.25))
    return Gemma2ForCausalLM(Gemma2Config(**settings, final_logit_softcapping=2.0))


def reference(model, tokenizer, mean=True):
    """Each row alone through a float64 copy, its tokens one after the other."""
    double = type(model)(model.config).double().eval()
    double.load_state_dict({name: weight.double() for name, weight in model.state_dict().items()})
    scores = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        with torch.no_grad():
            logps = sequence_logps(double, *tokenize_response(tokenizer, prompt, completion))
        total = sum(float(logp) for logp in logps)
        scores.append(total / len(logps) if mean else total)
    return scores


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
def test_equals_plain_loops(teacher, tokenizer, name, mean):
    model = teacher if name == "llama" else family(name)
    preference = TeacherLikelihood(model, length_normalized=mean, processing_class=tokenizer, chunk_tokens=7)
    scores = preference.score(PROMPTS, COMPLETIONS)
    assert scores == pytest.approx(reference(model, tokenizer, mean), abs=2e-5)
    assert len(set(scores)) == len(scores)


@pytest.mark.parametrize("settings", [{"max_batch_tokens": 2}, {"max_batch_tokens": 60}, {"chunk_tokens": 1}])
def test_batches_and_chunks_change_nothing(teacher, tokenizer, settings):
    whole = TeacherLikelihood(teacher, processing_class=tokenizer).score(PROMPTS, COMPLETIONS)
    other = TeacherLikelihood(teacher, processing_class=tokenizer, **settings).score(PROMPTS, COMPLETIONS)
    assert other == pytest.approx(whole, abs=1e-6)


def test_padding_changes_nothing(teacher, tokenizer):
    preference = TeacherLikelihood(teacher, processing_class=tokenizer)
    alone = [preference.score([p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    long = preference.score([*PROMPTS, "a" * 60], [*COMPLETIONS, "b" * 60])
    assert long[:-1] == pytest.approx(alone, abs=1e-6)


def test_no_more_logits_than_a_chunk_are_ever_there(teacher, tokenizer):
    rows = []
    preference = TeacherLikelihood(teacher, processing_class=tokenizer, chunk_tokens=5)
    preference.load()  # which looks at the model's own logits of a short text
    hook = teacher.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[:-1].numel()))
    try:
        preference.score(PROMPTS, COMPLETIONS)
    finally:
        hook.remove()
    responses = [tokenize_response(tokenizer, p, c)[1] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert max(rows) <= 5
    assert sum(rows) == sum(map(len, responses))  # and none for the tokens of prompts


def test_tokens_are_those_of_dpo(tokenizer):
    from datasets import Dataset

    stand_in = SimpleNamespace(_tokenizer=tokenizer)
    for rows in (slice(0, 2), slice(2, 4)):
        data = [
            {"prompt": p, "chosen": c if isinstance(p, str) or isinstance(c, list) else answer(c)}
            for p, c in zip(PROMPTS[rows], COMPLETIONS[rows], strict=True)
        ]
        dataset = Dataset.from_list([{**row, "rejected": row["chosen"]} for row in data])
        for row in DPOTrainer._prepare_dataset(stand_in, dataset, tokenizer, DPOConfig(bf16=False), "train"):
            ids = tokenize_response(tokenizer, row["prompt"], row["chosen"])
            assert ids == (row["prompt_ids"], row["chosen_ids"])


def answer(text):
    return [{"role": "assistant", "content": text}]


def test_a_response_that_was_cut_off_has_no_end_token(teacher, tokenizer):
    preference = TeacherLikelihood(teacher, processing_class=tokenizer, length_normalized=False)
    for prompt in ("1+1=", USER):
        cut, whole = preference.score([prompt] * 2, ["22"] * 2, finish_reason=["length", "stop"])
        (unknown,) = preference.score([prompt], ["22"])
        context, response = tokenize_response(tokenizer, prompt, "22")
        with torch.no_grad():
            logps = sequence_logps(teacher, context, response)
        assert cut == pytest.approx(float(sum(logps[:2])), abs=1e-4)
        assert whole == pytest.approx(float(sum(logps)), abs=1e-4)
        assert unknown == pytest.approx(whole, abs=1e-6)
    assert preference.score(["1+1="], [""], finish_reason=["length"]) == [None]


def test_finish_reasons_of_both_sides(teacher, tokenizer):
    preference = TeacherLikelihood(teacher, processing_class=tokenizer, length_normalized=False)
    same = {"first_finish_reason": ["length"], "second_finish_reason": ["stop"]}
    assert preference(["1+1="], ["2"], ["2"], **same) == [1.0]
    assert preference(["1+1="], ["2"], ["2"]) == [0.5]


def test_what_the_template_writes_after_the_end_is_left_out(teacher):
    tokenizer = make_tokenizer()
    plain = TeacherLikelihood(teacher, processing_class=tokenizer).score([USER], ["2"])
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "{{ eos_token + '!!' }}")
    assert TeacherLikelihood(teacher, processing_class=tokenizer).score([USER], ["2"]) == plain


def test_tools_and_template_variables_reach_the_template(teacher):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ tools[0]['function']['name'] if tools }}{{ mood }}" + tokenizer.chat_template
    preference = TeacherLikelihood(teacher, processing_class=tokenizer)
    columns = {"tools": [json.dumps(TOOLS), TOOLS, None], "chat_template_kwargs": [None, {}, {"mood": "glad"}]}
    scores = preference.score([USER] * 3, ["2"] * 3, **columns)
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert scores[0] != pytest.approx(preference.score([USER], ["2"])[0], abs=1e-6)
    context, response = tokenize_response(tokenizer, USER, "2", {"mood": "glad"})
    assert tokenizer.decode(context).startswith("glad")
    with torch.no_grad():
        logps = sequence_logps(teacher, context, response)
    assert scores[2] == pytest.approx(float(sum(logps)) / len(logps), abs=1e-5)


def test_long_rows_lose_the_beginning_of_their_prompt(teacher, tokenizer, caplog):
    preference = TeacherLikelihood(teacher, processing_class=tokenizer, max_length=10)
    with caplog.at_level(logging.WARNING, logger="trl_kd"):
        scores = preference.score(["abc" * 9, "c" * 30, "1+1="], ["1234", "1" * 20, "2"])
    assert preference.truncated == 2
    assert caplog.text.count("`max_length` = 10") == 1
    short = TeacherLikelihood(teacher, processing_class=tokenizer)
    assert scores[0] == pytest.approx(short.score(["bcabc"], ["1234"])[0], abs=1e-6)
    assert scores[1] == pytest.approx(short.score(["c"], ["1" * 9], finish_reason=["length"])[0], abs=1e-6)
    assert short.max_length == 128  # the model's positions


def test_by_name_loads_when_first_asked_and_again_after_close(tmp_path, teacher):
    folder = save_tiny(tmp_path, seed=3)
    preference = TeacherLikelihood(folder)
    assert preference._model is None
    first = preference.score(PROMPTS, COMPLETIONS)
    assert first == TeacherLikelihood(teacher, processing_class=make_tokenizer()).score(PROMPTS, COMPLETIONS)
    preference.close()
    assert preference._model is None
    assert preference.score(PROMPTS, COMPLETIONS) == first


def test_quantized(tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = save_tiny(tmp_path, hidden_size=64, intermediate_size=128)
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"}
    preference = TeacherLikelihood(folder, model_init_kwargs=options)
    scores = preference.score(PROMPTS, COMPLETIONS)
    assert type(preference.model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    for prompt, completion, score in zip(PROMPTS, COMPLETIONS, scores, strict=True):
        with torch.no_grad():
            logps = sequence_logps(preference.model, *tokenize_response(preference.tokenizer, prompt, completion))
        assert score == pytest.approx(float(sum(logps)) / len(logps), abs=1e-4)
    assert scores != pytest.approx(TeacherLikelihood(folder).score(PROMPTS, COMPLETIONS), abs=1e-4)


def test_out_of_memory_halves_the_batch(teacher, tokenizer, caplog):
    whole = TeacherLikelihood(teacher, processing_class=tokenizer).score(["1+1="] * 8, list("12345678"))

    def runs_out(module, args, kwargs):
        if len(kwargs["input_ids"]) > 3:
            raise torch.OutOfMemoryError("no more")

    hook = teacher.model.register_forward_pre_hook(runs_out, with_kwargs=True)
    try:
        preference = TeacherLikelihood(teacher, processing_class=tokenizer)
        with caplog.at_level(logging.WARNING, logger="trl_kd"):
            assert preference.score(["1+1="] * 8, list("12345678")) == pytest.approx(whole, abs=1e-6)
    finally:
        hook.remove()
    assert caplog.text.count("Out of memory") == 2  # 8, then 4, then 2 at a time
    assert preference.max_batch_tokens == 2 * 6


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scale": 0.0}, r"`scale` is 0\.0"),
        ({"max_batch_tokens": 0}, "`max_batch_tokens` is 0"),
        ({"max_length": 1}, "`max_length` is 1"),
        ({"chunk_tokens": 0}, "`chunk_tokens` is 0"),
    ],
)
def test_bad_settings(teacher, tokenizer, settings, said):
    with pytest.raises(ValueError, match=said):
        TeacherLikelihood(teacher, processing_class=tokenizer, **settings)


def test_other_kinds_of_models_are_refused_before_their_weights_are_read(tmp_path):
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path / "t5")
    config = make_model().config
    config.architectures = [LlamaForSequenceClassification.__name__]
    config.save_pretrained(tmp_path / "rm")  # configs alone: there are no weights to read
    for folder, name in (("t5", "T5ForConditionalGeneration"), ("rm", "LlamaForSequenceClassification")):
        with pytest.raises(ValueError, match=f"is {name}, which gives no likelihood"):
            TeacherLikelihood(str(tmp_path / folder))


def test_describe(tmp_path):
    folder = save_tiny(tmp_path)
    options = {"dtype": torch.float32, "token": "hf_secret", "device_map": None}
    described = TeacherLikelihood(folder, scale=0.5, model_init_kwargs=options).describe()
    assert "secret" not in json.dumps(described)
    assert (described["preference"], described["model"], described["scale"]) == ("teacher_likelihood", folder, 0.5)
    assert described["model_init_kwargs"] == {"dtype": "torch.float32"}
    other = TeacherLikelihood(folder, scale=0.5, length_normalized=False, model_init_kwargs=options).describe()
    assert other == {**described, "length_normalized": False}
    tokenizer = make_tokenizer()
    tokenizer.chat_template += " "
    assert (
        TeacherLikelihood(folder, processing_class=tokenizer).describe()["chat_template"] != described["chat_template"]
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert TeacherLikelihood(model, scale=0.5).describe()["model"] == folder


def test_a_score_that_is_no_number_is_refused(tokenizer):
    model = make_model(seed=3)
    preference = TeacherLikelihood(model, processing_class=tokenizer)
    preference.load()  # a short text is well: what is NaN here is another word
    model.model.embed_tokens.weight.data[tokenizer("9")["input_ids"][0]] = torch.nan
    with pytest.raises(ValueError, match=r"gives the score nan to a response to '9\*9=': its weights are broken"):
        preference(["9*9="], ["81"], ["80"])


def test_weights_that_are_broken_are_told_without_a_word_of_training(tokenizer):
    model = make_model(seed=3)
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="gives logits that are NaN or infinite: its weights are broken") as caught:
        TeacherLikelihood(model, processing_class=tokenizer)(["9*9="], ["81"], ["80"])
    assert "loss" not in str(caught.value)


def test_an_adapter_is_refused_by_its_folder_and_taken_as_an_object(teacher, tokenizer, tmp_path):
    model = get_peft_model(make_model(seed=3), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="`model` is '.*', an adapter: merge it into its base model .*`PeftModel` object"
    ):
        TeacherLikelihood(str(tmp_path), processing_class=tokenizer)
    scores = TeacherLikelihood(model, processing_class=tokenizer).score(PROMPTS, COMPLETIONS)
    assert scores == TeacherLikelihood(teacher, processing_class=tokenizer).score(PROMPTS, COMPLETIONS)
