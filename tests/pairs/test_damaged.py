"""Stores that are not what a folder needs: empty, of something else, damaged, or no file at all."""

import os
import re
import shlex
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset

from tests.pairs.fakes import Column, Longer, Source
from tests.pairs.test_store import KEY, SETTINGS
from trl_kd.pairs import build_pairs, merge_shards
from trl_kd.pairs.fetched import FetchedAnswers
from trl_kd.pairs.lock import LOCK
from trl_kd.pairs.places import StoreError
from trl_kd.pairs.readonly_store import StoredAnswers
from trl_kd.pairs.store import AnswerStore
from trl_kd.preferences.simple import TeacherWins
from trl_kd.sampling import Answer


PROMPTS = Dataset.from_list([{"prompt": f"prompt {i}"} for i in range(4)])


def build(folder, log=None, **options):
    teacher, student = Source("teacher", log), Source("student", log)
    return build_pairs(
        PROMPTS,
        teacher=teacher,
        student=student,
        preference=Longer(log),
        output_dir=folder,
        show_progress=False,
        **options,
    )


def emptied(path):
    path.write_bytes(b"")


def without_rows(path):
    path.unlink()
    AnswerStore(path.parents[1] / "new").close()
    shutil.copy(path.parents[1] / "new" / path.name, path)


@pytest.mark.parametrize("harm", [emptied, without_rows])
def test_an_empty_store_beside_pairs_is_refused_and_may_be_deleted_on_purpose(tmp_path, harm):
    log, folder = tmp_path / "log", tmp_path / "pairs"
    rows = build(folder, log).to_list()
    asked = log.read_text()
    harm(folder / "answers.db")
    before = (folder / "answers.db").read_bytes()
    for opened in (lambda: build(folder, log), lambda: StoredAnswers(folder)):
        with pytest.raises(StoreError, match=r"holds nothing, though `.*data/train-00000-.*` was made of .*paid"):
            opened()
    assert (log.read_text(), (folder / "answers.db").read_bytes()) == (asked, before)
    (folder / "answers.db").unlink()  # as the sentence says
    assert build(folder, log).to_list() == rows
    assert sorted(log.read_text().splitlines()) == sorted([*asked.splitlines()] * 2)


LOST = [
    ("DELETE FROM answers", "no answers of the student and no answers of the teacher"),
    ("DELETE FROM answers WHERE source = 'teacher'", "no answers of the teacher"),
    ("DELETE FROM labels", "no labels"),
]


@pytest.mark.parametrize(("harm", "said"), LOST)
def test_a_store_that_has_lost_what_pairs_were_made_of_is_refused(tmp_path, harm, said):
    log, folder = tmp_path / "log", tmp_path / "pairs"
    build(folder, log)
    asked = log.read_text()
    with closing(sqlite3.connect(folder / "answers.db")) as database, database:
        assert database.execute(harm).rowcount > 0
    for opened in (lambda: build(folder, log), lambda: StoredAnswers(folder)):
        with pytest.raises(StoreError, match=rf"answers.db` holds {said}, though `.*/data/train-.*` was made of what"):
            opened()
    assert log.read_text() == asked
    shutil.rmtree(folder / "data")  # nothing is made of it: it may have been meant
    assert len(build(folder, log)) == 4


def test_answers_that_are_looked_up_are_not_missed(tmp_path):
    rows = Dataset.from_list([{"prompt": f"prompt {i}", "t": "good", "s": "bad"} for i in range(4)])
    parts = {"teacher": Column("t"), "student": Column("s"), "preference": TeacherWins(), "show_progress": False}
    for _ in range(2):
        assert len(build_pairs(rows, output_dir=tmp_path, **parts)) == 4


def test_a_store_that_is_gone_from_beside_its_pairs_is_said(tmp_path, caplog):
    build(tmp_path)
    assert "answers.db" not in caplog.text
    (tmp_path / "answers.db").unlink()
    build(tmp_path)
    assert (
        f"`{tmp_path}/answers.db` is not there, though `{tmp_path}/data/train-00000-of-00001.parquet`" in caplog.text
    )


@pytest.mark.parametrize("name", ["README.md", "pairs.html", "summary.json", "counts.json"])
@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("gone")])
def test_results_that_could_not_be_written_are_refused_before_anything_is_asked(tmp_path, name, make):
    log, folder = tmp_path / "log", tmp_path / "pairs"
    AnswerStore(folder).close()
    make(folder / name)
    with pytest.raises(StoreError, match=rf"{name}` is a (folder, where the file with results|link to `gone`)"):
        build(folder, log)
    assert not log.exists()


