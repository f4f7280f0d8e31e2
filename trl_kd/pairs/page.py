"""`pairs.html`: all pairs in one file, to be read side by side. It needs no network, and runs nothing but its own script."""

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from trl_kd import __version__
from trl_kd.pairs.card import flatten_settings
from trl_kd.pairs.places import written_whole
from trl_kd.pairs.statistics import content_text, summary_table, text_length
from trl_kd.responses.finish_reasons import ending
from trl_kd.sampling import Text


_SIDES = ("chosen", "rejected")
_LONGEST_TEXT = 8000
_LONGEST_VALUE = 400
_SHOWN = {
    *("prompt", "chosen", "rejected", "teacher", "preference", "teacher_side", "score_chosen", "score_rejected"),
    *("chosen_source", "rejected_source", "chosen_finish_reason", "rejected_finish_reason"),
    *("student_count", "source_row"),
}
_UNSAFE = "<>&\u2028\u2029"


def write_page(
    output_dir: str | os.PathLike[str],
    rows: Iterable[dict[str, Any]],
    summary: dict[str, Any],
    settings: Mapping[str, Any],
) -> Path:
    """
    Writes `pairs.html` into a folder of pairs: the summary, search, filters, and two answers side by side.

    What is looked at stands in the page's address and may be linked to, e.g.
    `pairs.html#q=word&winner=teacher&longer=chosen&min=10&max=500&cut=1&page=2`, where `winner` is `teacher`, `student`,
    `tie` or `unknown`, `longer` is `chosen`, `rejected` or `equal`, and `min` and `max` are characters of the longer answer.

    Args:
        output_dir (`str` or `os.PathLike`):
            The folder.
        rows (`Iterable[dict]`):
            Pairs to show; 5,000 are quick to look through. Texts are shown up to 8,000 characters.
        summary (`dict[str, Any]`):
            Of [`~trl_kd.pairs.statistics.PairStatistics`], over all pairs.
        settings (`Mapping[str, Any]`):
            As for [`~trl_kd.pairs.card.write_card`].

    Returns:
        `Path`: the page.
    """
    path = Path(output_dir) / "pairs.html"
    with written_whole(path) as building:
        building.write_bytes(render_page(rows, summary, settings).encode("utf-8", "replace"))
    return path


def render_page(rows: Iterable[dict[str, Any]], summary: dict[str, Any], settings: Mapping[str, Any]) -> str:
    """The page as one HTML document."""
    pairs = [_pair(row, index) for index, row in enumerate(rows, 1)]
    total = summary["pairs"]["total"]
    several = f"{total:,} pairs" if len(pairs) == total else f"{len(pairs):,} of {total:,} pairs, chosen at random,"
    prompts = f"{'' if summary['prompts_exact'] else 'about '}{summary['prompts']:,} prompts"
    data = {
        "lead": f"{several} from {prompts}. Chosen is the better of two answers, or as good as the other.",
        "summary": summary_table(summary),
        "warnings": summary["warnings"],
        "settings": flatten_settings(settings),
        "pairs": pairs,
        "footer": f"Made by trl-kd {__version__}. This file loads nothing from a network.",
    }
    template = files("trl_kd.pairs").joinpath("page.html").read_text(encoding="utf-8")
    script, style = _hash(template, "<script>", "</script>"), _hash(template, "<style>", "</style>")
    values = {"script_hash": script, "style_hash": style, "data": as_json(data)}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def as_json(data: Any) -> str:
    """JSON that cannot end the element it is put into."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in _UNSAFE:
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _hash(template: str, begin: str, end: str) -> str:
    """The source expression of a Content-Security-Policy that allows what stands between two tags, and nothing else."""
    content = template.partition(begin)[2].partition(end)[0]
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _pair(row: dict[str, Any], index: int) -> dict[str, Any]:
    preference = row["preference"]
    if preference is not None and math.isnan(preference):
        preference = None
    side = row.get("teacher_side")
    by = {key: row.get(f"{key}_source") or (side and ("teacher" if side == key else "student")) for key in _SIDES}
    winner = "unknown" if preference is None else "tie" if preference == 0.5 else by["chosen"]
    teacher = row.get("teacher")
    return {
        "index": index,
        "row": row.get("source_row"),
        "p": preference,
        "winner": winner,
        "prompt": _text(row["prompt"]),
        **{key: _answer(row, key, by[key]) for key in _SIDES},
        "teacher": None if teacher is None else _text(teacher),
        "rest": [(str(k), _value(v)) for k, v in row.items() if k not in _SHOWN and v is not None],
    }


def _answer(row: dict[str, Any], side: str, by: str | None) -> dict[str, Any]:
    score = row.get(f"score_{side}")
    return {
        "text": _text(row[side]),
        "by": by,
        "score": None if score is None or math.isnan(score) else f"{score:.4g}",
        "length": text_length(row[side]),
        "end": row.get(f"{side}_finish_reason"),
        "cut": ending(row.get(f"{side}_finish_reason")) == "cut",
    }


def _text(text: Text) -> str | list[tuple[str, str]]:
    """Text as it is, messages as pairs of role and content."""
    if isinstance(text, str):
        return _clip(text, _LONGEST_TEXT)
    return [(str(message.get("role", "")), _clip(_content(message), _LONGEST_TEXT)) for message in text]


def _content(message: dict[str, Any]) -> str:
    """What a message says, with the tools it calls."""
    calls = message.get("tool_calls")
    said = content_text(message.get("content"))
    return f"{said}\n{json.dumps(calls, ensure_ascii=False, default=str)}".strip() if calls else said


def _value(value: Any) -> str:
    return _clip(value if isinstance(value, str) else repr(value), _LONGEST_VALUE)


def _clip(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}\n[… {len(text) - longest:,} more characters]"
