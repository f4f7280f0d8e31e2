"""The demo's report page: what was done, what came of it, and how to read it."""

import math
import os
import platform
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from trl_kd import __version__
from trl_kd.demo.experiment import Cell
from trl_kd.demo.methods import METHODS, WHITE_BOX
from trl_kd.demo.table import MEASURES, flipped, rows, spread
from trl_kd.evaluation.charts import LineChart, Point, Series
from trl_kd.evaluation.report import Answer, Page, Sample, Section, Table


LEARNS_FROM = {
    "teacher": "right answers, but not for long enough",
    "start": "right answers, for a shorter time",
    "seqkd": "all teacher answers",
    "seqkd_dft": "all teacher answers, likely tokens counting most",
    "sft_chosen": "the better answers of pairs with a winner",
    "dpo": "pairs with a winner",
    "dpo_sft": "pairs with a winner, and their better answer",
    "pbkd": "teacher answers, as much as the preferences speak for them",
    "forward_kl": "the teacher's distributions along its own answers",
    "reverse_kl": "the teacher's distributions along the student's answers",
    "mm": "as on-policy reverse KL, and where an adversary tells it from its teacher",
    "mm_pbkd": "as MM, with an adversary that explains the preferences",
}

COLORS = {"pbkd": 0, "seqkd": 1, "dpo": 2, "dpo_sft": 3, "teacher": 4, "seqkd_dft": 5, "sft_chosen": 6}
WHITE_BOX_COLORS = {"mm_pbkd": 0, "forward_kl": 1, "reverse_kl": 2, "mm": 3, "teacher": 4}


def make_page(cells: list[Cell], results: dict[str, list[dict[str, Any]]]) -> Page:
    """Makes the page.

    Args:
        cells (`list[Cell]`):
            The cells that were run, task by task.
        results (`dict[str, list[dict]]`):
            For each task the results of each seed, stage by stage.
    """
    count = len(next(iter(results.values())))
    firsts = {cell.task.name: cell for cell in reversed(cells)}
    sections: list[Section] = []
    for name, seeds in results.items():
        sections += _task_sections(firsts[name], seeds)
    return Page(
        title="Preference-based knowledge distillation, and its rivals",
        lead=[
            "A small student model learns from a larger teacher that is good but not perfect. Both answer the same "
            "questions; a program checks the answers, and where one is right and the other wrong, that is a "
            "preference. From the same start, with the same number of updates, the student is then distilled in "
            "several ways.",
            "SeqKD imitates the teacher's answers; its dft form trusts the tokens that the student finds likely. SFT "
            "on chosen imitates the preferred answers. DPO learns from the preferences alone, and DPO + sft from both. "
            "PbKD, the method of this package, imitates the teacher's answers where the preferences leave it an "
            "advantage over the student. All models here are tiny and were made on this machine; the numbers say how "
            "the methods compare on these tasks, and nothing about large models.",
        ],
        sections=[*sections, _settings(cells, count)],
        footer=f"Made by trl-kd {__version__}, command `trl-kd demo`.",
    )


def _task_sections(cell: Cell, seeds: list[dict[str, Any]]) -> list[Section]:
    curves = [_curves(cell, seeds, "learning", METHODS, COLORS)]
    if "mm_pbkd" in seeds[0]:
        curves.append(_curves(cell, seeds, "learning from distributions", WHITE_BOX, WHITE_BOX_COLORS))
    return [
        _results(cell, seeds),
        *curves,
        _imitation(cell, seeds),
        _samples(cell, seeds[0]),
    ]


def _results(cell: Cell, seeds: list[dict[str, Any]]) -> Section:
    pairs = [seed["pairs"] for seed in seeds]
    average = {key: mean(pair[key] for pair in pairs) for key in ("total", "strict", "ties", "unknown")}
    wins = mean(pair["teacher_win_rate"] or 0.0 for pair in pairs)
    example = cell.task.questions("test", 1, cell.seed)[0]
    kind = (
        f"mean ± standard deviation of {len(seeds)} seeds, each with its own teacher and start"
        if len(seeds) > 1
        else "in brackets the 95 % interval from the number of questions"
    )
    models = rows(seeds)
    lines = [
        [
            f"{name}\n{LEARNS_FROM[key]}",
            *(spread(seeds, key, measure).replace(" (", "\n(") for measure in MEASURES),
            flipped(seeds, key).replace(" (", "\n("),
        ]
        for key, name in models.items()
    ]
    return Section(
        title=f"{cell.task.name}: results",
        text=[
            f"{cell.task.description} For example: {example.prompt} asks for {example.answer}.",
            f"Of {average['total']:.0f} questions answered by both, {average['strict']:.0f} gave a winner (the "
            f"teacher in {wins:.0%} of the pairs with a known preference, a tie counting half), "
            f"{average['ties']:.0f} a tie, since both were wrong or both right in different words, and "
            f"{average['unknown']:.0f} twice the same answer. SFT on chosen and DPO use the pairs with a winner, PbKD "
            "the teacher's answers that won, tied or were the student's too.",
            "Sampled means drawn from the model's own distribution, which is what a student is in use; at the best "
            "temperature means drawn from a sharper one, if that is better on validation questions; greedy means the "
            "most likely token each time, which hides how unsure a model is. With wrong labels means sampled, after "
            f"learning from pairs of which {cell.settings.flipped:.0%} of the labels say the opposite.",
        ],
        tables=[
            Table(
                [
                    "model, and what it learned from",
                    "sampled",
                    "at the best temperature",
                    "greedy",
                    "with wrong labels",
                ],
                lines,
                bars=[mean(seed[key]["sampled"] for seed in seeds) for key in models],
                highlighted=list(models).index("pbkd"),
                caption=f"Right answers to {seeds[0]['teacher']['questions']} unseen questions; {kind}. Bars: "
                "sampled.",
            )
        ],
    )


