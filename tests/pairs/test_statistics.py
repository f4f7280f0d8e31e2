import json
import math
import random

import numpy as np
import pytest

from trl_kd.evaluation import metrics
from trl_kd.pairs import pair_row
from trl_kd.pairs.counting import DistinctCounter, Lengths, clustered_interval, wilson_interval
from trl_kd.pairs.statistics import PairStatistics, content_text, format_summary, text_length
from trl_kd.sampling import Answer


def make_rows(count, seed=0, per_prompt=4, messages=False):
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        prompt, texts = f"prompt {seed}/{i // per_prompt}", ["t" * draw.randint(1, 900), "s" * draw.randint(1, 900)]
        if messages:
            prompt = [{"role": "user", "content": prompt}]
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        row = pair_row(prompt, *texts, draw.choice([1.0, 0.0, 0.5, 0.25, None]))
        rows.append(row | {"chosen_finish_reason": "stop", "rejected_finish_reason": draw.choice(["stop", "length"])})
    return rows


def summary_of(rows, **given):
    statistics = PairStatistics()
    statistics.add_rows(rows)
    return statistics.summary(**given)


def sums_of(prompts):
    sums = dict.fromkeys(("prompts", "rows", "won", "rows_squared", "won_squared", "rows_won"), 0.0)
    for values in prompts:
        n, s = len(values), sum(values)
        for key, value in zip(sums, (1, n, s, n * n, s * s, n * s), strict=True):
            sums[key] += value
    return sums


class TestRows:
    def test_counts_are_those_of_the_rows(self):
        rows = make_rows(400)
        summary = summary_of(rows)
        known = [row for row in rows if row["preference"] is not None]
        preferences = [row["preference"] for row in known]
        assert {k: summary["pairs"][k] for k in ("total", "strict", "soft", "ties", "unknown")} == {
            "total": len(rows),
            "strict": sum(p == 1 for p in preferences),
            "soft": sum(0.5 < p < 1 for p in preferences),
            "ties": sum(p == 0.5 for p in preferences),
            "unknown": len(rows) - len(known),
        }
        assert summary["pairs"]["truncated"] == sum(row["rejected_finish_reason"] == "length" for row in rows)
        assert summary["teacher_win_rate"] == pytest.approx(
            sum(r["preference"] if r["teacher_side"] == "chosen" else 1 - r["preference"] for r in known) / len(known)
        )
        assert summary["teacher_pairs"] == len(known)
        assert (summary["prompts"], summary["prompts_exact"]) == (100, True)

    def test_nothing_at_all(self):
        summary = PairStatistics().summary()
        assert summary["pairs"]["total"] == summary["prompts"] == 0
        assert summary["teacher_win_rate"] is None
        assert summary["longer_is_chosen"] == {"auc": None, "pairs": 0}
        assert summary["warnings"] == []
        assert "pairs" in format_summary(summary)

    def test_nan_is_unknown(self):
        assert summary_of([pair_row("x", "a", "b", 1.0) | {"preference": math.nan}])["pairs"]["unknown"] == 1

    def test_pairs_of_one_source_say_nothing_of_the_teacher(self):
        both = {"chosen_source": "teacher", "rejected_source": "teacher"}
        rows = [pair_row("x", "a", "b", 0.0), pair_row("x", "a", "c", 1.0) | both]
        rows.append(pair_row("x", "d", "e", 1.0) | {"teacher_side": None})
        summary = summary_of(rows)
        assert (summary["teacher_win_rate"], summary["teacher_pairs"]) == (0.0, 1)
        assert summary["pairs"]["strict"] == 3

    @pytest.mark.parametrize("messages", [False, True])
    def test_in_pieces_as_at_once(self, messages):
        rows = make_rows(1000, messages=messages)
        whole = summary_of(rows)
        batches = PairStatistics()
        for start in range(0, 1000, 7):  # a prompt's rows are split between two calls
            batches.add_rows(rows[start : start + 7])
        assert batches.summary() == whole  # sums of quarters are exact
        merged = PairStatistics()
        for start in (600, 0, 200):  # whole prompts, in another order
            piece = PairStatistics()
            piece.add_rows(rows[start : start + {600: 400, 0: 200, 200: 400}[start]])
            merged.merge(piece)
        assert merged.summary() == whole

    def test_is_json_and_asking_changes_nothing(self):
        statistics = PairStatistics()
        statistics.add_rows(make_rows(6))
        first = statistics.summary(order_agreement=0.9, unparseable=2)
        assert json.loads(json.dumps(first, allow_nan=False)) == first
        assert statistics.summary(order_agreement=0.9, unparseable=2) == first

    def test_answers(self):
        statistics, other = PairStatistics(), PairStatistics()
        statistics.add_answers(
            "student", [Answer("abc", "stop", 2), Answer("abcde", "length", 4), Answer(None, "filter")]
        )
        other.add_answers("student", iter([Answer([{"role": "assistant", "content": "four"}])]))
        statistics.merge(other)
        counts = {"answers": 4, "truncated": 1, "refused": 1, "reasons": {"filter": 1}, "with_reasoning": 0}
        counts |= {"mean_characters": 4.0, "mean_tokens": 3.0}
        assert statistics.summary()["answers"] == {"student": counts}

    def test_what_the_caller_knows(self):
        summary = summary_of(make_rows(8), prompts=77, order_agreement=0.25, unparseable=3)
        assert (summary["prompts"], summary["order_agreement"], summary["unparseable"]) == (77, 0.25, 3)
        assert any("only 25 %" in warning for warning in summary["warnings"])


