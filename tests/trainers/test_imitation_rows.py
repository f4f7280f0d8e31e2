"""Which rows teach without the preference term, with what weight, what is said of the others, and what is refused."""

import json
import logging
import math

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference

from tests.conftest import CHARACTERS, make_model, make_tokenizer, save_tiny
from tests.responses.templates import CHATML, TOOLS, says, tokenizer_with
from tests.trainers.test_pbkd_responses import turns
from trl_kd import PbKDConfig, PbKDTrainer
from trl_kd.losses.confidence import imitation_advantage
from trl_kd.trainers.common.teacher_texts import text_key


OFF = {"dual_init": 0.0}
LABELS = [(1.0, "chosen"), (0.3, "rejected"), (None, "rejected"), (0.5, "chosen"), (0.0, "chosen"), (0.8, None)]


@pytest.fixture
def rows(pairs) -> list[dict]:
    return [{**row, "preference": p, "teacher_side": s} for row, (p, s) in zip(pairs, LABELS, strict=False)]


def make(folder, rows, settings, eval_dataset=None, stream=False, **more) -> PbKDTrainer:
    train = Dataset.from_list(rows)
    return PbKDTrainer(
        model=folder,
        args=PbKDConfig(**{**settings, **OFF, **more}),
        train_dataset=train.to_iterable_dataset() if stream else train,
        eval_dataset=eval_dataset,
    )


def weights(dataset) -> list[float | None]:
    return [row["imitation_advantage"] for row in dataset]


def refuse(*args, **kwargs):
    raise AssertionError("weights were about to load")


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr("trl.trainer.dpo_trainer.create_model_from_path", refuse)


# ---- Weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("radius", "expected"),
    [
        (0.0, [1.0, 0.4, 1.0]),
        (0.05, [1.0, imitation_advantage(0.7, 0.05), 1.0, math.sqrt(1 - math.exp(-0.1))]),
        (1.0, [1.0, imitation_advantage(0.7, 1.0), 1.0, math.sqrt(1 - math.exp(-2)), 1 - 2 * math.exp(-1)]),
        (math.inf, [1.0] * 5),
    ],
)
def test_each_row_has_the_advantage_of_its_preference(radius, expected, stream, tiny_dir, rows, settings):
    trainer = make(tiny_dir, rows, settings, stream=stream, imitation_radius=radius)
    assert weights(trainer.train_dataset) == pytest.approx(expected)
    if stream:
        assert trainer.mean_advantage == 1
        assert not trainer.text_counts


def test_a_third_text_is_imitated_whatever_the_others_are_worth(tiny_dir, pairs, settings):
    scores = {"score_chosen": 1.0, "score_rejected": 0.0}
    rows = [{**pairs[0], **scores, "teacher": "7"}, {**pairs[1], **scores, "teacher": pairs[1]["rejected"]}]
    for options in ({}, {"imitation_min_score": 2.0}):
        trainer = make(tiny_dir, rows, settings, **options)
        assert weights(trainer.train_dataset) == [1.0]
        assert trainer._tokenizer.decode(trainer.train_dataset[0]["input_ids"]) == f"{pairs[0]['prompt']}7<eos>"
        told = trainer.text_counts["train"].told
        assert "1 of 3 rows teach; 1 left out: the teacher did not win" in told
        assert told.endswith("1 left out: no text of the teacher's")


def test_equal_texts_are_imitated_whatever_their_label(tiny_dir, pairs, settings):
    rows = [{**pairs[0], "rejected": pairs[0]["chosen"], "preference": p} for p in (0.0, 0.5, None)]
    trainer = make(tiny_dir, rows, settings, imitation_radius=0.0, per_device_train_batch_size=1, max_steps=1)
    assert weights(trainer.train_dataset) == [1.0]
    trainer.train()
    assert "pbkd/advantage" not in trainer.state.log_history[0]  # of texts that differ


