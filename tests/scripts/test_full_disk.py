"""A disk that fills up while a training is saved."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.scripts.conftest import replaced


@pytest.fixture
def full(monkeypatch):
    """Lets `torch.save` run out of space from its n-th call on, as a library that hides the number of the error or not."""

    def fill(calls, hides_number):
        save, seen = torch.save, []

        def failing(*args, **kwargs):
            seen.append(1)
            if len(seen) < calls:
                return save(*args, **kwargs)
            if hides_number:
                raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(torch, "save", failing)
        monkeypatch.setattr("trl_kd.pairs.full_disk.can_write", lambda folder: False)
        monkeypatch.setattr("trl_kd.pairs.full_disk.free_bytes", lambda folder: 1000)
        return seen

    return fill


SAVING = ("--save_steps", "1", "--save_strategy", "steps")


@pytest.mark.parametrize("command", ["base", "mm_base"])
@pytest.mark.parametrize("hides_number", [True, False])
def test_a_checkpoint_that_does_not_fit_is_one_sentence(request, trl_kd, out, full, command, hides_number):
    words = [*request.getfixturevalue(command), *SAVING]
    full(2, hides_number)
    error = trl_kd(*words).error
    assert f"The disk of `{out}` is full: " in error
    assert "bytes are needed and 1,000 are free, so that " in error
    assert "`checkpoint-1` was not saved, and nothing before: free some space." in error
    assert not list(out.glob("checkpoint-*"))


def test_the_last_whole_checkpoint_is_named_and_goes_on(trl_kd, base, out, full, monkeypatch):
    with monkeypatch.context() as counted:
        save, seen = torch.save, []
        counted.setattr(torch, "save", lambda *args, **kwargs: (seen.append(1), save(*args, **kwargs)))
        assert trl_kd(*replaced(base, "--max_steps", "1"), *SAVING).code == 0
    shutil.rmtree(out)
    of_a_checkpoint = len(seen) - 1  # and one at the end
    full(of_a_checkpoint + 2, hides_number=True)
    error = trl_kd(*base, *SAVING).error
    assert (
        "`checkpoint-2` was not saved, and `checkpoint-1` is the last whole checkpoint: free some space, and" in error
    )
    monkeypatch.undo()
    assert trl_kd(*base, *SAVING, "--resume_from_checkpoint", "true").code == 0


def test_other_errors_of_saving_keep_their_traceback(trl_kd, base, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="inline_container"):
        trl_kd(*base, *SAVING)


@pytest.mark.parametrize("size", ["20k", "60k"])
def test_a_disk_that_is_full(base, tmp_path, size):
    """A real one, where this machine lets us mount it: the weights do not fit, or the optimizer."""
    folder = tmp_path / "disk"
    folder.mkdir()
    script = f'mount -t tmpfs -o size={size} none "$1" && shift && exec "$@"'
    mount = ["unshare", "-rm", "sh", "-c", script, "sh", str(folder)]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("nothing may be mounted here")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    words = replaced(base, "--output_dir", str(folder / "out"))
    command = [*mount, sys.executable, "-m", "trl_kd.scripts.cli", *words, *SAVING]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "are missing. `checkpoint-1` was not saved, and nothing before: free some space." in done.stderr
