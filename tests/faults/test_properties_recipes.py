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
    st.sampled_from(
        ["\0", "a\nb", "~nobody/x", "a::b", "s3://b/x", "x/" * 50, "ä" * 300, "9" * 400, "owner/name", "\ud800"]
    ),
    st.text(max_size=8),
)
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 2**31, 2**63, 2**64, 10**400, 0.0, 0.5, 1.5, -0.5, 1e308, 5e-324]),
    st.integers(),
    st.floats(),
)
URLS = st.sampled_from(
    [
        "http://[",
        "http://h:x/v1",
        "http://h:99999/v1",
        "ftp://h/v1",
        "//h",
        "http://a@b@c/v1",
        "http://",
        "http://h/v1?a=b",
    ]
)
SCALARS = st.one_of(
    st.none(), st.booleans(), NUMBERS, TEXTS, URLS, st.binary(max_size=4), st.dates(), st.just(datetime.datetime.max)
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
    @example("output_dir", "ä" * 300)
    def one(field, value):
        check(recipes, command, recipes.of(command) | {field: value}, field)

    one()


KINDS = [
    ("pbkd", {"eval_delay": -1}),
    ("pbkd", {"warmup_steps": float("inf")}),
    ("pbkd", {"max_steps": 10**400}),
    ("pbkd", {"max_length": 10**400}),
    ("pbkd", {"imitation_radius": 10**400}),
    ("pbkd", {"adam_beta1": float("nan")}),
    ("pbkd", {"lora_r": -1}),
    ("pbkd", {"seed": -1}),
    ("pbkd", {"pad_to_multiple_of": "x"}),
    ("pbkd", {"debug": ["x"]}),
    ("pbkd", {"parallelism_config": {"a": 1}}),
    ("pbkd", {"liger_kernel_config": [1]}),
    ("pbkd", {"lr_scheduler_kwargs": {1: None}}),
    ("pbkd", {"accelerator_config": {"a": 1}}),
    ("pbkd", {"model_name_or_path": "ä" * 300}),
    ("pbkd", {"accelerate_config": "ä" * 300}),
    ("pbkd", {"run_name": "\ud800"}),
    ("online-pbkd", {"num_generations": None}),
    ("online-pbkd", {"num_generations": 0}),
    ("online-pbkd", {"steps_per_generation": 0}),
    ("online-pbkd", {"reward_clip_range": "x"}),
    ("online-pbkd", {"reward_funcs": [None]}),
    ("online-pbkd", {"rm_lora_r": 2**62}),
    ("pairs", {"student_base_url": ["http://["]}),
    ("pairs", {"teacher_base_url": [None]}),
    ("pairs", {"student_extra_body": {"": b""}}),
    ("pairs", {"student_top_p": 3}),
    ("pairs", {"teacher_price_in": -1}),
    ("pairs", {"num_student_samples": 10**9}),
    ("rounds", {"rounds": 2**70}),
]
"""A value of each kind that was once a traceback, a sentence without the field's name, or taken."""


@pytest.mark.parametrize(("command", "changed"), KINDS)
def test_what_is_refused_is_named(recipes, command, changed):
    error = recipes.dry_run(command, recipes.of(command) | changed).error
    assert f"`{next(iter(changed))}`" in error, error


def test_a_pair_of_numbers(recipes):
    recipe = recipes.of("online-pbkd") | {"reward_clip_range": [-1, 1]}
    assert recipes.dry_run("online-pbkd", recipe).code == 0
    assert recipes.dry_run("online-pbkd", recipe, "--reward_clip_range", "0", "0.5").code == 0
    assert "`reward_clip_range`" in recipes.dry_run("online-pbkd", recipe | {"reward_clip_range": [1]}).error


# ---- Texts that are no recipes -------------------------------------------------------------------------------------------


BROKEN = [
    b"beta: 2024-13-45",
    b"beta: 0x_",
    b"beta: !!int ''",
    b"beta: !!bool x",
    b"beta: !!timestamp x",
    b"? [a]\n: b",
    b"a: *b",
    b"a: " + b"[" * 3000,
    b"a: &x [*x]",
    b"\xff\xfe\xff",
    b"seed: 1\nseed: 2",
    b"seed: " + b"9" * 5000,
    b"env: {A=B: 1}",
    b'env: {A: "\\0"}',
    b"env: {'': 1}",
    b"- 1",
    b"",
]


@pytest.mark.parametrize("text", BROKEN)
def test_files_that_are_no_recipes(recipes, text):
    error = recipes.dry_run("pbkd", text).error
    assert "`config` is" in error or "`env` in" in error or "unknown key `a`" in error, error


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_encodings_of_yaml(recipes, encoding):
    text = yaml.safe_dump(recipes.of("pbkd") | {"run_name": "ä漢"}, allow_unicode=True)
    assert recipes.dry_run("pbkd", text.encode(encoding)).code == 0


def test_a_key_may_be_overridden_by_a_merge(recipes):
    text = yaml.safe_dump(recipes.of("pbkd"))
    merged = text + "model_init_kwargs:\n  <<: &x {dtype: float32}\n  <<: *x\n  dtype: float32\n"
    assert recipes.dry_run("pbkd", merged).code == 0


PIECES = st.sampled_from(
    [
        *(
            "seed: 1",
            "beta: 0.1",
            "bata: 0.1",
            "use_peft: yes",
            "env:",
            "  A: 1",
            "- x",
            "...",
            "---",
            "&a",
            "*a",
            "<<: *a",
        ),
        *(
            "? x",
            ": y",
            "!!float x",
            "!!python/object:os.system x",
            "{a: ",
            "}",
            "'",
            '"\\ud800"',
            "\t",
            "# x",
            "|",
            ">",
            "%YAML 9.9",
        ),
        *(
            "\ufeff",
            "\x07",
            "5: 5",
            "null: 1",
            "true: 1",
            "2001-99-01",
            "1:2:3",
            ".inf",
            ".nan",
            "0b",
            "num_processes: x",
        ),
    ]
)


@properties
@given(
    pieces=st.lists(st.tuples(PIECES, st.sampled_from(["", " ", "\n", "\n  "])), max_size=8),
    encoding=st.sampled_from(["utf-8", "utf-8", "utf-16", "utf-32", "latin-1"]),
    noise=st.binary(max_size=3),
)
def test_a_file_of_any_text(recipes, pieces, encoding, noise):
    text = "".join(piece + space for piece, space in pieces)
    content = text.encode(encoding, "replace") + noise
    done = recipes.dry_run("pbkd", content)
    assert "`" in done.error, done.err  # there is neither a student nor a dataset