def test_the_keys_of_a_text_are_prompt_tools_options_and_itself(tmp_path, settings):
    tokenizer = tokenizer_with(TOOLS)
    folder = save_tiny(tmp_path / "student", tokenizer, vocab_size=len(tokenizer))
    row = {"prompt": [says("user", "1+1=")], "chosen": [says("assistant", "2")], "rejected": [says("assistant", "3")]}
    row |= {"tools": [{"name": "add"}], "chat_template_kwargs": {"mood": "glad", "tone": None}}
    others = [{"tools": [{"name": "sum"}]}, {"chat_template_kwargs": {"mood": "glad", "tone": "low"}}]
    others += [{"prompt": [says("user", "2=")]}, {"chosen": [says("assistant", "4")]}]
    trainer = make(
        folder, [row, {**row, "rejected": [says("assistant", "5")]}, *({**row, **o} for o in others)], settings
    )
    assert trainer.text_counts["train"].texts == len(trainer.train_dataset) == 5
    assert trainer.text_counts["train"].told == "6 of 6 rows teach (5 different texts)"


def test_nothing_and_an_empty_list_are_one_key(tiny_dir, pairs, settings):
    row = {**pairs[0], "tools": None, "chat_template_kwargs": None}
    same = [
        row,
        {**row, "tools": []},
        {**row, "chat_template_kwargs": {}},
        {**row, "chat_template_kwargs": {"a": None}},
    ]
    assert len({text_key(one, "chosen") for one in same}) == 1


ARGUMENTS = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}a?{% for call in message.tool_calls %}"
    "{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}{{ eos_token }}{% else %}"
    "u?{{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}a?{% endif %}"
)


def calls(arguments: dict) -> list[dict]:
    function = {"name": "add", "arguments": arguments}
    return [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}]


@pytest.mark.parametrize(
    ("teacher", "student"),
    [({"y": "s"}, {"x": 1}), ({"x": 1}, {"x": 2.5}), ({"x": [1]}, {"x": 1}), ({"x": 1}, {"x": "s"})],
)
def test_calls_of_tools_are_learnt_as_the_teacher_made_them(teacher, student, tmp_path, settings):
    """Whatever types Arrow gives the two columns, in one of which another call stands."""
    tokenizer = make_tokenizer("".join(dict.fromkeys(CHARACTERS + '"{}[]:,_. ')))
    tokenizer.chat_template = ARGUMENTS
    folder = save_tiny(tmp_path / "student", tokenizer, vocab_size=len(tokenizer))
    asked = {"preference": 1.0, "teacher_side": "chosen"}
    rows = [{"prompt": [says("user", "1+1=")], "chosen": calls(teacher), "rejected": calls(student), **asked}]
    swapped = {"prompt": [says("user", "2+2=")], "chosen": calls(teacher), "rejected": calls(student)}
    rows.append({**swapped, "preference": 0.0, "teacher_side": "rejected"})
    trainer = make(folder, rows, settings)
    learnt = [tokenizer.decode([t for t in row["labels"] if t != -100]) for row in trainer.train_dataset]
    assert learnt == [f"add{json.dumps(arguments)}<eos>" for arguments in (teacher, student)]
    assert weights(trainer.train_dataset) == [1.0, 1.0]


def test_a_text_that_ended_once_has_its_end(tiny_dir, pairs, settings):
    """Cut off in one run, and not in another."""
    row = {**pairs[0], "preference": 1.0, "teacher_side": "chosen", "rejected_finish_reason": "stop"}
    rows = [
        {**row, "chosen_finish_reason": reason, "rejected": text} for reason, text in (("length", "8"), ("stop", "9"))
    ]
    trainer = make(tiny_dir, rows, settings)
    (only,) = trainer.train_dataset
    assert trainer._tokenizer.decode([t for t in only["labels"] if t != -100]) == f"{pairs[0]['chosen']}<eos>"


def test_weights_and_formats_of_another_trainer_are_not_read(tiny_dir, pairs, settings):
    rows = [{**row, "imitation_advantage": 0.0, "imitation_share": 0.5} for row in pairs]
    data = Dataset.from_list(rows).with_format("torch")
    args = PbKDConfig(**{**settings, **OFF})
    trainer = PbKDTrainer(model=tiny_dir, args=args, train_dataset=data)
    assert set(weights(trainer.train_dataset)) == {1.0}


