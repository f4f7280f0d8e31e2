"""What rows may hold, and the sentence that answers what they may not, before any weight is loaded."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer
from trl import DPOConfig

from tests.conftest import CHARACTERS, make_tokenizer, save_tiny
from trl_kd import PbKDConfig, PbKDTrainer
from trl_kd.losses.dual import theory_radius
from trl_kd.losses.imitation import CHOSEN, NO_TEACHER, REJECTED
from trl_kd.trainers.pbkd.data import ADVANTAGE, COMPARED, SHARE, PbKDCollator, prepare_rows


ON = {"dual_init": 1.0}


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if a weight is loaded."""

    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded before the input was checked")

    monkeypatch.setattr("trl.trainer.dpo_trainer.create_model_from_path", refuse)
    monkeypatch.setattr("trl_kd._trl.models.create_model_from_path", refuse)


BAD_ROWS = {
    "empty": (lambda rows: [], "train dataset is empty"),
    "missing column": (
        lambda rows: [{k: r[k] for k in ("prompt", "chosen")} for r in rows],
        "lacks the column 'rejected'",
    ),
    "null response": (lambda rows: [*rows[:2], {**rows[2], "chosen": None}], "Row 2 .*`chosen` is null"),
    "null prompt": (lambda rows: [*rows[:2], {**rows[2], "prompt": None}], "Row 2 .*`prompt` is null"),
    "numbers for text": (
        lambda rows: [{**r, "chosen": 1, "rejected": 2} for r in rows],
        r"`chosen` is 1 \(int\); it must be text .*numbers must be cast",
    ),
    "no messages": (
        lambda rows: [{**r, "chosen": [], "rejected": []} for r in rows],
        r"`chosen` is \[\] \(list\); it must be",
    ),
    "text and messages": (
        lambda rows: [{**r, "prompt": [{"role": "user", "content": "x"}]} for r in rows],
        "prompt and chosen and rejected must be all text or all messages",
    ),
    "nothing to learn": (
        lambda rows: [{**r, "preference": None, "teacher_side": None} for r in rows],
        "train dataset teaches nothing",
    ),
    "preference above 1": (lambda rows: [{**r, "preference": 1.2} for r in rows], r"`preference` is 1.2.*\[0, 1\]"),
    "preference below 0": (lambda rows: [{**r, "preference": -0.1} for r in rows], "`preference` is -0.1"),
    "preference text": (lambda rows: [{**r, "preference": "high"} for r in rows], "`preference` is 'high'"),
    "unknown side": (lambda rows: [{**r, "teacher_side": "left"} for r in rows], "`teacher_side` is 'left'"),
    "side against text": (
        lambda rows: [{**r, "teacher_side": "chosen", "teacher": "third"} for r in rows],
        "`teacher_side` is 'chosen' but `teacher` is another text",
    ),
    "teacher of another kind": (
        lambda rows: [{**r, "teacher": [{"role": "assistant", "content": "x"}]} for r in rows],
        "`teacher` is a list but `chosen` a str",
    ),
    "teacher's answer alone, without a prompt": (
        lambda rows: [
            {
                "chosen": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["chosen"]}],
                "rejected": [
                    {"role": "user", "content": r["prompt"]},
                    {"role": "assistant", "content": r["rejected"]},
                ],
                "teacher": [{"role": "assistant", "content": "third"}],
            }
            for r in rows
        ],
        "`teacher` must be a whole conversation",
    ),
    "equal texts without a prompt": (lambda rows: [{"chosen": "1+1=2", "rejected": "1+1=2"}], "'prompt' column"),
    "teacher without a prompt": (
        lambda rows: [{"chosen": "1+1=2", "rejected": "1+1=3", "teacher": "1+1=4"}],
        "'prompt' column",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_refused_by_a_sentence(case, tiny_dir, pairs, settings, no_weights):
    change, message = BAD_ROWS[case]
    rows = change(pairs)
    dataset = Dataset.from_list(rows) if rows else Dataset.from_list(pairs).select([])
    with pytest.raises(ValueError, match=message):
        PbKDTrainer(model=tiny_dir, args=PbKDConfig(**settings), train_dataset=dataset)


@pytest.mark.parametrize("case", ["preference above 1", "unknown side", "equal texts without a prompt"])
def test_bad_rows_of_a_stream_too(case, tiny_dir, pairs, settings, no_weights):
    change, message = BAD_ROWS[case]
    dataset = IterableDataset.from_generator(lambda: iter(change(pairs)))
    with pytest.raises(ValueError, match=message):
        PbKDTrainer(model=tiny_dir, args=PbKDConfig(**settings), train_dataset=dataset)


def test_a_bad_row_later_in_a_stream_stops_the_training(tiny_dir, pairs, settings):
    rows = [{**row, "preference": 1.0} for row in pairs]
    rows[6]["preference"] = 3.0
    trainer = PbKDTrainer(
        model=tiny_dir, args=PbKDConfig(**settings), train_dataset=IterableDataset.from_generator(lambda: iter(rows))
    )
    with pytest.raises(ValueError, match="Row 6 of the train dataset: `preference` is 3.0"):
        trainer.train()


REFUSED_LABELS = {
    "soft with ipo": (0.7, {"loss_type": "ipo"}, "soft labels"),
    "soft in a mixture with ipo": (0.7, {"loss_type": ["sigmoid", "ipo"]}, "soft labels"),
    "soft with weighting": (0.7, {"use_weighting": True}, "soft labels"),
    "tie with JS": (0.5, {"f_divergence_type": "js_divergence"}, "soft labels"),
    "null with aot": (None, {"loss_type": "aot"}, "'aot'"),
    "null with aot_unpaired": (None, {"loss_type": "aot_unpaired"}, "'aot_unpaired'"),
    "null with sft": (None, {"loss_type": ["sigmoid", "sft"]}, "'sft'"),
}


@pytest.mark.parametrize("case", REFUSED_LABELS)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_labels_that_a_loss_would_ignore_are_refused(case, split, tiny_dir, pairs, settings, no_weights):
    preference, options, message = REFUSED_LABELS[case]
    plain = Dataset.from_list(pairs)
    labelled = Dataset.from_list([*pairs[:-1], pairs[-1]]).add_column("preference", [1.0] * 7 + [preference])
    datasets = {"train_dataset": labelled} if split == "train" else {"train_dataset": plain, "eval_dataset": labelled}
    with pytest.raises(ValueError, match=f"{split} dataset has .*{message}"):
        PbKDTrainer(model=tiny_dir, args=PbKDConfig(**settings, **ON, **options), **datasets)


def test_labels_that_a_loss_would_ignore_are_refused_in_a_stream(tiny_dir, pairs, settings):
    rows = [{**row, "preference": 0.6} for row in pairs]
    trainer = PbKDTrainer(
        model=tiny_dir,
        args=PbKDConfig(**settings, **ON, loss_type="ipo"),
        train_dataset=IterableDataset.from_generator(lambda: iter(rows)),
    )
    with pytest.raises(ValueError, match="soft labels"):
        trainer.train()


def test_max_length_without_room_for_a_response(tiny_dir, pairs, settings, no_weights):
    with pytest.raises(ValueError, match="In 8 of 8 rows .*`max_length` = 3"):
        PbKDTrainer(model=tiny_dir, args=PbKDConfig(**settings, max_length=3), train_dataset=Dataset.from_list(pairs))


def test_rows_that_max_length_takes_are_counted(tiny_dir, pairs, settings, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = PbKDTrainer(
            model=tiny_dir, args=PbKDConfig(**settings, max_length=5), train_dataset=Dataset.from_list(pairs)
        )
    assert "In 3 of 8 rows of the train dataset the prompt alone fills `max_length` = 5" in caplog.text
    assert len(trainer.train_dataset) == 5


def test_messages_need_a_chat_template(tmp_path, pairs, settings, no_weights):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    folder = save_tiny(tmp_path / "bare", tokenizer=tokenizer)
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in pairs
    ]
    with pytest.raises(ValueError, match="no chat template"):
        PbKDTrainer(model=folder, args=PbKDConfig(**settings), train_dataset=Dataset.from_list(rows))


def test_text_needs_an_end_token(tmp_path, pairs, settings, no_weights):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    folder = save_tiny(tmp_path / "endless", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        PbKDTrainer(model=folder, args=PbKDConfig(**settings), train_dataset=Dataset.from_list(pairs))


def test_empty_responses_are_legal_and_said(tiny_dir, pairs, settings, caplog):
    rows = [{**pairs[0], "rejected": ""}, *pairs[1:]]
    with caplog.at_level(logging.WARNING):
        args = PbKDConfig(**settings, **ON)
        trainer = PbKDTrainer(model=tiny_dir, args=args, train_dataset=Dataset.from_list(rows))
    assert "1 rows of the train dataset have an empty response" in caplog.text
    assert list(trainer.train_dataset[0]["rejected_ids"]) == [trainer.processing_class.eos_token_id]
    trainer.train()


UNNAMED = "no column `teacher_side` or `teacher`: every chosen answer is taken as the teacher's"


@pytest.mark.parametrize("streamed", [False, True])
def test_without_teacher_columns_the_chosen_is_the_teachers_and_this_is_said(
    streamed, tiny_dir, pairs, settings, caplog
):
    data = IterableDataset.from_generator(lambda: iter(pairs)) if streamed else Dataset.from_list(pairs)
    with caplog.at_level(logging.WARNING):
        trainer = PbKDTrainer(model=tiny_dir, args=PbKDConfig(**settings), train_dataset=data)
    assert caplog.text.count(f"The train dataset has {UNNAMED}") == 1
    if not streamed:
        assert trainer.row_counts["train"].teacher == 8
    trainer.create_model_card()
    card = Path(settings["output_dir"], "README.md").read_text()
    assert "No column of the train data names the teacher: every chosen answer was taken as the teacher's." in card
    assert "with a response of the teacher's" not in card


@pytest.mark.parametrize("case", ["a column", "nothing is imitated"])
def test_this_is_not_said(case, tiny_dir, pairs, settings, caplog):
    rows = [row | {"teacher_side": "chosen"} for row in pairs] if case == "a column" else pairs
    args = PbKDConfig(**settings, **ON, imitation_weight=float(case == "a column"))
    trainer = PbKDTrainer(model=tiny_dir, args=args, train_dataset=Dataset.from_list(rows))
    trainer.create_model_card()
    card = Path(settings["output_dir"], "README.md").read_text()
    assert "taken as the teacher's" not in caplog.text + card
    assert ("8 rows, of which 8 with a response of the teacher's" in card) == (case == "a column")


def test_counts(pairs, settings):
    preferences = [1.0, 0.5, None, math.nan, 0.0, 1.0, 1.0, 1.0]
    teachers = ["2", "5", None, "9", "25", "", "2", None]
    rows = [{**r, "preference": p, "teacher": t} for r, p, t in zip(pairs, preferences, teachers, strict=True)]
    dataset, counts = prepare_rows(Dataset.from_list(rows), "train", PbKDConfig(**settings))
    # "9" and "" are neither of the pair's responses: each is a row of its own
    assert (counts.rows, counts.known, counts.soft, counts.null, counts.teacher, counts.empty) == (10, 6, 2, 4, 6, 1)
    assert len(dataset) == 10
    assert "teacher" not in dataset.column_names


def test_labels_of_the_first_thousand_rows_may_all_be_null(pairs, settings):
    rows = [{**pairs[0], "preference": None, "teacher": None} for _ in range(2500)]
    rows.append({**pairs[0], "preference": 0.5, "teacher": "third"})
    dataset, counts = prepare_rows(Dataset.from_list(rows), "train", PbKDConfig(**settings))
    assert counts.teacher == 1
    assert dataset[-2]["preference"] == 0.5
    assert dataset[-1]["chosen"] == "third"


def test_conversational_rows_without_a_prompt_may_have_equal_texts(tiny_dir, pairs, settings):
    rows = [
        {
            "chosen": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["chosen"]}],
            "rejected": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["chosen"]}],
            "preference": None,
        }
        for r in pairs
    ]
    trainer = PbKDTrainer(model=tiny_dir, args=PbKDConfig(**settings, **ON), train_dataset=Dataset.from_list(rows))
    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    assert tokenizer.decode(trainer.train_dataset[2]["prompt_ids"]) == "u?40+2=a?"
    assert tokenizer.decode(trainer.train_dataset[2]["chosen_ids"]) == "42<eos>"
    trainer.train()


