"""Answers from a column: whatever form they have there, and no more read than asked for."""

from itertools import count, islice

import pytest

from trl_kd.sampling import Request
from trl_kd.sampling.column import ColumnSampler


MESSAGES = [{"role": "assistant", "content": "4"}]


def texts(value, samples=(0,)) -> list:
    request = Request("k", "2+2=", samples, {"answer": value, "other": "x"})
    answers = list(ColumnSampler("answer").sample([request]))
    assert [(r, s) for r, s, _ in answers] == [(request, sample) for sample in samples]
    return [answer.text for _, _, answer in answers]


@pytest.mark.parametrize("answer", ["4", "", MESSAGES])
def test_one_answer(answer):
    assert texts(answer) == [answer]


@pytest.mark.parametrize("answer", ["4", MESSAGES])
def test_several_answers(answer):
    assert texts([answer, None, answer], (0, 1, 2)) == [answer, None, answer]
    assert texts([answer, "5"], (1,)) == ["5"]


def test_no_answer():
    assert texts(None) == [None]
    assert texts([]) == [None]
    assert texts("4", (0, 1)) == ["4", None]  # the column has one answer, not two


def test_a_missing_column_is_one_sentence():
    with pytest.raises(
        ValueError,
        match="There is no column 'no_such' to read answers from: beside the prompt there are 'answer', 'other'.",
    ):
        list(ColumnSampler("no_such").sample([Request("k", "p", columns={"other": 1, "answer": "4"})]))


@pytest.mark.parametrize("value", [3, {"role": "assistant"}, [3], [[{"content": "no role"}]]])
def test_other_things_are_one_sentence(value):
    with pytest.raises(ValueError, match="The column 'answer' holds .* an answer is text"):
        texts(value)


def test_it_reads_no_further_than_asked():
    read = []

    def requests():
        for i in count():
            read.append(i)
            yield Request(str(i), "p", columns={"answer": str(i)})

    answers = islice(ColumnSampler("answer").sample(requests()), 3)
    assert [answer.text for _, _, answer in answers] == ["0", "1", "2"]
    assert read == [0, 1, 2]


def test_description():
    assert ColumnSampler("answer").is_lookup
    assert ColumnSampler("answer").describe() == {"sampler": "column", "column": "answer"}
