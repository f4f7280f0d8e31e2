"""The dataset card of a folder of pairs, rewritten at each run without touching what a person wrote into it."""

import html
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_kd import __version__
from trl_kd.pairs.places import written_whole
from trl_kd.pairs.statistics import summary_table


BEGIN = "<!-- trl-kd: from here to the end mark this file is rewritten at each run; write before or after -->"
END = "<!-- trl-kd: end -->"

_LONGEST = 500
_SIZES = (
    ("1K", 10**3),
    ("10K", 10**4),
    ("100K", 10**5),
    ("1M", 10**6),
    ("10M", 10**7),
    ("100M", 10**8),
    ("1B", 10**9),
)

_FRONT = """\
---
# The licence is for you to choose: the prompts' and the teacher's terms decide what you may publish.
license: other
license_name: to-be-chosen
tags:
- trl-kd
- preference
- trl
- pbkd
- knowledge-distillation
size_categories:
- {size}
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
---
"""

_HEAD = """
# Preference pairs of a teacher's and a student's answers

## Licence

**Not chosen yet.** Say here, and in `license` above, under which terms the prompts, the teacher's answers and the student's
may be used; some providers forbid training on what their models say.

"""

_COLUMNS = """\
## Columns

| column | what it holds |
|---|---|
| `prompt` | what was asked: text, or messages |
| `chosen`, `rejected` | the two answers, in the prompt's format |
| `preference` | P(chosen ≻ rejected) in [½, 1]: 1 for a winner, ½ for a tie, null for equal texts or if not known |
| `teacher_side` | `"chosen"` or `"rejected"`: which of the two the teacher wrote; null for neither |
| `teacher` | the teacher's answer where it is neither of the two (only where needed) |
| `score_chosen`, `score_rejected` | scores that the preference comes from; null where there are none |
| `chosen_source`, `rejected_source` | who wrote each: `"teacher"` or `"student"` |
| `chosen_finish_reason`, `rejected_finish_reason` | why each ended; `"length"` and the like if it was cut off |
| `student_count` | how often the student gave its answer, since equal ones make one row; null for two of one source |
| `source_row` | number of the prompt's row in its own dataset |

All other columns are the prompts' own; a name that a trainer would read has the prefix `source_`.
"""

_LOADING = """\
## Loading

```python
from trl import DPOConfig, DPOTrainer
from trl_kd import PbKDConfig, PbKDTrainer
from trl_kd.pairs import load_pairs

# This folder; the student is yours to choose
trainer = PbKDTrainer(model=student, args=PbKDConfig("student-pbkd"), train_dataset=load_pairs(folder))

# TRL's own trainers read `chosen` as the better of the two, whatever `preference` says: ties and nulls have to go, and
# soft labels count as hard ones
trainer = DPOTrainer(model=student, args=DPOConfig("student-dpo"), train_dataset=load_pairs(folder, strict_only=True))
```

`pairs.html` in this folder shows the pairs side by side.

## Citation

The pairs are made for [preference-based knowledge distillation](https://arxiv.org/abs/2505.18952):

```bibtex
@article{jia2025online,
    title   = {{Online Knowledge Distillation with Reward Guidance}},
    author  = {Chen Jia},
    year    = 2025,
    journal = {arXiv preprint arXiv:2505.18952}
}
```
"""


def write_card(output_dir: str | os.PathLike[str], summary: dict[str, Any], settings: Mapping[str, Any]) -> Path:
    """
    Writes `README.md`, the dataset card, into a folder of pairs.

    In a card that is there already, the part between our two comments is replaced and `size_categories` brought up to
    date; everything else stays as it is, so that a licence that was filled in survives.

    Args:
        output_dir (`str` or `os.PathLike`):
            The folder.
        summary (`dict[str, Any]`):
            Of [`~trl_kd.pairs.statistics.PairStatistics`].
        settings (`Mapping[str, Any]`):
            What the pairs depend on, as `describe()` of each part gives it: JSON, nested, without secrets.

    Returns:
        `Path`: the card.
    """
    path = Path(output_dir) / "README.md"
    size = _size_category(summary["pairs"]["total"])
    block = f"{BEGIN}\n\n{_body(summary, settings)}\n{END}\n"
    if path.exists():
        text = path.read_text(encoding="utf-8")
        end = text.find(END)
        begin = text.rfind(BEGIN, 0, end) if end >= 0 else -1
        if begin >= 0:
            text = text[:begin] + block + text[end + len(END) :].removeprefix("\n")
        else:
            text = f"{text.rstrip()}\n\n{block}" if text.strip() else block
        front = re.match(r"---\n.*?\n---\n", text, flags=re.DOTALL)
        if front is not None:
            known = re.sub(r"^(size_categories:\n *- ).*$", rf"\g<1>{size}", front[0], flags=re.MULTILINE)
            text = known + text[front.end() :]
        else:
            text = f"{_FRONT.format(size=size)}\n{text}"
    else:
        text = _FRONT.format(size=size) + _HEAD + block
    with written_whole(path) as building:
        building.write_bytes(text.encode("utf-8", "replace"))
    return path


def flatten_settings(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as pairs of a dotted name and a value in text, one line each and no longer than a table can bear.
    Of a folder's path only its last part is kept, since the result is read elsewhere."""
    flat: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat += flatten_settings(value, f"{prefix}{key}.")
        else:
            flat.append((prefix + str(key), _plain(value)))
    return flat


def _plain(value: Any) -> str:
    if isinstance(value, str):
        text = os.path.basename(os.path.normpath(value)) if os.path.isabs(value) and os.path.exists(value) else value
        text = json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"') if text else '""'
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text):,} characters)"


def _body(summary: dict[str, Any], settings: Mapping[str, Any]) -> str:
    parts = ["## What it holds\n"]
    parts += _table(("", "", ""), [tuple(map(escape, row)) for row in summary_table(summary)])
    parts += [f"\n> **Warning.** {escape(warning)}" for warning in summary["warnings"]]
    parts += [
        "\nA teacher and a student answered the same prompts, a preference function said which answer is better, and each",
        "row pairs two of the answers: `chosen` is at least as good as `rejected`.\n",
        _COLUMNS,
        f"## How it was made\n\nBy `trl-kd pairs`, version {__version__}, with these settings:\n",
        *_table(("setting", "value"), [(code(name), code(value)) for name, value in flatten_settings(settings)]),
        f"\n{_LOADING}",
    ]
    return "\n".join(parts)


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows)]


def escape(text: str) -> str:
    """Text as Markdown that shows it and does nothing else, on one line."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def code(text: str) -> str:
    """Text in the type of code, as Markdown that shows it and does nothing else, on one line."""
    if re.fullmatch(r"[^\s`|<\\\x00-\x1f](?:[^`|<\\\x00-\x1f]*[^\s`|<\\\x00-\x1f])?", text):
        return f"`{text}`"
    # No structure of Markdown or HTML can be made of character references
    plain = "".join(c if c.isalnum() or c in " .,-/" else f"&#{ord(c)};" for c in " ".join(text.split()))
    return f"<code>{plain}</code>"


def _size_category(count: int) -> str:
    """The Hub's name for a number of rows."""
    below = "n"
    for name, limit in _SIZES:
        if count < limit:
            return f"n<{name}" if below == "n" else f"{below}<n<{name}"
        below = name
    return "n>1B"