def test_collator_reads_the_labels_before_the_inner_one_and_hides_them():
    def inner(examples):
        assert all(set(example) == {"prompt"} for example in examples)
        for example in examples:
            example.clear()  # as the vision collator changes what it is given
        return {}

    weights = [(None, 1.0, False), (0.5, 0.25, True), (1.0, 1.0, False)]
    labels = [{"preference": None, "teacher_side": None}, {"preference": 0.25, "teacher_side": "rejected"}, {}]
    examples = [
        {"prompt": "a", **label, **dict(zip((ADVANTAGE, SHARE, COMPARED), weight, strict=True))}
        for label, weight in zip(labels, weights, strict=True)
    ]
    batch = PbKDCollator(inner)(examples)
    assert batch["preference"].isnan().tolist() == [True, False, False]
    assert batch["preference"].tolist()[1:] == [0.25, 1.0]
    assert batch["teacher_side"].tolist() == [NO_TEACHER, REJECTED, CHOSEN]
    assert batch["advantage"].tolist() == [0.0, 0.5, 1.0]
    assert batch["weight"].tolist() == [0.0, 0.125, 1.0]
    assert batch["compared"].tolist() == [False, True, False]


def test_theory_radius_counts_known_preferences(tiny_dir, pairs, settings):
    rows = [{**row, "preference": None if i < 3 else 1.0} for i, row in enumerate(pairs)]
    args = PbKDConfig(**settings, **ON, confidence_radius="theory", confidence_constant=2.0, confidence_delta=0.1)
    trainer = PbKDTrainer(model=tiny_dir, args=args, train_dataset=Dataset.from_list(rows))
    assert trainer.dual.radius == theory_radius(5, 2.0, 0.1)
    cut = PbKDConfig(
        **settings, **ON, confidence_radius="theory", max_length=5
    )  # leaves 5 rows, 3 of them with a preference
    trainer = PbKDTrainer(model=tiny_dir, args=cut, train_dataset=Dataset.from_list(rows))
    counts = trainer.row_counts["train"]
    assert (counts.rows, counts.known, counts.null, counts.teacher) == (5, 3, 2, 5)
    assert trainer.dual.radius == theory_radius(3)
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(ValueError, match="`confidence_radius` is 'theory'"):
        PbKDTrainer(model=tiny_dir, args=args, train_dataset=stream)


