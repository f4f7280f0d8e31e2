"""How many examples a property is tried on: few, always the same ones, by default; many at random in `make faults`."""

import os

from hypothesis import HealthCheck, settings


IS_LONG = os.environ.get("TRL_KD_FAULTS") == "long"

properties = settings(
    max_examples=500 if IS_LONG else 100,
    derandomize=not IS_LONG,
    print_blob=IS_LONG,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.large_base_example],
)
"""Decorator of every property. Nothing is timed, and nothing is kept between runs."""
