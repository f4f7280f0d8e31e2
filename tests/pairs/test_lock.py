"""Locks of folders as other processes see them."""

import multiprocessing
import os
import signal
import time

import pytest

from trl_kd.pairs import lock
from trl_kd.pairs.lock import LOCK, LockWatch, lock_folder
from trl_kd.pairs.places import StoreError


def _hold(folder, pipe):
    with lock_folder(folder, "training") as held:
        pipe.send(held.owner)
        pipe.recv()


@pytest.fixture
def holder(tmp_path):
    """Another process that has the folder, what it is called, and the end of a pipe that lets it go on."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_hold, args=(tmp_path, theirs))
    process.start()
    yield process, ours.recv(), ours
    process.kill()
    process.join()


def test_a_lock_ends_with_its_process(tmp_path, holder):
    process, owner, _ = holder
    watch = LockWatch(tmp_path, owner)
    assert watch.is_held()
    assert watch.is_held()
    with pytest.raises(StoreError, match=f"written by process {process.pid}: let it end"):
        lock_folder(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not watch.is_held()
    lock_folder(tmp_path).close()  # looking has left no lock


def test_a_lock_that_is_given_back_is_not_held(tmp_path, holder):
    process, owner, pipe = holder
    watch = LockWatch(tmp_path, owner)
    pipe.send(None)
    process.join()
    assert not watch.is_held()


def test_the_lock_of_another_run_is_not_ours(tmp_path, holder):
    assert not LockWatch(tmp_path, holder[1].replace(str(holder[0].pid), "1")).is_held()


def test_another_host_sees_beats_alone(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(lock.time, "monotonic", lambda: now[0])
    (tmp_path / LOCK).write_text("7@elsewhere training")  # no lock is to be seen here
    watch = LockWatch(tmp_path, "7@elsewhere training")
    assert watch.is_held()
    for beat in range(3):
        now[0] += lock.SILENCE - 1
        os.utime(tmp_path / LOCK, (beat, beat))  # a clock that is wrong
        assert watch.is_held()
    now[0] += lock.SILENCE - 1
    assert watch.is_held()
    now[0] += 1
    assert not watch.is_held()


def test_a_lock_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    with lock_folder(tmp_path) as held:
        os.utime(tmp_path / LOCK, (1, 1))
        with held.beating():
            while (tmp_path / LOCK).stat().st_mtime == 1:
                time.sleep(0.01)


def test_a_lock_that_is_removed_leaves_nothing(tmp_path):
    held = lock_folder(tmp_path)
    held.remove()
    held.close()
    assert not list(tmp_path.iterdir())
    lock_folder(tmp_path).close()