def _curves(
    cell: Cell, seeds: list[dict[str, Any]], title: str, methods: dict[str, str], colors: dict[str, int]
) -> Section:
    last, names = cell.settings.steps, rows(seeds)
    lines = [Series(names[key], _logged(seeds, key, "exact_match"), colors[key]) for key in methods]
    teacher = mean(seed["teacher"]["sampled"] for seed in seeds)
    lines.append(Series("Teacher", [(0, teacher), (last, teacher)], colors["teacher"], dashed=True))
    losses = [Series(names[key], _logged(seeds, key, "loss"), colors[key]) for key in methods]
    return Section(
        title=f"{cell.task.name}: {title}",
        charts=[
            LineChart(
                "Right answers while learning",
                "updates",
                "sampled exact match",
                lines,
                percent=True,
                note=f"Measured on {cell.settings.curve_questions} held-out questions, others than those of the "
                "table.",
            ),
            LineChart(
                "Training loss",
                "updates",
                "loss",
                losses,
                note="The losses are different functions: compare their shapes, not their heights.",
            ),
        ],
    )


def _imitation(cell: Cell, seeds: list[dict[str, Any]]) -> Section:
    return Section(
        title=f"{cell.task.name}: what PbKD learns",
        text=[
            "PbKD's loss ℓ_q of a token begins as the negative log-likelihood and becomes a bounded one, which rare tokens "
            "of the teacher's, mistakes among them, move little. So its mean falls by itself in the first half, while q "
            "rises. The negative log-likelihood of the same answers says how close the student comes to them.",
        ],
        charts=[
            LineChart(
                "The teacher's answers, as far as they are imitated",
                "updates",
                "loss; nats per token",
                [
                    Series("negative log-likelihood", _logged(seeds, "pbkd", "pbkd/teacher_nll"), 2),
                    Series("loss ℓ_q", _logged(seeds, "pbkd", "pbkd/imitation"), 0),
                ],
            )
        ],
    )


def _samples(cell: Cell, results: dict[str, Any]) -> Section:
    questions = cell.task.questions("test", 10, cell.seed)
    samples = [
        Sample(
            question.prompt,
            question.answer,
            [
                Answer(name, text := results[key]["answers"][number], cell.task.verify(question, text))
                for key, name in rows([results]).items()
            ],
        )
        for number, question in enumerate(questions[: len(results["teacher"]["answers"])])
    ]
    return Section(
        title=f"{cell.task.name}: {len(samples)} questions, and what each model said",
        text=[
            f"The first {len(samples)} of the unseen questions, not picked; one sampled answer each (seed "
            f"{cell.seed})."
        ],
        samples=samples,
    )


def _logged(seeds: list[dict[str, Any]], key: str, metric: str) -> list[Point]:
    """A metric over the steps, averaged over the seeds."""
    values: dict[int, list[float]] = defaultdict(list)
    for seed in seeds:
        for entry in seed[key]["log"]:
            if metric in entry:
                values[entry["step"]].append(float(entry[metric]))
    return [(float(step), mean(found)) for step, found in sorted(values.items()) if all(map(math.isfinite, found))]


def _settings(cells: list[Cell], seeds: int) -> Section:
    settings = cells[0].settings
    values = [[name.replace("_", " "), str(value)] for name, value in vars(settings).items()]
    values += [["seeds", ", ".join(str(number) for number in range(seeds))]]
    return Section(
        title="Settings, versions and hardware",
        text=[
            "Everything that is not listed is the default of its trainer; PbKD ran with the defaults of PbKDConfig, and "
            "MM-PbKD with those of MMPbKDConfig."
        ],
        tables=[
            Table(["setting", "value"], values, caption="Settings", words=True),
            Table(["what", "value"], list(environment().items()), caption="Versions and hardware", words=True),
        ],
        folded=True,
    )


def environment() -> dict[str, str]:
    """Versions and hardware of this machine."""
    packages = ("trl", "transformers", "torch", "datasets", "accelerate")
    return {
        "trl-kd": __version__,
        **{name: version(name) for name in packages},
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": f"{_processor()}, {os.cpu_count()} cores",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
