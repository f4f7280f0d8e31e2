"""Beside `PbKDTrainer` everybody else who reads responses: states and pairs of MM-PbKD, online imitation, the reward model,
the teacher's likelihood, samplers. They all go by `trl_kd.responses`."""

import logging

import pytest
import torch
from datasets import Dataset

from tests.conftest import make_model, make_tokenizer, save_tiny
from tests.responses.templates import CHATML, R1, TOOLS, calls, says, tokenizer_with
from tests.trainers import mm_cases, online_cases
from trl_kd.preferences.likelihood import TeacherLikelihood
from trl_kd.preferences.reward_model import RewardModelPreference
from trl_kd.sampling import Answer, Request, SamplingSettings
from trl_kd.sampling.column import ColumnSampler
from trl_kd.sampling.local import LocalSampler
from trl_kd.scripts.data import _teacher_texts


USER = [says("user", "1+1=")]
CALLED = [calls("add"), says("tool", "secret 2"), says("assistant", "it is 2")]
PLAIN = [says("assistant", "2")]


def folder(path, template: str, **settings) -> str:
    tokenizer = tokenizer_with(template)
    return save_tiny(path, tokenizer, vocab_size=len(tokenizer), **settings)


@pytest.fixture
def models(tmp_path):
    return lambda template: (folder(tmp_path / "student", template), folder(tmp_path / "teacher", template, seed=1))


def mm(models, template, settings, rows, **options):
    student, teacher = models(template)
    options = {"lmbda": 0.0, "max_steps": 1, "max_completion_length": 60, "shuffle_dataset": False} | options
    return mm_cases.make(student, teacher, {**settings, "per_device_train_batch_size": len(rows)}, rows, **options)


def learnt(trainer) -> list[str]:
    batch = trainer.batches[0]
    mask = (batch["completion_mask"] * batch.get("tool_mask", 1)).bool()
    decode = trainer._tokenizer.decode
    return [decode(ids[kept]) for ids, kept in zip(batch["completion_ids"], mask, strict=True)]


# ---- MM-PbKD ---------------------------------------------------------------------------------------------------------


def test_states_are_the_models_own_words_and_the_rest_is_context(models, settings):
    answers = [(CALLED, "stop"), (PLAIN, None), (PLAIN, "length"), (CALLED, "max_tokens")]
    rows = [{"prompt": USER, "completion": said, "completion_finish_reason": reason} for said, reason in answers]
    trainer = mm(models, TOOLS, settings, rows)
    trainer.train()
    assert learnt(trainer) == ["call add<eos>it is 2<eos>", "2<eos>", "2", "call add<eos>it is 2"]
    whole = [trainer._tokenizer.decode(ids) for ids in trainer.completions[0]]
    assert whole[0] == "call add<eos>[t]secret 2[a]it is 2<eos>"
    batch = trainer.batches[0]
    tokens = int((batch["completion_mask"] * batch["tool_mask"]).sum())
    assert batch["token_weight"] == [pytest.approx(1 / tokens)] * 4


def test_batches_without_such_turns_have_no_tool_mask(models, settings):
    trainer = mm(models, TOOLS, settings, [{"prompt": USER, "completion": PLAIN}] * 2, lmbda=0.5)
    trainer.train()
    assert "tool_mask" not in trainer.batches[0]


def test_both_kinds_of_states_beside_each_other(models, settings):
    rows = [{"prompt": USER, "completion": CALLED}] * 4
    trainer = mm(models, TOOLS, settings, rows, lmbda=0.5)
    trainer.train()
    batch = trainer.batches[0]
    assert batch["on_policy"] == [False, True] * 2
    assert [text == "call add<eos>it is 2<eos>" for text in learnt(trainer)] == [True, False] * 2
    assert all(bool((row == 1).all()) == on for row, on in zip(batch["tool_mask"], batch["on_policy"], strict=True))