class TestLength:
    @pytest.mark.parametrize(
        ("content", "text"),
        [
            ("ab", "ab"),
            (None, ""),
            ([{"type": "text", "text": "ab"}, {"type": "image"}], "ab\n[image]"),
            ({"a": 1}, '{"a": 1}'),
        ],
    )
    def test_of_a_message(self, content, text):
        assert content_text(content) == text
        assert text_length([{"role": "user", "content": content}, {"role": "user", "content": "x"}]) == len(text) + 1

    def test_auc_counts_longer_and_half_of_equal(self):
        rows = [pair_row("x", "aaa", "b", 1.0), pair_row("x", "a", "bb", 1.0), pair_row("x", "a", "b", 0.9)]
        rows += [pair_row("x", "aaaa", "b", 0.1), pair_row("x", "aaaa", "b", 0.5), pair_row("x", "aaaa", "b", None)]
        assert summary_of(rows)["longer_is_chosen"] == {"auc": (1 + 0.5) / 4, "pairs": 4}

    @pytest.mark.parametrize(("longer", "word"), [(16, "longer"), (15, None), (10, None), (5, None), (4, "shorter")])
    def test_warns_of_length_bias(self, longer, word):
        rows = [
            pair_row(str(i), "a" * (2 if i < longer else 1), "b" * (1 if i < longer else 2), 1.0) for i in range(20)
        ]
        warnings = summary_of(rows)["warnings"]
        assert len(warnings) == (word is not None)
        if word:
            assert f"the {word} text is the chosen one in 80 % of 20 pairs" in warnings[0]

    def test_three_pairs_are_no_evidence_of_bias(self):
        assert summary_of([pair_row("x", "aa", "b", 1.0)] * 3)["warnings"] == []

    def test_warns_of_cut_off_answers_and_of_no_winner(self):
        statistics = PairStatistics()
        statistics.add_answers("student", [Answer("a", "length")] + [Answer("a", "stop")] * 9)
        statistics.add_answers("teacher", [Answer("a", "length")] + [Answer("a", "stop")] * 10)
        statistics.add_rows([pair_row("x", "a", "b", 0.5)])
        warnings = statistics.summary()["warnings"]
        assert len(warnings) == 2
        assert warnings[0].startswith("1 of 10 answers of the student were cut off")
        assert warnings[1].startswith("No pair has a winner")

    def test_quantiles_within_one_percent(self):
        lengths = np.random.default_rng(0).lognormal(6, 1.5, 20_000).astype(int)
        histogram = Lengths()
        histogram.add(lengths[:5000].tolist())
        histogram.add(lengths[5000:].tolist())
        summary = histogram.summary()
        assert summary["mean"] == pytest.approx(lengths.mean())
        exact = np.quantile(lengths, [0.1, 0.5, 0.9], method="inverted_cdf")
        assert [summary[key] for key in ("p10", "median", "p90")] == pytest.approx(exact, rel=0.01)
        assert len(histogram.buckets) < 1500
        assert Lengths().summary() is None


