"""Online distillation on the bundled tasks, five seeds each: rounds, a reward model that the student climbs, and what they
are to be held against: PbKD offline, RLOO on the true reward, a discriminator.

    python benchmarks/online_tasks.py                # needs runs/bundled_tasks, else trains its teachers and starts anew
    python benchmarks/online_tasks.py --prompts 500  # a quarter of the teacher's answers

Every method makes the same number of updates of as many rows (imitation's come on top, 16 a step, and the reward model's own
steps), from the same start, with one answer of the teacher to each of the same prompts, labelled by the task's verifier. So
at a given `--prompts` they are equal in updates and in teacher's answers. They are not equal in how often the student is
sampled, and so in pairs, which the rows tell: beside rounds stands offline PbKD with as many pairs as they have in the end,
all of the start's answers. Nor are they equal in what they know: reward model and discriminator start from the teacher's
weights. Offline PbKD has the demo's settings, rounds too, with the schedule that did best on validation questions of another
seed, and the others what did best there. The reward model that is climbed has its warm-up once for a task and seed, and all
methods that climb one start from it and its pairs; where it does not get there, their rows say so. Every cell (task, seed,
method) is kept under `runs/`, so that an interrupted run goes on where it stopped, and rows of the results that were made of
the same teacher and start with the same settings are kept too. Numbers are of test questions, on which nothing was chosen.
Results go to benchmarks/results/online_tasks.json.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from imitation_ablations import SIZES, draw_labels
from imitation_tasks import GRADED, DrawnPreference
from transformers import PrinterCallback
from white_box_tasks import spread

from trl_kd import OnlinePbKDConfig, OnlinePbKDTrainer, PbKDConfig, PbKDRounds, PbKDTrainer
from trl_kd.demo.experiment import Cell, DemoSettings, columns, fingerprint, load
from trl_kd.demo.methods import Recipe
from trl_kd.demo.progress import quiet_libraries
from trl_kd.demo.report import environment
from trl_kd.demo.stage import check_settings, stage, write_json
from trl_kd.pairs import build_pairs, load_pairs
from trl_kd.preferences.reward_function import RewardFunctionPreference
from trl_kd.sampling import SamplingSettings
from trl_kd.sampling.local import LocalSampler
from trl_kd.tasks import TASKS, Task
from trl_kd.trainers.online_pbkd.learner import PAIRS, WarmUpFailed
from trl_kd.trainers.online_pbkd.trainer import COMPANIONS


ROUNDS = 6
NO_IMITATION = {"imitation_weight": 0.0}
ONLINE: dict[str, tuple[str, dict[str, Any]]] = {  # name: (what readers see, settings)
    "online_mle": ("Online, MLE head (ζ = 0)", {"confidence_radius": 0.0} | NO_IMITATION),
    "online_0.02": ("Online PbKD, ζ = 0.02", {"confidence_radius": 0.02} | NO_IMITATION),
    "online_0.05": ("Online PbKD, ζ = 0.05", {"confidence_radius": 0.05} | NO_IMITATION),
    "online_0.2": ("Online PbKD, ζ = 0.2", {"confidence_radius": 0.2} | NO_IMITATION),
    "online_1": ("Online PbKD, ζ = 1", {"confidence_radius": 1.0} | NO_IMITATION),
    "online_mle_imitation": ("Online, MLE head, imitation", {"confidence_radius": 0.0}),
    "online_0.05_imitation": ("Online PbKD, ζ = 0.05, imitation", {"confidence_radius": 0.05}),
    "discriminator": ("Discriminator (GAD-like)", {"adversary": "discriminator"} | NO_IMITATION),
    "rloo": ("RLOO on the true reward (ceiling)", {"adversary": "off", "beta": 0.01} | NO_IMITATION),
    "rloo_imitation": ("RLOO on the true reward, imitation", {"adversary": "off", "beta": 0.01}),
}
WITHOUT_PREFERENCES = {"dual_init": 0.0}
PREFERENCE_TERM = {"dual_init": 3.0}
GATED = WITHOUT_PREFERENCES | {"student_wins": "gated"}
IMPLICIT: dict[str, tuple[str, dict[str, Any]]] = {  # settings of the training, and of rounds
    "pbkd": ("PbKD, offline", WITHOUT_PREFERENCES),
    "pbkd_6": ("PbKD, offline, six answers of the start to each prompt", WITHOUT_PREFERENCES),
    "pbkd_6_gated": ("PbKD, offline, six answers, the student's wins too", GATED),
    "rounds": ("PbKD in rounds, pairs accumulate", WITHOUT_PREFERENCES),
    "rounds_gated": ("PbKD in rounds, pairs accumulate, the student's wins too", GATED),
    "rounds_fresh": ("PbKD in rounds, a fresh optimizer in each", WITHOUT_PREFERENCES | {"optimizer": "fresh"}),
    "rounds_newest": ("PbKD in rounds, newest pairs", WITHOUT_PREFERENCES | {"accumulate": False}),
    "pbkd_lambda_3": ("PbKD, offline, λ = 3", PREFERENCE_TERM),
    "rounds_lambda_3": ("PbKD in rounds, λ = 3", PREFERENCE_TERM),
}
READ = ("prompt", "chosen", "rejected", "preference", "teacher_side", "student_count")
OF_ROUNDS = ("optimizer", "accumulate")
METHODS = {name: seen for name, (seen, _) in (IMPLICIT | ONLINE).items()}
LEADS = {"pbkd": "offline PbKD", "pbkd_6": "offline PbKD, six answers", "rounds": "rounds", "rloo": "RLOO"}
OF_ONLINE = {  # found on validation questions of another seed
    "per_device_train_batch_size": 64,  # answers: as many as 32 pairs have
    "num_generations": 4,
    "learning_rate": 3e-4,
    "beta": 0.3,
    "imitation_weight": 4.0,
    "rm_lora_r": 0,
}
ALL_TASKS = {**TASKS, GRADED.name: GRADED}
RM_LEARNING_RATE = {"running_sums": 1e-3, "addition": 3e-4}  # at the other's neither warm-up ends in time
WARM_UP = {"adversary": "mle", "rm_warmup_accuracy": 0.8, "rm_warmup_steps": 4000, "rm_warmup_epochs": 40}


class OnlineCell(Cell):
    """With the methods of this file, on the first `prompts` questions; `cells` is where what they leave is kept."""

    prompts = 2000
    cells: Path

    def questions(self) -> Dataset:
        found = columns(self.task.questions("train", self.settings.prompts, self.seed))
        return Dataset.from_dict(found).select(range(self.prompts))

    def preference(self) -> RewardFunctionPreference:
        return DrawnPreference() if self.task is GRADED else RewardFunctionPreference(self.task.score)

    def rows(self) -> list[dict[str, Any]]:
        rows = super().rows()[: self.prompts]
        return draw_labels(rows, self.seed) if self.task is GRADED else rows

    def teacher(self) -> LocalSampler:
        settings = SamplingSettings(
            max_new_tokens=self.task.max_response_tokens, seed=10 * self.seed
        )  # as of the pairs
        return LocalSampler(str(self.model_folder("teacher")), settings)

    def start(self) -> SamplingSettings:
        return SamplingSettings(
            max_new_tokens=self.task.max_response_tokens, seed=10 * self.seed + 1
        )  # as of the pairs

    def more_pairs(self) -> list[dict[str, Any]]:
        """As many as rounds have, all with answers of the start."""
        folder = self.cells / "pairs_6"
        build_pairs(
            self.questions(),
            teacher=self.teacher(),
            student=LocalSampler(str(self.model_folder("start")), self.start()),
            preference=self.preference(),
            output_dir=folder,
            num_student_samples=ROUNDS,
            show_progress=False,
        )
        return load_pairs(folder).to_list()

    def recipe(self, method: str, rows: list[dict[str, Any]]) -> Recipe:
        if method in IMPLICIT:
            pairs = self.more_pairs() if method.startswith("pbkd_6") else rows
            data = Dataset.from_list([{name: pair.get(name) for name in READ} for pair in pairs])
            return Recipe(PbKDTrainer, PbKDConfig, data, {"max_length": 128} | IMPLICIT[method][1], {})
        if method not in (*ONLINE, "reward_model"):
            return super().recipe(method, rows)
        own = WARM_UP if method == "reward_model" else ONLINE[method][1]
        settings = {"max_completion_length": self.task.max_response_tokens, **OF_ONLINE, **own}
        settings["rm_learning_rate"] = RM_LEARNING_RATE[self.task.name]
        if method.startswith("rloo"):
            arguments: dict[str, Any] = {"reward_funcs": self.task.score}
            arguments["teacher"] = self.teacher() if method == "rloo_imitation" else None
        else:
            arguments = {"teacher": self.teacher(), "preference_function": self.preference()}
            arguments["reward_model"] = str(self.model_folder("teacher"))
            if method.startswith("online"):
                warm = self.cells / "reward_model"
                failed = stage(warm, self._warm_up).get("failed")
                if failed:
                    raise WarmUpFailed(failed)
                arguments["reward_model"] = str(warm / COMPANIONS / "reward_model")
                arguments["preference_dataset"] = load_pairs(warm / COMPANIONS / PAIRS)
        return Recipe(OnlinePbKDTrainer, OnlinePbKDConfig, self.questions(), settings, arguments)

    def distil(self, method: str, folder: Path) -> dict[str, Any]:
        if method.startswith("rounds"):
            return self._rounds(folder, IMPLICIT[method][1])
        try:
            trainer = self.trainer(method, folder)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        except WarmUpFailed as failed:
            return {"failed": str(failed)}
        tested = self._test(trainer.model, trainer.processing_class)
        learner = getattr(trainer, "learner", None)
        pairs = ROUNDS * self.prompts if method.startswith("pbkd_6") else self.prompts if method in IMPLICIT else None
        tested |= {"pairs": pairs if learner is None else len(learner.pool)}
        return tested | {"steps": trainer.state.global_step, "log": trainer.state.log_history}

    def _warm_up(self, folder: Path) -> dict[str, Any]:
        """A reward model that has learnt from comparisons of the start, which itself does not move."""
        trainer = self.trainer("reward_model", folder, learning_rate=0.0, max_steps=1)
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
        except WarmUpFailed as failed:
            return {"failed": str(failed)}
        trainer.save_model(str(folder))
        return {"log": trainer.state.log_history}

    def _rounds(self, folder: Path, changed: dict[str, Any]) -> dict[str, Any]:
        settings = self.settings
        with tempfile.TemporaryDirectory() as scratch:
            args = self._arguments(
                PbKDConfig,
                folder,
                seed=self.seed,
                per_device_train_batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                max_steps=settings.steps // ROUNDS,
                max_length=128,
                **{name: value for name, value in changed.items() if name not in OF_ROUNDS},
            )
            args.output_dir = scratch
            found = PbKDRounds(
                str(self.model_folder("start")),
                args,
                prompts=self.questions(),
                teacher=self.teacher(),
                preference=self.preference(),
                student=self.start(),
                rounds=ROUNDS,
                show_progress=False,
                **{name: value for name, value in changed.items() if name in OF_ROUNDS},
            ).run()
            tested = self._test(*load(Path(scratch)))
        tested |= {"pairs": sum(record["new_pairs"] for record in found["rounds"])}
        return tested | {"steps": settings.steps, "log": found["rounds"]}


Rows = list[dict[str, Any]]


def settings_of(task: Task) -> DemoSettings:
    settings = DemoSettings()
    if task is not GRADED:
        return settings
    sizes = SIZES[GRADED]
    return replace(settings, teacher_accuracy=sizes.teacher_accuracy, start_accuracy=sizes.start_accuracy)


def row(task: str, seed: int, method: str, found: dict[str, Any]) -> dict[str, Any]:
    """One line of the results."""
    line: dict[str, Any] = {"task": task, "method": method, "seed": seed}
    if "failed" in found:
        return line | {"failed": found["failed"]}
    line |= {measure: round(found[measure], 5) for measure in ("sampled", "greedy")}
    return line | {name: found[name] for name in ("steps", "pairs") if found.get(name) is not None}


def earlier_rows(path: Path, settings: dict[str, Any]) -> Rows:
    """Those of a results file that were made with these settings."""
    found = json.loads(path.read_text()) if path.exists() else {"rows": []}
    then = found.get("settings", {})
    if then | {"methods": None} != settings | {"methods": None}:
        return []
    own = [(line, line["method"]) for line in found["rows"]]
    return [line for line, name in own if then["methods"].get(name) == settings["methods"].get(name)]


def summarise(rows: Rows) -> dict[str, Any]:
    """By task and method: mean and standard deviation over seeds, of leads over others too, for the seeds that both have,
    and for how many seeds the warm-up failed."""
    lines: dict[str, dict[str, dict[int, dict[str, Any]]]] = defaultdict(partial(defaultdict, dict))
    for line in rows:
        lines[line["task"]][line["method"]][line["seed"]] = line
    summary: dict[str, Any] = defaultdict(dict)
    for task, methods in lines.items():
        for method, seeds in methods.items():
            done = {seed: line for seed, line in seeds.items() if "failed" not in line}
            told: dict[str, Any] = {"seeds": len(done)}
            if len(done) < len(seeds):
                told["failed"] = len(seeds) - len(done)
            if done:
                told |= {m: spread([line[m] for line in done.values()]) for m in ("sampled", "greedy")}
            for other, seen in LEADS.items():
                theirs = methods.get(other, {})
                leads = [line["sampled"] - theirs[seed]["sampled"] for seed, line in done.items() if seed in theirs]
                if leads:
                    told[f"lead over {seen}"] = spread(leads)
            summary[task][method] = told
    return summary


def main() -> None:
    arguments = _arguments()
    quiet_libraries()
    torch.set_num_threads(1)
    settings = DemoSettings(curve_every=600)
    online = {
        "questions": arguments.prompts,
        "rounds": ROUNDS,
        "online": OF_ONLINE,
        "rm_learning_rate": RM_LEARNING_RATE,
        "warm-up": WARM_UP,
    }
    told = json.loads(json.dumps(asdict(settings) | online))
    own = {name: changed for name, (_, changed) in (IMPLICIT | ONLINE).items()}
    rows = earlier_rows(arguments.output, told | {"methods": own})
    for seed in arguments.seeds:
        for task in (ALL_TASKS[name] for name in arguments.tasks):
            shared = arguments.bundled / task.name
            of_task = settings_of(task)
            check_settings(shared, fingerprint(task, of_task))
            # Pretraining is looked at more often than these curves are, or it would overshoot its goal
            results = Cell(task, seed, of_task, shared / f"seed{seed}").run([])
            cell = OnlineCell(task, seed, replace(of_task, curve_every=of_task.steps), shared / f"seed{seed}")
            cell.prompts = arguments.prompts
            cell.cells = arguments.cells / f"{cell.prompts}_prompts" / task.name / f"seed{seed}"
            models = {name: row(task.name, seed, name, results[name]) for name in ("teacher", "start")}
            check_settings(cell.cells, told | models)
            here = {line["method"]: line for line in rows if (line["task"], line["seed"]) == (task.name, seed)}
            if any(here.get(name) != line for name, line in models.items()):
                here = models  # those were distilled from other ones
            rows = [line for line in rows if (line["task"], line["seed"]) != (task.name, seed)]
            for method in (name for name in arguments.methods if name not in here):
                check_settings(cell.cells / method, own.get(method, {}))
                found = stage(cell.cells / method, partial(cell.distil, method))
                here[method] = row(task.name, seed, method, found)
                print(*here[method].values(), flush=True)
            rows += [here[name] for name in ("teacher", "start", *METHODS) if name in here]
            rows.sort(key=lambda line: (line["seed"], list(ALL_TASKS).index(line["task"])))
            write_json(
                arguments.output,
                {
                    "what": "exact match (of graded: mean score) on unseen questions, in [0, 1]: mean and standard "
                    "deviation over seeds",
                    "prompts, each answered once by the teacher": arguments.prompts,
                    "summary": summarise(rows),
                    "rows": rows,
                    "settings": told | {"methods": own},
                    "environment": environment(),
                },
            )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="which; rows of others stay")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(ALL_TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--prompts", type=int, default=2000, help="questions, and so answers of the teacher")
    parser.add_argument("--bundled", type=Path, default=Path("runs/bundled_tasks"), help="teachers, starts and pairs")
    parser.add_argument("--cells", type=Path, default=Path("runs/online_tasks"), help="where cells are kept")
    parser.add_argument("--output", type=Path, default=None, help="results")
    arguments = parser.parse_args()
    if arguments.output is None:
        name = "online_tasks.json" if arguments.prompts == 2000 else f"online_tasks_{arguments.prompts}.json"
        arguments.output = Path(__file__).parent / "results" / name
    return arguments


if __name__ == "__main__":
    main()
