"""D, the preferences that a reward model is held by: they grow, some are held out, and batches are drawn from the rest."""

import random
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_kd.pairs.dataset import PairWriter, load_pairs
from trl_kd.pairs.prompts import prompt_key
from trl_kd.responses.nulls import without_nulls
from trl_kd.sampling import Text
from trl_kd.trainers.common.held_out import MOST_HELD_OUT


KEPT = ("prompt", "chosen", "rejected", "preference", "teacher_side", "chosen_finish_reason", "rejected_finish_reason")


class PairPool:
    """
    Args:
        held_out (`float`):
            In [0, 1), share of the prompts whose pairs are held out. Which prompts these are depends on them alone: no pair
            of one that is held out is ever learnt from.
        seed (`int`):
            Seed of what is drawn.

    Attributes:
        rows (`list[dict]`):
            All pairs in the order in which they came.
        train, held_out (`list[int]`):
            Places of those with a known preference; of the pairs held out the newest [`MOST_HELD_OUT`].
        fresh (`list[int]`):
            Places of the training pairs that came last.
    """

    def __init__(self, held_out: float, seed: int):
        self._share = held_out
        self._random = random.Random(seed)
        self.rows: list[dict[str, Any]] = []
        self.train: list[int] = []
        self.held_out: list[int] = []
        self.fresh: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def strict(self) -> list[int]:
        """Places of the held-out pairs that are no ties."""
        return [i for i in self.held_out if self.rows[i]["preference"] != 0.5]

    def holds_out(self, prompt: Text) -> bool:
        """Whether a prompt's pairs are held out, or would be."""
        return int(prompt_key(without_nulls(prompt), {})[:8], 16) < self._share * 16**8

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Takes in new pairs, the columns [`KEPT`] of them."""
        self.fresh = []
        for row in rows:
            place = len(self.rows)
            # As they are read again from a dataset of rows whose messages differ in their fields
            self.rows.append({name: without_nulls(row.get(name)) for name in KEPT})
            if row["preference"] is None:
                continue
            if self.holds_out(row["prompt"]):
                self.held_out.append(place)
            else:
                self.train.append(place)
                self.fresh.append(place)
        del self.held_out[:-MOST_HELD_OUT]

    def draw(self, count: int, fresh_share: float) -> list[int]:
        """Places of at most `count` training pairs without repetition, a share of them among the fresh ones if there are so
        many."""
        first = self._random.sample(self.fresh, min(round(fresh_share * count), len(self.fresh)))
        taken = set(first)
        rest = self._random.sample(self.train, min(count, len(self.train)))
        return (first + [place for place in rest if place not in taken])[:count]

    # ---- On disk ---------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """As a dataset of pairs, for [`~trl_kd.pairs.load_pairs`]."""
        writer = PairWriter(folder)
        for start in range(0, len(self.rows), 1000):
            writer.write(self.rows[start : start + 1000])
        writer.close()

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """
        What was saved there, and `state_dict()` of then.

        Raises:
            `ValueError`: another share was held out then, so that pairs which are now would have been learnt from.
        """
        if state["held_out"] != self._share:
            raise ValueError(
                f"`rm_held_out` was {state['held_out']} in the checkpoint and is now {self._share}: pairs that have been "
                f"learnt from would be held out, or the reverse. Resume with `rm_held_out={state['held_out']}`, or begin "
                "anew with D as `preference_dataset`."
            )
        saved = list(load_pairs(folder).select_columns(list(KEPT))) if state["rows"] else []
        self.rows, self.train, self.held_out = [], [], []
        self.add(saved)
        self.fresh = self.train[len(self.train) - state["fresh"] :]
        version, internal, gauss = state["random"]
        self._random.setstate((version, tuple(internal), gauss))

    def state_dict(self) -> dict[str, Any]:
        """What the rows do not tell, as JSON."""
        return {
            "held_out": self._share,
            "rows": len(self.rows),
            "fresh": len(self.fresh),
            "random": self._random.getstate(),
        }


def as_rows(dataset: Dataset) -> list[dict[str, Any]]:
    """Rows of any preference dataset for a [`PairPool`]."""
    names = [name for name in KEPT if name in dataset.column_names]
    return list(dataset.select_columns(names))  # `to_list` of older releases leaves JSON as it is
