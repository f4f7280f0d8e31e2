import logging

import pytest

from trl_kd.responses.finish_reasons import ending


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


def test_an_unknown_word_counts_as_cut_off_and_is_reported_once(caplog):
    with caplog.at_level(logging.WARNING):
        assert [ending(word) for word in ("repetition_x", "Repetition_X", "budget_x")] == ["cut"] * 3
    assert [record.getMessage().count("not known") for record in caplog.records] == [1, 1]
