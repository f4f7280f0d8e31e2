import copy
import logging
import math

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
)
from trl import RewardConfig, RewardTrainer

from tests.conftest import CHARACTERS, make_model, make_tokenizer, save_tiny
from trl_kd.preferences.reward_model import RewardModelPreference


USER = [{"role": "user", "content": "how many?"}]
PROMPTS = ["1+1=", "100 - 1 = ", USER, [{"role": "system", "content": "be brief"}, *USER], "9*9="]
COMPLETIONS = ["2", "it is 99, of course", "none", [{"role": "assistant", "content": "a great many"}], ""]


def make_reward_model(num_labels=1, pad_token_id=0, **settings):
    config = copy.deepcopy(make_model(**settings).config)
    config.num_labels, config.pad_token_id = num_labels, pad_token_id
    torch.manual_seed(5)
    return LlamaForSequenceClassification(config).eval()


def save_reward_model(folder, **settings):
    make_reward_model(**settings).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model():
    return make_reward_model()


def text_of(prompt, completion):
    """What the reward model reads, written out."""
    if isinstance(prompt, str):
        return prompt + completion + "<eos>"
    completion = completion if isinstance(completion, str) else completion[0]["content"]
    return "".join(m["role"][0] + "?" + m["content"] for m in prompt) + "a?" + completion + "<eos>"


def reference(model, ids):
    """The head on the last hidden state of one row by itself."""
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
    return sum(float(h) * float(w) for h, w in zip(hidden, model.score.weight[0].detach(), strict=True))


