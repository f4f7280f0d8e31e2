import pytest

from trl_kd.pairs import pair_row


def row(preference, teacher="t", student="s"):
    return pair_row("x", teacher, student, preference)


@pytest.mark.parametrize(
    ("preference", "expected"),
    [
        (1.0, ("t", "s", 1.0, "chosen")),
        (0.0, ("s", "t", 1.0, "rejected")),
        (0.5, ("t", "s", 0.5, "chosen")),
        (0.75, ("t", "s", 0.75, "chosen")),
        (0.25, ("s", "t", 0.75, "rejected")),
        (None, ("t", "s", None, "chosen")),
    ],
)
def test_the_better_is_chosen(preference, expected):
    made = row(preference)
    assert (made["chosen"], made["rejected"], made["preference"], made["teacher_side"]) == expected
    assert made["prompt"] == "x"


@pytest.mark.parametrize("preference", [0.0, 0.125, 0.25, 0.625, 1.0])
def test_swapping_the_labels_swaps_only_who_is_the_teacher(preference):
    made, swapped = row(preference), row(1 - preference, teacher="s", student="t")
    other = {"chosen": "rejected", "rejected": "chosen"}
    assert swapped == {**made, "teacher_side": other[made["teacher_side"]]}


@pytest.mark.parametrize("preference", [0.0, 0.5, 1.0, None])
def test_equal_texts_have_no_preference(preference):
    assert row(preference, student="t") == {
        "prompt": "x",
        "chosen": "t",
        "rejected": "t",
        "preference": None,
        "teacher_side": "chosen",
    }


def test_messages():
    teacher, student = ([{"role": "assistant", "content": text}] for text in "ab")
    made = pair_row([{"role": "user", "content": "x"}], teacher, student, 0)
    assert made["chosen"] == student
    assert made["preference"] == 1.0
    assert isinstance(made["preference"], float)


@pytest.mark.parametrize("preference", [-0.1, 1.1, float("nan"), float("inf")])
def test_no_probability(preference):
    with pytest.raises(ValueError, match="`preference` is"):
        row(preference)
