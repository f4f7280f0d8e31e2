"""Files of rows that cannot be read: the line, the column and the way out; and rows that only look so."""

import json

import pytest
from trl import DatasetMixtureConfig, ScriptArguments
from trl.scripts.utils import DatasetConfig

from trl_kd.scripts.data import load_datasets, load_split
from trl_kd.scripts.errors import InputError


ROW = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
LATER = 6000
"""Rows of 2,000 characters of which some are no more in the block by which the columns are found out."""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Writes a file and loads it."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(content: bytes | str | list, name: str = "rows.jsonl", folder: bool = False):
        if isinstance(content, list):
            content = "\n".join(json.dumps(row, ensure_ascii=False) for row in content)
        (tmp_path / "data").mkdir(exist_ok=True)
        path = tmp_path / "data" / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_split(str(path.parent if folder else path), None, "train", streaming=False)

    return write


def many(first: dict, last: dict) -> list[dict]:
    return [{**ROW, **row, "rest": "x" * 2000} for row in [first] * LATER + [last]]


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt": "café"}\n', 2),
        ("rows.json", '[{"prompt": "café"}]', 1),
        ("rows.csv", "prompt\na\nb\ncafé\n", 4),
    ],
)
def test_a_file_that_is_not_utf_8(name, content, line, folder, load):
    said = (
        rf"`dataset_name` is '.*': line {line} of {name} is not UTF-8 \(byte 0xe9 behind '.*caf'\)\. Save it as UTF-8"
    )
    with pytest.raises(InputError, match=said):
        load(content.encode("latin-1"), name, folder)


def test_utf_16_is_named(load):
    with pytest.raises(InputError, match="by `iconv -f UTF-16 -t UTF-8`"):
        load('{"prompt": "a"}\n'.encode("utf-16"))


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize(
    ("column", "usual", "rare", "said"),
    [
        ("chosen", "2", 3, "line 3 of rows.jsonl has 3 in `chosen`, which is a number in 1 row and text in 3"),
        (
            "chosen",
            "2",
            [{"role": "assistant", "content": "x"}],
            "in `chosen`, which is a list in 1 row and text in 3",
        ),
        ("preference", 1, "0.5", 'line 3 of rows.jsonl has "0.5" in `preference`, which is text in 1 row'),
        ("preference", 0.5, True, "line 3 of rows.jsonl has true in `preference`, which is true or false in 1 row"),
        ("teacher_side", "chosen", 1, "line 3 of rows.jsonl has 1 in `teacher_side`"),
    ],
)
def test_kinds_that_differ_in_a_column(column, usual, rare, said, folder, load):
    rows = [{**ROW, column: value} for value in (usual, usual, rare, usual)]
    with pytest.raises(InputError) as error:
        load(rows, folder=folder)
    assert said in str(error.value)
    assert f"give all rows of `{column}` the same kind" in str(error.value)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['{"prompt": "a"}', "3"], "line 2 of rows.jsonl is 3: each row must be an object"),
        (['{"prompt": "a"}', '{"prompt":', '{"prompt": "c"}'], "line 2 of rows.jsonl is no JSON (Expecting value"),
    ],
)
def test_lines_that_are_no_rows(lines, said, load):
    with pytest.raises(InputError) as error:
        load("\n".join(lines))
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ({"preference": 1}, {"preference": 0.5}),
        ({"preference": None}, {"preference": 0.5}),
        ({}, {"preference": 0.5}),
        ({"teacher": None}, {"teacher": "4", "preference": 0}),
    ],
)
def test_rows_of_a_kind_that_shows_late(first, last, load):
    rows = many(first, last)
    found = load(rows)
    assert len(found) == len(rows)
    for name, value in last.items():
        assert found[-1][name] == value
        assert found[0][name] == first.get(name)


def test_ones_and_halves(load):
    assert load([{**ROW, "preference": p} for p in (1, 0.5, None)])["preference"] == [1.0, 0.5, None]


def test_other_columns_may_be_what_they_like(load):
    assert len(load([{**ROW, "tools": None}, {**ROW, "tools": [{"a": 1}]}, {**ROW, "tools": [{"a": "b"}]}])) == 3


@pytest.mark.parametrize("streaming", [True, False])
def test_streams_and_mixtures_are_checked_as_files_are(tmp_path, streaming):
    folder = tmp_path / "data"
    folder.mkdir()
    mixture = DatasetMixtureConfig(datasets=[DatasetConfig(path=str(folder))], streaming=streaming)
    for content, said in (
        ('{"prompt": "café"}\n'.encode("latin-1"), "line 1 of rows.jsonl is not UTF-8"),
        (b'{"prompt": "a"}\n{"prompt":\n', "line 2 of rows.jsonl is no JSON"),
    ):
        (folder / "rows.jsonl").write_bytes(content)
        with pytest.raises(InputError, match=f"`datasets` has '.*data': {said}"):
            load_datasets(ScriptArguments(), mixture, with_eval=False)
        if streaming:
            with pytest.raises(InputError, match=said):
                load_split(str(folder / "rows.jsonl"), None, "train", streaming=True)


@pytest.mark.parametrize("start", [b"", b"\n", b"\xef\xbb\xbf"])
def test_a_first_row_that_is_null(load, start):
    with pytest.raises(InputError, match="of rows.jsonl is null: each row must be an object"):
        load(start + b'null\n{"prompt": "a"}\n')