def test_evaluation_sets_do_not_count_as_training_rows(tiny_dir, pairs, settings):
    args = PbKDConfig(**settings, **ON, confidence_radius="theory")
    rows = Dataset.from_list(pairs)
    sets = {"train": rows.select(range(2)), "test": rows.select(range(3))}
    trainer = PbKDTrainer(model=tiny_dir, args=args, train_dataset=rows, eval_dataset=sets)
    assert trainer.dual.radius == theory_radius(8)
    trainer.evaluate(rows.select(range(2)))
    trainer.evaluate({"train": rows.select(range(3))})
    assert {name: counts.rows for name, counts in trainer.row_counts.items()} == {
        "train": 8,
        "eval/train": 2,
        "eval/test": 3,
    }


def test_max_length_may_not_take_all_that_teaches(tiny_dir, pairs, settings, no_weights):
    data = [
        {**row, "preference": None, "teacher_side": None}
        if len(row["prompt"]) < 5
        else {**row, "teacher_side": "chosen"}
        for row in pairs
    ]
    assert any(row["teacher_side"] for row in data)
    with pytest.raises(ValueError, match="In 3 of 3 rows .* the prompt alone fills `max_length` = 5"):
        PbKDTrainer(
            model=tiny_dir, args=PbKDConfig(**settings, **ON, max_length=5), train_dataset=Dataset.from_list(data)
        )


