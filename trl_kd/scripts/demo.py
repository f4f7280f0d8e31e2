"""`trl-kd demo`: distils a tiny student several ways on this machine, and shows what came of it."""

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_kd.demo.table import text_table
from trl_kd.scripts import paths
from trl_kd.scripts.errors import InputError, bad_input


if TYPE_CHECKING:
    from trl_kd.demo.experiment import DemoSettings


DEFAULT_TASKS = ("running_sums",)


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
        settings ([`~trl_kd.demo.experiment.DemoSettings`], *optional*):
            Sizes; the default takes some minutes a seed and task.
        white_box (`bool`, *optional*, defaults to `False`):
            Whether to distil also in the ways that read the teacher's distributions.

    Returns:
        `dict[str, list[dict]]`: for each task the results of each seed, stage by stage.
    """
    started = time.monotonic()
    with bad_input():
        cells = _prepare(output_dir, seeds, tasks, settings)
    from trl_kd.demo.experiment import NoWinner
    from trl_kd.pairs.lock import hold_folder  # heavy, as what has been loaded by now
    from trl_kd.scripts.training import stopped_training

    results: dict[str, list[dict[str, Any]]] = {}
    with stopped_training(str(output_dir)), hold_folder(output_dir, "demo"):
        for number, cell in enumerate(cells, 1):
            print(f"\nTask {cell.task.name}, seed {cell.seed} ({number} of {len(cells)}): {cell.task.description}")
            try:
                results.setdefault(cell.task.name, []).append(cell.compare(white_box))
            except NoWinner as error:
                raise InputError(str(error)) from error
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
    from trl_kd.demo.experiment import Cell, DemoSettings, fingerprint
    from trl_kd.demo.progress import BarCallback, quiet_libraries
    from trl_kd.demo.stage import check_settings
    from trl_kd.scripts.checks import check_output_dir
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
    from trl_kd.demo.report import make_page
    from trl_kd.evaluation.report import write_report

    page = output_dir / "report.html"
    write_report(page, make_page(cells, results))
    for task, seeds in results.items():
        print(f"\n{task}, exact match on {seeds[0]['teacher']['questions']} unseen questions")
        print(text_table(seeds))
    print(f"\nReport page:    {page}")
    print(f"Pairs:          {cells[0].folder / 'pairs' / 'pairs.html'}")
    print(f"Student (PbKD): {cells[0].model_folder('pbkd')}")
    print(f"This run took {seconds / 60:.1f} minutes.")
