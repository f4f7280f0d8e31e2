"""Answers and labels on disk as they arrive, so that a run can be killed at any moment and nothing is paid for twice."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from trl_kd.pairs.database import Database
from trl_kd.pairs.differences import differences, listed
from trl_kd.pairs.null_causes import Causes, as_cause, nulls_of
from trl_kd.pairs.stored_values import HELD, KINDS, are_texts, is_description, is_share, is_usage
from trl_kd.sampling import Answer
from trl_kd.sampling.budget import Usage
from trl_kd.sampling.recorded import recorded_settings


SETTINGS = "settings.json"

_AT_ONCE = 500
"""Keys in one query: SQLite's oldest limit on variables is 999."""


class AnswerStore(Database):
    """
    The answers and labels of a folder of pairs, and what their sources say of themselves, in its database.

    Every answer is committed as it arrives. Only on a network file system, where a commit is slow and write-ahead logging
    does not work, up to 64 of them share a commit, for at most one second.

    When the disk fills up, a reserve is given back, and what arrives is stored in its place; from then on `check_space`
    raises.

    Args:
        folder (`str` or `Path`):
            The output folder; made if it does not exist.
        made (`Sequence[str | Path]`, *optional*):
            What is made of the answers elsewhere, besides the pairs in the folder: where any of it exists, an empty database
            is refused.

    Raises:
        `StoreError`: another process holds the folder; or the database is damaged, of another version, of something else, or
        empty beside what was made of it; or the disk is full.
    """

    def __init__(self, folder: str | Path, made: Sequence[str | Path] = ()):
        self._counted: tuple[str, Usage, Usage] | None = None
        self._judge: Any = None
        self._orders: tuple[float, float] = (0.0, 0)  # without what the judge has counted since
        self._unreadable: list[str] = []
        self._written: dict[str, str] = {}  # of what is counted
        self._described: dict[str, Any] = {}  # what each source says of itself
        self._kinds: set[str] = set()  # of rows that are stored
        super().__init__(folder, made)

    def check_settings(self, settings: dict[str, Any], relabel: bool = False) -> None:
        """
        Compares the settings of the stored answers and labels with today's, and remembers today's.

        Args:
            settings (`dict[str, dict]`):
                What `"teacher"`, `"student"` and `"preference"` say of themselves, and `"shard"`, as JSON.
            relabel (`bool`, *optional*, defaults to `False`):
                Whether the preference may be another than before. Answers stay, and labels of the former one too: they are
                found again if it comes back.

        Raises:
            `ValueError`: settings of something stored differ, which the message names, or the folder is another shard's.
        """
        settings = recorded_settings(json.loads(json.dumps(settings)))
        with self._guard():
            rows = self._connection.execute("SELECT name, value FROM settings").fetchall()
        stored = {name: self._values.setting(name, value, partial(is_description, name)) for name, value in rows}
        before = recorded_settings(stored)
        if before != stored:
            self._forget_keys(stored, before)
        self._preference = self._key_of(settings["preference"])
        shard, former_shard = settings.get("shard"), before.get("shard")
        if shard and former_shard and shard != former_shard:
            raise ValueError(
                f"`{self.path.parent}` is the folder of shard {former_shard[0]}/{former_shard[1]}, and this is "
                f"{shard[0]}/{shard[1]}: give each piece an `output_dir` of its own."
            )
        for source in ("teacher", "student"):
            changes = list(differences(before.get(source, settings[source]), settings[source], source))
            if changes and self.has_texts(source):
                raise ValueError(
                    f"`{self.path.parent}` holds answers of another {source}, and answers of two settings are never mixed: "
                    f"set it back, give another `output_dir`, or delete the folder to start anew. {listed(changes)}."
                )
        former = before.get("preference", settings["preference"])
        changes = list(differences(former, settings["preference"], "preference"))
        if changes and not relabel and self._is_labelled_by(former):
            raise ValueError(
                f"`{self.path.parent}` holds labels of another preference: set it back, give another `output_dir`, or say "
                f"`relabel=True` to keep the answers and label them anew. {listed(changes)}."
            )
        self._know_nulls(before)
        self._described = settings
        self._note(settings)

    def _forget_keys(self, stored: dict[str, Any], before: dict[str, Any]) -> None:
        """Takes out of the database the values of fields that an earlier version has stored and that are not recorded any
        more. Labels go on under what is left of their preference's description."""
        old, new = _digest(stored.get("preference")), _digest(before.get("preference"))
        with self._guard():
            nulls = self._connection.execute("SELECT cause, source, prompt, sample FROM nulls").fetchall()
        changed = {name: json.dumps(value) for name, value in before.items() if value != stored[name]}
        notes = [(f"{note} {new.hex()}", f"{note} {old.hex()}") for note in ("orders", "unreadable")]
        self._write(
            ("UPDATE settings SET value = ? WHERE name = ?", [(value, name) for name, value in changed.items()]),
            ("UPDATE OR REPLACE settings SET name = ? WHERE name = ?", notes),
            ("UPDATE OR REPLACE labels SET preference = ? WHERE preference = ?", [(new, old)]),
            (
                "UPDATE nulls SET cause = ? WHERE source = ? AND prompt = ? AND sample = ?",
                [(self._values.cause(cause, place), *place) for cause, *place in nulls],
            ),
        )
        self.commit()

    def _key_of(self, preference: Any) -> bytes:
        """The key of a preference's labels."""
        return _digest(preference)

    def has_texts(self, source: str) -> bool:
        """Whether an answer of a source is stored, other than one without a text."""
        with self._guard():
            query = "SELECT 1 FROM answers WHERE source = ? AND text != 'null' LIMIT 1"
            return self._connection.execute(query, (source,)).fetchone() is not None

    def _know_nulls(self, before: dict[str, Any]) -> None:
        """Takes the answers without a text that a former version has stored for those of the settings `before`."""
        if not self._noted("nulls"):
            self._write(*(nulls_of(source, before.get(source)) for source in ("teacher", "student")))
            self._note({"nulls": True})

    def _written_preference(self) -> Any:
        """The preference of the pairs that a build has written, whose labels need not be stored: a column's, for one."""
        try:
            written = json.loads((self.path.parent / SETTINGS).read_text(encoding="utf-8"))
            return recorded_settings(written).get("preference")
        except (OSError, ValueError, AttributeError):
            return None

    def _note(self, values: dict[str, Any]) -> None:
        rows = [(name, json.dumps(value)) for name, value in values.items()]
        self._write(("INSERT OR REPLACE INTO settings VALUES (?, ?)", rows))
        self.commit()

    def _noted(self, name: str, holds: Callable[[Any], bool] = lambda value: True) -> Any:
        """A value that was noted, of which `holds` is true, or `None`."""
        with self._guard():
            row = self._connection.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        return self._values.setting(name, row[0], holds) if row else None

    def usage(self, name: str) -> Usage:
        """What all runs so far have used of a source or judge."""
        return Usage(**self._noted(f"usage {name}", is_usage) or {})

    def count_usage(self, name: str, usage: Usage) -> None:
        """From now on adds to what is stored of `name`, at every commit, what `usage` has grown by."""
        self.commit()
        self._counted = (name, usage, self.usage(name) - usage)
        self._written |= self._usage_now()

    @contextmanager
    def counting(self, name: str, usage: Usage) -> Iterator[None]:
        """Counts as [`count_usage`] does, until it is left: `usage` may be that of others too."""
        self.count_usage(name, usage)
        try:
            yield
        finally:
            self.commit()
            self._counted = None

    def count_verdicts(self, judge: Any) -> None:
        """
        From now on adds to what is stored of the present preference, at every commit, and so with the labels, what a judge
        has said beside them.

        Args:
            judge (`Any`):
                May have `order_counts` and `unreadable`, as [`~trl_kd.preferences.judge.LLMJudge`] has them.
        """
        self.commit()
        agreed, judged = getattr(judge, "order_counts", (0, 0))
        share, number = self.orders() or (0.0, 0)
        # Stored shares are of whole numbers. A judge may have judged for others before
        self._judge, self._orders = judge, (round(share * number, 6) - agreed, number - judged)
        self._unreadable = self.unreadable()

    def orders(self) -> tuple[float, int] | None:
        """On what share of the comparisons in both orders a judge has agreed with itself, and how many these were; `None`
        without any."""
        known = self._noted(f"orders {self._preference.hex()}", is_share)
        return (known[0], known[1]) if known else None

    def unreadable(self) -> list[str]:
        """Up to three replies of a judge that could not be read."""
        return self._noted(f"unreadable {self._preference.hex()}", are_texts) or []

    def _before_commit(self) -> None:
        """Writes what was counted by now."""
        now = self._usage_now() | self._verdicts_now() | self._held_now()
        new = {name: value for name, value in now.items() if value != self._written.get(name)}
        if new:
            self._connection.executemany("INSERT OR REPLACE INTO settings VALUES (?, ?)", list(new.items()))
            self._written |= new

    def _rolled_back(self) -> None:
        self._written, self._kinds = {}, set()

    def _held_now(self) -> dict[str, str]:
        """Which kinds of rows there are, so that it is noticed where all of one are lost."""
        for kind in KINDS.keys() - self._kinds:
            if self._connection.execute(KINDS[kind]).fetchone():
                self._kinds.add(kind)
        return {HELD: json.dumps(sorted(self._kinds))} if self._kinds else {}

    def _usage_now(self) -> dict[str, str]:
        if self._counted is None:
            return {}
        name, usage, earlier = self._counted
        return {f"usage {name}": json.dumps(asdict(earlier + usage))}

    def _verdicts_now(self) -> dict[str, str]:
        if self._judge is None:
            return {}
        agreed, judged = map(sum, zip(self._orders, getattr(self._judge, "order_counts", (0, 0)), strict=True))
        replies = map(_well_formed, getattr(self._judge, "unreadable", ()))
        self._unreadable = list(dict.fromkeys([*self._unreadable, *replies]))[:3]
        now = {"orders": [agreed / judged, judged]} if judged else {}
        now |= {"unreadable": self._unreadable} if self._unreadable else {}
        return {f"{name} {self._preference.hex()}": json.dumps(value) for name, value in now.items()}

    def label_count(self) -> int:
        """How many labels or scores of the present preference are stored."""
        query = "SELECT COUNT(*) FROM labels WHERE preference = ?"
        with self._guard():
            return self._connection.execute(query, (self._preference,)).fetchone()[0]

    def null_labels(self) -> int:
        """How many labels of the present preference are null."""
        query = "SELECT COUNT(*) FROM labels WHERE preference = ? AND value IS NULL"
        with self._guard():
            return self._connection.execute(query, (self._preference,)).fetchone()[0]

    def _is_labelled_by(self, preference: Any) -> bool:
        """Whether a preference has said something that is kept: a label that is not null, or the pairs that a build has
        written, where labels are not stored."""
        query = "SELECT MAX(value IS NOT NULL) FROM labels WHERE preference = ?"
        with self._guard():
            (known,) = self._connection.execute(query, (self._key_of(preference),)).fetchone()
        return preference == self._written_preference() if known is None else bool(known)

    def add_answer(self, source: str, key: str, sample: int, answer: Answer) -> None:
        """Stores an answer for good. One that is there already stays: it may have been labelled."""
        self.add_answers(source, [(key, sample, answer)])

    def add_answers(
        self, source: str, answers: Iterable[tuple[str, int, Answer]], causes: Causes | None = None
    ) -> None:
        """Stores answers, each with its prompt's key and its sample's number, in one transaction: all of them or none. One
        without a text is kept with what it is due to, and another answer takes its place."""
        rows, nulls, texts = [], [], []
        for key, sample, answer in answers:
            text = _well_formed(json.dumps(answer.text, ensure_ascii=False))
            place = (source, bytes.fromhex(key), sample)
            rows.append((*place, text, answer.finish_reason, answer.tokens))
            if answer.text is None:
                nulls.append((*place, self._cause(source, answer.finish_reason, causes)))
            else:
                texts.append(place)
        self._write(
            (
                "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET text = excluded.text, "
                "finish_reason = excluded.finish_reason, tokens = excluded.tokens WHERE text = 'null'",
                rows,
            ),
            ("DELETE FROM nulls WHERE source = ? AND prompt = ? AND sample = ?", texts),
            ("INSERT OR REPLACE INTO nulls VALUES (?, ?, ?, ?)", nulls),
        )

    def _cause(self, source: str, finish_reason: str | None, causes: Causes | None) -> str:
        """What an answer without a text is due to today."""
        return as_cause(self._described.get(source), {} if causes is None else causes(finish_reason))

    def answers(self, source: str, keys: Sequence[str], samples: int) -> dict[str, dict[int, Answer]]:
        """The stored answers 0 … `samples` − 1 to each of the prompts named by `keys`, by sample."""
        found: dict[str, dict[int, Answer]] = {key: {} for key in keys}
        for rows in self._select(
            "prompt, sample, text, finish_reason, tokens", "answers WHERE source = ? AND sample < ? AND prompt",
            (source, samples), [bytes.fromhex(key) for key in found],
        ):  # fmt: skip
            for prompt, sample, *values in rows:
                found[prompt.hex()][sample] = self._values.answer(values, (source, prompt, sample))
        return found

    def missing(
        self, source: str, keys: Sequence[str], samples: int, causes: Causes | None = None
    ) -> dict[str, tuple[int, ...]]:
        """The numbers of the answers to ask for, for each prompt that lacks some: those that are not stored, and those
        without a text whose cause has changed since."""
        lacking = {key: set(range(samples)) for key in keys}
        where = "answers WHERE source = ? AND sample < ? AND prompt"
        keys_ = [bytes.fromhex(key) for key in lacking]
        for rows in self._select("prompt, sample", where, (source, samples), keys_):
            for prompt, sample in rows:
                lacking[prompt.hex()].discard(sample)
        for prompt, sample in self._stale(source, keys_, samples, causes):
            lacking[prompt.hex()].add(sample)
        return {key: tuple(sorted(numbers)) for key, numbers in lacking.items() if numbers}

    def _stale(
        self, source: str, keys: Sequence[bytes], samples: int, causes: Causes | None
    ) -> Iterator[tuple[bytes, int]]:
        """Answers without a text whose cause is not today's."""
        if source not in self._described:
            return
        columns = "prompt, sample, cause, (SELECT finish_reason FROM answers AS a WHERE a.source = n.source"
        columns += " AND a.prompt = n.prompt AND a.sample = n.sample)"
        for rows in self._select(
            columns, "nulls AS n WHERE source = ? AND sample < ? AND prompt", (source, samples), keys
        ):
            for prompt, sample, cause, finish_reason in rows:
                if self._values.cause(cause, (source, prompt, sample)) != self._cause(source, finish_reason, causes):
                    yield prompt, sample

    def labels(self, keys: Sequence[bytes]) -> dict[bytes, float | None]:
        """The stored labels or scores of the present preference, by key."""
        where = "labels WHERE preference = ? AND key"
        return {
            key: self._values.label(value, (self._preference, key))
            for rows in self._select("key, value", where, (self._preference,), keys)
            for key, value in rows
        }

    def add_labels(self, labels: dict[bytes, float | None]) -> None:
        """Stores labels or scores of the present preference."""
        rows = [(self._preference, key, value) for key, value in labels.items()]
        self._write(("INSERT OR REPLACE INTO labels VALUES (?, ?, ?)", rows))
        self.commit()

    def _select(self, columns: str, where: str, values: tuple, keys: Sequence[bytes]) -> Iterator[list[tuple]]:
        for start in range(0, len(keys), _AT_ONCE):
            some = keys[start : start + _AT_ONCE]
            query = f"SELECT {columns} FROM {where} IN ({','.join('?' * len(some))})"
            with self._guard():
                yield self._connection.execute(query, (*values, *some)).fetchall()


def _well_formed(text: str) -> str:
    """Text without half characters, which servers can send in JSON escapes and no file format takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _digest(description: Any) -> bytes:
    return hashlib.blake2b(json.dumps(description, sort_keys=True).encode(), digest_size=16).digest()
