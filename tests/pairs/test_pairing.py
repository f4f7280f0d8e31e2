"""Pairing is a pure function of answers and labels: every case here is worked out by hand."""

import random

import pytest

from trl_kd.pairs.pairing import PairingSettings, PromptPairs, choose_pairs, make_candidates, make_rows
from trl_kd.preferences import ScoredPreference
from trl_kd.sampling import Answer


def answers(*texts, finish_reason="stop"):
    return [Answer(text, finish_reason) for text in texts]


def pair(teacher, student, policy="teacher_vs_student", labels=None, scores=None, prompt="x", scale=None, **options):
    """Rows of one prompt; `labels` gives P(first ≻ second) by texts, `scores` a score by text."""
    settings = PairingSettings(policy, **options)
    candidates = make_candidates(prompt, answers(*teacher), answers(*student), settings.truncated)
    made = PromptPairs("key", prompt, candidates, choose_pairs("key", candidates, settings))
    if scores is not None:
        made.scores = [scores.get(candidate.text) for candidate in candidates]
    for i, j in made.pairs:
        if labels is not None and candidates[i].text != candidates[j].text:
            made.labels[i, j] = labels.get((candidates[i].text, candidates[j].text))
    return make_rows(made, settings, ScoredPreference(scale))


def short(rows):
    return [(row["chosen"], row["rejected"], row["preference"], row["teacher_side"]) for row in rows]


ALWAYS = {("t", "a"): 1.0, ("t", "b"): 0.0, ("u", "a"): 0.5, ("u", "b"): 0.25, ("t", "u"): 0.75, ("a", "b"): 1.0}


def test_teacher_against_each_student_answer():
    rows = pair("t", "ab", labels=ALWAYS)
    assert short(rows) == [("t", "a", 1.0, "chosen"), ("b", "t", 1.0, "rejected")]
    assert [(row["chosen_source"], row["rejected_source"]) for row in rows] == [
        ("teacher", "student"),
        ("student", "teacher"),
    ]
    assert all("teacher" not in row for row in rows)


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        ("tu", "ab", ["ta", "ub"]),
        ("tu", "abc", ["ta", "ub", "tc"]),
        ("tuv", "a", ["ta", "ua", "va"]),
        ("t", "", []),
        ("", "ab", []),
    ],
)
def test_several_of_both_are_used_once_each(teacher, student, expected):
    assert [row["chosen"] + row["rejected"] for row in pair(teacher, student)] == expected


def test_equal_texts_make_one_row_that_teaches_imitation():
    assert short(pair("t", "tt")) == [("t", "t", None, "chosen")]
    assert short(pair("t", "ta", labels=ALWAYS)) == [("t", "t", None, "chosen"), ("t", "a", 1.0, "chosen")]


def test_a_pair_of_texts_comes_once():
    assert short(pair("t", "aab", labels=ALWAYS)) == [("t", "a", 1.0, "chosen"), ("b", "t", 1.0, "rejected")]
    # A student's answer that equals the teacher's stands for it in no other pair
    assert [row["chosen"] + row["rejected"] for row in pair("t", "ta", "all")] == ["tt", "ta"]


def test_nothing_known_still_teaches_imitation():
    assert short(pair("t", "a", labels={})) == [("t", "a", None, "chosen")]


def test_answers_without_text_give_no_pair():
    settings = PairingSettings()
    candidates = make_candidates("x", [Answer(None)], answers("a"), "keep")
    assert choose_pairs("key", candidates, settings) == []


def test_truncated_answers_are_kept_or_dropped():
    student = [*answers("a", finish_reason="length"), *answers("b")]
    for truncated, expected in (("keep", "tab"), ("drop", "tb")):
        candidates = make_candidates("x", answers("t"), student, truncated)
        assert "".join(candidate.text for candidate in candidates) == expected
    assert [candidate.finish_reason for candidate in candidates] == ["stop", "stop"]


