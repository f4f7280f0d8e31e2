"""A disk that fills up: what is paid for is stored in the place of a reserve, and a sentence says what is missing."""

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from datasets import Dataset

from tests.pairs.test_store import KEY, OTHER, SETTINGS
from tests.sampling.fault_server import FaultServer, chat
from trl_kd.pairs import build_pairs
from trl_kd.pairs.full_disk import RESERVE, RESERVE_BYTES, DiskFull, Reserve, full_disk_said, is_disk_full
from trl_kd.pairs.places import StoreError, written_whole
from trl_kd.pairs.store import AnswerStore
from trl_kd.preferences.judge import LLMJudge
from trl_kd.preferences.simple import TeacherWins
from trl_kd.sampling import Answer
from trl_kd.sampling.client import ServerClient
from trl_kd.sampling.column import ColumnSampler
from trl_kd.sampling.server import ServerSampler


MISSING = (
    r"is full: [\d,]+ bytes are needed and [\d,]+ are free, so that [\d,]+ are missing\. What was stored is kept: free"
)


def fill(store, monkeypatch, room=100):
    """Lets a store's disk be full, but for what its reserve gives back: `room` pages."""
    execute = store._connection.execute
    pages = execute("PRAGMA page_count").fetchone()[0]
    execute(f"PRAGMA max_page_count = {pages}")
    monkeypatch.setattr("trl_kd.pairs.full_disk.free_bytes", lambda folder: 0)
    free = store._reserve.free

    def freed():
        had = free()
        if had:
            execute(f"PRAGMA max_page_count = {pages + room}")
        return had

    store._reserve.free = freed


@pytest.mark.parametrize("is_network", [False, True])
def test_what_arrives_at_a_full_disk_is_stored_in_the_place_of_the_reserve(tmp_path, monkeypatch, is_network):
    monkeypatch.setattr("trl_kd.pairs.database.is_network_folder", lambda folder: is_network)
    store = AnswerStore(tmp_path)
    store.check_settings(SETTINGS)
    assert (tmp_path / RESERVE).stat().st_blocks * 512 >= RESERVE_BYTES
    fill(store, monkeypatch)
    for sample in range(5):  # none of which fits
        store.add_answers("teacher", [(KEY, sample, Answer("x" * 10_000)), (OTHER, sample, Answer("y" * 10_000))])
    store.add_labels({b"k": 0.5})
    with pytest.raises(DiskFull, match=MISSING):
        store.check_space()
    store.close()
    assert not (tmp_path / RESERVE).exists()
    again = AnswerStore(tmp_path)
    again.check_settings(SETTINGS)
    assert again.missing("teacher", [KEY, OTHER], 5) == {}
    assert again.labels([b"k"]) == {b"k": 0.5}
    again.check_space()
    again.close()


def test_a_full_disk_at_the_shared_commit_of_a_network_disk_is_said_later(tmp_path, monkeypatch):
    """That commit is made in a thread of its own, where nobody would hear of it."""
    monkeypatch.setattr("trl_kd.pairs.database.is_network_folder", lambda folder: True)
    store = AnswerStore(tmp_path)
    store.check_settings(SETTINGS)
    store.add_answer("teacher", KEY, 0, Answer("x"))
    store._timer.cancel()

    def full():
        raise DiskFull("The disk is full")

    monkeypatch.setattr(store, "commit", full)
    store._commit_later()
    with pytest.raises(DiskFull):
        store.check_space()
    monkeypatch.undo()
    store.close()


def test_a_write_that_is_interrupted_is_stored_all_or_none(tmp_path):
    store = AnswerStore(tmp_path)
    store.check_settings(SETTINGS)
    store.add_answer("teacher", KEY, 0, Answer("x"))

    def interrupted():
        raise KeyboardInterrupt

    def rows():
        yield (b"p", b"k", 0.5)
        interrupted()

    with pytest.raises(KeyboardInterrupt):
        store._write(("INSERT INTO labels VALUES (?, ?, ?)", rows()))
    store.close()
    again = AnswerStore(tmp_path)
    again.check_settings(SETTINGS)
    assert again._connection.execute("SELECT COUNT(*) FROM labels").fetchone() == (0,)
    assert again.missing("teacher", [KEY], 1) == {}
    again.close()


AT_ONCE = 8
PROMPTS = Dataset.from_list([{"prompt": f"prompt {i}", "s": "b", "t": "a"} for i in range(200)])


def until_full(monkeypatch, answers):
    """Fills the disk of the next store when so many answers or labels are in it."""
    added = AnswerStore._write
    done = []

    def write(store, *statements):
        if any("answers" in statement or "labels" in statement for statement, rows in statements if rows):
            done.append(1)
            if len(done) == answers:
                fill(store, monkeypatch)
        added(store, *statements)

    monkeypatch.setattr(AnswerStore, "_write", write)


def build(folder, server, **parts):
    client = ServerClient(server.url, max_concurrency=AT_ONCE, max_retries=0)
    teacher, student = ServerSampler("teacher", client), ColumnSampler("s")
    given = {"teacher": teacher, "student": student, "preference": TeacherWins()} | {
        name: part(client) if callable(part) else part for name, part in parts.items()
    }
    return build_pairs(PROMPTS, output_dir=folder, show_progress=False, **given)


