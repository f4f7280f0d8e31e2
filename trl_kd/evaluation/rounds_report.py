"""The report page of rounds: win rate, accuracy, λ and the size of D over the rounds, and the regret view."""

import json
import math
from pathlib import Path
from typing import Any

from trl_kd import __version__
from trl_kd.evaluation.charts import LineChart, Point, Series
from trl_kd.evaluation.report import Page, Section, Table, write_report
from trl_kd.trainers.rounds.folder import REPORT, has_preference_term


def write_rounds_report(output_dir: str | Path) -> Path:
    """
    Writes `rounds.html` into the folder of a [`~trl_kd.PbKDRounds`], from its `rounds.json`; also while they run.

    Args:
        output_dir (`str` or `Path`):
            The folder.

    Returns:
        `Path`: The page.

    Raises:
        `FileNotFoundError`: the folder has no `rounds.json`.
        `ImportError`: Jinja is not installed; the message names the extra.
    """
    folder = Path(output_dir)
    if not (folder / REPORT).is_file():
        raise FileNotFoundError(f"`{output_dir}` has no `{REPORT}`: it is not the folder of rounds.")
    path = folder / "rounds.html"
    write_report(path, make_page(json.loads((folder / REPORT).read_text(encoding="utf-8")), folder.resolve().name))
    return path


def make_page(told: dict[str, Any], name: str) -> Page:
    """
    Args:
        told (`dict[str, Any]`):
            What `rounds.json` holds.
        name (`str`):
            What the student is called.
    """
    settings = told["settings"]
    grown = "the pairs of all rounds so far" if settings["accumulate"] else "the pairs of that round alone"
    reference = "the start" if settings["reference"] == "start" else "the student of the round before"
    uses = f"; the reference is {reference}" if has_preference_term(settings) else ""
    ended = (told["final"] or {}).get("ended")
    return Page(
        title=f"Rounds of preference-based distillation: {name}",
        lead=[
            "Each round samples the student as it is, compares its answers with its teacher's, and trains it on the pairs.",
            f"It trains on {grown}{uses}. Numbers of a round are those of its beginning (win rate) and of its end (means "
            "over its second half).",
            *([ended] if ended else []),
        ],
        sections=[_results(told), _regret(told), _settings(settings)],
        footer=f"Made by trl-kd {__version__}.",
    )


def _results(told: dict[str, Any]) -> Section:
    rounds, final, prefers = told["rounds"], told["final"], has_preference_term(told["settings"])
    measured = [*rounds, *([final] if final is not None else [])]
    wins = [(record["round"], record["student_win_rate"]) for record in measured]
    known = [record for record in measured if record["teacher_preferred"] is not None]
    with_ties = [(record["round"], 1 - record["teacher_preferred"]) for record in known]
    level = [(1.0, 0.5), (float(max(len(measured), 2)), 0.5)]
    rates = [
        Series("student wins, equal answers counting half", _points(with_ties), 0),
        Series("student wins where the answers differ", _points(wins), 1),
        *([Series("accuracy", _logged(rounds, "accuracy"), 2)] if prefers else []),
        Series("as good as its teacher", level, 4, dashed=True),
    ]
    note = (
        "How often the student's answer is preferred to its teacher's, as it comes into the round; the last point is the "
        "student after all rounds, on prompts that the last one trained on."
    )
    if prefers:
        note += " Accuracy: of the training pairs, at each end."
    dual = Series("λ", _logged(rounds, "dual"), 0)
    charts = [
        LineChart("Against the teacher", "round", "share", rates, percent=True, note=note, whole=True),
        *([LineChart("λ, the weight of the preferences", "round", "λ", [dual], whole=True)] if prefers else []),
        LineChart(
            "Size of D", "round", "pairs", [Series("pairs trained on", _logged(rounds, "pairs"), 1)], whole=True
        ),
        _imitation(rounds, told["settings"]),
    ]
    return Section(title="Round by round", tables=[_table(rounds, final, prefers)], charts=charts)


