import errno
import os
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest

from tests.pairs.fakes import processes
from trl_kd.pairs.dataset import PairWriter
from trl_kd.pairs.filesystems import is_network_folder
from trl_kd.pairs.full_disk import RESERVE
from trl_kd.pairs.lock import LOCK
from trl_kd.pairs.places import StoreError
from trl_kd.pairs.store import AnswerStore
from trl_kd.sampling import Answer


KEY = "ab" * 16
OTHER = "cd" * 16
SETTINGS = {"teacher": {"model": "a", "temperature": 1.0}, "student": {"model": "b"}, "preference": {"kind": "longer"}}


@pytest.fixture
def store(tmp_path):
    store = AnswerStore(tmp_path)
    store.check_settings(SETTINGS)
    yield store
    store.close()


@pytest.mark.parametrize(
    "answer",
    [
        Answer("plain", "stop", 3),
        Answer('"quoted"\n\0 and more ✓ 😀', "length", None),
        Answer(None, "content_filter"),
        Answer([{"role": "assistant", "content": "x"}]),
        Answer(""),
    ],
)
def test_an_answer_comes_back_as_it_was(store, answer):
    store.add_answer("teacher", KEY, 2, answer)
    assert store.answers("teacher", [KEY, OTHER], 3) == {KEY: {2: answer}, OTHER: {}}
    assert store.answers("student", [KEY], 3) == {KEY: {}}
    assert store.missing("teacher", [KEY, OTHER], 3) == {KEY: (0, 1), OTHER: (0, 1, 2)}
    assert store.missing("teacher", [KEY], 2) == {KEY: (0, 1)}


def test_half_characters_are_replaced(store):
    store.add_answer("teacher", KEY, 0, Answer("a\ud83d b \ud83d\ude00"))
    assert store.answers("teacher", [KEY], 1)[KEY][0].text == "a\ufffd b 😀"


def test_the_first_answer_stays(store):
    store.add_answer("teacher", KEY, 0, Answer("first"))
    store.add_answer("teacher", KEY, 0, Answer("second"))
    assert store.answers("teacher", [KEY], 1)[KEY][0].text == "first"


def test_more_keys_than_a_query_takes(store):
    keys = [f"{i:032x}" for i in range(1201)]
    for key in keys[::2]:
        store.add_answer("teacher", key, 0, Answer("x"))
    assert list(store.missing("teacher", keys, 1)) == keys[1::2]
    store.add_labels({bytes.fromhex(key): 0.5 for key in keys[::3]})
    assert len(store.labels([bytes.fromhex(key) for key in keys])) == len(keys[::3])


def test_every_answer_is_committed_as_it_arrives(store, tmp_path):
    store.add_answer("teacher", KEY, 0, Answer("x"))
    assert _count(tmp_path) == 1
    store.add_labels({b"k": None})
    assert _count(tmp_path, "labels") == 1


def _count(folder, table="answers"):
    other = sqlite3.connect(folder / "answers.db")
    count = other.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0]
    other.close()
    return count


def test_on_a_network_file_system_commits_are_shared_for_a_second(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_kd.pairs.database.is_network_folder", lambda folder: True)
    store = AnswerStore(tmp_path)
    assert store._connection.execute("PRAGMA journal_mode").fetchone()[0] == "delete"
    for sample in range(70):
        store.add_answer("teacher", KEY, sample, Answer("x"))
    assert _count(tmp_path) == 64
    time.sleep(1.3)
    assert _count(tmp_path) == 70
    store.add_answer("teacher", KEY, 70, Answer("x"))
    store.close()
    assert _count(tmp_path) == 71
    assert not (tmp_path / "answers.db-wal").exists()


def test_network_file_systems(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\n/dev/sdb /home/local xfs rw 0 0\n"
        "x /scratch lustre rw 0 0\ny /my\\040disk fuse.sshfs rw 0 0\nz /over ext4 rw 0 0\nz /over beegfs rw 0 0\n"
    )
    expected = {"/home/me/x": True, "/home/local/x": False, "/homestead": False, "/scratch": True, "/tmp": False}
    expected |= {"/my disk/a": True, "/over/a": True}
    assert {folder: is_network_folder(folder, mounts) for folder in expected} == expected
    assert not is_network_folder("/home/me", tmp_path / "none")


def test_a_link_into_a_network_file_system(tmp_path):
    (tmp_path / "link").symlink_to("/home/me")
    (tmp_path / "mounts").write_text("/dev/sda / ext4 rw 0 0\nserver:/home /home nfs4 rw 0 0\n")
    assert is_network_folder(tmp_path / "link", tmp_path / "mounts")


def _hold(folder, ready):
    store = AnswerStore(folder)
    ready.set()
    time.sleep(60)
    store.close()


def test_a_second_process_is_refused_by_name_and_let_in_after_kill_9(tmp_path):
    context = processes()
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(30)
    with pytest.raises(StoreError, match=f"is being written by process {process.pid}: let it end"):
        AnswerStore(tmp_path)
    (tmp_path / LOCK).write_text("12345@elsewhere")
    with pytest.raises(StoreError, match="by process 12345 on the host elsewhere"):
        AnswerStore(tmp_path)
    process.kill()
    process.join()
    AnswerStore(tmp_path).close()
    assert (tmp_path / LOCK).read_text() == ""


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused_and_no_file_left_for_a_lock(tmp_path, monkeypatch, code):
    def flock(*_):
        raise OSError(code, "no locks here")

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(StoreError, match="is on a file system that cannot lock files .*no locks here.*: use another"):
        AnswerStore(tmp_path)
    monkeypatch.undo()
    AnswerStore(tmp_path).close()


def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / LOCK))

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.raises(StoreError, match=rf"{tmp_path}` may not be written .*Permission denied.*another `output_dir`"):
        AnswerStore(tmp_path)


