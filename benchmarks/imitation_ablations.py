"""What each part of PbKD's loss does, on validation questions of seeds that no test uses: one setting is changed at a time.

    python benchmarks/imitation_ablations.py
    python benchmarks/imitation_ablations.py --prompts 500 --settings default radius_0 radius_0.05    # few pairs
    python benchmarks/imitation_ablations.py --rates     # and at which learning rate each method of the demo is best

Tasks: the two bundled ones, one in which ties are mostly both right, and one whose labels are drawn from a hidden score
(`imitation_tasks.py`). All settings make 600 updates of 32 rows from the same start. Every stage is kept under `runs/`, so
that an interrupted run goes on where it stopped. Results go to benchmarks/results/imitation_ablations.json and
learning_rates.json after every seed.
"""

import argparse
import math
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from bundled_tasks import spread
from imitation_tasks import EITHER_SEPARATOR, GRADED, SCALE

from trl_kd.demo.experiment import Cell, DemoSettings, fingerprint
from trl_kd.demo.methods import FLIPPED, METHODS, Recipe
from trl_kd.demo.progress import quiet_libraries
from trl_kd.demo.report import environment
from trl_kd.demo.stage import MARKER, check_settings, stage, write_json
from trl_kd.tasks import TASKS
from trl_kd.trainers.pbkd.data import ADVANTAGE, COMPARED
from trl_kd.trainers.pbkd.tokens import mean_advantage
from trl_kd.trainers.pbkd.trainer import PbKDTrainer


BASE = DemoSettings(curve_every=600, test_questions=500)
SIZES = {  # task: what differs from the demo
    **dict.fromkeys(TASKS.values(), BASE),
    EITHER_SEPARATOR: replace(BASE, teacher_accuracy=0.85, start_accuracy=0.7),
    GRADED: replace(BASE, teacher_accuracy=0.78, start_accuracy=0.66),
}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {  # name: (what readers see, fields of PbKDConfig)
    "default": ("default: ζ = 0.02, q rises to 0.5, equal texts 1, λ = 0", {}),
    "q_0": ("q = 0 (−log π)", {"imitation_q": 0.0}),
    "q_constant": ("q = 0.5 from the start", {"imitation_q_warmup": 0.0}),
    "q_0.7": ("q rises to 0.7", {"imitation_q": 0.7}),
    "q_1": ("q rises to 1", {"imitation_q": 1.0}),
    "radius_0": ("ζ = 0", {"imitation_radius": 0.0}),
    "radius_0.05": ("ζ = 0.05", {"imitation_radius": 0.05}),
    "radius_0.2": ("ζ = 0.2", {"imitation_radius": 0.2}),
    "radius_inf": ("ζ = ∞ (labels unused)", {"imitation_radius": math.inf}),
    "radius_0_q_0.7": ("ζ = 0, q rises to 0.7", {"imitation_radius": 0.0, "imitation_q": 0.7}),
    "radius_0_q_1": ("ζ = 0, q rises to 1", {"imitation_radius": 0.0, "imitation_q": 1.0}),
    "radius_0.05_q_1": ("ζ = 0.05, q rises to 1", {"imitation_radius": 0.05, "imitation_q": 1.0}),
    "equal_0": ("equal texts 0 (left out)", {}),
    "equal_0.3_radius_0": ("equal texts 0.3, ζ = 0", {"imitation_radius": 0.0}),
    "equal_0.6_radius_0": ("equal texts 0.6, ζ = 0", {"imitation_radius": 0.0}),
    "lambda_1": ("λ = 1", {"dual_init": 1.0}),
    "lambda_3": ("λ = 3", {"dual_init": 3.0}),
    "token": ("the teacher's distributions, KL(μ ‖ π)", {"imitation": "token"}),
    "token_q_0.5": ("the same, q rises to 0.5 (half KL, half TV)", {"imitation": "token", "imitation_q": 0.5}),
    "token_q_1": ("the same, q rises to 1 (TV)", {"imitation": "token", "imitation_q": 1.0}),
}
EQUAL = {"equal_0.3_radius_0": 0.3, "equal_0.6_radius_0": 0.6}
"""Weight of equal texts, which is no field of PbKDConfig."""
RATES = {
    **{method: [f"{method}:{rate:g}" for rate in (0.0003, 0.001, 0.003)] for method in METHODS},
    "dpo": [
        *("dpo:1e-06:0.1", "dpo:1e-05:0.1"),
        *(f"dpo:{rate:g}:{beta:g}" for beta in (1, 5, 20) for rate in (1e-5, 1e-4, 3e-4)),
    ],
    "dpo_sft": [f"dpo_sft:{rate:g}:{beta:g}" for beta in (0.1, 1) for rate in (0.0003, 0.001, 0.003)],
}
"""Method and learning rate, and β of DPO's."""
MEASURES = ("sampled", "best", "greedy")