def test_scores_decide_where_there_are_any(tiny_dir, pairs, settings):
    scores = [(1.0, 0.0), (0.4, 1.0), (None, 0.0), (None, 0.0), (0.0, 0.5)]
    preferences = [0.0, 1.0, 1.0, 0.0, 0.0]
    sides = ["chosen"] * 4 + ["rejected"]
    rows = [
        {**row, "score_chosen": c, "score_rejected": r, "preference": p, "teacher_side": side}
        for row, (c, r), p, side in zip(pairs, scores, preferences, sides, strict=False)
    ]
    evaluation = Dataset.from_list(rows)
    trainer = make(tiny_dir, rows, settings, evaluation, imitation_min_score=0.5)
    assert weights(trainer.eval_dataset) == [1, 0, 1, 0, 1]
    assert "or scores less than `imitation_min_score`" in trainer.text_counts["train"].told
    with pytest.raises(ValueError, match="`imitation_min_score` is 0.5, but the train dataset has no column `score_"):
        make(tiny_dir, pairs, settings, imitation_min_score=0.5)


def test_theory_counts_known_pairs_before_any_is_left_out(tiny_dir, rows, settings):
    trainer = make(tiny_dir, rows, settings, imitation_radius="theory", confidence_constant=0.5)
    assert trainer.imitation_radius == pytest.approx(0.5 * math.log(5 / 0.05) / 5)
    unknown = [{**row, "preference": None} for row in rows]
    with pytest.raises(ValueError, match="`imitation_radius` is 'theory', .* no preference is known"):
        make(tiny_dir, unknown, settings, imitation_radius="theory")
    with pytest.raises(ValueError, match="`imitation_radius` is 'theory', .* a stream has no length"):
        make(tiny_dir, rows, settings, imitation_radius="theory", stream=True)


# ---- What leaves, and what is said -------------------------------------------------------------------------------------


def test_what_is_left_out_is_counted(tiny_dir, rows, settings, caplog):
    with caplog.at_level(logging.INFO):
        trainer = make(tiny_dir, rows, settings, Dataset.from_list(rows))
    said = "4 of 6 rows teach; 1 left out: the teacher did not win; 1 left out: no text of the teacher's"
    assert caplog.text.count(f"Of the train dataset {said}.") == 1
    assert trainer.text_counts["train"].told == said
    assert caplog.text.count("`rewards/*` and `pbkd/preference_nll` are not logged") == 1
    assert len(trainer.train_dataset) == 4
    assert len(trainer.eval_dataset) == 6  # an evaluation keeps all
    trainer.create_model_card()
    with open(f"{settings['output_dir']}/README.md") as file:
        card = file.read()
    assert f"Of the train data {said}." in card
    assert "| `imitation_radius` | 0.02 |" in card
    assert "beta" not in card.split("## Results")[0].split("## Distillation")[1]


def test_an_evaluation_without_a_used_row_is_warned_of(tiny_dir, rows, settings, caplog):
    sets = {"lost": Dataset.from_list(rows[4:5]), "silent": Dataset.from_list(rows[5:])}
    with caplog.at_level(logging.WARNING):
        trainer = make(tiny_dir, rows, settings, sets)
    assert (
        "Of the eval/lost dataset 0 of 1 rows teach; 1 of weight 0: the teacher did not win: its loss" in caplog.text
    )
    assert "Of the eval/silent dataset 0 of 1 rows teach; 1 of weight 0: no text of the teacher's: its" in caplog.text
    metrics = trainer.evaluate()
    assert metrics["eval_lost_loss"] == metrics["eval_silent_loss"] == 0
    lost, silent = trainer.state.log_history[-2:]
    assert lost["eval_pbkd/teacher_nll"] > 0
    assert "eval_pbkd/teacher_nll" not in silent


@pytest.mark.parametrize("stream", [False, True])
def test_training_data_that_teaches_nothing_is_refused(stream, no_weights, tiny_dir, rows, settings):
    message = "No row of the train dataset teaches with `imitation_radius` = 0.02.* Raise the radius"
    with pytest.raises(ValueError, match=message):
        make(tiny_dir, [rows[4], rows[5]], settings, stream=stream)
    if not stream:
        with pytest.raises(
            ValueError, match="The train dataset has no text of the teacher's, and nothing else is learnt"
        ):
            make(tiny_dir, [rows[5]], settings)


def test_texts_without_a_token_of_the_models_own_are_left_out(tiny_dir, pairs, settings, caplog):
    empty = {"prompt": "1+1=", "chosen": "", "rejected": "3", "chosen_finish_reason": "length"}
    with caplog.at_level(logging.WARNING):
        trainer = make(tiny_dir, [empty, *pairs], settings)
    assert "1 of 9 rows of the train dataset cannot be learnt from" in caplog.text
    assert len(trainer.train_dataset) == 8
    with pytest.raises(ValueError, match="1 of 1 rows of the train dataset cannot be learnt from"):
        make(tiny_dir, [empty], settings)


