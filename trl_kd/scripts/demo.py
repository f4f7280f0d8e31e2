"""`trl-kd demo`: distils a tiny student several ways on this machine, and shows what came of it."""

import argparse
import os
import time
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from trl_kd.scripts import paths
from trl_kd.scripts.errors import bad_input


if TYPE_CHECKING:
    from trl_kd.scripts.demo_experiment import DemoSettings


DEFAULT_TASKS = ("running_sums",)

NAMES = {
    "teacher": "Teacher",
    "start": "Student, start",
    "seqkd": "SeqKD",
    "seqkd_dft": "SeqKD with dft",
    "sft_chosen": "SFT on chosen",
    "dpo": "DPO",
    "dpo_sft": "DPO + sft",
    "pbkd": "PbKD (ours)",
}
"""Rows of the table, in its order."""

WHITE_BOX_NAMES = {
    "forward_kl": "Forward KL",
    "reverse_kl": "On-policy reverse KL",
    "mm": "MM, no preferences",
    "mm_pbkd": "MM-PbKD (ours)",
}
"""Further rows of `--white_box`: these students read the teacher's distributions."""

LABEL_FREE = ("seqkd", "seqkd_dft")
"""Rows that wrong labels do not change, since they read none."""

MEASURES = {"sampled": "sampled", "best": "best temp.", "greedy": "greedy"}
"""Columns of the table: at temperature 1, at the temperature that is best on validation questions, and greedy."""


def main(argv: list[str]) -> int:
    """
    Runs `trl-kd demo`.

    Args:
        argv (`list[str]`):
            Arguments after the command's name.

    Returns:
        `int`: exit code, 0.

    Raises:
        [`~trl_kd.scripts.errors.InputError`]: an argument was refused, or the folder holds results of other settings.
    """
    arguments = _parser().parse_args(argv)
    run(arguments.output_dir, seeds=arguments.seeds, tasks=arguments.tasks, white_box=arguments.white_box)
    return 0


