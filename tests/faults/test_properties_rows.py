"""Files of rows of any content: a command takes them, or refuses them by one sentence that says which field is wrong, and in
which row."""

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.faults.commands import ROWS, WORDS, Recipes, run
from tests.faults.profiles import properties
from trl_kd.scripts.data import load_split
from trl_kd.scripts.errors import InputError


def user(content, **more):
    return {"role": "user", "content": content, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def in_messages(row: dict) -> dict:
    texts = {name: [assistant(row[name])] for name in ("completion", "chosen", "rejected")}
    return {**row, **texts, "prompt": [user(row["prompt"])]}


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
COLUMNS = (
    *("prompt", "completion", "chosen", "rejected", "teacher", "teacher_side", "preference", "student_count"),
    *("score_teacher", "score_chosen", "chosen_finish_reason", "tools", "chat_template_kwargs", "images", "other"),
)
DEEP: list = []
for _ in range(60):
    DEEP = [DEEP]
ROLES = st.sampled_from(["user", "tool", "robot", "", None, 5])
CALLS = st.sampled_from([None, [], [CALL], "f", [None]])
PARTS = st.one_of(
    st.sampled_from([None, 5, "x", [], ["x"], [{"type": "text", "text": "hi"}], [{"type": "image"}], "\ud83d", "\0"])
)
MESSAGES = st.lists(
    st.one_of(
        st.builds(lambda role, content: {"role": role, "content": content}, ROLES, PARTS),
        st.builds(lambda content, calls: assistant(content, tool_calls=calls), PARTS, CALLS),
        st.builds(assistant, PARTS),
        st.sampled_from([{}, {"role": "user"}, {"content": "x"}, None, "x"]),
    ),
    max_size=3,
)  # fmt: skip
VALUES = st.one_of(
    st.sampled_from([None, True, 0, 1, 0.5, -0.5, 1.5, 10**30, 10**400, float("nan"), float("inf"), DEEP]),
    st.sampled_from(
        ["", "x", "\0", "\ud83d", "1+1=" * 3000, "chosen", "teacher", "[]", " ", [], [None], [[]], {}, {"a": 1}]
    ),
    MESSAGES,
    st.text(max_size=4),
)
NOISE = st.sampled_from(
    [b"", b"\n", b"\xef\xbb\xbf", b"\xff", b"{}\n", b"3\n", b"null\n", b"{\n", b"\0", b"[", b"  \n\r\n"]
)


@pytest.fixture(scope="module")
def recipes(tiny_dir, teacher_dir, tmp_path_factory):
    with (
        pytest.MonkeyPatch.context() as patch,
        Recipes(tmp_path_factory.mktemp("rows"), tiny_dir, teacher_dir) as recipes,
    ):
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(recipes.folder / "cache"))
        yield recipes


def outcome(recipes: Recipes, command: str, content: bytes):
    """Of the dry run of a training with these rows; pairs are made of them to the end."""
    Path(recipes.rows).write_bytes(content)
    shutil.rmtree(recipes.folder / "cache", ignore_errors=True)
    if command != "pairs":
        return recipes.dry_run(command, recipes.of(command))
    shutil.rmtree(recipes.out, ignore_errors=True)
    recipe = {
        **{"dataset_name": recipes.rows, "output_dir": str(recipes.out), "preference": "column:preference"},
        **{"teacher_column": "completion", "student_column": "rejected"},
    }
    done = run("pairs", "--config", recipes.write("recipe.yaml", recipe))
    shutil.rmtree(recipes.out, ignore_errors=True)
    return done


def as_bytes(rows: list[dict]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


TRAININGS = sorted(set(WORDS) - {"rounds"})  # which read their prompts as `pairs` does


@properties
@given(
    command=st.sampled_from(TRAININGS),
    are_messages=st.booleans(),
    column=st.sampled_from(COLUMNS),
    value=VALUES,
    places=st.sampled_from([(1,), (0, 1, 2)]),
)
def test_a_value_of_any_kind(recipes, command, are_messages, column, value, places):
    rows = [in_messages(row) if are_messages else dict(row) for row in ROWS]
    for place in places:
        rows[place][column] = value
    done = outcome(recipes, command, as_bytes(rows))
    if done.code != 0:
        assert "(a TypeError" not in done.error
        assert column in done.error or re.search(r"[Rr]ow \d", done.error), done.error


@properties
@given(
    noise=NOISE,
    place=st.integers(0, 4),
    encoding=st.sampled_from(["utf-8", "utf-16", "latin-1"]),
    streaming=st.booleans(),
)
def test_a_file_of_any_bytes(recipes, noise, place, encoding, streaming):
    rows = [row | {"prompt": row["prompt"] + "é"} for row in ROWS]
    lines = [json.dumps(row, ensure_ascii=False).encode(encoding) + b"\n" for row in rows]
    content = b"".join([*lines[:place], noise, *lines[place:]])
    path = recipes.folder / "bytes.jsonl"
    path.write_bytes(content if place < 4 else noise)
    shutil.rmtree(recipes.folder / "cache", ignore_errors=True)
    read, said = [], ""
    try:
        read = list(load_split(str(path), None, "train", streaming))
    except InputError as error:
        said = str(error)
    if said:
        assert "`dataset_name`" in said
    elif place < 4:
        assert [row["prompt"] for row in read if row["prompt"] is not None] == [row["prompt"] for row in rows]


KINDS = [
    ("pbkd", True, "completion", "x", (0, 1, 2), 0),
    ("pbkd", True, "completion", [], (0, 1, 2), 0),
    ("pbkd", False, "other", DEEP, (1,), "`other` is nested"),
    ("pairs", False, "other", DEEP, (1,), "`other` is nested"),
    (
        "mm-pbkd",
        False,
        "chat_template_kwargs",
        5,
        (0, 1, 2),
        "Row 0 of the preference dataset: `chat_template_kwargs` is 5",
    ),
    ("pbkd", False, "teacher_side", ["x"], (0, 1, 2), "Row 0 of the train dataset: `teacher_side` is ['x']"),
    ("pbkd", False, "tools", "x", (0, 1, 2), "Row 0 of the train dataset: `tools` is 'x', which is no JSON"),
    ("pbkd", True, "chosen", [assistant(5)], (0, 1, 2), "`chosen`: message 0 has the `content` 5"),
    ("pbkd", True, "chosen", [{"role": 5, "content": "x"}], (0, 1, 2), "`chosen`: message 0 has the `role` 5"),
    (
        "pbkd",
        False,
        "other",
        "\ud83d",
        (1,),
        "line 2 of rows.jsonl has, in `other`, \\ud83d, which is half of a character",
    ),
]
"""A value of each kind that was once a traceback, or a sentence that does not say where."""


@pytest.mark.parametrize(("command", "are_messages", "column", "value", "places", "said"), KINDS)
def test_what_is_refused_is_named(recipes, command, are_messages, column, value, places, said):
    rows = [in_messages(row) if are_messages else dict(row) for row in ROWS]
    for row in rows:
        if column == "chat_template_kwargs":
            row[column] = {"a": 1}
    for place in places:
        rows[place][column] = value
    done = outcome(recipes, command, as_bytes(rows))
    assert done.code == 0 if said == 0 else said in done.error, done.err