def test_vocabularies_that_look_alike_are_told_apart(tmp_path, tiny_dir, pairs, settings, no_weights):
    other = make_tokenizer(CHARACTERS.replace("ab", "ba"))
    teacher = save_tiny(tmp_path / "other", tokenizer=other)
    args = PbKDConfig(**settings, imitation="token", teacher_model_name_or_path=teacher)
    with pytest.raises(ValueError, match="vocabulary.*token 23 is 'b' for the teacher .* and 'a' for the student"):
        PbKDTrainer(model=tiny_dir, args=args, train_dataset=Dataset.from_list(pairs))


def test_an_embedding_too_small_is_told_before_weights(tmp_path, tiny_dir, pairs, settings, no_weights):
    teacher = save_tiny(tmp_path / "small", vocab_size=len(make_tokenizer()) - 1)
    args = PbKDConfig(**settings, imitation="token", teacher_model_name_or_path=teacher)
    with pytest.raises(
        ValueError, match=r"The teacher's vocabulary has \d+ rows and the student's \d+, for \d+ tokens"
    ):
        PbKDTrainer(model=tiny_dir, args=args, train_dataset=Dataset.from_list(pairs))


def test_fields_of_a_users_own_config_are_not_lost_without_a_word(tiny_dir, pairs, settings, no_weights):
    @dataclass
    class MyConfig(DPOConfig):
        mine: int = 1

    with pytest.raises(ValueError, match="is a MyConfig, whose mine `PbKDConfig` does not have"):
        PbKDTrainer(model=tiny_dir, args=MyConfig(**settings), train_dataset=Dataset.from_list(pairs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imitation": "token"}, "give `teacher_model_name_or_path`"),
        ({"loss_type": "sigmiod"}, "`loss_type` is 'sigmiod': use one of aot"),
        ({"learning_rate": -1.0}, "`learning_rate` is -1.0"),
        ({"imitation": "tokens"}, "use 'sequence' or 'token'"),
        ({"imitation": "token", "imitation_weight": 0, "teacher_model_name_or_path": "x"}, "a term without weight"),
        (
            {"teacher_model_init_kwargs": "{bad"},
            "`teacher_model_init_kwargs` must be a JSON object, and is none: Expecting property name",
        ),
        ({"model_init_kwargs": "[1]"}, "`model_init_kwargs` must be a JSON object, and is none: it is a list"),
        ({"f_divergence_type": "kl"}, "`f_divergence_type` is 'kl': use one of reverse_kl"),
        ({"loss_weights": [-1.0]}, "`loss_weights` is -1.0"),
        ({"loss_weights": [math.nan]}, "`loss_weights` is nan"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` is 0"),
        ({"num_train_epochs": -1}, "`num_train_epochs` is -1"),
        ({"max_grad_norm": math.nan}, "`max_grad_norm` is nan"),
        ({"ld_alpha": 3.0}, "`ld_alpha` is 3.0"),
        ({"label_smoothing": 2.0}, "`label_smoothing` is 2.0"),
        ({"max_length": -5}, "`max_length` is -5"),
        ({"imitation_weight": -1.0}, "`imitation_weight` is -1.0"),
        ({"imitation_weight": math.nan}, "`imitation_weight` is nan"),
        ({"dual_init": -0.5}, "`dual_init` is -0.5"),
        ({"dual_init": 11.0}, "raise `dual_max`"),
        ({"dual_max": 0.0}, "`dual_max` is 0.0"),
        ({"dual_learning_rate": math.inf}, "`dual_learning_rate` is inf"),
        ({"dual_learning_rate": 0.1}, "final `pbkd/preference_nll` of a run with fixed λ"),
        ({"dual_learning_rate": 0.1, "loss_type": "ipo", "preference_nll_target": 0.1}, "`loss_type='sigmoid'`"),
        ({"dual_learning_rate": 0.1, "loss_type": ["sigmoid", "sft"], "preference_nll_target": 0.1}, "sigmoid"),
        ({"confidence_radius": "wide"}, "'wide'"),
        ({"confidence_radius": -0.1}, "`confidence_radius` is -0.1"),
        ({"confidence_delta": 1.0}, "`confidence_delta` is 1.0"),
        ({"confidence_constant": 0.0}, "`confidence_constant` is 0.0"),
        ({"preference_nll_target": -0.2}, "`preference_nll_target` is -0.2"),
        ({"beta": 0.0}, "`beta` is 0.0"),
        ({"teacher_model_name_or_path": "x"}, "`imitation='sequence'` reads the teacher's texts"),
    ],
)
def test_bad_settings(options, message, tiny_dir, pairs, settings, no_weights):
    with pytest.raises(ValueError, match=message):
        PbKDTrainer(model=tiny_dir, args=PbKDConfig(**{**settings, **options}), train_dataset=Dataset.from_list(pairs))


@pytest.mark.parametrize(("text", "value"), [("theory", "theory"), ("0.02", 0.02), ("1e-3", 1e-3), (None, 0.0)])
def test_radius_from_the_command_line(text, value, settings):
    assert PbKDConfig(**settings, **ON, confidence_radius=text).confidence_radius == value
