"""What is told of a folder of pairs: its statistics, card and page."""

import json
import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trl_kd.pairs.card import write_card
from trl_kd.pairs.full_disk import full_disk_said
from trl_kd.pairs.page import write_page
from trl_kd.pairs.places import read_json_file, written_whole
from trl_kd.pairs.statistics import PairStatistics
from trl_kd.pairs.store import SETTINGS
from trl_kd.sampling import Answer
from trl_kd.sampling.budget import Usage


SHOWN_REPLIES = 3
"""Replies of a judge, of those that could not be read, that are shown."""

SUMMARY, COUNTS = "summary.json", "counts.json"
_SHOWN = 5000


class PairReport:
    """
    Gathers what the statistics and the page need while rows go by, in memory that does not grow with them.

    Args:
        seed (`int`):
            Seed of the choice of the 5,000 rows that the page shows, where there are more.

    Attributes:
        prompts (`int`): Prompts read; set by the caller, like the others.
        unparseable, judged (`int`, *optional*): Comparisons on which a judge gave no verdict that could be read, and all
            that it was asked about.
        unreadable (`list[str]`): Some replies that could not be read.
        orders (`tuple[float, int]`, *optional*): Share of comparisons on which a judge agreed with itself in both orders,
            and their number.
        usage (`dict[str, Usage]`): What all runs have used of `"teacher"`, `"student"` and `"judge"`, where that is counted.
    """

    def __init__(self, seed: int = 0):
        self.prompts = 0
        self.unparseable: int | None = None
        self.judged: int | None = None
        self.unreadable: list[str] = []
        self.orders: tuple[float, int] | None = None
        self.usage: dict[str, Usage] = {}
        self._random = random.Random(seed)
        self._statistics = PairStatistics()
        self._shown: list[tuple[int, dict[str, Any]]] = []
        self._seen = 0

    def add_answers(self, source: str, answers: list[Answer]) -> None:
        """Counts answers of a source, paired or not."""
        self._statistics.add_answers(source, answers)

    def add_rows(self, rows: list[dict[str, Any]]) -> None:
        """Counts rows of the dataset, in its order."""
        self._statistics.add_rows(rows)
        for row in rows:
            place = self._seen if self._seen < _SHOWN else int(self._random.random() * (self._seen + 1))
            if place < len(self._shown):
                self._shown[place] = (self._seen, row)
            elif place < _SHOWN:
                self._shown.append((self._seen, row))
            self._seen += 1

    def add_counts(self, folder: str | Path) -> None:
        """Adds what the rows of another folder of pairs do not say: its prompts, answers, what its judge did, and what was
        used."""
        counts = read_json_file(Path(folder) / COUNTS)
        self.prompts += counts["prompts"]
        for source, answers in counts["answers"].items():
            self._statistics.answers.setdefault(source, Counter()).update(answers)
        if counts["unparseable"] is not None:
            self.unparseable = (self.unparseable or 0) + counts["unparseable"]
        if counts.get("judged") is not None:  # not in folders of former versions
            self.judged = (self.judged or 0) + counts["judged"]
            self.unreadable = [*self.unreadable, *counts["unreadable"]][:SHOWN_REPLIES]
        if counts["orders"] is not None:
            (share, number), (more, others) = self.orders or (0.0, 0), counts["orders"]
            self.orders = (share * number + more * others) / (number + others), number + others
        for name, used in counts["usage"].items():
            self.usage[name] = self.usage.get(name, Usage()) + Usage(**used)

    def _counts(self) -> dict[str, Any]:
        answers = {source: dict(counts) for source, counts in self._statistics.answers.items()}
        return {
            "prompts": self.prompts,
            "answers": answers,
            "unparseable": self.unparseable,
            "judged": self.judged,
            "unreadable": self.unreadable,
            "orders": self.orders,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        return {name: asdict(used) for name, used in self.usage.items()}

    def write(self, folder: str | Path, settings: dict[str, Any]) -> dict[str, Any]:
        """Writes `summary.json`, `settings.json`, `counts.json` (which [`merge_shards`] reads), the card and the page, and
        returns the summary."""
        agreement = self.orders[0] if self.orders else None
        summary = self._statistics.summary(
            self.prompts, agreement, self.unparseable, self._usage(), self.judged, self.unreadable
        )
        with full_disk_said(Path(folder)):
            for name, content in ((SUMMARY, summary), (SETTINGS, settings), (COUNTS, self._counts())):
                text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
                with written_whole(Path(folder) / name) as building:
                    building.write_text(text, encoding="utf-8")
            write_card(folder, summary, settings)
            rows = [row for _, row in sorted(self._shown, key=lambda shown: shown[0])]
            write_page(folder, rows, summary, settings)
        return summary