def test_commands_to_paste_are_quoted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("-it's $HOME")
    filled(folder)
    for harm in (lambda database: database.execute("UPDATE settings SET value = '{' WHERE name = 'teacher'"), None):
        if harm is None:
            (folder / "answers.db").write_bytes(b"none" * 1000)
        else:
            with closing(sqlite3.connect(folder / "answers.db")) as database, database:
                harm(database)
        with pytest.raises(StoreError) as caught:
            read_it(AnswerStore, folder, None)
        commands = re.findall(r"`((?:sqlite3|mv) .*?)`", str(caught.value))
        assert commands
        for command in commands:
            assert shlex.split(command)[1] == f"./{folder}/answers.db"


def test_a_store_that_was_begun_a_moment_ago_goes_on(tmp_path):
    AnswerStore(tmp_path / "a").close()
    emptied(tmp_path / "a" / "answers.db")
    assert len(build(tmp_path / "a")) == 4


def test_an_empty_store_of_a_loop_is_refused_beside_what_it_has_made(tmp_path):
    made = tmp_path / "round-1" / "metrics.json"
    fetched = FetchedAnswers(Source("teacher"), tmp_path / "teacher", 1, made=[made])
    assert fetched.fetch(PROMPTS, show_progress=False) == 4
    emptied(tmp_path / "teacher" / "answers.db")
    made.parent.mkdir()
    made.write_text("{}")
    with pytest.raises(
        StoreError, match=r"teacher/answers.db` holds nothing, though `.*round-1/metrics.json` was made"
    ):
        fetched.fetch(PROMPTS, show_progress=False)


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("version", [0, 1])
def test_a_database_of_something_else_is_refused_and_left_as_it_is(tmp_path, is_finished, version):
    if is_finished:
        build(tmp_path)
        (tmp_path / "answers.db").unlink()
    with closing(sqlite3.connect(tmp_path / "answers.db")) as database, database:
        database.execute("CREATE TABLE bookmarks (url TEXT)")
        database.execute(f"PRAGMA user_version = {version}")
    before = (tmp_path / "answers.db").read_bytes()
    for opened in (AnswerStore, StoredAnswers):
        with pytest.raises(
            StoreError, match="database of something else, with the tables bookmarks. It was left as it is"
        ):
            opened(tmp_path)
    assert (tmp_path / "answers.db").read_bytes() == before
    assert not (tmp_path / "answers.db-wal").exists()


def filled(folder):
    """A store with an answer, an answer without a text, a label and what was used."""
    with closing(AnswerStore(folder)) as store:
        store.check_settings(SETTINGS)
        store.add_answers("teacher", [(KEY, 0, Answer("x", "stop", 3)), (KEY, 1, Answer(None, "error"))])
        store.add_labels({b"k" * 16: 0.5})
        store._note({"usage teacher": {"requests": 3}})
        judge = SimpleNamespace(order_counts=(0, 0), unreadable=[])
        store.count_verdicts(judge)
        judge.order_counts, judge.unreadable = (1, 2), ["what?"]
        store.commit()
        return store._preference.hex()


READS = {
    "answers": lambda store: store.answers("teacher", [KEY], 2),
    "missing": lambda store: store.missing("teacher", [KEY], 2),
    "labels": lambda store: store.labels([b"k" * 16]),
    "usage": lambda store: store.usage("teacher"),
    "orders": lambda store: store.orders(),
    "unreadable": lambda store: store.unreadable(),
}


def read_it(opened, folder, read):
    with closing(opened(folder)) as store:
        store.check_settings(SETTINGS)
        if read is not None:
            READS[read](store)


DAMAGES = [
    ("answers", "text", "'{half of it'", "source = 'teacher' AND sample = 0", "answers"),
    ("answers", "text", "'3'", "sample = 0", "answers"),
    ("answers", "text", "'[]'", "sample = 0", "answers"),
    ("answers", "text", "x'00ff'", "sample = 0", "answers"),
    ("answers", "finish_reason", "x'00ff'", "sample = 0", "answers"),
    ("answers", "tokens", "'many'", "sample = 0", "answers"),
    ("nulls", "cause", "'{'", "sample = 1", "missing"),
    ("labels", "value", "'better'", "1", "labels"),
    ("labels", "value", "9e999", "1", "labels"),
    ("settings", "value", "'{'", "name = 'teacher'", None),
    ("settings", "value", "'5'", "name = 'student'", None),
    ("settings", "value", "'null'", "name = 'preference'", None),
    ("settings", "value", "'{}'", "name = 'held'", None),
    ("settings", "value", "'[1]'", "name = 'usage teacher'", "usage"),
    ("settings", "value", "'{\"pages\": 3}'", "name = 'usage teacher'", "usage"),
    ("settings", "value", "'7'", "name LIKE 'orders%'", "orders"),
    ("settings", "value", "'[7]'", "name LIKE 'unreadable%'", "unreadable"),
]