class TestBestAgainstWorst:
    def rows(self, teacher="t", student="ab", **kwargs):
        return pair(teacher, student, "best_vs_worst", **kwargs)

    def test_by_score(self):
        (row,) = self.rows(scores={"t": 2.0, "a": 3.0, "b": 1.0})
        assert (row["chosen"], row["rejected"], row["score_chosen"], row["score_rejected"]) == ("a", "b", 3.0, 1.0)
        # The teacher wrote neither: its text is a third one, to be imitated
        assert (row["teacher_side"], row["teacher"], row["preference"]) == (None, "t", 1.0)

    def test_by_score_with_the_teacher(self):
        (row,) = self.rows(scores={"t": 0.0, "a": 3.0, "b": 1.0})
        assert short([row]) == [("a", "t", 1.0, "rejected")]
        assert row["teacher"] is None
        assert (row["score_chosen"], row["score_rejected"]) == (3.0, 0.0)

    def test_the_best_of_several_teacher_texts_is_imitated(self):
        (row,) = self.rows("tuv", "ab", scores={"t": 1.5, "u": 2.0, "v": 2.0, "a": 3.0, "b": 1.0})
        assert row["teacher"] == "u"
        (row,) = self.rows("tu", "ab", scores={"t": None, "u": 2.0, "a": 3.0, "b": 1.0})
        assert row["teacher"] == "u"

    def test_soft(self):
        (row,) = self.rows(scores={"t": 1.0, "a": 0.0, "b": 0.5}, scale=1.0)
        assert row["preference"] == pytest.approx(0.7310585786)

    def test_by_wins(self):
        labels = {("t", "a"): 0.4, ("t", "b"): 0.9, ("a", "b"): 0.8}  # means: t .65, a .7, b .15
        (row,) = self.rows(labels=labels)
        assert short([row]) == [("a", "b", 0.8, None)]
        assert row["score_chosen"] is None

    def test_the_better_of_the_pair_is_chosen_even_in_a_circle(self):
        labels = {
            ("t", "a"): 1.0,
            ("t", "b"): 0.1,
            ("a", "b"): 0.55,
        }  # means: t .55, a .275, b .675; b beats t and loses to a
        (row,) = self.rows(labels=labels)
        assert short([row]) == [("a", "b", 0.55, None)]

    def test_ties_go_to_the_teacher(self):
        assert short(self.rows(scores=dict.fromkeys("tab", 1.0))) == [("t", "b", 0.5, "chosen")]

    def test_a_text_of_both_is_the_teachers(self):
        assert short(self.rows("t", "tb", scores={"t": 0.0, "b": 1.0})) == [("b", "t", 1.0, "rejected")]
        assert short(self.rows("t", "tt", scores={"t": 0.0})) == [("t", "t", None, "chosen")]

    def test_unknown_scores_are_left_out(self):
        assert short(self.rows(scores={"t": None, "a": 1.0, "b": 2.0}))[0][:3] == ("b", "a", 1.0)
        assert short(self.rows(scores={"t": None, "a": None, "b": 2.0})) == [("t", "a", None, "chosen")]


class TestAll:
    def test_every_two(self):
        rows = pair("tu", "ab", "all", labels=ALWAYS)
        assert short(rows) == [
            ("t", "u", 0.75, "chosen"),
            ("t", "a", 1.0, "chosen"),
            ("b", "t", 1.0, "rejected"),
            ("u", "a", 0.5, "chosen"),
            ("b", "u", 0.75, "rejected"),
            ("a", "b", 1.0, None),
        ]
        assert all(row["teacher"] is None for row in rows)  # imitated in other rows

    def test_rows_that_teach_nothing_are_left_out(self):
        assert short(pair("t", "ab", "all", labels={("t", "a"): 1.0})) == [
            ("t", "a", 1.0, "chosen"),
            ("t", "b", None, "chosen"),
        ]
        assert pair("", "aa", "all", labels={}) == []
        assert pair("", "ab", "all", labels={}) == []

    def test_at_most_k(self):
        everything = short(pair("t", "abcde", "all", labels={}))
        seen = set()
        for seed in range(20):
            rows = pair(
                "t", "abcde", "all", labels=dict.fromkeys(_couples("tabcde"), 1.0), max_pairs_per_prompt=3, seed=seed
            )
            again = pair(
                "t", "abcde", "all", labels=dict.fromkeys(_couples("tabcde"), 1.0), max_pairs_per_prompt=3, seed=seed
            )
            assert rows == again
            assert len(rows) == 3
            seen.update((row["chosen"], row["rejected"]) for row in rows)
            sides = [row["teacher_side"] for row in rows]
            assert [row["teacher"] for row in rows] == [None if any(sides) else "t", None, None]
        assert len(seen) == 15
        assert len(everything) == 5

    def test_the_cap_comes_before_the_labels(self):
        settings = PairingSettings("all", max_pairs_per_prompt=2)
        candidates = make_candidates("x", answers("t"), answers("a", "b", "c"))
        assert len(choose_pairs("key", candidates, settings)) == 2


