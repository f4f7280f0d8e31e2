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

    def fill(calls, hidden):
        save, seen = torch.save, []

        def failing(*args, **kwargs):
            seen.append(1)
            if len(seen) < calls:
                return save(*args, **kwargs)
            if hidden:
                raise RuntimeError(hidden)
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(torch, "save", failing)
        monkeypatch.setattr("trl_kd.pairs.full_disk.can_write", lambda folder: False)
        monkeypatch.setattr("trl_kd.pairs.full_disk.free_bytes", lambda folder: 1000)
        return seen

    return fill


UNEXPECTED = "[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"
SAVING = ("--save_steps", "1", "--save_strategy", "steps")


@pytest.mark.parametrize("command", ["base", "mm_base"])
@pytest.mark.parametrize("hidden", [None, UNEXPECTED, "basic_ios::clear: iostream error", "of another library"])
def test_a_checkpoint_that_does_not_fit_is_one_sentence(request, trl_kd, out, full, command, hidden):
    words = [*request.getfixturevalue(command), *SAVING]
    full(2, hidden)
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
    full(of_a_checkpoint + 2, UNEXPECTED)
    error = trl_kd(*base, *SAVING).error
    assert (
        "`checkpoint-2` was not saved, and `checkpoint-1` is the last whole checkpoint: free some space, and" in error
    )
    monkeypatch.undo()
    assert trl_kd(*base, *SAVING, "--resume_from_checkpoint", "true").code == 0


def test_other_errors_of_saving_keep_their_traceback(trl_kd, base, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError(UNEXPECTED)

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="inline_container"):
        trl_kd(*base, *SAVING)


def test_an_empty_file_is_not_left_of_a_model_that_does_not_fit(trl_kd, base, out, monkeypatch):
    def begun(self, output_dir=None, state_dict=None):
        (out / "config.json").write_text("")
        raise OSError(errno.ENOSPC, "No space left on device")

    out.mkdir()
    (out / "mine").write_text("")
    monkeypatch.setattr("transformers.Trainer._save", begun)
    assert (
        "The model was not saved, and nothing before: free some space." in trl_kd(*base, "--save_strategy", "no").error
    )
    assert [path.name for path in out.iterdir()] == ["mine"]


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