class AblationCell(Cell):
    """PbKD with one setting changed, on the pairs of the first `prompts` questions, measured on validation questions."""

    prompts = BASE.prompts

    def rows(self) -> list[dict[str, Any]]:
        rows = super().rows()[: self.prompts]
        return draw_labels(rows, self.seed) if self.task is GRADED else rows

    def recipe(self, method: str, rows: list[dict[str, Any]]) -> Recipe:
        if method not in SETTINGS:
            name, _, beta = [*method.split(":"), "", ""][:3]
            found = super().recipe(name, rows)
            return found._replace(settings=found.settings | {"beta": float(beta)}) if beta else found
        if method == "equal_0":
            rows = [row for row in rows if row["chosen"] != row["rejected"]]
        found = super().recipe("pbkd", rows)
        settings = found.settings | SETTINGS[method][1]
        if settings.get("imitation") == "token":
            settings["teacher_model_name_or_path"] = str(self.model_folder("teacher"))
        return found._replace(settings=settings)

    def trainer(self, method: str, *args: Any, **kwargs: Any) -> Any:
        trainer = super().trainer(method, *args, **kwargs)
        if method in EQUAL:
            weigh_equal_texts(trainer, EQUAL[method])
        return trainer

    def learning_rate(self, method: str) -> float:
        return float(method.split(":")[1]) if ":" in method else super().learning_rate(method)

    def cell_folder(self, method: str) -> Path:
        few = "" if self.prompts == self.settings.prompts else f"_of_{self.prompts}"
        return self.stage_folder(method.replace(":", "_") + few)

    def measured(self, method: str) -> dict[str, Any]:
        """The row of one cell; `method` is a setting, or one of `RATES`."""
        return self.row(method, stage(self.cell_folder(method), partial(self._distil, method)))

    def row(self, method: str, found: dict[str, Any]) -> dict[str, Any]:
        values = {measure: round(found[measure], 5) for measure in MEASURES}
        names = {"task": self.task.name, "flipped": self.flipped, "setting": method, "seed": self.seed}
        return names | values | {"temperature": found["temperature"], "steps": found["steps"]}


def weigh_equal_texts(trainer: PbKDTrainer, weight: float) -> None:
    """Gives the teacher's texts that were only compared with themselves another weight than 1."""
    rows = trainer.train_dataset
    weights = [a if compared else weight * a for a, compared in zip(rows[ADVANTAGE], rows[COMPARED], strict=True)]
    kind = rows.features[ADVANTAGE]
    trainer.train_dataset = rows.remove_columns([ADVANTAGE]).add_column(ADVANTAGE, weights, feature=kind)
    trainer.mean_advantage = mean_advantage(trainer.train_dataset, trainer.args)