def _couples(texts):
    return [(a, b) for i, a in enumerate(texts) for b in texts[i + 1 :]]


def test_chosen_is_always_at_least_as_good():
    rng = random.Random(0)
    for _ in range(300):
        teacher, student = (rng.choices("abcd", k=rng.randrange(4)) for _ in range(2))
        labels = {(a, b): rng.choice([None, 0.0, 0.3, 0.5, 1.0]) for a in "abcd" for b in "abcd"}
        for policy in ("teacher_vs_student", "best_vs_worst", "all"):
            rows = pair(teacher, student, policy, labels=labels)
            texts = [frozenset((row["chosen"], row["rejected"])) for row in rows]
            assert len(set(texts)) == len(texts)
            for row in rows:
                assert row["preference"] is None or 0.5 <= row["preference"] <= 1
                assert (row["preference"] is None) >= (row["chosen"] == row["rejected"])
                side = row["teacher_side"]
                assert side is None or row[f"{side}_source"] == "teacher"
                if side is None:
                    assert (row["chosen_source"], row["rejected_source"]) == ("student", "student")
            if rows and teacher:  # the teacher is imitated on every prompt
                assert any(row["teacher_side"] or row["teacher"] for row in rows)


def test_messages():
    prompt = [{"role": "user", "content": "x"}]
    (row,) = pair("t", "a", prompt=prompt)
    assert (row["prompt"], row["chosen"]) == (prompt, [{"role": "assistant", "content": "t"}])
    nulls = [{"role": "assistant", "content": "t", "tool_calls": None}]
    (candidate,) = make_candidates(prompt, answers(nulls), [])
    assert candidate.text == [{"role": "assistant", "content": "t"}]
    with pytest.raises(ValueError, match="The teacher's answer to 'x' is a list of messages, but the prompt is text"):
        make_candidates("x", answers(prompt), [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "some"}, "`policy` is 'some': it must be one of 'teacher_vs_student', 'best_vs_worst', 'all'"),
        ({"max_pairs_per_prompt": 0}, "`max_pairs_per_prompt` is 0: it must be at least 1, or None"),
        ({"truncated": "no"}, "`truncated` is 'no': it must be 'keep' or 'drop'"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        PairingSettings(**options)


def test_rows_count_how_often_the_student_gave_their_answer():
    def counts(*args, **options):
        return [(row["chosen"] + row["rejected"], row["student_count"]) for row in pair(*args, **options)]

    assert counts("t", "a") == [("ta", 1)]
    assert counts("t", "aataba") == [("ta", 4), ("tt", 1), ("tb", 1)]
    assert counts("tu", "aaab") == [("ta", 3), ("ua", 3), ("ub", 1)]  # of all samples, whichever were compared
    assert counts("tt", "a") == [("ta", 1)]
    assert counts("tu", "aab", "all", labels=ALWAYS) == [
        ("tu", None),
        ("ta", 2),
        ("bt", 1),
        ("ua", 2),
        ("bu", 1),
        ("ab", None),
    ]
