"""One process of a run claims its folder and works there; the others wait for it, for as long as it lives."""

import itertools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from accelerate import PartialState
from torch.distributed import DistError, distributed_c10d

from trl_kd.pairs.lock import LockWatch, hold_folder
from trl_kd.pairs.places import StoreError
from trl_kd.trainers.common.leftovers import remove_leftovers


_POLL = 0.2
_REFUSED = "refused: "
GOES_ON = "What is finished is kept: the same command goes on from there."
_LOST = re.compile(
    "(?i)remote worker crashing|remote process exited|ncclRemoteError|communicator was aborted|pair closure|broken pipe|"
    "(connection )?(closed|reset) by peer|connection (closed|reset|refused)|timed out|socket timeout"
)
"""What gloo and NCCL say when another process does not answer any more."""
_numbers = itertools.count()


class MainProcessEnded(RuntimeError):
    """The main process has ended, or failed, while this one waited for it."""


class Claim:
    """What [`claim`] gives: the claimed folder, as one process of the run sees it."""

    def __init__(self, watch: LockWatch | None = None):
        self._watch = watch

    def wait_until(self, done: Callable[[], bool]) -> None:
        """
        Returns when `done()`, which the main process sees to and leaves behind in files. That may take hours: a collective
        would time out.

        Raises:
            `MainProcessEnded`: the main process has ended before.
        """
        while True:
            lives = self._watch is None or self._watch.is_held()  # looked at first: it may end as soon as it is done
            if done():
                return
            if not lives:
                raise _ended(f" ({self._watch.owner})" if self._watch else "", GOES_ON)
            time.sleep(_POLL)


@contextmanager
def claim(folder: str | Path) -> Iterator[Claim]:
    """
    Claims a folder for all processes of a run together: the main one makes and locks it, the others wait until it has.

    Raises:
        `StoreError`: somebody else writes the folder, or it cannot be written.
        `MainProcessEnded`: the main process has ended before it had the folder.
    """
    state, key = PartialState(), f"trl_kd/claim/{next(_numbers)}"
    if not state.is_main_process:
        yield Claim(LockWatch(folder, _told(key)))
        return
    with ExitStack() as held:
        try:
            lock = held.enter_context(hold_folder(folder, "training"))
        except OSError as error:
            _tell(state, key, f"{_REFUSED}{error}")
            raise
        held.enter_context(lock.beating())
        remove_leftovers(folder)
        _tell(state, key, lock.owner)
        yield Claim()


# ---- What the processes tell each other in the store by which they have met -----------------------------------------------


def _tell(state: PartialState, key: str, value: str) -> None:
    if state.num_processes > 1:
        _store().set(key, value)


def _told(key: str) -> str:
    """Waits for what the main process tells. Without an elastic agent, which ends all processes when one fails, the main
    process keeps the store itself, and it ends with it."""
    try:
        while not _store().check([key]):
            time.sleep(_POLL)
        value = _store().get(key).decode()
    except RuntimeError as error:  # torch.distributed's DistError
        raise _ended("", "Start the run again.") from error
    if value.startswith(_REFUSED):
        raise StoreError(value.removeprefix(_REFUSED))
    return value


def _store():
    return distributed_c10d._get_default_store()


def _ended(who: str, way_out: str) -> MainProcessEnded:
    return MainProcessEnded(
        f"The main process of this run{who} has ended, and this process, of rank {PartialState().process_index}, ends "
        f"too: the output of the main process says why. {way_out}"
    )


# ---- A collective that another process has left ---------------------------------------------------------------------------


def lost_process(error: Exception, way_out: str) -> str | None:
    """
    Says that a collective has failed since another process of the run has ended, or is out of reach.

    Args:
        error (`Exception`):
            What was raised.
        way_out (`str`):
            A sentence on how to go on.

    Returns:
        `str`, *optional*: the sentences; `None` for any other error.
    """
    of_torch = type(error) is RuntimeError or isinstance(error, DistError)  # gloo's, or NCCL's
    found = _LOST.search(" ".join(str(error).split())) if of_torch and distributed_c10d.is_initialized() else None
    if found is None or distributed_c10d.get_world_size() < 2:
        return None
    return (
        f"This process, of rank {distributed_c10d.get_rank()}, has lost another process of its run ({found[0]}), and ends "
        f"too: the output of the other process says why. {way_out}"
    )