# ---- Tokens ------------------------------------------------------------------------------------------------------------


def test_turns_of_others_and_cut_ends_carry_no_loss(tmp_path, settings):
    tokenizer = tokenizer_with(TOOLS)
    folder = save_tiny(tmp_path / "student", tokenizer, vocab_size=len(tokenizer))
    data = [*turns(), {**turns()[2], "chosen": [says("assistant", "cut")]}]
    data = [{**row, "chosen_finish_reason": "length" if i == 3 else "stop"} for i, row in enumerate(data)]
    for stream in (False, True):
        trainer = make(folder, data, settings, stream=stream)
        learnt = [
            trainer._tokenizer.decode([label for label in row["labels"] if label != -100])
            for row in trainer.train_dataset
        ]
        assert learnt == ["two<eos>yes<eos>", "call add<eos>it is 2<eos>", "2<eos>", "cut"]


@pytest.mark.parametrize(("mode", "left"), [("keep_start", "first "), ("keep_end", "we add<eos>")])
def test_max_length_cuts_texts_as_it_cuts_pairs(mode, left, tiny_dir, settings):
    rows = [{"prompt": "1+1=", "chosen": "first we add", "rejected": "2"}]
    trainer = make(tiny_dir, rows, settings, max_length=10 if mode == "keep_start" else 7, truncation_mode=mode)
    labels = trainer.train_dataset[0]["labels"]
    assert trainer._tokenizer.decode([label for label in labels if label != -100]) == left


def test_the_templates_own_end_keeps_its_likelihood_too(tmp_path, settings):
    tokenizer = tokenizer_with(CHATML)
    folder = save_tiny(tmp_path / "student", tokenizer, vocab_size=len(tokenizer))
    trainer = make(folder, turns()[2:], settings)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end != tokenizer.eos_token_id
    assert trainer._is_end(torch.tensor([end, tokenizer.eos_token_id, 5])).tolist() == [True, True, False]


# ---- What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        *({"beta": 0.2}, {"loss_type": "ipo"}, {"sync_ref_model": True}, {"precompute_ref_log_probs": True}),
        *({"ld_alpha": 0.5}, {"use_weighting": True}, {"preference_nll_target": 0.1}, {"label_smoothing": 0.1}),
    ],
)
def test_settings_of_the_preference_term_are_refused(options, settings):
    (name,) = options
    with pytest.raises(
        ValueError, match=rf"`{name}` is .*only the preference term reads.*drop `{name}`, or set `dual_init`"
    ):
        PbKDConfig(**settings, **OFF, **options)
    PbKDConfig(**settings, **options, dual_init=1.0)  # with the preference term it is none of this


def test_a_reference_and_a_collator_of_pairs_are_refused(no_weights, tiny_dir, pairs, settings):
    given = {"model": tiny_dir, "args": PbKDConfig(**settings, **OFF), "train_dataset": Dataset.from_list(pairs)}
    for name, value in (("ref_model", make_model()), ("data_collator", DataCollatorForPreference(0))):
        with pytest.raises(ValueError, match=f"`{name}` is given, which only the preference term uses"):
            PbKDTrainer(**given, **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imitation_radius": -0.1}, "`imitation_radius` is -0.1: it must be a finite number, at least 0"),
        ({"imitation_radius": "large"}, "`imitation_radius` is 'large'"),
        ({"imitation_q": 1.5}, "`imitation_q` is 1.5"),
        ({"imitation_q_warmup": -1.0}, "`imitation_q_warmup` is -1.0"),
        ({"imitation_min_score": math.nan}, "`imitation_min_score` is nan"),
        ({"imitation_weight": 0.0}, "`imitation_weight` is 0 and so are"),
    ],
)
def test_impossible_settings_are_refused(options, message, settings):
    with pytest.raises(ValueError, match=message):
        PbKDConfig(**settings, **OFF, **options)


@pytest.mark.parametrize("name", ["imitation_radius", "imitation_q", "imitation_q_warmup", "imitation_min_score"])
def test_settings_of_the_imitation_term_are_refused_without_it(name, settings):
    with pytest.raises(
        ValueError, match=f"`{name}` is 0.25, which only the imitation term reads, and `imitation_weight`"
    ):
        PbKDConfig(**settings, dual_init=1.0, imitation_weight=0.0, **{name: 0.25})


