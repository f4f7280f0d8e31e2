"""Recipes of any content: each is run or refused by one sentence that names the field, and none is a traceback."""

import datetime
from dataclasses import fields

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from tests.faults.commands import WORDS, Recipes
from tests.faults.profiles import properties
from trl_kd.scripts import mm_pbkd, online_pbkd, pbkd
from trl_kd.scripts.pairs_arguments import PairsArguments


TYPES = {
    "pairs": (PairsArguments,),
    "pbkd": pbkd.DATACLASSES,
    "rounds": pbkd.DATACLASSES,
    "mm-pbkd": mm_pbkd.DATACLASSES,
    "online-pbkd": online_pbkd.DATACLASSES,
}
FIELDS = {command: sorted({f.name for owner in owners for f in fields(owner)}) for command, owners in TYPES.items()}

TEXTS = st.one_of(
    st.sampled_from(["", "None", "null", "no", "1e3", "1e999", "nan", "-1", "0.5", "{", '{"a": 1}', "[1]", "a b"]),
    st.sampled_from(["\0", "a\nb", "~nobody/x", "a::b", "s3://b/x", "x/" * 50, "ä" * 300, "9" * 400, "owner/name", "\ud800"]),
    st.text(max_size=8),
)
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 2**31, 2**63, 2**64, 10**400, 0.0, 0.5, 1.5, -0.5, 1e308, 5e-324]),
    st.integers(),
    st.floats(),
)
SCALARS = st.one_of(
    st.none(), st.booleans(), NUMBERS, TEXTS, st.binary(max_size=4), st.dates(), st.just(datetime.datetime.max)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(TEXTS, st.none(), st.integers()), inner, max_size=3)
    ),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def recipes(tiny_dir, teacher_dir, tmp_path_factory):
    with Recipes(tmp_path_factory.mktemp("recipes"), tiny_dir, teacher_dir) as recipes:
        yield recipes


def check(recipes: Recipes, command: str, recipe, *named: str) -> None:
    """Of a dry run: it passes, or says by one sentence what is wrong with one of those `named`. It leaves nothing behind."""
    done = recipes.dry_run(command, recipe)
    if done.code != 0:
        error = done.error
        assert "(a TypeError" not in error  # a fault that nobody has thought of
        assert any(f"`{name}`" in error for name in named), error
    assert not recipes.out.exists()


@pytest.mark.parametrize("command", WORDS)
def test_the_recipes_pass(recipes, command):
    done = recipes.dry_run(command, recipes.of(command))
    assert done.code == 0, done.err


@pytest.mark.parametrize("command", WORDS)
def test_a_field_of_any_value(recipes, command):
    @properties
    @given(st.sampled_from(FIELDS[command]), VALUES)
    def one(field, value):
        check(recipes, command, recipes.of(command) | {field: value}, field)

    one()
