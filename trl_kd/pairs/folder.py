"""The output folder before anything is written to it: nobody else's files are in it."""

import json
import re
from pathlib import Path

from trl_kd.pairs.database import DATABASE
from trl_kd.pairs.dataset import DATA
from trl_kd.pairs.lock import LOCK
from trl_kd.pairs.places import check_files
from trl_kd.pairs.report import COUNTS, SETTINGS, SUMMARY


_WRITTEN = ("README.md", "pairs.html", SUMMARY, SETTINGS, COUNTS)
_FORMER_LOCK = ".lock"
_OURS = re.compile(r"train-\d{5}-of-\d{5}\.parquet")


def check_folder(output_dir: str | Path) -> None:
    """
    Checks that pairs can be written to a folder without touching what somebody else has put there.

    The files of an earlier build or merge are known by its `answers.db`, or its `settings.json` and `counts.json`.

    Args:
        output_dir (`str` or `Path`):
            The folder. It need not exist.

    Raises:
        `ValueError`: it holds a file of a name that is written here and that no build has written, or a folder `data` with
        other files than those of pairs.
        `StoreError`: something that is no file has a name that is written here.
    """
    folder = Path(output_dir)
    data = folder / DATA
    held = sorted(path.name for path in data.iterdir()) if data.is_dir() else []
    foreign = next((f"{DATA}/{name}" for name in held if not _OURS.fullmatch(name)), None)
    if not data.is_dir() and (data.exists() or data.is_symlink()):
        foreign = DATA
    if foreign is None and not _is_ours(folder):
        names = [f"{DATA}/{held[0]}"] if held else []
        foreign = next(iter([*names, *(name for name in _WRITTEN if (folder / name).exists())]), None)
    if foreign is not None:
        raise ValueError(
            f"`output_dir` is {str(output_dir)!r}, which holds `{foreign}`, which no build of pairs has written: it would "
            "be overwritten. Give the pairs a folder of their own."
        )
    check_files(folder, _WRITTEN)


def _is_ours(folder: Path) -> bool:
    if (folder / DATABASE).is_file():
        return True
    locks = [folder / name for name in (LOCK, _FORMER_LOCK)]
    if any(lock.is_file() and re.fullmatch(r"(\d+@\S*)?", lock.read_text(errors="replace")) for lock in locks):
        return True  # of a merge that was interrupted
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and "pairing" in settings and (folder / COUNTS).is_file()