def test_another_thread_may_close_the_store(tmp_path):
    store = AnswerStore(tmp_path)
    thread = threading.Thread(target=store.close)
    thread.start()
    thread.join()
    AnswerStore(tmp_path).close()


def test_an_interrupted_close_lets_others_in_and_leaves_no_reserve(tmp_path):
    class Interrupted:
        def __init__(self, connection):
            self.connection = connection

        def __getattr__(self, name):
            return getattr(self.connection, name)

        def close(self):
            self.connection.close()
            raise KeyboardInterrupt

    store = AnswerStore(tmp_path)
    store._connection = Interrupted(store._connection)
    with pytest.raises(KeyboardInterrupt):
        store.close()
    assert not (tmp_path / RESERVE).exists()
    AnswerStore(tmp_path).close()


class Judge:
    def __init__(self, agreed=0, judged=0):
        self.order_counts, self.unreadable = (agreed, judged), []

    def judges(self, agreed, judged, *unreadable):
        before = self.order_counts
        self.order_counts, self.unreadable = (before[0] + agreed, before[1] + judged), list(unreadable)


def test_what_a_judge_says_is_stored_with_its_labels(tmp_path):
    """So that a process that is killed loses none of it, and counts nothing twice."""
    store, judge = AnswerStore(tmp_path), Judge(agreed=5, judged=9)  # for others
    store.check_settings(SETTINGS)
    store.count_verdicts(judge)
    assert store.orders() is None
    for number in range(3):
        judge.judges(number % 2, 1, f"what? {number}")
        store.add_labels({bytes([number]): 0.5})
    assert (store.orders(), store.unreadable()) == ((1 / 3, 3), ["what? 0", "what? 1", "what? 2"])
    judge.judges(1, 1, "of a label that was not stored")
    store._connection.close()  # as a process that is killed
    store._lock.close()
    with closing(AnswerStore(tmp_path)) as again:
        again.check_settings(SETTINGS)
        again.count_verdicts(judge := Judge())
        judge.judges(1, 1)
        again.add_labels({b"3": 1.0})
        assert (again.orders(), again.unreadable()) == ((2 / 4, 4), ["what? 0", "what? 1", "what? 2"])


def test_a_full_disk_keeps_what_was_there(tmp_path):
    store = AnswerStore(tmp_path)
    store.check_settings(SETTINGS)
    store.add_answer("teacher", KEY, 0, Answer("x"))
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(
        StoreError, match=r"The disk of `.*` is full: .* What was stored is kept, but for 1 of the answers"
    ):
        store.add_answer("teacher", KEY, 1, Answer("x" * 100_000))
    store.close()
    again = AnswerStore(tmp_path)
    assert again.missing("teacher", [KEY], 2) == {KEY: (1,)}
    again.close()


def test_what_a_full_network_disk_has_lost_is_said(tmp_path, monkeypatch):
    """SQLite gives up a transaction that several answers share. Those before the one that does not fit are stored again."""
    monkeypatch.setattr("trl_kd.pairs.database.is_network_folder", lambda folder: True)
    store = AnswerStore(tmp_path)
    store.check_settings(SETTINGS)
    store.add_answer("teacher", KEY, 0, Answer("x"))
    store.commit()
    for sample in (1, 2):
        store.add_answer("teacher", KEY, sample, Answer("x"))
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match=r"stored is kept, but for 1 of the answers or labels, which will be asked"):
        store.add_answer("teacher", KEY, 3, Answer("x" * 100_000))
    store.close()
    again = AnswerStore(tmp_path)
    assert again.missing("teacher", [KEY], 4) == {KEY: (3,)}
    again.close()


