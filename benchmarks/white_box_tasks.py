"""White-box distillation on the bundled tasks, five seeds each: divergences, moment matching, and MM-PbKD at its defaults;
at equal updates and at equal processor time; and what becomes of MM-PbKD when its parts are changed.

    python benchmarks/white_box_tasks.py                # needs runs/bundled_tasks, else trains its teachers and starts anew
    python benchmarks/white_box_tasks.py --seeds 3 --ablations

Every cell (task, seed, method) is kept under `runs/`, so that an interrupted run goes on where it stopped. Teachers, starts
and pairs are those of `bundled_tasks.py`. The settings of MM-PbKD were chosen on validation questions of other seeds (100
and up); the numbers are of test questions, which nothing was chosen on. Equal time is by processor seconds a step of one
thread, generation and Q's steps included, measured in short runs of seed 0. Results go to
benchmarks/results/white_box_tasks.json and white_box_ablations.json.
"""

import argparse
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import DistillationTrainer

from trl_kd.demo.experiment import Cell, DemoSettings, fingerprint
from trl_kd.demo.methods import Recipe
from trl_kd.demo.progress import quiet_libraries
from trl_kd.demo.report import environment
from trl_kd.demo.stage import check_settings, stage, write_json
from trl_kd.tasks import TASKS
from trl_kd.trainers.mm_pbkd.trainer import MMPbKDTrainer


SKEW = 0.1


class SkewedKLTrainer(DistillationTrainer):
    """On-policy skewed forward KL, KL(μ ‖ α·μ + (1 − α)·π) with α = 0.1, as in DistiLLM (arXiv 2402.03898), without its
    schedule of who generates. In plain torch: the vocabulary has some ten words."""

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        at = slice(inputs["prompt_ids"].size(1) - 1, -1)
        log_pi = unwrapped_student(input_ids=ids, attention_mask=mask).logits[:, at].log_softmax(-1)
        with torch.no_grad():
            log_mu = self.teacher_model(input_ids=ids, attention_mask=mask).logits[:, at].log_softmax(-1)
        pi, mu = log_pi.exp(), log_mu.exp()
        kept = inputs["completion_mask"]
        skewed = (mu * (log_mu - torch.log(SKEW * mu + (1 - SKEW) * pi))).sum(-1) * kept
        entropy = -(pi * log_pi).sum(-1) * kept
        tokens = kept.sum()
        return skewed.sum() / (num_items_in_batch or tokens), entropy.sum().detach(), tokens