def draw_labels(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Bradley–Terry draws of the scores; equal texts keep their unknown label."""
    rng = random.Random(f"labels/{seed}")
    drawn = []
    for row in rows:
        p = 1 / (1 + math.exp((row["score_rejected"] - row["score_chosen"]) / SCALE))
        label = float(rng.random() < p)
        drawn.append(row if row["preference"] is None else row | {"preference": label})
    return drawn


def cells(arguments: argparse.Namespace) -> Iterable[AblationCell]:
    """Seed by seed, so that an early end leaves whole seeds; teachers and starts are made where they are missing."""
    for seed in arguments.seeds:
        for task, settings in SIZES.items():
            folder = arguments.cells / task.name
            cell = AblationCell(task, seed, settings, folder / f"seed{seed}", split="validation")
            cell.prompts = arguments.prompts
            is_made = (cell.stage_folder("pairs") / MARKER).is_file()
            if task.name not in arguments.tasks or (arguments.finished and not is_made):
                continue
            check_settings(folder, fingerprint(task, settings))
            # Pretraining is looked at more often than these curves are, or it would overshoot its goal
            often = replace(settings, curve_every=DemoSettings().curve_every)
            Cell(task, seed, often, cell.folder, split="validation").run([])
            yield cell


def is_finished(cell: AblationCell, method: str) -> bool:
    return (cell.cell_folder(method) / MARKER).is_file()


def ablations(arguments: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    for cell in cells(arguments):
        found = cell.run([])
        rows += [cell.row(name, found[name]) for name in ("teacher", "start")]
        rows += rows_of(cell, arguments.settings, arguments.finished)
        what = "share of right answers, or mean score, on validation questions, in [0, 1]: mean and standard deviation"
        seen = {"teacher": "teacher", "start": "student at the start"} | {k: v[0] for k, v in SETTINGS.items()}
        few = "" if arguments.prompts == BASE.prompts else f"_{arguments.prompts}"
        write(arguments.results / f"imitation_ablations{few}.json", what, rows, seen)


def rates(arguments: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    for clean in cells(arguments):
        flipped = AblationCell(clean.task, clean.seed, clean.settings, clean.folder, flipped=True, split="validation")
        for cell in (clean, flipped):
            methods = [name for name in arguments.methods if name in FLIPPED or not cell.flipped]
            asked = [name for method in methods for name in RATES[method]]
            rows += rows_of(cell, asked, arguments.finished)
        what = (
            "exact match on validation questions, in [0, 1], by method and learning rate: mean and standard deviation"
        )
        write(arguments.results / "learning_rates.json", what, rows, {})


def rows_of(cell: AblationCell, methods: Iterable[str], finished: bool) -> list[dict[str, Any]]:
    """The rows of a cell's methods, of those that are finished or of all."""
    rows = []
    for method in methods:
        if not finished or is_finished(cell, method):
            rows.append(cell.measured(method))
            print(*rows[-1].values(), flush=True)
    return rows


def write(path: Path, what: str, rows: list[dict[str, Any]], seen: dict[str, str]) -> None:
    content = {"what": what, "settings seen": seen, "summary": summarise(rows), "rows": rows}
    sizes = {task.name: asdict(settings) for task, settings in SIZES.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content | {"settings": sizes, "environment": environment()})


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By task and setting: mean and standard deviation over seeds, and of the difference to the default of the same seed, of
    `token_…` to `token`."""
    lines: dict[str, dict[str, dict[int, dict[str, Any]]]] = defaultdict(partial(defaultdict, dict))
    for row in rows:
        lines[row["task"] + (", flipped labels" if row["flipped"] else "")][row["setting"]][row["seed"]] = row
    summary: dict[str, Any] = {}
    for task, settings in lines.items():
        summary[task] = {}
        for name, seeds in settings.items():
            told: dict[str, Any] = {"seeds": len(seeds)}
            for measure in MEASURES:
                told[measure] = spread({seed: row[measure] for seed, row in seeds.items()})
                other = "token" if name.startswith("token_") else "default"
                theirs = settings.get(other, {})
                leads = {s: row[measure] - theirs[s][measure] for s, row in seeds.items() if s in theirs}
                if leads and name not in ("default", "teacher", "start"):
                    told[f"{measure}, difference to {other}"] = spread(leads)
            told["temperature"] = round(mean(row["temperature"] for row in seeds.values()), 2)
            summary[task][name] = told
    return summary


def main() -> None:
    arguments = _arguments()
    quiet_libraries()
    (rates if arguments.rates else ablations)(arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rates", action="store_true", help="learning rates of the demo's methods, on the bundled tasks"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102])
    parser.add_argument("--prompts", type=int, default=BASE.prompts, help="questions that settings learn from")
    parser.add_argument("--tasks", nargs="+", default=None, help="names of tasks")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--finished", action="store_true", help="write the results of finished cells, and run no others"
    )
    parser.add_argument("--cells", type=Path, default=Path("runs/imitation_ablations"), help="where stages are kept")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results", help="folder of the results"
    )
    arguments = parser.parse_args()
    if arguments.tasks is None:
        arguments.tasks = list(TASKS) if arguments.rates else [task.name for task in SIZES]
    return arguments


if __name__ == "__main__":
    main()
