"""What a set of pairs holds, counted row by row in bounded memory: counts, teacher win rate, lengths, warnings."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trl_kd.pairs.counting import DistinctCounter, Lengths, clustered_interval, wilson_interval
from trl_kd.responses.finish_reasons import KNOWN, ending
from trl_kd.responses.reasoning import answer_reasons
from trl_kd.sampling import Answer, Text


LENGTH_BIAS = 0.8
"""From this share of pairs on in which the longer (or the shorter) text is the chosen one, a warning is given."""

_TRUNCATED_SHARE = 0.1
_UNREADABLE_SHARE = 0.1
_REASON = "refused: "
_ORDER_AGREEMENT = 0.7
_KINDS = ("strict", "soft", "ties", "unknown")
_WINS = ("prompts", "rows", "won", "rows_squared", "won_squared", "rows_won")  # as in `clustered_interval`


def content_text(content: Any) -> str:
    """What a message's content says: text as it is, a list of parts as their texts, anything else as JSON."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, list):
        parts = (part if isinstance(part, dict) else {"type": "text", "text": str(part)} for part in content)
        return "\n".join(p["text"] if isinstance(p.get("text"), str) else f"[{p.get('type', 'part')}]" for p in parts)
    return json.dumps(content, ensure_ascii=False, default=str)


def whole_text(text: Text) -> str:
    """A text as it is; of messages, all their contents."""
    return text if isinstance(text, str) else "\n".join(content_text(message.get("content")) for message in text)


def text_length(text: Text) -> int:
    """Length in characters; of messages, of all their contents."""
    return len(text) if isinstance(text, str) else sum(len(content_text(message.get("content"))) for message in text)