class FrozenRandomQ(MMPbKDTrainer):
    """Q is drawn at random, with a standard deviation of about 1, and stays as it is."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        with torch.no_grad():
            self.adversary.q.outputs.normal_(generator=torch.Generator().manual_seed(self.args.seed))


METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {  # name: (what readers see, the demo's method, settings)
    "reverse_kl": ("On-policy reverse KL", "reverse_kl", {}),
    "skewed_kl": ("On-policy skewed KL (DistiLLM's)", "reverse_kl", {}),
    "forward_kl": ("Forward KL on the teacher's states", "forward_kl", {}),
    "mm": ("MM, no preferences", "mm", {}),
    "mm_pbkd": ("MM-PbKD", "mm_pbkd", {}),
    "mm_off_policy": ("MM, no preferences, teacher's states", "mm", {"lmbda": 0.0}),
    "mm_pbkd_off_policy": ("MM-PbKD, teacher's states", "mm_pbkd", {"lmbda": 0.0}),
}
SAME_TIME = {  # name: (what readers see, the method)
    "forward_kl_time": ("Forward KL, as long as MM-PbKD takes", "forward_kl"),
    "reverse_kl_time": ("On-policy reverse KL, as long as MM-PbKD takes", "reverse_kl"),
    "mm_pbkd_off_policy_time": ("MM-PbKD, teacher's states, as long", "mm_pbkd_off_policy"),
}
TIMED = ("mm_pbkd", *(base for _, base in SAME_TIME.values()))
CALIBRATION_STEPS = 60
FIXED = {"dual_learning_rate": 0.0, "dual_max": 100.0}
ABLATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mm_pbkd": ("MM-PbKD", "mm_pbkd", {}),
    **{f"lambda_{x:g}": (f"λ = {x:g}, fixed", "mm_pbkd", FIXED | {"dual_init": x}) for x in (0.0, 0.1, 1.0, 10.0)},
    **{f"tau_{x:g}": (f"τ = {x:g}", "mm_pbkd", {"kl_coef": x}) for x in (0.3, 3.0)},
    "lmbda_0.5": ("half of the states on-policy", "mm_pbkd", {"lmbda": 0.5}),
    "q_frozen": ("Q random and frozen", "mm_pbkd", {"q_learning_rate": 0.0, "q_warmup_steps": 0}),
    "shuffled": ("preferences shuffled", "mm_pbkd", {}),
    "mle": ("ζ = 0: the maximum-likelihood Q", "mm_pbkd", {"confidence_radius": 0.0}),
}
ALL = METHODS | ABLATIONS


class WhiteBoxCell(Cell):
    """With the methods of this file; those of equal time have as many steps as their name says after the colon."""

    def recipe(self, method: str, rows: list[dict[str, Any]]) -> Recipe:
        name, _, steps = method.partition(":")
        _, base, settings = ALL[SAME_TIME[name][1] if steps else name]
        if steps:
            settings = settings | {"max_steps": int(steps)}
        found = super().recipe(base, rows)
        if name == "skewed_kl":
            found = found._replace(trainer=SkewedKLTrainer)
        if name == "q_frozen":
            found = found._replace(trainer=FrozenRandomQ)
        if name == "shuffled":
            found.arguments["preference_dataset"] = shuffled(found.arguments["preference_dataset"], self.seed)
        return found._replace(settings=found.settings | settings)


def shuffled(pairs: Dataset, seed: int) -> Dataset:
    """Preferences that say nothing: chosen and rejected change places by the toss of a coin."""
    rng = random.Random(seed)
    rows = pairs.to_list()
    for row in rows:
        if rng.random() < 0.5:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return Dataset.from_list(rows)


class StepClock(TrainerCallback):
    """Processor time of each step, generation and Q's steps included, evaluations not."""

    def __init__(self):
        self.steps: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(time.process_time() - self.started)


def seconds_of(cell: WhiteBoxCell, methods: Iterable[str], folder: Path) -> dict[str, list[float]]:
    """Processor seconds of each method's first step, where Q warms up, and of its median step: short runs, twice in turn."""

    def measure(folder: Path) -> dict[str, list[float]]:
        found = defaultdict(list)
        for _ in range(2):
            for method in methods:
                clock = StepClock()
                with tempfile.TemporaryDirectory() as scratch:
                    cell.trainer(method, Path(scratch), max_steps=CALIBRATION_STEPS, callbacks=[clock]).train()
                found[method].append([clock.steps[0], median(clock.steps[1:])])
        return {
            method: [round(median(column), 5) for column in zip(*runs, strict=True)] for method, runs in found.items()
        }

    return stage(folder, measure)


def distil(cell: WhiteBoxCell, cells: Path, method: str, steps: int | None = None) -> dict[str, Any]:
    """The row of one cell."""
    folder = cells / cell.task.name / f"seed{cell.seed}" / (f"{method}_{steps}" if steps else method)
    found = stage(folder, partial(cell._distil, f"{method}:{steps}" if steps else method))
    made = row(cell.task.name, cell.seed, method, found)
    print(*made.values(), flush=True)
    return made


def row(task: str, seed: int, method: str, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "task": task,
        "method": method,
        "seed": seed,
        "sampled": round(found["sampled"], 5),
        "greedy": round(found["greedy"], 5),
        "steps": found["steps"],
    }


