"""Preference functions: P(first ≻ second) of two responses, by verifier, reward model, judge, likelihood, or column."""

from trl_kd.preferences.preference import Preference, ScoredPreference, function_name


__all__ = ["Preference", "ScoredPreference", "function_name"]