@pytest.mark.parametrize(("table", "column", "value", "where", "read"), DAMAGES)
def test_a_damaged_value_is_named_by_file_and_row_which_can_be_deleted(tmp_path, table, column, value, where, read):
    filled(tmp_path)
    path = tmp_path / "answers.db"
    with closing(sqlite3.connect(path)) as database, database:
        assert database.execute(f"UPDATE {table} SET {column} = {value} WHERE {where}").rowcount == 1
    for opened in (StoredAnswers, AnswerStore):
        with pytest.raises(StoreError) as caught:
            read_it(opened, tmp_path, read)
        said = str(caught.value)
        assert f"`{path}` is damaged: in the row of `{table}` where " in said
        assert f"`{column}` is " in said
        assert len(said) < 700  # what a command says of it
    (delete,) = re.findall(r'"(DELETE FROM .*?)"', said)
    with closing(sqlite3.connect(path)) as database, database:
        assert database.execute(delete).rowcount == 1
    read_it(AnswerStore, tmp_path, read)


@pytest.mark.parametrize("opened", [AnswerStore, StoredAnswers])
@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_a_store_that_is_no_file_is_one_sentence(tmp_path, kind, opened):
    path = tmp_path / "answers.db"
    {
        "folder": path.mkdir,
        "link": lambda: path.symlink_to(tmp_path / "gone" / "answers.db"),
        "pipe": lambda: os.mkfifo(path),
    }[kind]()
    expected = {
        "folder": r"answers.db` is a folder, where the file with the stored answers belongs: move it away",
        "link": r"answers.db` is a link to `.*gone/answers.db`, which is not there. That file holds the stored answers",
        "pipe": r"answers.db` is a device or pipe, where",
    }[kind]
    with pytest.raises(StoreError, match=expected):
        opened(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["answers.db"]


@pytest.mark.parametrize("name", [LOCK, ".reserve"])
@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("gone")])
def test_other_files_of_ours_that_are_none(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(StoreError, match=rf"{name}` is a (folder|link to `gone`)"):
        AnswerStore(tmp_path)


def test_a_link_to_a_store_is_followed(tmp_path):
    filled(tmp_path / "elsewhere")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "answers.db").symlink_to(tmp_path / "elsewhere" / "answers.db")
    with closing(AnswerStore(tmp_path / "here")) as store:
        assert store.answers("teacher", [KEY], 1)[KEY][0].text == "x"


@pytest.mark.parametrize("make", [lambda path: path.write_text("mine"), lambda path: path.symlink_to("gone")])
@pytest.mark.parametrize("below", [False, True])
def test_an_output_folder_that_is_none(tmp_path, make, below):
    place = tmp_path / "out"
    make(place)
    with pytest.raises(
        StoreError, match=r"cannot be made, since `.*out` is a (file|link to `gone`, which is not there):"
    ):
        AnswerStore(place / "pairs" if below else place)


@pytest.mark.parametrize("make", [lambda path: path.write_text("mine"), lambda path: path.symlink_to("gone")])
def test_data_that_is_no_folder_is_left_alone(tmp_path, make):
    AnswerStore(tmp_path).close()
    make(tmp_path / "data")
    with pytest.raises(ValueError, match="holds `data`, which no build of pairs has written"):
        build(tmp_path)
    assert os.path.lexists(tmp_path / "data")


@pytest.mark.parametrize("name", ["settings.json", "counts.json"])
def test_a_damaged_file_of_a_piece_is_named(tmp_path, name):
    pieces = [tmp_path / f"{i}" for i in range(2)]
    for i, piece in enumerate(pieces):
        build(piece, shard=(i, 2))
    (pieces[1] / name).write_text('{"half": ')
    with pytest.raises(
        StoreError, match=rf"1/{name}` is damaged \(Expecting value.*\): put a copy of it back, or build"
    ):
        merge_shards(pieces, tmp_path / "whole")
