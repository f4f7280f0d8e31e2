"""Asking a source for what is not stored yet: which requests there are, and how answers come."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from datasets import Dataset, IterableDataset

from trl_kd.pairs.progress import Bar
from trl_kd.pairs.prompts import PromptRow, read_prompts
from trl_kd.pairs.store import AnswerStore, Causes
from trl_kd.responses.finish_reasons import ending
from trl_kd.sampling import Answer, Request, Sampler
from trl_kd.sampling.sampler import beginning
from trl_kd.sampling.server_errors import REFUSALS, ServerError


USELESS = 20
"""Replies without a usable text, one behind the other, that stop a run."""


class MissingRequests:
    """The requests for what is not stored of a source's answers, in the order of the prompts and each once, and which of
    them are still without an answer."""

    def __init__(
        self,
        prompts: Dataset | IterableDataset,
        shard: tuple[int, int] | None,
        store: AnswerStore,
        source: str,
        samples: int,
        bar: Bar,
        causes: Causes | None = None,
    ):
        self._prompts, self._shard, self._store, self._causes = prompts, shard, store, causes
        self._source, self._samples, self._bar = source, samples, bar
        self._under_way: dict[str, set[int]] = {}
        self._is_read = False

    def __iter__(self) -> Iterator[Request]:
        for rows in read_prompts(self._prompts, self._shard):
            # Under way first, stored second: an answer that arrives between the two is seen by the second
            fresh: dict[str, PromptRow] = {}
            for row in rows:
                if row.key not in self._under_way:
                    fresh.setdefault(row.key, row)
            missing = self._store.missing(self._source, list(fresh), self._samples, self._causes)
            self._under_way |= {key: set(samples) for key, samples in missing.items()}
            self._bar.skip(len(rows) * self._samples - sum(map(len, missing.values())))
            for key, samples in missing.items():
                self._store.check_space()  # what is under way is stored, and nothing else asked for
                yield Request(key, fresh[key].prompt, samples, fresh[key].columns)
        self._is_read = True

    def answered(self, key: str, sample: int) -> None:
        waiting = self._under_way.get(key, set())
        waiting.discard(sample)
        if not waiting:
            self._under_way.pop(key, None)

    def check(self) -> None:
        """Raises a `DiskFull` if the disk was full meanwhile, and a `RuntimeError` if the source ended before it had
        answered everything."""
        self._store.check_space()
        if self._under_way or not self._is_read:
            missing = sum(map(len, self._under_way.values()))
            raise RuntimeError(
                f"The {self._source} ended without {missing} of the answers that it was asked for. Those that came are "
                "stored: run the same command again for the rest."
            )


def together(
    sampler: Any, requests: Iterator[Request], source: str, has_texts: bool
) -> Iterator[list[tuple[Request, int, Answer]]]:
    """
    Answers as they arrive, in lists of those that are stored all or none.

    A server's first replies are held back as long as none has a text: a setting may be at fault, and nothing is stored then.

    Args:
        sampler (`Sampler`):
            Who is asked.
        requests (`Iterator[Request]`):
            What.
        source (`str`):
            Its name, for the error.
        has_texts (`bool`):
            Whether texts of it are stored: then only replies that broke off are held back, of which a server that is
            breaking down gives many in a row.

    Raises:
        `ServerError`: 20 replies in a row are of no use, or fewer where all are and no text is stored. The sentence shows
        one.
    """
    replies = getattr(sampler, "sample_replies", None)
    if not callable(replies):
        yield from ([answer] for answer in sampler.sample(requests))
        return
    held: list[list[tuple[Request, int, Answer]]] = []
    is_useful = has_texts
    try:
        for reply in replies(requests):
            kinds = {_kind(answer) for _, _, answer in reply}
            if kinds & {"text", "refusal"} or (has_texts and kinds != {"failed"}):
                yield from held
                held, has_texts, is_useful = [], has_texts or "text" in kinds, True
                yield reply
            else:
                held.append(reply)
            if len(held) == USELESS:
                break
    except Exception:
        # What broke off is asked for again
        yield from (reply for reply in held if any(_kind(answer) != "failed" for _, _, answer in reply))
        raise
    if len(held) == USELESS or (held and not is_useful):
        raise ServerError(_useless(held, source))
    yield from held


def _kind(answer: Answer) -> str:
    """What use an answer is: `"text"`, a `"refusal"` that is the last word on one prompt, `"failed"` or `"none"`."""
    if answer.text is not None:
        return "text"
    if answer.finish_reason in (*REFUSALS, "refusal", "bad_request"):
        return "refusal"
    return "failed" if ending(answer.finish_reason) == "failed" else "none"


def _useless(held: list[list[tuple[Request, int, Answer]]], source: str) -> str:
    request, _, answer = held[0][0]
    reasons = Counter(str(answer.finish_reason) for reply in held for _, _, answer in reply)
    counted = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
    longer = "" if "length" not in reasons else " Reasoning models need a larger `max_new_tokens`."
    return (
        f"{len(held)} replies to the {source} in a row have no usable text ({counted}), and none of them is stored. To the "
        f"prompt that begins {beginning(request.prompt)!r} the server said {answer.said or 'nothing'!r}: change the setting "
        f"that is at fault, and run the same command again.{longer}"
    )


def look_up(source: str, sampler: Sampler, samples: int, requests: list[Request]) -> list[list[Answer]]:
    """The answers of a source that reads them, to each of the requests, by sample."""
    given = list(sampler.sample(requests))
    if samples == 1 and [request for request, _, _ in given] == requests:  # in order, as most do: the fast way
        return [[answer] for _, _, answer in given]
    found: dict[str, dict[int, Answer]] = {request.key: {} for request in requests}
    for request, sample, answer in given:
        found[request.key][sample] = answer
    for answers in found.values():
        if len(answers) < samples:
            raise RuntimeError(f"The {source} gave {len(answers)} answers where {samples} were asked for.")
    return [[answers[sample] for sample in range(samples)] for answers in found.values()]
