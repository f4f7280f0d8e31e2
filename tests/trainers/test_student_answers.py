"""How often the student gave an answer weighs its label, and its winning answers are imitated where enough is known."""

import logging
import math

import pytest
from datasets import Dataset

from tests.trainers.test_imitation_rows import OFF, make, no_weights, weights  # noqa: F401
from trl_kd import PbKDConfig
from trl_kd.losses.confidence import imitation_advantage
from trl_kd.scripts.pbkd_dry_run import _weigh
from trl_kd.trainers.common.student_answers import StudentWins


GATED = {"student_wins": "gated"}


def pair(teacher: str, student: str, preference: float | None, count: int | None = 1, prompt: str = "1+1=", **more):
    """A row as `build_pairs` makes it, from P(teacher's ≻ student's)."""
    row = {"prompt": prompt, "chosen": teacher, "rejected": student, "preference": preference, "student_count": count}
    row |= {"teacher_side": "chosen", "chosen_source": "teacher", "rejected_source": "student"} | more
    if preference is not None and preference < 0.5:
        row |= {"chosen": student, "rejected": teacher, "preference": 1 - preference, "teacher_side": "rejected"}
        row |= {"chosen_source": "student", "rejected_source": "teacher"}
    return row


def texts(trainer) -> list[tuple[str, float]]:
    """What is imitated, with its weight."""
    found = []
    for row in trainer.train_dataset:
        text = trainer._tokenizer.decode([label for label in row["labels"] if label != -100])
        found.append((text.removesuffix("<eos>"), row["imitation_advantage"]))
    return found


# ---- Counts ------------------------------------------------------------------------------------------------------------


def test_labels_count_as_often_as_the_student_gave_the_answer(tiny_dir, settings):
    rows = [pair("2", "3", 1.0, 3), pair("2", "4", 0.0, 1), pair("2", "2", None, 5), pair("2", "5", None, 9)]
    rows += [pair("7", "8", 0.4, 1, "3+4="), pair("7", "9", 0.8, None, "3+4=")]
    trainer = make(tiny_dir, rows, settings, imitation_radius=0.0)
    assert texts(trainer) == [("2", 0.5), ("7", pytest.approx(0.2))]
    trainer = make(tiny_dir, rows, settings, imitation_radius=0.05)
    assert [a for _, a in texts(trainer)] == pytest.approx([imitation_advantage(p, 0.05) for p in (0.75, 0.6)])


def test_a_row_without_a_count_is_one_answer(tiny_dir, settings):
    rows = [pair("2", "3", 1.0), pair("2", "4", 0.0)]
    for row in rows:
        del row["student_count"]
    assert texts(make(tiny_dir, [*rows, rows[0]], settings, imitation_radius=0.0)) == [("2", pytest.approx(1 / 3))]


@pytest.mark.parametrize("count", [0, -1, 1.5, math.inf, True])
@pytest.mark.parametrize("stream", [False, True])
def test_counts_that_are_none_are_refused(count, stream, no_weights, tiny_dir, settings):  # noqa: F811
    rows = [pair("2", "3", 1.0, count)]
    with pytest.raises(
        ValueError, match="Row 0 of the train dataset: `student_count` is .* a whole number, at least 1"
    ):
        make(tiny_dir, rows, settings, stream=stream)


def test_the_mean_advantage_is_that_of_unequal_texts_used_or_not(tiny_dir, settings):
    rows = [pair("2", "3", 0.75), pair("7", "8", 0.0, prompt="3+4="), pair("9", "9", None, prompt="4+5=")]
    counts = make(tiny_dir, rows, settings, imitation_radius=0.0).text_counts["train"]
    assert counts.advantage == 0.25
    assert make(tiny_dir, rows[2:], settings).text_counts["train"].advantage is None


# ---- The student's wins ------------------------------------------------------------------------------------------------


def test_wins_by_hand(tiny_dir, settings):
    rows = [
        # p̄ = (0 + 0 + 1)/4 with the teacher's own text at ½ twice: (2·0 + 1 + 2·½)/5 = 0.4, weight 0.2
        *(pair("2", "3", 0.0, 2), pair("2", "4", 1.0), pair("2", "2", None, 2)),
        # Two comparisons are too few
        *(pair("7", "8", 0.0, 1, "3+4="), pair("7", "9", 0.0, 1, "3+4=")),
        # Three different ones are enough: p̄ = (3·0.1 + 0.1 + 0.6)/5 = 0.2. What is not known says nothing
        *(pair("6", "5", 0.1, 3, "2+4="), pair("6", "4", None, 3, "2+4=")),
        *(pair("6", "8", 0.1, 1, "2+4="), pair("6", "9", 0.6, 1, "2+4=")),
        # One answer is one judgement, however often it was given
        pair("4", "5", 0.0, 9, "1+3="),
        # The teacher is ahead
        *(pair("5", "1", 1.0, 2, "2+3="), pair("5", "2", 0.0, 1, "2+3=")),
    ]
    trainer = make(tiny_dir, rows, settings, imitation_radius=0.0, **GATED)
    teachers = [("5", pytest.approx(1 / 3))]
    students = [("3", pytest.approx(0.2)), ("5", pytest.approx(0.6)), ("8", pytest.approx(0.6))]
    assert texts(trainer) == [*teachers, *students]
    assert texts(make(tiny_dir, rows, settings, imitation_radius=0.0)) == teachers
    told = trainer.text_counts["train"].told
    assert told.endswith("the teacher did not win; 3 winning answers of the student's teach too")
    args = PbKDConfig(**{**settings, **OFF}, imitation_radius=0.0, **GATED)
    assert _weigh("train", Dataset.from_list(rows), args, 12)[1] == [("train imitation", told)]
    trainer.create_model_card()
    with open(f"{settings['output_dir']}/README.md") as file:
        card = file.read()
    assert f"Of the train data {told}." in card
    assert "| `student_wins` | gated |" in card


