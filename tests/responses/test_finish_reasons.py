import logging
import math

import pytest

from trl_kd.responses.finish_reasons import check_finish_reason, ending, has_end


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("complete", [None, "stop", "STOP", "tool_calls", "function_call"]),
        ("complete", ["eos", "eos_token", "end_turn", "stop_sequence"]),
        ("cut", ["length", "Length", "max_tokens", "MAX_TOKENS", "model_length"]),
        ("failed", ["error", "abort", "cancelled"]),
        ("final", ["content_filter", "refusal"]),
    ],
)
def test_words_are_sorted_whatever_their_case(kind, words):
    assert [ending(word) for word in words] == [kind] * len(words)


def test_nothing_known_counts_as_complete():
    assert {ending(word) for word in ("", "  ", math.nan, None)} == {"complete"}
    assert has_end(None)
    assert not any(has_end(word) for word in ("length", "error", "content_filter", "what"))


def test_a_reason_that_is_no_text_is_one_sentence():
    check_finish_reason(None, "x")
    check_finish_reason(math.nan, "x")
    with pytest.raises(ValueError, match=r"Row 3: `chosen_finish_reason` is \{'a': 1\}: it must be a text"):
        check_finish_reason({"a": 1}, "Row 3: `chosen_finish_reason`")


def test_an_unknown_word_counts_as_cut_off_and_is_reported_once(caplog):
    with caplog.at_level(logging.WARNING):
        assert [ending(word) for word in ("repetition_x", "Repetition_X", "budget_x")] == ["cut"] * 3
    assert [record.getMessage().count("not known") for record in caplog.records] == [1, 1]