def test_equals_the_head_on_the_last_token_of_each_row(model):
    tokenizer = make_tokenizer()
    scores = RewardModelPreference(model, processing_class=tokenizer).score(PROMPTS, COMPLETIONS)
    rows = [tokenizer(text_of(*pair))["input_ids"] for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert scores == pytest.approx([reference(model, row) for row in rows], abs=1e-5)
    assert len(set(scores)) == len(scores)


@pytest.mark.parametrize("missing", ["model", "tokenizer"])
def test_the_last_token_is_found_whatever_is_said_of_padding(model, missing):
    model, tokenizer = copy.deepcopy(model), make_tokenizer()
    expected = RewardModelPreference(model, processing_class=tokenizer).score(PROMPTS, COMPLETIONS)
    if missing == "model":
        model.config.pad_token_id = None
    else:  # then the end token pads, and the reward is read at the token before it, in a batch and alone
        tokenizer.pad_token = None
        rows = [make_tokenizer()(text_of(*pair))["input_ids"] for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
        expected = [reference(model, row[:-1]) for row in rows]
    preference = RewardModelPreference(model, processing_class=tokenizer)
    assert preference.score(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
    alone = [preference.score([p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert alone == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("max_batch_tokens", [2, 50])
def test_batches_change_nothing(model, max_batch_tokens):
    whole = RewardModelPreference(model, processing_class=make_tokenizer())
    other = RewardModelPreference(model, processing_class=make_tokenizer(), max_batch_tokens=max_batch_tokens)
    assert other.score(PROMPTS, COMPLETIONS) == pytest.approx(whole.score(PROMPTS, COMPLETIONS), abs=1e-6)


def test_batches_hold_rows_of_like_length_and_no_more_than_the_budget(model):
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try:
        preference = RewardModelPreference(model, processing_class=make_tokenizer(), max_batch_tokens=40)
        preference.score(["1"] * 9, ["2" * n for n in (3, 18, 3, 48, 18, 3, 3, 18, 3)])
    finally:
        hook.remove()
    assert shapes == [(1, 50), (2, 20), (2, 20), (4, 5)]


def test_rows_are_those_that_a_reward_model_is_trained_on(model, tmp_path):
    from datasets import Dataset

    tokenizer = make_tokenizer()
    preference = RewardModelPreference(model, processing_class=tokenizer)
    folder = save_reward_model(tmp_path)
    args = RewardConfig(output_dir=str(tmp_path / "out"), bf16=False, use_cpu=True, report_to="none")
    for prompt, completion in (("1+1=", "2"), (USER, [{"role": "assistant", "content": "none"}])):
        row = {"chosen": prompt + completion, "rejected": prompt + completion}
        trainer = RewardTrainer(folder, args=args, train_dataset=Dataset.from_list([row]))
        ids = trainer.train_dataset[0]["chosen_ids"]
        assert preference.score([prompt], [completion]) == pytest.approx([reference(model, ids)], abs=1e-5)


def test_bradley_terry_by_default(model):
    preference = RewardModelPreference(model, processing_class=make_tokenizer())
    first, second = preference.score(["1+1="] * 2, ["2", "3"])
    (label,) = preference(["1+1="], ["2"], ["3"])
    assert label == pytest.approx(1 / (1 + math.exp(second - first)))
    hard = RewardModelPreference(model, scale=None, processing_class=make_tokenizer())
    assert hard(["1+1="], ["2"], ["3"]) == [float(first > second)]


def test_long_rows_lose_the_beginning_of_their_prompt(model, caplog):
    tokenizer = make_tokenizer()
    preference = RewardModelPreference(model, processing_class=tokenizer, max_length=10)
    with caplog.at_level(logging.WARNING, logger="trl_kd"):
        scores = preference.score(["x" * 30 + "abcde", "y" * 99], ["1234", "z" * 9])
    assert preference.truncated == 2
    assert caplog.text.count("`max_length` = 10") == 1
    expected = [reference(model, tokenizer(text)["input_ids"]) for text in ("abcde1234<eos>", "z" * 9 + "<eos>")]
    assert scores == pytest.approx(expected, abs=1e-5)
    tokenizer.bos_token = "."
    opened = RewardModelPreference(model, processing_class=tokenizer, max_length=10).score([".xxxabcde"], ["1234"])
    assert opened == pytest.approx([reference(model, tokenizer(".bcde1234<eos>")["input_ids"])], abs=1e-5)


def test_an_encoder_keeps_its_first_token():
    tokenizer = make_tokenizer(CHARACTERS + "^")
    tokenizer.cls_token, tokenizer.eos_token = "^", None
    settings = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, max_position_embeddings=16, **settings
    )
    model = BertForSequenceClassification(config).eval()
    preference = RewardModelPreference(model, processing_class=tokenizer)
    assert preference.max_length == 16  # longer rows would be an error of the model's
    with torch.no_grad():
        expected = [
            float(model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits)
            for text in ("^" + "b" * 15, "^ac")
        ]
    assert preference.score(["^aaa" + "b" * 10, "^a"], ["b" * 5, "c"]) == pytest.approx(expected, abs=1e-5)


def test_by_name(tmp_path):
    folder = save_reward_model(tmp_path)
    preference = RewardModelPreference(folder, model_init_kwargs={"dtype": "float32"})
    assert preference._model is None
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    expected = RewardModelPreference(model, processing_class=make_tokenizer()).score(PROMPTS, COMPLETIONS)
    assert preference.score(PROMPTS, COMPLETIONS) == expected
    preference.close()
    assert preference._model is None
    described = preference.describe()
    assert (described["preference"], described["model"], described["scale"]) == ("reward_model", folder, 1.0)
    assert described["model_init_kwargs"] == {"dtype": "float32"}


def test_dropout_is_off():
    config = make_reward_model().config
    config.attention_dropout = 0.5
    model = LlamaForSequenceClassification(config).train()
    preference = RewardModelPreference(model, processing_class=make_tokenizer())
    assert preference.score(PROMPTS, COMPLETIONS) == preference.score(PROMPTS, COMPLETIONS)


def test_other_models_are_refused_before_their_weights_are_read(tmp_path):
    config = make_reward_model(num_labels=3).config  # configs alone are saved: there are no weights to read
    config.architectures = ["LlamaForSequenceClassification"]
    config.save_pretrained(tmp_path / "three")
    with pytest.raises(ValueError, match="no reward model, but LlamaForSequenceClassification with `num_labels` = 3"):
        RewardModelPreference(str(tmp_path / "three"))
    with pytest.raises(ValueError, match="no reward model, but LlamaForCausalLM with `num_labels` = 2"):
        RewardModelPreference(save_tiny(tmp_path / "causal"))
    config = make_model().config
    config.num_labels, config.architectures = 1, ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="no reward model, but LlamaForCausalLM with `num_labels` = 1"):
        RewardModelPreference(str(tmp_path / "headless"))


def test_a_tokenizer_that_cannot_pad_is_refused(model):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a padding nor an end token"):
        RewardModelPreference(model, processing_class=tokenizer)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_refused(broken):
    model = make_reward_model()
    model.score.weight.data[0, 0] = broken
    preference = RewardModelPreference(model, processing_class=make_tokenizer())
    with pytest.raises(
        ValueError, match=r"gives the score (nan|inf|-inf) to a response to '1\+1=': its weights are broken"
    ):
        preference(["1+1="], ["2"], ["3"])
