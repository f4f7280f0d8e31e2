"""Batches of the teacher's texts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trl_kd.responses.nulls import without_nulls
from trl_kd.responses.tokens import OWN
from trl_kd.trainers.common.response_rows import PairReader
from trl_kd.trainers.common.teacher_texts import IMAGES
from trl_kd.trainers.pbkd.data import ADVANTAGE, imitation_weights
from trl_kd.trainers.pbkd.tokens import IGNORED, only_teachers_text


@dataclass
class ImitationCollator:
    """
    Makes a batch of B texts of the teacher's with one of TRL's collators for `SFTTrainer`, and adds

    - `advantage`, `[B]`, float32, a(p, ζ), 0 where there is no text of the teacher's;
    - `weight`, `[B]`, float32, the row's weight in the loss: the same, since a text is one row;
    - `compared`, `[B]`, bool, whether the text was compared with another one.

    `labels`, `[B, T]`, are −100 but for the model's own tokens in the teacher's texts.

    Parameters:
        inner (`Callable`): TRL's collator.
        reader (`PairReader`, *optional*): Reads examples with images, which TRL's collator tokenizes.
    """

    inner: Callable[[list[dict[str, Any]]], dict[str, Any]]
    reader: PairReader | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        weights = imitation_weights(examples)
        if self.reader is None:
            batch = self.inner([{name: example[name] for name in ("input_ids", "labels")} for example in examples])
        else:
            batch = self._with_images(self.reader, examples)
        batch.update(weights)
        return batch

    def _with_images(self, reader: PairReader, examples: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [{**example, **only_teachers_text(example)} for example in examples]
        kinds = [reader.kinds_alone(row)[0] for row in rows]
        batch = self.inner([self._theirs(row) for row in rows])
        labels_BT = batch["labels"]
        for row, of_row in enumerate(kinds):
            if rows[row][ADVANTAGE] is None:
                labels_BT[row] = IGNORED
            elif of_row is not None:
                places = (labels_BT[row] != IGNORED).nonzero().squeeze(1)  # `max_length` may have taken some
                labels_BT[row, places[torch.tensor(of_row[: len(places)]) != OWN]] = IGNORED
        return batch

    @staticmethod
    def _theirs(row: dict[str, Any]) -> dict[str, Any]:
        kept = {column: row[column] for column in ("prompt", *IMAGES, "tools") if column in row}
        if "chat_template_kwargs" in row:
            kept["chat_template_kwargs"] = without_nulls(row["chat_template_kwargs"] or {})
        return kept | {"completion": row["chosen"]}
