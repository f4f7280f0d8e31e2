"""Results on disk, stage by stage, so that an interrupted run goes on where it stopped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl_kd.pairs.places import written_whole


MARKER = "done.json"


def stage(folder: Path, compute: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Returns the result of a stage: from its marker if it was completed, else computed now.

    Args:
        folder (`Path`):
            The stage's own folder.
        compute (`Callable[[Path], dict]`):
            Does the work, leaves its files in the folder, and returns a result that JSON can hold. The marker is
            written after it, in one piece: a stage that was cut off has none, and is taken up again.
    """
    marker = folder / MARKER
    if not marker.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(marker, compute(folder))
    return json.loads(marker.read_text())


def write_json(path: Path, content: Any) -> None:
    """Writes JSON so that a reader sees the whole file or none."""
    with written_whole(path) as building:
        building.write_text(json.dumps(content, indent=1, ensure_ascii=False))


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Makes sure that a folder holds results of these settings only, and notes them there.

    Raises:
        `ValueError`: the folder holds results of other settings; the message names what differs.
    """
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
        return
    found = json.loads(path.read_text())
    differing = [
        f"{name} was {found.get(name)!r} and is now {settings.get(name)!r}"
        for name in sorted(found.keys() | settings.keys())
        if found.get(name) != settings.get(name)
    ]
    if differing:
        raise ValueError(
            f"{folder} holds results of other settings, which must not be mixed: choose another --output_dir, or delete "
            f"that folder. What differs: {'; '.join(differing)}."
        )
