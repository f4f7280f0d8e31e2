"""Answers that a dataset holds already."""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from trl_kd.responses.finish_reasons import check_finish_reason
from trl_kd.sampling.sampler import Answer, Request, as_counted


logger = logging.getLogger(__name__)


class ColumnSampler:
    """
    A column of the dataset as a [`Sampler`]: no model is loaded, and nothing is computed.

    A row holds one answer, plain text or messages, or a list of them, one for each sample. Where there is a null, or fewer
    than the samples asked for, the answer's `text` is `None`. Why they ended is read from the column
    `{column}_finish_reason`, where there is one.

    Args:
        column (`str`):
            Name of the column.

    Raises:
        `ValueError`: in `sample`, a row that lacks the column or holds something else there.

    Example:

    ```python
    >>> from trl_kd.sampling import Request
    >>> from trl_kd.sampling.column import ColumnSampler

    >>> request = Request("0", "2+2=", samples=(0, 1), columns={"answer": ["4", "5"]})
    >>> [answer.text for _, _, answer in ColumnSampler("answer").sample([request])]
    ['4', '5']
    ```
    """

    is_lookup = True

    def __init__(self, column: str):
        self.column = column
        self._warned = False

    def describe(self) -> dict[str, Any]:
        return {"sampler": "column", "column": self.column}

    def sample(self, requests: Iterable[Request]) -> Iterator[tuple[Request, int, Answer]]:
        for request in requests:
            try:
                value = request.columns[self.column]
            except KeyError:
                raise ValueError(
                    f"There is no column {self.column!r} to read answers from: beside the prompt there are "
                    f"{', '.join(map(repr, sorted(request.columns))) or 'none'}."
                ) from None
            texts = value if isinstance(value, list) and not _is_messages(value) else [value]
            wanted = max(request.samples, default=-1) + 1
            if len(texts) > wanted and not self._warned:
                self._warned = True
                logger.warning(
                    "The column %r has a row with %d answers, of which %d are used: ask for more samples "
                    "(`num_teacher_samples`, `num_student_samples`).",
                    self.column,
                    len(texts),
                    wanted,
                )
            reasons = request.columns.get(f"{self.column}_finish_reason")
            reasons = reasons if isinstance(reasons, list) else [reasons] * len(texts)
            for reason in reasons:
                check_finish_reason(reason, f"The column '{self.column}_finish_reason' holds a value that")
            for sample in request.samples:
                text = texts[sample] if sample < len(texts) else None
                if not (text is None or isinstance(text, str) or _is_messages(text)):
                    raise ValueError(
                        f"The column {self.column!r} holds {str(text)[:60]!r}: an answer is text, a list of messages with a "
                        "role each, or null."
                    )
                reason = reasons[sample] if sample < len(reasons) else None
                yield request, sample, as_counted(request.prompt, Answer(text, reason))


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)
