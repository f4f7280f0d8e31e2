"""What a folder holds, looked at while it is written, after a `kill -9`, and where there is nothing."""

import os
import signal
import sqlite3
from contextlib import closing
from types import SimpleNamespace

import pytest

from tests.pairs.fakes import processes
from trl_kd.pairs.places import StoreError
from trl_kd.pairs.readonly_store import StoredAnswers
from trl_kd.pairs.store import AnswerStore
from trl_kd.sampling import Answer
from trl_kd.sampling.budget import Usage


KEY, OTHER = "0" * 32, "1" * 32
SETTINGS = {"teacher": {"model": "a"}, "student": {"model": "b"}, "preference": {"kind": "longer"}}


def fill(folder):
    """Left open: what it stores is in the log, and not in the database yet."""
    store = AnswerStore(folder)
    store.check_settings(SETTINGS)
    store.add_answer("teacher", KEY, 0, Answer("x", "stop", 3))
    store.add_labels({b"k": 0.25})
    return store


def filled_and_killed(folder):
    fill(folder)
    os.kill(os.getpid(), signal.SIGKILL)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.endswith("-shm")}


@pytest.mark.parametrize("state", ["closed", "in use", "killed"])
def test_it_sees_everything_and_leaves_everything(state, tmp_path):
    store = None
    if state == "killed":
        process = processes().Process(target=filled_and_killed, args=(tmp_path,))
        process.start()
        process.join()
        assert process.exitcode == -9
    else:
        store = fill(tmp_path)
    if state == "closed":
        store.close()
    before = files(tmp_path)
    assert ("answers.db-wal" in before) == (state != "closed")
    with closing(StoredAnswers(tmp_path)) as stored:
        with pytest.raises(ValueError, match="holds labels of another preference"):
            stored.check_settings({**SETTINGS, "preference": {"kind": "judge"}})
        stored.check_settings({**SETTINGS, "preference": {"kind": "judge"}}, relabel=True)
        assert stored.label_count() == 0
        stored.check_settings(SETTINGS)
        assert stored.label_count() == 1
        assert stored.answers("teacher", [KEY], 1) == {KEY: {0: Answer("x", "stop", 3)}}
        assert stored.missing("teacher", [KEY, OTHER], 2) == {KEY: (1,), OTHER: (0, 1)}
        stored.add_labels({b"other": 1.0})
    assert files(tmp_path) == before
    if state == "in use":
        store.add_answer("teacher", OTHER, 0, Answer("y"))
        store.close()
    with closing(AnswerStore(tmp_path)) as store:
        assert store.missing("teacher", [KEY], 1) == {}


def test_a_folder_that_is_not_there_holds_nothing_and_is_not_made(tmp_path):
    with closing(StoredAnswers(tmp_path / "none")) as stored:
        stored.check_settings(SETTINGS)
        assert stored.missing("teacher", [KEY], 1) == {KEY: (0,)}
        assert stored.label_count() == 0
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("is_there", [False, True])
def test_what_it_is_given_is_dropped(tmp_path, is_there):
    if is_there:
        store = fill(tmp_path)
        before = store.missing("teacher", [KEY, OTHER], 2)
    with closing(StoredAnswers(tmp_path)) as stored:
        stored.check_settings({**SETTINGS, "preference": {"kind": "another"}}, relabel=True)
        usage = Usage()
        stored.count_usage("teacher", usage)
        usage.requests += 1
        stored.add_answers("teacher", [(OTHER, 0, Answer("x")), (OTHER, 1, Answer("y"))])
        stored.add_labels({b"k": 0.5})
        judge = SimpleNamespace(order_counts=(0, 0), unreadable=[])
        stored.count_verdicts(judge)
        judge.order_counts, judge.unreadable = (1, 2), ["what?"]
        stored.commit()
        assert (stored.orders(), stored.unreadable()) == (None, [])
        assert stored.usage("teacher") == Usage()
        assert stored.missing("teacher", [OTHER], 2) == {OTHER: (0, 1)}
        assert stored.labels([b"k"]) == {}
    if is_there:
        assert store.missing("teacher", [KEY, OTHER], 2) == before
        store.check_settings(SETTINGS)  # as it was
        store.close()
    assert (tmp_path / "answers.db").exists() == is_there


def test_a_damaged_or_foreign_file_is_said(tmp_path):
    (tmp_path / "answers.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(StoreError, match="is damaged"):
        StoredAnswers(tmp_path)
    (tmp_path / "answers.db").unlink()
    connection = sqlite3.connect(tmp_path / "answers.db")
    connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(StoreError, match="has format 9"):
        StoredAnswers(tmp_path)