def test_fields_keep_their_places_and_their_kinds(settings):
    assert PbKDConfig("folder").output_dir == "folder"
    assert PbKDConfig.__mro__[1] is DPOConfig
    read = PbKDConfig(**settings, **OFF, imitation_radius="inf")
    assert read.imitation_radius == math.inf
    assert (read.final_imitation_q, PbKDConfig(**settings, **OFF, imitation_q=0.0).final_imitation_q) == (0.5, 0.0)
    named = {"imitation": "token", "teacher_model_name_or_path": "x"}
    assert PbKDConfig(**settings, **OFF, **named).final_imitation_q == 0
    assert not read.has_preference_term
    moving = {"dual_learning_rate": 0.1, "preference_nll_target": 0.1}
    assert PbKDConfig(**settings, **OFF, **moving).has_preference_term


# ---- Types that Arrow guesses ------------------------------------------------------------------------------------------


def test_reasons_and_messages_of_one_side_alone(tmp_path, settings):
    """A thousand rows and more, so that the types of a written batch are settled before the teacher's side changes."""
    tokenizer = tokenizer_with(CHATML)
    folder = save_tiny(tmp_path / "student", tokenizer, vocab_size=len(tokenizer))
    named = {**says("assistant", "3"), "name": "x"}
    row = {"prompt": [says("user", "1+1=")], "chosen": [says("assistant", "2")], "rejected": [named]}
    data = [
        {**row, "prompt": [says("user", f"{i}=")], "teacher_side": side, "rejected_finish_reason": "length"}
        for side in ("chosen", "rejected")
        for i in range(1100)
    ]
    trainer = make(folder, data, settings, imitation_radius="inf")
    assert len(trainer.train_dataset) == 2200


def test_nulls_that_arrow_fills_in_make_no_other_text(tmp_path, settings):
    tokenizer = tokenizer_with(CHATML)
    folder = save_tiny(tmp_path / "student", tokenizer, vocab_size=len(tokenizer))
    two, three = ([says("assistant", text)] for text in "23")
    row = {"prompt": [says("user", "1+1=")], "teacher_side": "chosen"}
    data = [
        {**row, "chosen": two, "rejected": three, "preference": 1.0},
        {**row, "chosen": three, "rejected": two, "preference": 1.0, "teacher_side": "rejected"},
        {**row, "chosen": two, "rejected": two, "preference": 1.0},
        {**row, "chosen": [{**says("assistant", "4"), "name": "x"}], "rejected": two, "preference": 1.0},
    ]
    trainer = make(folder, data, settings)
    assert weights(trainer.train_dataset) == pytest.approx([imitation_advantage(0.5, 0.02), 1.0])


@pytest.mark.parametrize(
    ("changed", "options", "said"),
    [
        ({"teacher_side": None}, {}, "The train dataset has no text of the teacher's"),
        (
            {"preference": None},
            {"imitation_weight": 0.0, "dual_init": 1.0},
            "has a known `preference`, and nothing is",
        ),
        ({"preference": 0.0}, {}, "No row of the train dataset teaches with `imitation_radius`"),
    ],
)
def test_a_stream_without_anything_to_learn_says_why(changed, options, said, tiny_dir, rows, settings):
    with pytest.raises(ValueError, match=said):
        make(
            tiny_dir, [{**row, "teacher_side": "chosen", **changed} for row in rows], settings, stream=True, **options
        )


def test_that_nothing_is_imitated_is_said(tiny_dir, rows, settings, caplog):
    lost = [{**row, "teacher_side": "chosen", "preference": 0.0} for row in rows]
    make(tiny_dir, lost, settings, dual_init=1.0)
    assert "Of the train dataset 0 of 6 rows are imitated" in caplog.text


def test_a_users_column_of_labels_is_left_alone(tiny_dir, rows, settings):
    trainer = make(tiny_dir, [{**row, "labels": 3} for row in rows], settings, dual_init=1.0)
    assert 0 < trainer.mean_advantage < 1


def test_scores_that_are_no_numbers_are_refused(tiny_dir, rows, settings):
    with pytest.raises(ValueError, match="Row 0 of the train dataset: `score_chosen` is 'good'; it must be a number"):
        make(tiny_dir, [{**row, "score_chosen": "good"} for row in rows], settings)
