"""What a killed process leaves in an output folder does not stay there."""

import pytest

from trl_kd.pairs.full_disk import RESERVE
from trl_kd.pairs.store import AnswerStore
from trl_kd.trainers.common.checkpoints import remove_older
from trl_kd.trainers.common.leftovers import remove_leftovers
from trl_kd.trainers.common.main_process import claim


def write(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_begun_weights_are_removed_and_nothing_else(tmp_path):
    begun = [write(tmp_path / place / ".tmpAb3dE9") for place in (".", "checkpoint-3", "round-1/student/checkpoint-2")]
    others = [write(tmp_path / name) for name in (".tmp", ".tmpAb3dE9x", "tmpAb3dE9", ".git", "mine/.tmpAb3dE9")]
    (tmp_path / ".tmpFolder").mkdir()
    with claim(tmp_path):
        pass
    assert not any(path.exists() for path in begun)
    assert all(path.exists() for path in [*others, tmp_path / ".tmpFolder"])


def test_a_store_that_was_open_is_closed(tmp_path):
    folder = tmp_path / "_online" / "labels"
    store = AnswerStore(folder)
    held = AnswerStore(tmp_path / "_online" / "held")  # by somebody who lives
    store._connection.close()
    store._lock._lock.release()  # as a process that is killed
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["_lock", "answers.db"]
    assert (folder / "_lock").read_text() == ""
    assert (tmp_path / "_online" / "held" / RESERVE).is_file()
    held.close()


def test_a_damaged_store_is_left_to_who_needs_it(tmp_path):
    write(tmp_path / "_online" / RESERVE)
    damaged = write(tmp_path / "_online" / "answers.db", b"no database at all" * 100)
    remove_leftovers(tmp_path)
    assert damaged.read_bytes() == b"no database at all" * 100


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [2, 4, 6, 10, 12]),
        (0, None, [2, 4, 6, 10, 12]),
        (9, None, [2, 4, 6, 10, 12]),
        (3, None, [4, 6, 10, 12]),
        (2, None, [6, 10, 12]),
        (1, None, [10, 12]),
        (2, 2, [2, 10, 12]),
        (1, 2, [2, 10, 12]),
        (3, 2, [2, 6, 10, 12]),
    ],
)
def test_checkpoints_that_are_too_many_go_from_the_first(tmp_path, limit, best, left):
    """The one to go on from stays, and what comes behind it: one that was begun, say."""
    for step in (12, 2, 10, 4, 6):
        write(tmp_path / f"checkpoint-{step}" / "model.safetensors")
    write(tmp_path / "checkpoint-best" / "model.safetensors")
    remove_older(tmp_path / "checkpoint-10", limit, best and f"elsewhere/checkpoint-{best}")
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{name}" for name in [*left, "best"]}
