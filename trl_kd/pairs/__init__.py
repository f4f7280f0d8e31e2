"""Preference pairs of a teacher's and a student's responses."""

from trl_kd.pairs.rows import PairCounts, count_pairs, pair_row


__all__ = ["PairCounts", "count_pairs", "pair_row"]