def main() -> None:
    arguments = _arguments()
    quiet_libraries()
    torch.set_num_threads(1)
    settings = DemoSettings(curve_every=600)
    rows: list[dict[str, Any]] = []
    seconds = {}
    for task in (TASKS[name] for name in arguments.tasks if not arguments.ablations):
        folder = arguments.bundled / task.name / "seed0"
        Cell(task, 0, DemoSettings(), folder).run([])
        cell = WhiteBoxCell(task, 0, settings, folder)
        seconds[task.name] = seconds_of(cell, TIMED, arguments.cells / task.name / "seconds")
    for seed in range(arguments.seeds):
        for task in (TASKS[name] for name in arguments.tasks):
            shared = arguments.bundled / task.name
            check_settings(shared, fingerprint(task, DemoSettings()))
            # Pretraining is looked at more often than these curves are, or it would overshoot its goal
            results = Cell(task, seed, DemoSettings(), shared / f"seed{seed}").run([])
            cell = WhiteBoxCell(task, seed, settings, shared / f"seed{seed}")
            rows += [row(task.name, seed, name, results[name]) for name in ("teacher", "start")]
            for method in METHODS if not arguments.ablations else ABLATIONS:
                rows.append(distil(cell, arguments.cells, method))
            for name, (_, base) in SAME_TIME.items() if not arguments.ablations else ():
                first, other = seconds[task.name]["mm_pbkd"]
                budget = first + (settings.steps - 1) * other
                first, other = seconds[task.name][base]
                rows.append(distil(cell, arguments.cells, name, round((budget - first) / other + 1)))
            write(arguments.output, rows, settings, seconds)
    print_summary(summarise(rows))


def write(path: Path, rows: list[dict[str, Any]], settings: DemoSettings, seconds: dict[str, Any]) -> None:
    write_json(
        path,
        {
            "what": "exact match on unseen questions, in [0, 1]: mean and standard deviation over seeds",
            "summary": summarise(rows),
            "rows": rows,
            "processor seconds of the first and of the median step": seconds,
            "settings": asdict(settings),
            "environment": environment(),
        },
    )


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By task and method: mean and standard deviation of sampled and greedy exact match, and of MM-PbKD's lead."""
    found: dict[str, dict[str, dict[int, dict[str, Any]]]] = defaultdict(partial(defaultdict, dict))
    for line in rows:
        found[line["task"]][line["method"]][line["seed"]] = line
    summary = {}
    for task, methods in found.items():
        summary[task] = {
            method: {measure: spread([line[measure] for line in seeds.values()]) for measure in ("sampled", "greedy")}
            | {"steps": spread([line["steps"] for line in seeds.values()])}
            for method, seeds in methods.items()
        }
        ours = methods.get("mm_pbkd", {})
        for method, seeds in methods.items():
            if method != "mm_pbkd" and ours:
                leads = [ours[seed]["sampled"] - line["sampled"] for seed, line in seeds.items() if seed in ours]
                summary[task][method]["lead of MM-PbKD"] = spread(leads)
    return summary


def spread(values: list[float]) -> list[float]:
    return [round(mean(values), 4), round(stdev(values), 4) if len(values) > 1 else 0.0]


def print_summary(summary: dict[str, Any]) -> None:
    names = {"teacher": "Teacher", "start": "Student, start"} | {k: v[0] for k, v in (ALL | SAME_TIME).items()}
    for task, methods in summary.items():
        print(f"\n{task}: sampled and greedy exact match, mean ± standard deviation over seeds; MM-PbKD's lead")
        for method, values in methods.items():
            cells = [f"{100 * m:6.1f} ± {100 * s:4.1f}" for m, s in (values[key] for key in ("sampled", "greedy"))]
            lead = values.get("lead of MM-PbKD")
            print(f"  {names[method]:<48}", *cells, f"{100 * lead[0]:+6.1f} ± {100 * lead[1]:.1f}" if lead else "")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--ablations", action="store_true", help="the changed forms of MM-PbKD in place of the rivals")
    parser.add_argument("--bundled", type=Path, default=Path("runs/bundled_tasks"), help="teachers, starts and pairs")
    parser.add_argument("--cells", type=Path, default=Path("runs/white_box_tasks"), help="where cells are kept")
    parser.add_argument("--output", type=Path, default=None, help="results")
    arguments = parser.parse_args()
    if arguments.output is None:
        name = "white_box_ablations.json" if arguments.ablations else "white_box_tasks.json"
        arguments.output = Path(__file__).parent / "results" / name
    return arguments


if __name__ == "__main__":
    main()