def test_they_are_learnt_with_their_weight_and_finish_reason(tiny_dir, settings):
    rows = [pair("2", "3", 0.0, 3, chosen_finish_reason="length"), pair("2", "4", 0.5), pair("2", "5", 0.5)]
    rows.append(pair("7", "8", 1.0, 1, "3+4="))
    trainer = make(tiny_dir, rows, settings, Dataset.from_list(rows), imitation_radius=0.0, max_steps=1, **GATED)
    learnt = [trainer._tokenizer.decode([t for t in row["labels"] if t != -100]) for row in trainer.train_dataset]
    assert learnt == ["7<eos>", "3"]
    assert weights(trainer.eval_dataset) == [0, 0, 0, 1]  # an evaluation is of the teacher's texts
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["pbkd/rows_used"] == 2
    assert log["pbkd/advantage"] == 0.5  # of the teacher's two texts


def test_rows_that_do_not_name_the_teacher_have_wins_too(tiny_dir, settings):
    rows = [{"prompt": "1+1=", "chosen": "2", "rejected": str(n), "preference": 0.0} for n in (3, 4, 5)]
    trainer = make(tiny_dir, rows, settings, **GATED, imitation_radius=0.0)
    assert texts(trainer) == [("3", 1.0), ("4", 1.0), ("5", 1.0)]


def test_a_score_below_the_least_is_no_win(tiny_dir, settings):
    of = {"score_chosen": 0.6, "score_rejected": 0.1}
    rows = [pair("2", "3", 0.0, 3, **of), *(pair("2", text, 0.0, 3, **of | {"score_chosen": 0.4}) for text in "45")]
    assert texts(make(tiny_dir, rows, settings, imitation_min_score=0.5, **GATED)) == [("3", 1.0)]


def test_third_texts_and_other_teachers_are_no_comparisons(tiny_dir, settings):
    third = {"prompt": "1+1=", "chosen": "8", "rejected": "9", "preference": 1.0, "teacher_side": None, "teacher": "2"}
    teachers = pair("2", "6", 1.0)
    teachers["rejected_source"] = "teacher"
    options, lost = {"imitation_radius": 0.0, **GATED}, [pair("2", text, 0.0) for text in "345"]
    for others in ([third], [teachers]):
        for count, wins in ((2, []), (3, [("3", 1.0), ("4", 1.0), ("5", 1.0)])):
            data = (*lost[:count], *others, pair("7", "8", 1.0))
            rows = [{**third, "teacher": None, **row} for row in data]
            assert [found for found in texts(make(tiny_dir, rows, settings, **options)) if found[0] in "345"] == wins


def test_an_answer_beside_two_texts_of_the_teachers():
    wins = StudentWins()
    labels = [("t", "a", 0.0), ("u", "a", 1.0), ("t", "u", 0.0), ("u", "b", 0.25), ("t", "c", 1.0), ("u", "c", 1.0)]
    for row, (teacher, student, p) in enumerate(labels):
        wins.add(teacher.encode(), student.encode(), row, "chosen", p, count=3)
    # Against t: p̄ = 1/3, which a and u win; u is the teacher's. Against u: p̄ = 0.75, and none
    assert [(win.row, win.weight) for win in wins.found()] == [(0, pytest.approx(1 / 6))]


def test_a_gate_that_nothing_can_pass_is_said(tiny_dir, settings, caplog):
    rows = [pair("2", "3", 0.0, 9), pair("7", "8", 1.0, 1, "3+4=")]
    for name, said in (("gated", 1), ("off", 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            make(tiny_dir, rows, settings, student_wins=name)
        assert caplog.text.count("compared with 3 different answers of the student's: none of these can win.") == said


def test_labels_of_one_answer_are_taken_together():
    """A judge that said once this and once that."""
    wins = StudentWins()
    for row, (student, p) in enumerate([("a", 0.0), ("a", 1.0), ("b", 0.0), ("c", 0.0)]):
        wins.add(b"t", student.encode(), row, "chosen", p)
    assert [(win.row, win.weight) for win in wins.found()] == [(2, 0.5), (3, 0.5)]


# ---- What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_wins": "all"}, "`student_wins` is 'all': use 'off' or 'gated'"),
        ({**GATED, "dual_init": 1.0}, "`student_wins` is 'gated', which adds texts that are no pairs"),
        (
            {**GATED, "imitation": "token", "teacher_model_name_or_path": "x"},
            "`student_wins` is 'gated' and `imitation`",
        ),
    ],
)
def test_impossible_settings_are_refused(options, message, settings):
    with pytest.raises(ValueError, match=message):
        PbKDConfig(**{**settings, **OFF, **options})


def test_a_stream_is_refused(no_weights, tiny_dir, settings):  # noqa: F811
    with pytest.raises(ValueError, match="`student_wins` is 'gated', which compares all pairs .* is a stream"):
        make(tiny_dir, [pair("2", "3", 1.0)], settings, stream=True, **GATED)


def test_nothing_that_teaches_is_still_refused(no_weights, tiny_dir, settings):  # noqa: F811
    with pytest.raises(ValueError, match="No row of the train dataset teaches"):
        make(tiny_dir, [pair("2", "3", 0.0, 2)], settings, imitation_radius=0.0, **GATED)