def _imitation(rounds: list[dict[str, Any]], settings: dict[str, Any]) -> LineChart:
    """Rounds of before there was `imitation_q` have sums over an answer."""
    points = _logged(rounds, "imitation")
    if "imitation_q" not in settings:
        return LineChart("Imitation", "round", "nats per answer", [Series("−log π(answer)", points, 3)], whole=True)
    note = "It is smaller for a larger q, which rises over the rounds: it does not show how much was learnt."
    series = [Series("ℓ_q of the imitated answers", points, 3)]
    return LineChart("Imitation", "round", "ℓ_q per token", series, note=note, whole=True)


def _table(rounds: list[dict[str, Any]], final: dict[str, Any] | None, prefers: bool) -> Table:
    header = [
        "round",
        "prompts",
        "student wins where answers differ",
        "equal answers",
        "new pairs",
        "pairs in D",
        *(("accuracy", "λ") if prefers else ()),
        "mean advantage",
        "regret",
    ]
    lines = []
    for record in rounds:
        values = [
            f"{record['equal_answers']:,}",
            f"{record['new_pairs']:,}",
            f"{record['pairs']:,}",
            *((_percent(record.get("accuracy")), _number(record.get("dual"))) if prefers else ()),
        ]
        values += [_number(record.get("advantage")), _number(record["regret"])]
        lines.append([str(record["round"]), f"{record['prompts']:,}", _wins(record), *values])
    if final is not None:
        lines.append(
            [
                "after the last",
                f"{final['prompts']:,}",
                _wins(final),
                f"{final['equal_answers']:,}",
                *[""] * (len(header) - 4),
            ]
        )
    highlighted = len(lines) - 1 if final is not None else None
    caption = (
        "In small print: 95 % interval, clustered by prompt. Mean advantage: the mean weight of the teacher's answers in D "
        "that were compared with another answer, those of weight 0 among them."
    )
    return Table(header, lines, highlighted=highlighted, caption=caption)


def _regret(told: dict[str, Any]) -> Section:
    regrets, c = told["rounds"], told["regret_coefficient"]
    lines = [Series("cumulative regret", _logged(regrets, "regret"), 0)]
    if c is not None:
        steps = [1 + i * (len(regrets) - 1) / 40 for i in range(41)] if len(regrets) > 1 else [1.0]
        lines.append(Series(f"{c:.3g}·√k", [(k, c * math.sqrt(k)) for k in steps], 4, dashed=True))
    return Section(
        title="Regret",
        text=[
            "The sum over the rounds of P(teacher ≻ student) − ½, in which equal answers are ties. A student as good as its "
            "teacher adds nothing, a better one takes away. Theory bounds the regret of the online method by about √k. A "
            "curve that bends as the fitted c·√k does, or more, is what one hopes for; a straight one says that the rounds "
            "do not help.",
        ],
        charts=[LineChart("Cumulative regret", "round k", "regret", lines, whole=True)],
    )


def _settings(settings: dict[str, Any]) -> Section:
    ours = ["model", "teacher", "student", "preference", "prompts", "prompts_per_round", "accumulate", "reference"]
    ours += ["optimizer", "schedule", "num_teacher_samples", "num_student_samples", "peft_config"]
    trained = ["learning_rate", "lr_scheduler_type", "max_steps", "num_train_epochs", "per_device_train_batch_size"]
    trained += ["gradient_accumulation_steps", "imitation_weight", "imitation_radius", "imitation_q", "student_wins"]
    trained += ["dual_init", "dual_learning_rate", "beta", "seed"]
    rows = [[name, _told(settings.get(name))] for name in (*ours, *trained)]
    return Section(title="Settings", tables=[Table(["setting", "value"], rows, words=True)], folded=True)


def _told(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)


def _logged(records: list[dict[str, Any]], name: str) -> list[Point]:
    return _points([(record["round"], record.get(name)) for record in records])


def _points(values: list[tuple[int, float | None]]) -> list[Point]:
    return [(float(x), float(y)) for x, y in values if y is not None]


def _wins(record: dict[str, Any]) -> str:
    if record["student_win_rate"] is None:
        return "no known pair"
    low, high = record["teacher_win_interval"]
    return f"{_percent(record['student_win_rate'])}\n{_percent(1 - high)} to {_percent(1 - low)}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
