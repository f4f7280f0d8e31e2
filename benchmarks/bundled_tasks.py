"""The demo's comparison on the bundled tasks, several seeds each, with PbKD at its defaults, on clean and on wrong labels.

    python benchmarks/bundled_tasks.py

Every stage is kept under `runs/`, so that an interrupted run goes on where it stopped. The rows, their means and the leads
that matter are written to benchmarks/results/bundled_tasks.json after every seed.

The settings are those of `DemoSettings`. They, and the learning rates and β of DPO and DPO + sft, were chosen on validation
questions with other seeds (`imitation_ablations.py`); the numbers here are of test questions, which nothing was chosen on.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from trl_kd.demo.experiment import Cell, DemoSettings, fingerprint
from trl_kd.demo.methods import FLIPPED, METHODS, VERIFIED
from trl_kd.demo.progress import BarCallback, quiet_libraries
from trl_kd.demo.report import environment
from trl_kd.demo.stage import check_settings, write_json
from trl_kd.demo.table import LABEL_FREE
from trl_kd.demo.table import NAMES as DEMO_NAMES
from trl_kd.tasks import TASKS


Rows = list[dict[str, Any]]
Values = dict[tuple[str, str], dict[int, float]]  # of a task and a method, by seed
NAMES = {**DEMO_NAMES, **VERIFIED}
MEASURES = {  # what is measured, and whether with flipped labels
    **{measure: (measure, False) for measure in ("sampled", "best", "greedy")},
    **{f"{measure}, flipped labels": (measure, True) for measure in ("sampled", "best", "greedy")},
}
OF_LABELS = ("sft_chosen", "dpo_sft")
LEADS = {  # what is compared: the measure, and the rivals, of which the best on average counts
    "over SeqKD": ("sampled", ("seqkd",)),
    "over SeqKD with dft": ("sampled", ("seqkd_dft",)),
    "over DPO + sft": ("sampled", ("dpo_sft",)),
    "over SFT on chosen": ("sampled", ("sft_chosen",)),
    "flipped labels, over the best that reads labels": ("sampled, flipped labels", OF_LABELS),
    "flipped labels, over SeqKD with dft": ("sampled, flipped labels", ("seqkd_dft",)),
    "greedy, over the best": ("greedy", (*LABEL_FREE, *OF_LABELS)),
    "greedy, flipped labels, over the best": ("greedy, flipped labels", (*LABEL_FREE, *OF_LABELS)),
    "at the best temperature, over the best": ("best", (*LABEL_FREE, *OF_LABELS)),
}


def main() -> None:
    arguments = _arguments()
    quiet_libraries()
    rows: Rows = []
    for seed in arguments.seeds:
        for task in TASKS.values():
            started = time.monotonic()
            print(f"\n{task.name}, seed {seed}")
            rows += run(task, seed, arguments.cells / task.name, arguments.verified)
            print(f"  {time.monotonic() - started:.0f} s")
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            arguments.output,
            {
                "what": "exact match on unseen questions, in [0, 1]; PbKD at the defaults of PbKDConfig",
                "summary": summarise(rows),
                "rows": rows,
                "settings": asdict(DemoSettings()),
                "environment": environment(),
            },
        )
    print_summary(summarise(rows))
    print(f"\n{arguments.output}")


def run(task, seed: int, folder: Path, verified: bool) -> Rows:
    """The rows of one task and seed."""
    settings = DemoSettings()
    check_settings(folder, fingerprint(task, settings))
    # Pretraining is looked at more often than these curves are, or it would overshoot its goal
    results = Cell(task, seed, settings, folder / f"seed{seed}", BarCallback).run([])
    few = replace(settings, curve_every=settings.steps)
    clean, wrong = (Cell(task, seed, few, folder / f"seed{seed}", BarCallback, flipped) for flipped in (False, True))
    results |= clean.run([*METHODS, *(VERIFIED if verified else ())])
    pairs = results["pairs"] | {"equal and wrong": equal_and_wrong(clean.rows())}
    rows = [row(task.name, seed, method, False, results[method], pairs) for method in NAMES if method in results]
    found = wrong.run(FLIPPED)
    return rows + [row(task.name, seed, method, True, found[method], pairs) for method in FLIPPED]


def equal_and_wrong(rows: Rows) -> int:
    """Pairs in which teacher and student gave the same wrong answer."""
    return sum(row["chosen"] == row["rejected"] and row["score_chosen"] == 0 for row in rows)


def row(task: str, seed: int, method: str, flipped: bool, found: dict[str, Any], pairs: dict[str, Any]) -> dict:
    """One line of the results."""
    return {
        "task": task,
        "method": method,
        "flipped": flipped,
        "seed": seed,
        **{measure: round(found[measure], 5) for measure in ("sampled", "best", "greedy")},
        "temperature": found["temperature"],
        "questions": found["questions"],
        "steps": found["steps"],
        "pairs": pairs,
    }


def summarise(rows: Rows) -> dict[str, Any]:
    """Mean and standard deviation over seeds, by task and over the tasks, and PbKD's leads over its rivals."""
    tasks = list(dict.fromkeys(line["task"] for line in rows))
    found = {name: _values(rows, tasks, *how) for name, how in MEASURES.items()}
    summary: dict[str, Any] = {}
    for task in [*tasks, "mean of tasks"]:
        summary[task] = {
            name: {method: spread(values[task, method]) for method in NAMES if (task, method) in values}
            for name, values in found.items()
        }
        summary[task]["PbKD's lead in points / 100"] = {
            name: lead(found[measure], task, "pbkd", rivals) for name, (measure, rivals) in LEADS.items()
        }
    return summary


