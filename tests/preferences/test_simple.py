import math
import time

import pytest

from trl_kd.preferences.simple import LabelColumn, TeacherWins


def ask(preference, pairs, **columns):
    first_source, second_source = zip(*pairs, strict=True)
    texts = ["x"] * len(pairs)
    return preference(
        texts, texts, texts, first_source=list(first_source), second_source=list(second_source), **columns
    )


SOURCES = [("teacher", "student"), ("student", "teacher"), ("student", "student"), ("teacher", "teacher")]


def test_the_teacher_wins():
    assert ask(TeacherWins(), SOURCES) == [1.0, 0.0, None, None]
    assert TeacherWins().describe() == {"preference": "teacher_wins"}


def test_the_teacher_wins_fast():
    many = SOURCES * 50_000
    first_source, second_source = map(list, zip(*many, strict=True))
    texts = ["x"] * len(many)
    start = time.process_time()
    TeacherWins()(texts, texts, texts, first_source=first_source, second_source=second_source)
    assert len(many) / (time.process_time() - start) > 200_000  # ten times what a whole run of pairs must reach


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("teacher", 1.0),
        ("student", 0.0),
        ("tie", 0.5),
        (0.75, 0.75),
        (1, 1.0),
        (False, 0.0),
        (None, None),
        (math.nan, None),
    ],
)
def test_labels_of_people(value, expected):
    other = None if expected is None else 1 - expected
    assert ask(LabelColumn("winner"), SOURCES, winner=[value] * 4) == [expected, other, None, None]


@pytest.mark.parametrize("value", ["Teacher", "", "0.5", 1.5, -0.1, math.inf, [1.0]])
def test_no_label(value):
    with pytest.raises(ValueError, match=r"The column 'winner' holds .*: a label is 'teacher'") as error:
        ask(LabelColumn("winner"), SOURCES[:1], winner=[value])
    assert repr(value) in str(error.value)


def test_no_such_column():
    with pytest.raises(ValueError, match=r"There is no column 'winner' .*: the rows have better, id\."):
        ask(LabelColumn("winner"), SOURCES[:1], better=["teacher"], id=[1])
    assert LabelColumn("winner").describe() == {"preference": "label_column", "column": "winner"}
