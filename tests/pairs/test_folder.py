"""A folder that holds somebody else's files is left as it is."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from tests.pairs.fakes import Column, Source
from trl_kd.pairs import build_pairs, load_pairs, merge_shards
from trl_kd.preferences.simple import TeacherWins


def build(folder, data=None, **options):
    data = data or Dataset.from_list([{"prompt": f"question {i}", "t": "good", "s": "bad"} for i in range(8)])
    parts = {"teacher": Column("t"), "student": Column("s"), "preference": TeacherWins(), "show_progress": False}
    return build_pairs(data, output_dir=folder, **{**parts, **options})


def put(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")


def held(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FOREIGN = [
    (["data/prompts.jsonl", "data/other.txt"], "data/other.txt"),
    # A dataset repository of the Hub
    (["data/train-00000-of-00001.parquet", "README.md"], "data/train-00000-of-00001.parquet"),
    (["README.md"], "README.md"),
    (["pairs.html"], "pairs.html"),
    (["settings.json", "counts.json"], "settings.json"),
]


@pytest.mark.parametrize(("names", "said"), FOREIGN)
def test_a_build_refuses_and_changes_nothing(tmp_path, names, said):
    put(tmp_path, names)
    before = held(tmp_path)
    asked = Source("teacher", log=tmp_path / "log")
    with pytest.raises(ValueError, match=f"`output_dir` is .* holds `{said}`"):
        build(tmp_path, teacher=asked)
    assert held(tmp_path) == before


@pytest.mark.parametrize(("names", "said"), FOREIGN)
def test_so_does_a_merge(tmp_path, names, said):
    pieces = [tmp_path / "0", tmp_path / "1"]
    for i, piece in enumerate(pieces):
        build(piece, shard=(i, 2))
    put(tmp_path / "whole", names)
    before = held(tmp_path / "whole")
    with pytest.raises(ValueError, match=f"`output_dir` is .* holds `{said}`"):
        merge_shards(pieces, tmp_path / "whole")
    assert held(tmp_path / "whole") == before


def test_files_put_into_the_data_of_a_build_are_not_lost_either(tmp_path):
    build(tmp_path)
    put(tmp_path, ["data/notes.txt"])
    with pytest.raises(ValueError, match=r"holds `data/notes.txt`"):
        build(tmp_path)
    assert (tmp_path / "data" / "notes.txt").read_text() == "mine"
    assert len(load_pairs(tmp_path)) == 8


@pytest.mark.parametrize("gone", [(), ("answers.db",), ("settings.json", "counts.json")])
def test_what_a_build_has_written_is_written_anew(tmp_path, gone):
    build(tmp_path)
    for name in gone:
        (tmp_path / name).unlink()
    put(tmp_path, ["notes.txt"])
    assert len(build(tmp_path)) == 8
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_merge_may_be_repeated_also_one_that_was_stopped(tmp_path):
    pieces = [tmp_path / "0", tmp_path / "1"]
    for i, piece in enumerate(pieces):
        build(piece, shard=(i, 2))
    for name in ("nothing", "settings.json"):
        merge_shards(pieces, tmp_path / "whole")
        (tmp_path / "whole" / name).unlink(missing_ok=True)
    assert len(merge_shards(pieces, tmp_path / "whole")) == 8


def test_two_shards_do_not_share_a_folder(tmp_path):
    build(tmp_path, shard=(0, 2))
    before = held(tmp_path)
    with pytest.raises(ValueError, match=r"is the folder of shard 0/2, and this is 1/2"):
        build(tmp_path, shard=(1, 2))
    assert held(tmp_path)[Path("settings.json")] == before[Path("settings.json")]
    assert len(build(tmp_path, shard=(0, 2))) < 8
    assert len(build(tmp_path)) == 8  # the whole may be built from it


def test_pieces_of_other_prompts_are_not_merged(tmp_path):
    other = Dataset.from_list([{"prompt": f"other {i}", "t": "good", "s": "bad"} for i in range(8)])
    pieces = [tmp_path / "0", tmp_path / "1"]
    build(pieces[0], shard=(0, 2), prompts_from={"dataset": "/here/prompts"})
    build(pieces[1], shard=(1, 2), data=other, prompts_from={"dataset": "/here/prompts"})
    with pytest.raises(ValueError, match="was built from other prompts than"):
        merge_shards(pieces, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    build(tmp_path / "2", shard=(1, 2), prompts_from={"dataset": "/there/prompts"})
    assert len(merge_shards([pieces[0], tmp_path / "2"], tmp_path / "whole")) == 8
    settings = json.loads((tmp_path / "whole" / "settings.json").read_text())
    assert settings["prompts"]["rows"] == 8
    assert "prompts" in settings["prompts"]["dataset"]