@pytest.mark.parametrize("who", ["teacher", "judge"])
def test_no_answer_of_a_server_is_paid_twice_after_a_full_disk(tmp_path, monkeypatch, who):
    """All that was under way is stored, nothing further is asked for, and the same command goes on."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    together = threading.Barrier(AT_ONCE, timeout=5)

    def reply(body, number):
        if number < 10 * AT_ONCE:
            together.wait()
        return chat("Verdict: A" if who == "judge" else body["messages"][-1]["content"] + "x" * 5_000)

    parts = {"teacher": ColumnSampler("t"), "preference": lambda c: LLMJudge("j", c)} if who == "judge" else {}
    with FaultServer(reply) as server:
        with monkeypatch.context() as patched:
            until_full(patched, answers=20)
            with pytest.raises(DiskFull, match=MISSING):
                build(tmp_path / "a", server, **parts)
        asked = server.count
        assert who == "judge" or asked <= 20 + 4 * AT_ONCE
        assert len(build(tmp_path / "a", server, **parts)) == len(PROMPTS)
        contents = [str(body["messages"]) for body in server.bodies]
        assert len(contents) == len(set(contents)) == len(PROMPTS) * (2 if who == "judge" else 1)
        assert asked <= len(contents)


TEST = """
import sys
from pathlib import Path
from tests.pairs.test_full_disk import PROMPTS, build
from tests.sampling.fault_server import FaultServer, chat
from trl_kd.pairs.full_disk import RESERVE_BYTES, DiskFull, free_bytes

out = Path(sys.argv[1]) / "out"
filler = Path(sys.argv[1]) / "filler"
filler.write_bytes(bytes(free_bytes(sys.argv[1]) - RESERVE_BYTES - 400_000))
with FaultServer(lambda body, number: chat("x" * 20_000)) as server:
    try:
        build(out, server)
        raise SystemExit("the disk was not full")
    except DiskFull as error:
        print(error)
    asked = server.count
    filler.unlink()
    print(len(build(out, server)), asked, server.count)
"""


def test_a_disk_that_is_full(tmp_path):
    """A real one of 20 MiB, where this machine lets us mount it."""
    mount = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        'mount -t tmpfs -o size=20m none "$1" && shift && exec "$@"',
        "sh",
        str(tmp_path),
    ]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    environment = {**os.environ, "OPENAI_API_KEY": "none", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [*mount, sys.executable, "-c", TEST, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    said, counts = done.stdout.splitlines()
    assert re.search(MISSING, said)
    rows, asked, in_all = map(int, counts.split())
    assert rows == in_all == len(PROMPTS)
    assert asked < in_all


def test_a_disk_that_is_full_at_the_start_is_said_before_anything_is_asked(tmp_path, monkeypatch):
    def full(descriptor, start, count):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    monkeypatch.setattr("trl_kd.pairs.full_disk.free_bytes", lambda folder: 1000)
    with pytest.raises(
        DiskFull, match=r"8,388,608 bytes are needed and 1,000 are free, so that 8,387,608 are missing"
    ):
        AnswerStore(tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / RESERVE).exists()
    AnswerStore(tmp_path).close()


def test_a_limit_on_the_size_of_files_is_no_full_disk_without_a_number(tmp_path):
    code = (
        "import resource; from trl_kd.pairs.store import AnswerStore; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)); AnswerStore('out')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert re.search(r"DiskFull: The disk of `out` is full: .*a quota or a limit stops them", done.stderr)
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 2**20


def test_a_reserve_where_nothing_can_be_set_aside_is_written(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    reserve = Reserve(tmp_path)
    assert (tmp_path / RESERVE).stat().st_blocks * 512 >= RESERVE_BYTES
    assert reserve.free()
    assert not reserve.free()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (
            RuntimeError("[enforce fail at inline_container.cc:815] . PytorchStreamWriter failed writing file data/3"),
            False,
        ),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (Exception("Error while serializing: I/O error: Permission denied (os error 13)"), False),
        (RuntimeError("CUDA out of memory"), False),
        (None, False),
    ],
)
def test_errors_of_a_full_disk(tmp_path, error, expected):
    assert is_disk_full(error, tmp_path) is expected


def test_an_error_without_a_number_is_one_of_a_full_disk_where_nothing_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_kd.pairs.full_disk.can_write", lambda folder: False)
    assert is_disk_full(RuntimeError("PytorchStreamWriter failed writing file data/3"), tmp_path)
    assert is_disk_full(RuntimeError("basic_ios::clear: iostream error"), tmp_path)
    assert is_disk_full(OSError("4096 requested and 0 written"), tmp_path)  # numpy's
    assert is_disk_full(RuntimeError("of another library"), tmp_path, is_saving=True)
    assert not is_disk_full(StoreError("`x` is damaged"), tmp_path, is_saving=True)
    assert not is_disk_full(RuntimeError("CUDA out of memory"), tmp_path)


def test_nothing_stays_of_a_file_that_does_not_fit(tmp_path):
    path = tmp_path / "rounds.json"
    path.write_text("former")

    def write():
        with written_whole(path) as building:
            building.write_text("half of")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("rounds.json", "former")]


def test_other_errors_keep_their_words(tmp_path):
    with pytest.raises(PermissionError), full_disk_said(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")
