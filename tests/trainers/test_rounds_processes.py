"""Rounds in several processes: none waits for a main process that has ended, and their number stays as it was."""

import multiprocessing
import re
import socket

import pytest

from tests.trainers.rounds_cases import lose_main_process, make
from trl_kd.pairs.lock import lock_folder
from trl_kd.trainers.rounds.folder import RoundsFolder


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trainers.rounds_cases"])
    return context


@pytest.mark.distributed
@pytest.mark.parametrize("fate", ["killed", "error", "trained", "absent", "refused"])
def test_no_process_waits_for_a_main_process_that_has_ended(fate, processes, tiny_dir, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    held = lock_folder(out) if fate == "refused" else None
    both = [processes.Process(target=lose_main_process, args=(k, port, out, tiny_dir, fate)) for k in (0, 1)]
    for process in both:
        process.start()
    try:
        both[0].join(120)
        both[1].join(60)
        codes = [process.exitcode for process in both]
    finally:
        for process in both:
            process.kill()
    assert codes == [-9 if fate in ("killed", "trained") else 1, 0]
    said = (tmp_path / "out.said").read_text()
    if held is not None:
        held.close()
        # The main process may be gone before it is heard
        assert re.match(r"StoreError: `.*` is being written by process \d+: let it end|MainProcessEnded: ", said)
        return
    assert said.startswith("MainProcessEnded: The main process of this run ")
    assert "rank 1, ends too" in said
    assert RoundsFolder(out).stage(1) == ("trained" if fate == "trained" else None)


def test_another_number_of_processes_is_refused_by_name(tiny_dir, tmp_path):
    make(tmp_path / "out", tiny_dir, {"max_steps": 1}, rounds=1).run()
    rounds = make(tmp_path / "out", tiny_dir, {"max_steps": 1}, rounds=2)
    rounds.num_processes = 2
    with pytest.raises(ValueError, match="`num_processes` was 1 and is 2"):
        rounds.run()