def run(
    output_dir: str | Path,
    seeds: int = 1,
    tasks: list[str] | tuple[str, ...] = DEFAULT_TASKS,
    settings: "DemoSettings | None" = None,
    white_box: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """
    Runs the demo, or what is missing of it, and prints its table and the paths of its results.

    Args:
        output_dir (`str` or `Path`):
            Folder of the results; every stage found there in full is taken from there.
        seeds (`int`, *optional*, defaults to `1`):
            Number of seeds, each with a teacher, a start and students of its own.
        tasks (`Sequence[str]`, *optional*):
            Names of bundled tasks, or one's own as `"module:attribute"` or `"file.py:attribute"`.
        settings ([`~trl_kd.scripts.demo_experiment.DemoSettings`], *optional*):
            Sizes; the default takes some minutes a seed and task.
        white_box (`bool`, *optional*, defaults to `False`):
            Whether to distil also in the ways that read the teacher's distributions.

    Returns:
        `dict[str, list[dict]]`: for each task the results of each seed, stage by stage.
    """
    started = time.monotonic()
    with bad_input():
        cells = _prepare(output_dir, seeds, tasks, settings)
    from trl_kd.pairs.lock import hold_folder  # heavy, as what has been loaded by now
    from trl_kd.scripts.training import stopped_training

    results: dict[str, list[dict[str, Any]]] = {}
    with stopped_training(str(output_dir)), hold_folder(output_dir, "demo"):
        for number, cell in enumerate(cells, 1):
            print(f"\nTask {cell.task.name}, seed {cell.seed} ({number} of {len(cells)}): {cell.task.description}")
            results.setdefault(cell.task.name, []).append(cell.compare(white_box))
        _finish(Path(output_dir), cells, results, time.monotonic() - started)
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-kd demo",
        allow_abbrev=False,
        description="Trains a tiny teacher and a weak student, builds preference pairs from their answers, and "
        "distils the student six ways from the same start: SeqKD, SeqKD with TRL's dft loss, SFT on the chosen answers, "
        "DPO, DPO + sft and PbKD; three of them again with a fifth of the labels wrong. Some minutes on two "
        "CPU cores. Run again, it goes on where it stopped.",
    )
    parser.add_argument(
        "--seeds", type=_positive, default=1, metavar="N", help="repetitions with different seeds (default: 1)"
    )
    parser.add_argument(
        "--output_dir",
        type=paths.reader("output_dir"),
        default="runs/demo",
        metavar="DIR",
        help="where results go (default: runs/demo)",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        type=paths.reader("tasks"),
        default=list(DEFAULT_TASKS),
        metavar="TASK",
        help="bundled tasks (running_sums, addition), or your own as module:attribute or file.py:attribute "
        f"(default: {' '.join(DEFAULT_TASKS)})",
    )
    parser.add_argument(
        "--white_box",
        action="store_true",
        help="distil in four more ways, which read the teacher's distributions: forward KL, on-policy reverse KL, moment "
        "matching without preferences, and MM-PbKD. Takes more than twice as long",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _prepare(output_dir: str | Path, seeds: int, tasks, settings) -> list[Any]:
    """Loads what is heavy, checks the tasks and the folder, and returns the cells to run."""
    print("Loading TRL ...", flush=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from trl_kd.scripts.checks import check_output_dir
    from trl_kd.scripts.demo_experiment import Cell, DemoSettings, fingerprint
    from trl_kd.scripts.demo_quiet import BarCallback, quiet_libraries
    from trl_kd.scripts.demo_stage import check_settings
    from trl_kd.tasks import TASKS, load_task

    quiet_libraries()
    check_output_dir(str(output_dir))
    folder = Path(output_dir)
    settings = settings or DemoSettings()
    loaded = [load_task(name, TASKS) for name in dict.fromkeys(tasks)]
    for task in loaded:
        check_settings(folder / task.name, fingerprint(task, settings))
    return [
        Cell(task, seed, settings, folder / task.name / f"seed{seed}", BarCallback)
        for task in loaded
        for seed in range(seeds)
    ]


def _finish(output_dir: Path, cells: list[Any], results: dict[str, list[dict[str, Any]]], seconds: float) -> None:
    from trl_kd.evaluation.report import write_report
    from trl_kd.scripts.demo_report import make_page

    page = output_dir / "report.html"
    write_report(page, make_page(cells, results))
    for task, seeds in results.items():
        print(f"\n{task}, exact match on {seeds[0]['teacher']['questions']} unseen questions")
        print(text_table(seeds))
    print(f"\nReport page:    {page}")
    print(f"Pairs:          {cells[0].folder / 'pairs' / 'pairs.html'}")
    print(f"Student (PbKD): {cells[0].model_folder('pbkd')}")
    print(f"This run took {seconds / 60:.1f} minutes.")


def rows(seeds: list[dict[str, Any]]) -> dict[str, str]:
    """The models that there are results of, and their names, in the order of the table."""
    return {key: name for key, name in (NAMES | WHITE_BOX_NAMES).items() if key in seeds[0]}


def text_table(seeds: list[dict[str, Any]]) -> str:
    """The table of one task, for a terminal.

    Args:
        seeds (`list[dict]`):
            Results of each seed, stage by stage.
    """
    names = rows(seeds)
    width = max(map(len, names.values()))
    cells = [["", *MEASURES.values(), "wrong labels"]]
    cells += [[name, *(spread(seeds, key, m) for m in MEASURES), flipped(seeds, key)] for key, name in names.items()]
    lines = [f"  {name:<{width}}" + "".join(f"  {cell:>19}" for cell in row) for name, *row in cells]
    note = f"mean ± standard deviation of {len(seeds)} seeds" if len(seeds) > 1 else "with 95 % interval"
    return "\n".join(
        [
            *lines,
            f"  ({note}; sampled at temperature 1, at the temperature that is best on validation questions, and greedy;",
            "  wrong labels: sampled, after training on pairs of which a fifth of the labels is flipped)",
        ]
    )


def flipped(seeds: list[dict[str, Any]], key: str) -> str:
    """Sampled accuracy after learning from partly wrong labels, or a dash for what does not learn from pairs' labels."""
    if "flipped" in seeds[0][key]:
        return spread([{key: seed[key]["flipped"]} for seed in seeds], key, "sampled")
    return spread(seeds, key, "sampled") if key in LABEL_FREE else "–"


def spread(seeds: list[dict[str, Any]], key: str, measure: str) -> str:
    """An accuracy in per cent: with its interval for one seed, as mean ± standard deviation for several."""
    values = [seed[key][measure] for seed in seeds]
    if len(values) > 1:
        return f"{100 * mean(values):.1f} ± {100 * stdev(values):.1f} %"
    low, high = seeds[0][key][f"{measure}_interval"]
    return f"{100 * values[0]:.1f} % ({100 * low:.0f} to {100 * high:.0f})"