def test_options_of_a_row_reach_its_prompt(models, settings):
    rows = [
        {"prompt": USER, "completion": PLAIN, "chat_template_kwargs": one}
        for one in ({"mood": "glad"}, {"tone": "x"}, None)
    ]
    trainer = mm(models, "{{ mood if mood is defined }}" + CHATML, settings, rows, eos_token="<|im_end|>")
    trainer.train()
    prompts = [trainer._tokenizer.decode(ids) for ids in mm_cases.unpadded(trainer.batches[0], "prompt")]
    assert [prompt.partition("<")[0] for prompt in prompts] == ["glad", "", ""]
    assert learnt(trainer) == ["2<|im_end|>"] * 3  # what the template writes behind it is no state


@pytest.mark.parametrize(("reasoning", "said"), [(None, "\n\n2"), ("keep", "so\n</think>\n\n2"), ("strip", "2")])
def test_states_under_a_template_that_drops_reasoning(models, settings, caplog, reasoning, said):
    rows = [{"prompt": USER, "completion": [says("assistant", "so\n</think>\n\n2")]}] * 2
    with caplog.at_level(logging.WARNING):
        trainer = mm(models, R1, settings, rows, reasoning=reasoning, eos_token="<|im_end|>")
    assert ("In 2 of 2 rows of the train dataset what is learnt" in caplog.text) == (reasoning != "keep")
    trainer.train()
    assert learnt(trainer) == [f"{said}<|im_end|>"] * 2


def test_an_end_that_the_student_does_not_stop_at_is_told_of(models, settings, caplog):
    rows = [{"prompt": USER, "completion": PLAIN}] * 2
    with caplog.at_level(logging.WARNING):
        trainer = mm(models, CHATML, settings, rows)
    assert "ends turns with '<|im_end|>', but generation stops at '<eos>'" in caplog.text
    mended = mm(models, CHATML, settings, rows, eos_token="<|im_end|>")
    end = mended._tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert mended.model.generation_config.eos_token_id[0] == mended.eos_token_ids[0] == end
    assert trainer.eos_token_ids == [1]