def test_answers_of_one_reply_are_stored_all_or_none(tmp_path):
    store = AnswerStore(tmp_path)
    store.check_settings(SETTINGS)
    store.add_answers("teacher", [(KEY, 0, Answer("x")), (KEY, 1, Answer("y"))])
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match="is full"):
        store.add_answers("teacher", [(OTHER, 0, Answer("x")), (OTHER, 1, Answer("x" * 100_000))])
    store.close()
    again = AnswerStore(tmp_path)
    assert again.missing("teacher", [KEY, OTHER], 2) == {OTHER: (0, 1)}
    again.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_while_rows_are_written(tmp_path):
    writer = PairWriter(tmp_path)
    (tmp_path / "data.building" / "00000.parquet").symlink_to("/dev/full")
    row = {"prompt": "x", "chosen": "a", "rejected": "b", "source_row": 0}
    with pytest.raises(StoreError, match="is full"):
        writer.write([{**row, "chosen": os.urandom(500).hex()} for _ in range(20_000)])
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("damage", ["not a database", "overwritten pages"])
def test_a_damaged_database_is_said_and_left_alone(tmp_path, damage):
    path = tmp_path / "answers.db"
    if damage == "not a database":
        path.write_bytes(b"what is this?" * 1000)
    else:
        store = AnswerStore(tmp_path)
        store.check_settings(SETTINGS)
        for sample in range(500):
            store.add_answer("teacher", KEY, sample, Answer("x" * 100))
        store.close()
        content = bytearray(path.read_bytes())
        content[4096 * 3 : 4096 * 6] = os.urandom(4096 * 3)
        path.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"answers.db` is damaged \(.*left as it is.*mv .*answers.db\.damaged"):
        AnswerStore(tmp_path)
    assert path.read_bytes() == before
    path.rename(tmp_path / "answers.db.damaged")
    AnswerStore(tmp_path).close()


def test_a_format_of_the_future_is_refused(tmp_path):
    AnswerStore(tmp_path).close()
    connection = sqlite3.connect(tmp_path / "answers.db")
    connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(
        StoreError, match="has format 9, and this version of trl-kd reads 1: install the version that wrote it"
    ):
        AnswerStore(tmp_path)


def test_other_settings_are_refused_once_there_are_answers(store):
    hotter = {**SETTINGS, "teacher": {"model": "a", "temperature": 0.7, "top_p": 0.9}}
    store.check_settings(hotter)  # nothing is stored yet
    store.check_settings(SETTINGS)
    store.add_answer("teacher", KEY, 0, Answer("x"))
    with pytest.raises(
        ValueError, match=r"`teacher.temperature` was 1.0 and is 0.7; `teacher.top_p` was None and is 0.9"
    ):
        store.check_settings(hotter)
    store.check_settings({**SETTINGS, "student": {"model": "c"}})  # it has not answered yet


def test_of_many_and_long_differences_the_advice_is_read_first(store):
    template = "Compare the two. " * 30
    before = {f"option{i}": i for i in range(9)} | {"template": f"{template}Be strict."}
    store.check_settings({**SETTINGS, "teacher": before})
    store.add_answer("teacher", KEY, 0, Answer("x"))
    after = dict.fromkeys(before, -1) | {"template": f"{template}Be kind."}
    with pytest.raises(ValueError, match="set it back, give another `output_dir`") as caught:
        store.check_settings({**SETTINGS, "teacher": after})
    assert "`teacher.option3` was 3 and is -1; and 6 more." in str(caught.value)
    assert len(str(caught.value)) < 600
    with pytest.raises(
        ValueError, match=r"was … Compare the two\. Be strict\.' and is … Compare the two\. Be kind\.'"
    ):
        store.check_settings({**SETTINGS, "teacher": {**before, "template": after["template"]}})


def test_another_preference_needs_relabel_and_loses_no_label(store):
    store.add_labels({b"k": 0.25})
    judge = {**SETTINGS, "preference": {"kind": "judge"}}
    with pytest.raises(
        ValueError, match=r"another preference.*relabel=True.*: `preference.kind` was 'longer' and is 'judge'"
    ):
        store.check_settings(judge)
    store.check_settings(judge, relabel=True)
    assert store.labels([b"k"]) == {}
    store.add_labels({b"k": 0.75})
    store.check_settings(SETTINGS, relabel=True)
    assert store.labels([b"k"]) == {b"k": 0.25}


def test_the_package_of_pairs_imports_neither_torch_nor_trl():
    code = "import sys, trl_kd.pairs; print(sorted({'torch', 'trl', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
