"""The demo's comparison on the bundled tasks, five seeds each, with PbKD at its defaults.

    python benchmarks/bundled_tasks.py

Every stage is kept under `runs/`, so that an interrupted run goes on where it stopped. The rows, their means and the
differences that matter are written to benchmarks/results/bundled_tasks.json after every seed.

The settings are those of `DemoSettings`. They were chosen on validation questions with other seeds; the numbers here are
of test questions, which nothing was chosen on.
"""

import argparse
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from trl_kd.scripts.demo import NAMES as DEMO_NAMES
from trl_kd.scripts.demo_experiment import Cell, DemoSettings, fingerprint
from trl_kd.scripts.demo_methods import METHODS, VERIFIED
from trl_kd.scripts.demo_quiet import BarCallback, quiet_libraries
from trl_kd.scripts.demo_report import environment
from trl_kd.scripts.demo_stage import check_settings, write_json
from trl_kd.tasks import TASKS


Rows = list[dict[str, Any]]
NAMES = {**DEMO_NAMES, **VERIFIED}


def main() -> None:
    arguments = _arguments()
    quiet_libraries()
    settings = DemoSettings()
    rows: Rows = []
    for seed in range(arguments.seeds):
        for task in TASKS.values():
            folder = arguments.cells / task.name
            check_settings(folder, fingerprint(task, settings))
            started = time.monotonic()
            print(f"\n{task.name}, seed {seed}")
            results = Cell(task, seed, settings, folder / f"seed{seed}", BarCallback).run([*METHODS, *VERIFIED])
            print(f"  {time.monotonic() - started:.0f} s")
            rows += [row(task.name, seed, method, results) for method in NAMES]
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            arguments.output,
            {
                "what": "exact match on unseen questions, in [0, 1]; PbKD at the defaults of PbKDConfig",
                "summary": summarise(rows),
                "rows": rows,
                "settings": asdict(settings),
                "environment": environment(),
            },
        )
    print_summary(summarise(rows))
    print(f"\n{arguments.output}")


def row(task: str, seed: int, method: str, results: dict[str, Any]) -> dict[str, Any]:
    """One line of the results."""
    found = results[method]
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "sampled": round(found["sampled"], 5),
        "greedy": round(found["greedy"], 5),
        "questions": found["questions"],
        "steps": found["steps"],
        "pairs": results["pairs"],
    }


def summarise(rows: Rows) -> dict[str, Any]:
    """Mean and standard deviation over seeds, by task and over the tasks, and PbKD's lead over its rivals."""
    sampled: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    greedy: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for line in rows:
        sampled[line["task"], line["method"]][line["seed"]] = line["sampled"]
        greedy[line["task"], line["method"]][line["seed"]] = line["greedy"]
    tasks = list(dict.fromkeys(line["task"] for line in rows))
    for measure in (sampled, greedy):
        for method in NAMES:
            seeds = measure[tasks[0], method]
            measure["mean of tasks", method] = {
                seed: mean(measure[task, method][seed] for task in tasks) for seed in seeds
            }
    return {
        task: {
            "sampled": {method: spread(sampled[task, method]) for method in NAMES},
            "greedy": {method: spread(greedy[task, method]) for method in NAMES},
            "lead": {
                "PbKD over the better of SeqKD and DPO": lead(sampled, task, "pbkd", ("seqkd", "dpo")),
                "PbKD over DPO + sft": lead(sampled, task, "pbkd", ("dpo_sft",)),
                "PbKD over SeqKD, both on verified answers": lead(sampled, task, "pbkd_verified", ("seqkd_verified",)),
                "PbKD on verified answers over DPO + sft": lead(sampled, task, "pbkd_verified", ("dpo_sft",)),
            },
        }
        for task in [*tasks, "mean of tasks"]
    }


def spread(values: dict[int, float]) -> list[float]:
    """Mean, and standard deviation over seeds (0 for one seed)."""
    found = list(values.values())
    return [round(mean(found), 4), round(stdev(found), 4) if len(found) > 1 else 0.0]


def lead(sampled, task: str, method: str, rivals: tuple[str, ...]) -> list[float]:
    """Mean and standard deviation over seeds of a method's lead over the rival that is better on average."""
    rival = max(rivals, key=lambda name: mean(sampled[task, name].values()))
    return spread({seed: value - sampled[task, rival][seed] for seed, value in sampled[task, method].items()})


def print_summary(summary: dict[str, Any]) -> None:
    for task, found in summary.items():
        print(f"\n{task}: sampled and greedy exact match, mean ± standard deviation over seeds")
        for method, name in NAMES.items():
            columns = [found[measure][method] for measure in ("sampled", "greedy")]
            print(f"  {name:<24}" + "".join(f"{100 * m:8.1f} ± {100 * s:.1f}" for m, s in columns))
        for rival, (m, s) in found["lead"].items():
            print(f"  {rival}: {100 * m:+.1f} ± {100 * s:.1f} points")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cells", type=Path, default=Path("runs/bundled_tasks"), help="where the stages are kept")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "bundled_tasks.json", help="results"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