def test_qs_pairs_read_own_words_alone(models, settings):
    pairs = [{"prompt": USER, "chosen": CALLED, "rejected": PLAIN, "rejected_finish_reason": "length"}] * 2
    trainer = mm(models, TOOLS, settings, [{"prompt": USER, "completion": PLAIN}] * 2, pairs=pairs, pair_held_out=0.0)
    (batch,) = trainer.adversary.pairs.draw()
    decode = trainer._tokenizer.decode
    texts = [decode(ids[kept.bool()]) for ids, kept in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
    assert texts == ["call add<eos>it is 2<eos>"] * 2 + ["2"] * 2


def test_pairs_as_states_keep_the_reason_of_the_teachers_side():
    rows = [
        {"prompt": "1", "chosen": "2", "rejected": "3", "teacher_side": side}
        | {"chosen_finish_reason": "length", "rejected_finish_reason": "stop"}
        for side in ("chosen", "rejected", None)
    ]
    states = _teacher_texts(Dataset.from_list(rows))
    assert states["completion"] == ["2", "3", None]
    assert states["completion_finish_reason"] == ["length", "stop", None]


# ---- Online ----------------------------------------------------------------------------------------------------------


class Says(online_cases.Teacher):
    def __init__(self, text, reason):
        super().__init__()
        self.answer = Answer(text, reason)

    def sample(self, requests):
        return ((request, sample, self.answer) for request in requests for sample in request.samples)


@pytest.mark.parametrize(
    ("text", "reason", "imitated"),
    [
        (CALLED, "stop", "call add<eos>it is 2<eos>"),
        (PLAIN, "MAX_TOKENS", "2"),
        (PLAIN, "stop", "2<eos>"),
    ],
)
def test_online_imitation_learns_own_words_alone(tmp_path, settings, text, reason, imitated):
    student = folder(tmp_path / "student", TOOLS, max_position_embeddings=256)
    options = {"adversary": "mle", "imitation_weight": 1.0, "imitation_radius": "inf", "max_completion_length": 60}
    trainer = online_cases.make(
        *(student, settings, [{"prompt": USER}] * 4),
        **{"teacher": Says(text, reason), "preference_function": online_cases.digits, "max_steps": 1, **options},
    )
    kept = {}
    teacher_rows = trainer._teacher_rows
    trainer._teacher_rows = lambda count: kept.setdefault("rows", teacher_rows(count))
    trainer.train()
    (labels,) = {tuple(row.tolist()) for row in kept["rows"]["teacher_labels"] if row.numel() and (row >= 0).any()}
    assert trainer._tokenizer.decode([token for token in labels if token >= 0]) == imitated


def test_online_leaves_out_what_cannot_be_rendered(tmp_path, settings, caplog):
    template = "{% if 'no' in messages[-1]['content'] %}{{ raise_exception('not this') }}{% endif %}" + TOOLS
    student = folder(tmp_path / "student", template, max_position_embeddings=256)
    prompts = [{"prompt": [says("user", f"{i}+1=")], "completion": "no" if i == 1 else "2"} for i in range(5)]
    pairs = [{"prompt": USER, "chosen": PLAIN, "rejected": [says("assistant", text)]} for text in ("3", "no")] * 3
    options = {"adversary": "mle", "imitation_weight": 1.0, "max_steps": 1, "pairs": pairs}
    with caplog.at_level(logging.WARNING):
        trainer = online_cases.make(student, settings, prompts, **options)
    assert "1 of 5 rows of the train dataset cannot be learnt from" in caplog.text
    assert "3 of 6 rows of the preference dataset cannot be learnt from" in caplog.text
    trainer.train()
    silent = {"adversary": "mle", "imitation_weight": 1.0, "max_steps": 1, "teacher": Says("no", "stop")}
    asked = online_cases.make(
        student, settings, [{"prompt": USER}] * 4, preference_function=online_cases.digits, **silent
    )
    with caplog.at_level(logging.WARNING):
        asked.train()
    assert "is not used: the chat template cannot render it: not this" in caplog.text


def test_online_refuses_reasoning_before_anything_is_trained(tmp_path, settings):
    student = folder(tmp_path / "student", R1)
    rows = [{"prompt": USER, "completion": "so\n</think>\n\n2"}] * 4
    options = {"adversary": "mle", "preference_function": online_cases.digits, "imitation_weight": 1.0}
    with pytest.raises(ValueError, match="In 4 of 4 rows of the train dataset what is learnt is not what is sampled"):
        online_cases.make(student, settings, rows, reasoning="error", **options)


def test_a_column_of_answers_says_why_they_ended():
    sampler = ColumnSampler("completion")
    columns = {"completion": ["2", "3"], "completion_finish_reason": ["length", "stop"]}
    answers = [answer for _, _, answer in sampler.sample([Request("0", "1", (0, 1), columns)])]
    assert [answer.finish_reason for answer in answers] == ["length", "stop"]
    one = {"completion": "2", "completion_finish_reason": "length"}
    ((_, _, answer),) = sampler.sample([Request("0", "1", (0,), one)])
    assert answer == Answer("2", "length")


# ---- Likelihood and reward model -------------------------------------------------------------------------------------


def test_likelihood_scores_own_words_alone():
    tokenizer = tokenizer_with(TOOLS)
    model = make_model(3, len(tokenizer), max_position_embeddings=256).double().eval()
    preference = TeacherLikelihood(model, length_normalized=False, processing_class=tokenizer)
    ids = tokenizer.apply_chat_template([*USER, *CALLED], return_dict=True)["input_ids"]
    with torch.no_grad():
        logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    logps = logps.gather(1, torch.tensor(ids)[1:, None]).squeeze(1)
    text = tokenizer.convert_ids_to_tokens(ids)
    prompt = len(tokenizer.apply_chat_template(USER, add_generation_prompt=True, return_dict=True)["input_ids"])
    places = range(prompt, len(ids))
    start = next(i for i in places if text[i : i + 3] == ["[", "t", "]"])
    stop = next(i for i in places if i > start and text[i : i + 3] == ["[", "a", "]"]) + 3
    own = [i for i in places if not start <= i < stop]
    expected = float(sum(logps[i - 1] for i in own))
    assert preference.score([USER], [CALLED])[0] == pytest.approx(expected, rel=1e-6)


def test_likelihood_ends_at_what_the_template_ends_turns_with():
    """Also of a base model, whose end token is another: nobody has to say the line break behind it."""
    base, chat = tokenizer_with(CHATML), tokenizer_with(CHATML, eos_token="<|im_end|>")
    model = make_model(3, len(base))
    scores = [TeacherLikelihood(model, processing_class=one).score([USER], [PLAIN])[0] for one in (base, chat)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


@pytest.mark.parametrize("reason", ["max_tokens", "MODEL_LENGTH", "unheard_of"])
def test_likelihood_goes_by_every_word_for_a_cut(reason):
    preference = TeacherLikelihood(make_model(3), length_normalized=False, processing_class=make_tokenizer())
    whole, cut, same = preference.score(["1+1="] * 3, ["22"] * 3, finish_reason=["eos", "length", reason])
    assert cut == pytest.approx(same, abs=1e-6)
    assert cut > whole


def test_likelihood_of_reasoning():
    tokenizer = tokenizer_with(R1)
    model = make_model(3, len(tokenizer))
    thought, bare = [says("assistant", "one\n</think>\n\n2")], [says("assistant", "2")]

    def scores(reasoning):
        preference = TeacherLikelihood(model, processing_class=tokenizer, reasoning=reasoning)
        return preference.score([USER] * 2, [thought, bare])

    assert scores("strip")[0] == pytest.approx(scores("strip")[1], abs=1e-6)
    assert scores("keep")[0] != pytest.approx(scores(None)[0], abs=1e-3)
    with pytest.raises(ValueError, match="What is read of the answer to the prompt .* is not what was sampled"):
        scores("error")
    with pytest.raises(ValueError, match="`reasoning` is 'drop'"):
        scores("drop")
    described = TeacherLikelihood(model, processing_class=tokenizer).describe()
    kept = TeacherLikelihood(model, processing_class=tokenizer, reasoning="keep").describe()
    assert "reasoning" not in described  # folders that were labelled before there was such a setting go on
    assert kept == {**described, "reasoning": "keep"}


def test_rows_that_cannot_be_rendered_have_no_score(caplog):
    template = "{% if 'no' in messages[-1]['content'] %}{{ raise_exception('not this') }}{% endif %}" + CHATML
    tokenizer = tokenizer_with(template)
    preference = TeacherLikelihood(make_model(3, len(tokenizer)), processing_class=tokenizer)
    with caplog.at_level(logging.WARNING):
        first, second, third = preference.score([USER] * 3, ["no", "2", "no"])
    assert (first, third) == (None, None)
    assert second < 0
    assert preference.unrendered == 2
    assert caplog.text.count("A row has no score") == 1
    assert preference([USER], ["no"], ["2"]) == [None]


def test_a_reward_model_has_no_score_for_them_either(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    template = "{% if 'no' in messages[-1]['content'] %}{{ raise_exception('not this') }}{% endif %}" + CHATML
    tokenizer = tokenizer_with(template)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, **sizes)
    preference = RewardModelPreference(LlamaForSequenceClassification(config), processing_class=tokenizer)
    assert [score is None for score in preference.score([USER] * 2, ["no", "2"])] == [True, False]


# ---- Samplers --------------------------------------------------------------------------------------------------------


def test_a_local_model_stops_at_what_its_template_ends_turns_with(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = mm_cases.that_says({end: 50.0}, len(tokenizer))
    sampler = LocalSampler(model, SamplingSettings(max_new_tokens=5), tokenizer=tokenizer)
    ((_, _, turn),) = sampler.sample([Request("0", USER)])
    ((_, _, text),) = sampler.sample([Request("0", "1+1=")])
    assert (turn.finish_reason, turn.tokens) == ("stop", 1)
    assert (text.finish_reason, text.tokens) == ("length", 5)  # no template, no turns


def test_null_variables_are_left_out_of_a_samplers_prompt():
    from trl_kd.sampling.prompts import encode_prompt

    tokenizer = tokenizer_with("{{ mood if mood is defined }}" + CHATML)
    columns = {"chat_template_kwargs": {"mood": None, "tone": "low"}, "tools": None}
    text = tokenizer.decode(encode_prompt(tokenizer, Request("0", USER, columns=columns), {}))
    assert text.startswith("<|im_start|>")