class TestInterval:
    @pytest.mark.parametrize("count", [1, 10, 300])
    @pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
    def test_is_wilsons_for_one_hard_label_a_prompt(self, share, count):
        won = round(share * count)
        found = clustered_interval(sums_of([[1.0]] * won + [[0.0]] * (count - won)))
        assert found == pytest.approx(wilson_interval(won / count, count), abs=1e-12)
        assert found == pytest.approx(metrics.wilson_interval(won / count, count), abs=1e-12)

    def test_equal_labels_of_a_prompt_count_once(self):
        once = sums_of([[1.0]] * 30 + [[0.0]] * 10)
        assert clustered_interval(sums_of([[1.0] * 4] * 30 + [[0.0] * 4] * 10)) == pytest.approx(
            clustered_interval(once)
        )

    def test_soft_labels_and_ties_are_surer_but_never_certain(self):
        low, high = clustered_interval(sums_of([[0.5]] * 100))
        assert 0.01 < high - low < 0.05 < np.ptp(wilson_interval(0.5, 100))
        assert low < 0.5 < high

    def test_two_prompts_with_most_rows_are_worth_no_more_than_one(self):
        prompts = [[1.0] * 1000, [0.0] * 1000] + [[1.0], [0.0]] * 500
        assert clustered_interval(sums_of(prompts)) == pytest.approx(wilson_interval(0.5, 1))

    def test_of_rows_takes_those_of_a_prompt_together(self):
        rows = make_rows(200)
        prompts = []
        for start in range(0, 200, 4):
            known = [row for row in rows[start : start + 4] if row["preference"] is not None]
            prompts.append([abs((row["teacher_side"] == "rejected") - row["preference"]) for row in known])
        expected = clustered_interval(sums_of([values for values in prompts if values]))
        assert summary_of(rows)["teacher_win_interval"] == pytest.approx(expected)

    @pytest.mark.parametrize("values", ["hard", "ties", "soft", "clusters"])
    def test_covers_the_truth(self, values):
        draw = np.random.default_rng(0)
        make = {
            "hard": lambda: [[float(x)] for x in draw.random(60) < 0.6],
            "ties": lambda: [[float(x)] for x in draw.choice([0, 0.5, 1], 60, p=[0.2, 0.4, 0.4])],
            "soft": lambda: [[float(x)] for x in draw.beta(6, 4, 60)],
            "clusters": lambda: [list((draw.random(draw.integers(1, 6)) < p) * 1.0) for p in draw.beta(0.6, 0.4, 60)],
        }[values]
        covered = 0
        for _ in range(400):
            low, high = clustered_interval(sums_of(make()))
            covered += low <= 0.6 <= high
        assert 0.92 <= covered / 400 <= 0.99


class TestDistinct:
    def test_exact_then_close_whatever_the_order(self):
        values = [str(i) for i in range(5000)]
        counter, backwards, merged = DistinctCounter(256), DistinctCounter(256), DistinctCounter(256)
        for value in values[:512] * 2:
            counter.add(value)
        assert (len(counter), counter.exact) == (512, True)
        for value in values:
            counter.add(value)
        for value in values[::-1]:
            backwards.add(value)
        for piece in (values[:300], values[200:2500], values[2400:]):
            other = DistinctCounter(256)
            for value in piece:
                other.add(value)
            merged.merge(other)
        assert not counter.exact
        assert len(counter) == len(backwards) == len(merged)
        assert len(counter) == pytest.approx(5000, rel=0.2)  # three standard errors
        assert len(counter.hashes) <= 512


def test_the_table_says_it_all():
    statistics = PairStatistics()
    statistics.add_answers("teacher", [Answer("abc", "stop", 2), Answer(None)])
    statistics.add_rows([pair_row("x", "aa", "b", 1.0), pair_row("y", "aa", "b", 0.5)])
    table = format_summary(statistics.summary(order_agreement=0.5, unparseable=4))
    for words in (
        "answers of the teacher",
        "2 (1 without a text, on average 3 characters and 2 tokens)",
        "1 (50.0 %)",
        "75.0 % (95 %",
    ):
        assert words in table
    for words in ("AUC 1.00 (0.5 is no bias; 1 pairs)", "agree    50.0 %", "replies  4", "Warning: The judge"):
        assert words in table
