"""Names of folders and files of any characters: a command ends well, with its files in exactly the folder that was named, or
says by one sentence which name is wrong."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.faults.commands import ROWS, run
from tests.faults.profiles import properties
from trl_kd.scripts.paths import resolved


PARTS = st.one_of(
    st.sampled_from(
        ["a", "~", "~x", "~nobody", "..", ".", "[a]", "*", "?", "a b", "#", "%41", "\n", "-x", "--seed", "ä漢"]
    ),
    st.sampled_from(
        ["a::b", "s3:", "\0", "\udcff", "\ud800", "x" * 255, "x" * 256, "null", "$HOME", "{a,b}", "'", '"']
    ),
    st.sampled_from(["\\", "link", "file", "nowhere"]),
    st.text(st.characters(exclude_characters="/"), min_size=1, max_size=4),
)
ENDS = st.sampled_from(["", "/", "//", "/."])
NAMES = st.one_of(
    st.builds(lambda parts, end: "/".join(parts) + end, st.lists(PARTS, min_size=1, max_size=3), ENDS),
    st.sampled_from(["", "x/" * 3000, "/dev/null", "/dev/null/x", "file/x", "nowhere/x"]),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to work in, and a home beside it."""
    folder = tmp_path_factory.mktemp("paths")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder / "home"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
        yield folder


def furnish(folder: Path) -> Path:
    """Makes the folder anew, and works in it."""
    os.chdir(folder)
    for name in ("home", "here", "cache"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "home").mkdir()
    here = folder / "here" / "1" / "2" / "3"  # deeper than any name leads up
    here.mkdir(parents=True)
    os.chdir(here)
    (here / "file").write_text("x")
    (here / "link").symlink_to(folder / "home")
    (here / "nowhere").symlink_to("nothing")
    return here


def files(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*") if path.is_file() and path.name != "file"}


@pytest.fixture(autouse=True)
def where(monkeypatch):
    monkeypatch.chdir(Path.cwd())  # which is taken back at the end


def pairs_of(dataset: Path, output: str, config: Path | None) -> list[str]:
    words = ["--teacher_column", "completion", "--student_column", "rejected", "--preference", "teacher_wins"]
    words += ["--dataset_name", str(dataset)]
    if config is None:
        return ["pairs", *words, f"--output_dir={output}"]
    config.write_text(json.dumps({"output_dir": output}))
    return ["pairs", *words, "--config", str(config)]


@properties
@given(NAMES, st.booleans())
@example("s3:", False)
@example("$HOME", False)
@example("-x", False)
@example("~nobody/x", True)
@example("nowhere/x", True)
@example("file/x", True)
def test_an_output_folder_of_any_name(place, name, by_config):
    here = furnish(place)
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    before = files(place)
    done = run(*pairs_of(place / "rows.jsonl", name, place / "config.json" if by_config else None))
    cache = files(place / "cache") | {str(place / "config.json")}
    made = files(place) - before - cache
    if done.code == 0:
        folder = Path(here, os.path.expanduser(name)).resolve()
        assert (folder / "summary.json").is_file()
        assert all(Path(path).resolve().is_relative_to(folder) for path in made)
    else:
        assert "`output_dir`" in done.error or "`config`" in done.error, done.error
        assert not made


@properties
@given(NAMES, st.sampled_from(["file", "folder"]))
@example("x" * 251, "file")
def test_rows_of_any_name(place, name, kind):
    here = furnish(place)
    try:
        path = Path(here, resolved("dataset_name", name))
        target = path / "rows.jsonl" if kind == "folder" else path.with_name(path.name + ".jsonl")
        there = target.resolve().is_relative_to(place)
        if there:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("\n".join(map(json.dumps, ROWS)))
    except Exception:  # no file can be called so
        there = False
    given_name = name if kind == "folder" else f"{name}.jsonl"
    done = run(*pairs_of(Path("x"), str(place / "out"), None), f"--dataset_name={given_name}")
    shutil.rmtree(place / "out", ignore_errors=True)
    if done.code != 0:
        assert "`dataset_name`" in done.error or "`output_dir`" in done.error, done.error
    else:
        assert there


@properties
@given(NAMES)
def test_a_recipe_of_any_name(place, name):
    furnish(place)
    done = run("pairs", f"--config={name}")
    assert "`config` is" in done.error or "`output_dir` is not set" in done.error, done.error