class PairStatistics:
    """
    Statistics of pairs and of the answers they were made from, in memory that does not grow with their number.

    Rows of one prompt should come one after another, as a builder makes them: the interval of the teacher's win rate
    takes each run of rows with an equal prompt for one prompt. Statistics of disjoint sets of prompts can be merged, and
    are then those of one run over all of them.

    Example:

    ```python
    >>> from trl_kd.pairs import pair_row
    >>> from trl_kd.pairs.statistics import PairStatistics

    >>> statistics = PairStatistics()
    >>> statistics.add_rows([pair_row("1+1=", "2", "3", 1.0), pair_row("1+2=", "4", "3", 0.0)])
    >>> statistics.summary()["teacher_win_rate"]
    0.5
    ```
    """

    def __init__(self):
        self.prompts = DistinctCounter()
        self.answers: dict[str, Counter[str]] = {}
        self.pairs: Counter[str] = Counter()
        self.longer: Counter[str] = Counter()
        self.lengths = {"chosen": Lengths(), "rejected": Lengths()}
        self._wins = dict.fromkeys(_WINS, 0.0)
        # The prompt whose rows are coming in, how many of them say who won, and how much of that is the teacher's
        self._prompt: Any = None
        self._rows = 0
        self._won = 0.0

    def add_answers(self, source: str, answers: Iterable[Answer]) -> None:
        """Counts answers of a source, `"teacher"` or `"student"`."""
        counts = self.answers.setdefault(source, Counter())
        for answer in answers:
            counts["answers"] += 1
            # Where there is no text, the reason may be any word
            is_known = answer.text is not None or str(answer.finish_reason).lower() in KNOWN
            counts["truncated"] += is_known and ending(answer.finish_reason) == "cut"
            if answer.text is None:
                counts["refused"] += 1
                counts[f"{_REASON}{answer.finish_reason or 'null'}"] += 1
            else:
                counts["characters"] += text_length(answer.text)
                counts["with_reasoning"] += answer_reasons(answer.text)
                if answer.tokens is not None:
                    counts["with_tokens"] += 1
                    counts["tokens"] += answer.tokens

    def add_rows(self, rows: Iterable[dict[str, Any]]) -> None:
        """Counts rows of pairs: `prompt`, `chosen`, `rejected`, `preference`, and, where they have them, `teacher_side`,
        `chosen_source`, `rejected_source`, `chosen_finish_reason` and `rejected_finish_reason`."""
        kinds: list[str] = []
        longer: list[str] = []
        lengths: tuple[list[int], list[int]] = ([], [])
        for row in rows:
            prompt, chosen, rejected, preference = row["prompt"], row["chosen"], row["rejected"], row["preference"]
            if prompt != self._prompt:
                self._close_prompt()
                self._prompt = prompt
                self.prompts.add(prompt if isinstance(prompt, str) else repr(prompt))
            first = len(chosen) if isinstance(chosen, str) else text_length(chosen)
            second = len(rejected) if isinstance(rejected, str) else text_length(rejected)
            lengths[0].append(first)
            lengths[1].append(second)
            if "cut" in (ending(row.get("chosen_finish_reason")), ending(row.get("rejected_finish_reason"))):
                self.pairs["truncated"] += 1
            if preference is None or preference != preference:  # NaN is null
                kinds.append("unknown")
                continue
            if preference == 0.5:
                kinds.append("ties")
            else:
                kinds.append("strict" if preference == 1 else "soft")
                longer.append("longer" if first > second else "equal" if first == second else "shorter")
            side, source = row.get("teacher_side"), row.get("chosen_source")
            # Two answers of one source say nothing of teacher against student
            if side is not None and (source is None or source != row.get("rejected_source")):
                self._rows += 1
                self._won += preference if side == "chosen" else 1 - preference
        self.pairs.update(kinds)
        self.longer.update(longer)
        self.lengths["chosen"].add(lengths[0])
        self.lengths["rejected"].add(lengths[1])

    def _close_prompt(self) -> None:
        self._wins, self._rows, self._won = self._all_wins(), 0, 0.0

    def _all_wins(self) -> dict[str, float]:
        """The sums of [`clustered_interval`], with the prompt whose rows are coming in."""
        n, s = self._rows, self._won
        if not n:
            return self._wins
        return {k: self._wins[k] + v for k, v in zip(_WINS, (1, n, s, n * n, s * s, n * s), strict=True)}

    def merge(self, other: "PairStatistics") -> None:
        """Adds the statistics of other prompts."""
        self._close_prompt()
        self._prompt = None
        self._wins = {k: self._wins[k] + v for k, v in other._all_wins().items()}
        self.prompts.merge(other.prompts)
        for source, counts in other.answers.items():
            self.answers.setdefault(source, Counter()).update(counts)
        self.pairs.update(other.pairs)
        self.longer.update(other.longer)
        for side, lengths in other.lengths.items():
            self.lengths[side].merge(lengths)

    def summary(
        self,
        prompts: int | None = None,
        order_agreement: float | None = None,
        unparseable: int | None = None,
        usage: Mapping[str, dict[str, Any]] | None = None,
        judged: int | None = None,
        unreadable: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Everything counted so far, as JSON.

        Args:
            prompts (`int`, *optional*):
                Number of prompts asked, where the caller knows it. Otherwise the distinct prompts of the rows are
                counted, exactly up to 131,072 and within about 0.4 % beyond.
            order_agreement (`float`, *optional*):
                Share in [0, 1] of comparisons on which a judge says the same in both orders.
            unparseable (`int`, *optional*):
                Number of comparisons on which a judge gave no verdict that could be read.
            usage (`Mapping[str, dict]`, *optional*):
                What has been asked of `"teacher"`, `"student"` and `"judge"`, as [`~trl_kd.sampling.budget.Usage`] has it.
            judged (`int`, *optional*):
                Number of all comparisons that a judge was asked about.
            unreadable (`Sequence[str]`, *optional*):
                Some of the replies that could not be read, shortened.

        Returns:
            `dict[str, Any]`:
                - `prompts` (`int`), and `prompts_exact` (`bool`);
                - `answers`: for each source `answers`, `truncated`, `refused` (without a text), `reasons` (why, by finish
                  reason: `"null"` if not known), `with_reasoning` (with a reasoning block inside), and the
                  `mean_characters` and `mean_tokens` of those that came, `None` if not known;
                - `pairs`: `total`, `strict` (P = 1), `soft` (½ < P < 1), `ties` (P = ½), `unknown` (null), and
                  `truncated`, those in which either answer is;
                - `teacher_win_rate` (`float` or `None`): mean of P(teacher's ≻ student's) over the `teacher_pairs`
                  (`int`) where it is known, so that a tie counts half; `teacher_win_interval`, its two 95 % ends, see
                  [`clustered_interval`];
                - `lengths`: of `chosen` and `rejected` the `mean`, `p10`, `median` and `p90` in characters;
                - `longer_is_chosen`: over the strict and soft pairs (`pairs`), the `auc`: the share of pairs whose
                  chosen text has more characters than the rejected one, plus half the share of equal lengths. ½ if
                  length says nothing; 1 if the longer is always chosen, 0 if the shorter is;
                - `order_agreement`, `unparseable`, `judged`, `unreadable` and `usage`, as given;
                - `warnings` (`list[str]`).
        """
        answers = {source: _answer_summary(counts) for source, counts in sorted(self.answers.items(), reverse=True)}
        pairs = {kind: self.pairs[kind] for kind in _KINDS}
        wins = self._all_wins()
        decided = self.longer.total()
        summary = {
            "prompts": len(self.prompts) if prompts is None else prompts,
            "prompts_exact": prompts is not None or self.prompts.exact,
            "answers": answers,
            "pairs": {"total": sum(pairs.values()), **pairs, "truncated": self.pairs["truncated"]},
            "teacher_win_rate": wins["won"] / wins["rows"] if wins["rows"] else None,
            "teacher_win_interval": list(clustered_interval(wins)) if wins["rows"] else None,
            "teacher_pairs": int(wins["rows"]),
            "lengths": {side: lengths.summary() for side, lengths in self.lengths.items()},
            "longer_is_chosen": {
                "auc": (self.longer["longer"] + self.longer["equal"] / 2) / decided if decided else None,
                "pairs": decided,
            },
            "order_agreement": order_agreement,
            "unparseable": unparseable,
            "judged": judged,
            "unreadable": list(unreadable),
            "usage": dict(usage or {}),
        }
        return summary | {"warnings": _warnings(summary)}


def _answer_summary(counts: Counter[str]) -> dict[str, Any]:
    came = counts["answers"] - counts["refused"]
    return {
        "answers": counts["answers"],
        "truncated": counts["truncated"],
        "refused": counts["refused"],
        "reasons": {name.removeprefix(_REASON): count for name, count in counts.items() if name.startswith(_REASON)},
        "with_reasoning": counts["with_reasoning"],
        "mean_characters": counts["characters"] / came if came else None,
        "mean_tokens": counts["tokens"] / counts["with_tokens"] if counts["with_tokens"] else None,
    }


def _warnings(summary: dict[str, Any]) -> list[str]:
    warnings = []
    auc, decided = summary["longer_is_chosen"]["auc"], summary["longer_is_chosen"]["pairs"]
    if auc is not None and max(auc, 1 - auc) >= LENGTH_BIAS:
        low, high = wilson_interval(auc, decided)
        if not low <= 0.5 <= high:  # a handful of pairs is not enough to say so
            side = "longer" if auc > 0.5 else "shorter"
            warnings.append(
                f"Length alone predicts the label: the {side} text is the chosen one in {100 * max(auc, 1 - auc):.0f} % of "
                f"{decided:,} pairs, equal lengths counting half. A student may learn length instead of quality: look at "
                "the pairs, and compare texts of like length."
            )
    for source, counts in summary["answers"].items():
        if counts["truncated"] >= _TRUNCATED_SHARE * counts["answers"] > 0:
            warnings.append(
                f"{counts['truncated']:,} of {counts['answers']:,} answers of the {source} were cut off at the longest "
                "length allowed: raise `max_new_tokens`, or drop truncated answers."
            )
    pairs = summary["pairs"]
    if pairs["total"] and not pairs["strict"] and not pairs["soft"]:
        warnings.append("No pair has a winner: there is nothing that a preference loss could learn from.")
    agreement = summary["order_agreement"]
    if agreement is not None and agreement < _ORDER_AGREEMENT:
        warnings.append(
            f"The judge says the same in both orders for only {100 * agreement:.0f} % of the comparisons: it is swayed by "
            "position."
        )
    judged, unparseable = summary["judged"], summary["unparseable"]
    if judged and unparseable and unparseable > _UNREADABLE_SHARE * judged:
        shown = "; ".join(json.dumps(reply, ensure_ascii=False) for reply in summary["unreadable"])
        warnings.append(
            f"The judge gave no verdict that could be read on {unparseable:,} of {judged:,} comparisons, which have no "
            f"preference{f'. It said {shown}' if shown else ''}. Look at its template and at `judge_max_new_tokens`."
        )
    return warnings


def summary_table(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """A summary for people to read: rows of a name, a value, and what there is to say of it, or `""`."""
    pairs, prompts = summary["pairs"], summary["prompts"]
    table = [("prompts", f"{prompts:,}" if summary["prompts_exact"] else f"about {prompts:,}", "")]
    for source, counts in summary["answers"].items():
        said = [f"{counts['truncated']:,} truncated"] if counts["truncated"] else []
        if counts["refused"]:
            said.append(f"{counts['refused']:,} without a text{_because(counts['reasons'])}")
        if counts["with_reasoning"]:
            said.append(f"{counts['with_reasoning']:,} with reasoning inside")
        means = [(counts[f"mean_{unit}"], unit) for unit in ("characters", "tokens")]
        known = [f"{mean:,.0f} {unit}" for mean, unit in means if mean is not None]
        said += [f"on average {' and '.join(known)}"] if known else []
        table.append((f"answers of the {source}", f"{counts['answers']:,}", ", ".join(said)))
    table.append(("pairs", f"{pairs['total']:,}", ""))
    names = ("with a winner, P = 1", "with a soft label", "ties, P = ½", "unknown (null)", "with a truncated answer")
    for kind, name in zip((*_KINDS, "truncated"), names, strict=True):
        share = _percent(pairs[kind] / pairs["total"]) if pairs["total"] else ""
        table.append((f"· {name}", f"{pairs[kind]:,}", share))
    if summary["teacher_win_rate"] is not None:
        low, high = summary["teacher_win_interval"]
        trust = f"95 % interval {100 * low:.1f} to {100 * high:.1f}; {summary['teacher_pairs']:,} pairs, a tie counting half"
        table.append(("teacher wins", _percent(summary["teacher_win_rate"]), trust))
    for side, length in summary["lengths"].items():
        if length is not None:
            middle = f"median {length['median']:,.0f}, from {length['p10']:,.0f} (10 %) to {length['p90']:,.0f} (90 %)"
            table.append((f"characters of {side}", f"{length['mean']:,.0f} on average", middle))
    if summary["longer_is_chosen"]["auc"] is not None:
        longer = summary["longer_is_chosen"]
        table.append(
            ("the longer is chosen", f"AUC {longer['auc']:.2f}", f"0.5 is no bias; {longer['pairs']:,} pairs")
        )
    if summary["order_agreement"] is not None:
        table.append(("judge's two orders agree", _percent(summary["order_agreement"]), ""))
    if summary["unparseable"] is not None:
        table.append(("judge's unreadable replies", f"{summary['unparseable']:,}", ""))
    for name, used in summary["usage"].items():
        table.append((f"requests to the {name}", f"{used['requests']:,}", _used(used)))
    return table


def _because(reasons: dict[str, int]) -> str:
    """Why answers have no text, the most frequent reason first; nothing where no reason is known."""
    known = sorted(((count, reason) for reason, count in reasons.items() if reason != "null"), reverse=True)
    return f": {', '.join(f'{count:,} {reason}' for count, reason in known)}" if known else ""


def _used(used: dict[str, Any]) -> str:
    said = [f"{used['prompt_tokens']:,} prompt and {used['completion_tokens']:,} completion tokens"]
    if used["cost"]:
        said.append(f"cost {used['cost']:.6g}")
    for count, what in (("retries", "more attempts"), ("unreported", "answers without a count of tokens")):
        if used[count]:
            said.append(f"{used[count]:,} {what}")
    return ", ".join(said)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def format_summary(summary: dict[str, Any]) -> str:
    """A summary as a table for the terminal, its warnings beneath."""
    table = summary_table(summary)
    width = max(len(name) for name, _, _ in table)
    lines = [f"{name:<{width}}  {value}{f' ({detail})' if detail else ''}" for name, value, detail in table]
    return "\n".join([*lines, *(f"Warning: {warning}" for warning in summary["warnings"])])