def _values(rows: Rows, tasks: list[str], measure: str, flipped: bool) -> Values:
    values: Values = defaultdict(dict)
    for line in rows:
        # What reads no labels is what it is on clean ones
        if line["flipped"] == flipped or (flipped and line["method"] in LABEL_FREE):
            values[line["task"], line["method"]][line["seed"]] = line[measure]
    for method in dict.fromkeys(method for _, method in list(values)):
        seeds = set.intersection(*(set(values[task, method]) for task in tasks))
        values["mean of tasks", method] = {
            seed: mean(values[task, method][seed] for task in tasks) for seed in sorted(seeds)
        }
    return values


def spread(values: dict[int, float]) -> list[float]:
    """Mean, and standard deviation over seeds (0 for one seed)."""
    found = list(values.values())
    return [round(mean(found), 4), round(stdev(found), 4) if len(found) > 1 else 0.0]


def lead(values: Values, task: str, method: str, rivals: Iterable[str]) -> list[Any]:
    """Mean and standard deviation over seeds of a method's lead over the rival that is better on average, and its name."""
    rival = max(rivals, key=lambda name: mean(values[task, name].values()))
    leads = {seed: value - values[task, rival][seed] for seed, value in values[task, method].items()}
    return [*spread(leads), rival]


def print_summary(summary: dict[str, Any]) -> None:
    for task, found in summary.items():
        print(f"\n{task}: exact match, mean ± standard deviation over seeds")
        print(f"  {'':<24}" + "".join(f"{measure:>24}" for measure in MEASURES))
        for method, name in NAMES.items():
            columns = [found[measure].get(method) for measure in MEASURES]
            told = [f"{100 * c[0]:.1f} ± {100 * c[1]:.1f}" if c else "–" for c in columns]
            print(f"  {name:<24}" + "".join(f"{cell:>24}" for cell in told))
        for name, (m, s, rival) in found["PbKD's lead in points / 100"].items():
            print(f"  PbKD's lead, {name} ({NAMES[rival]}): {100 * m:+.1f} ± {100 * s:.1f} points")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--verified", action="store_true", help="two more rows, which read the verifier's scores")
    parser.add_argument("--cells", type=Path, default=Path("runs/bundled_tasks"), help="where the stages are kept")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "bundled_tasks.json", help="results"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
