"""
Writes `fixtures/`: folders as trl-kd leaves them at one commit, and the results when that code resumes them.

The committed fixtures were written at commit bcb394a (version 0.1.0.dev0), on one CPU core, with the packages of
`constraints.txt` at that commit. To run it again:

    git worktree add --detach /tmp/at-bcb394a bcb394a
    PYTHONPATH=/tmp/at-bcb394a OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python tests/compat/make_fixtures.py [NAME ...]

README.md says when a fixture may be written. Each folder is written by a process of its own, with relative paths; where the
folder is to be unfinished, the process ends without cleaning up, as a killed one does. The script stops if a resumed run
gives other rows, logs or weights than an uninterrupted one.
"""

import argparse
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from cases import (
    BROKEN_AT,
    FIXTURES,
    PAIRS,
    REFUSED,
    ROUNDS,
    TRAININGS,
    asked,
    lora_rounds,
    read_pairs,
    read_rounds,
    read_training,
    reply,
    run,
    serving,
    weights_file,
)
from inputs import prepare


COMMIT = "bcb394a"
KILLED = 9
RESULTS = "results.json"

# ---- Processes -----------------------------------------------------------------------------------------------------------


def write(fixture: str, output_dir: str) -> None:
    """Writes one output folder, and dies where the fixture says so."""
    case = TRAININGS.get(fixture) or (PAIRS | REFUSED | ROUNDS).get(output_dir)
    if fixture in TRAININGS:
        _die_at_checkpoint(lambda args: True, BROKEN_AT)
    elif fixture == "rounds_lora" or output_dir == "in-training":
        _die_at_checkpoint(lambda args: "round-2" in args.output_dir, 2)
    elif output_dir == "after-one":
        from trl_kd.trainers.rounds.rounds import PbKDRounds

        sample = PbKDRounds._sample
        PbKDRounds._sample = lambda self, number: sample(self, number) if number == 1 else os._exit(KILLED)

    def script(body: dict[str, Any], number: int) -> Any:
        if case is not None and number == case.dies_at:
            os._exit(KILLED)
        return reply(body, number)

    with serving(script):
        if case is None:
            lora_rounds(output_dir).run()
        else:
            run(case.arguments(output_dir))


def _die_at_checkpoint(is_meant: Any, step: int) -> None:
    from transformers.trainer_callback import DefaultFlowCallback

    def on_save(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step and is_meant(args):
            os._exit(KILLED)

    DefaultFlowCallback.on_save = on_save


def resume(fixture: str, *output_dirs: str) -> None:
    """Resumes output folders, or makes them in one go where they do not exist, and stores the results beside them."""
    results = {}
    for output_dir in output_dirs:
        with serving() as server:
            if fixture in TRAININGS:
                is_there = Path(output_dir).exists()
                run(TRAININGS[fixture].arguments(output_dir) + ["--resume_from_checkpoint", "true"] * is_there)
                found = read_training(output_dir)
            elif fixture == "rounds_lora":
                lora_rounds(output_dir).run()
                found = read_rounds(output_dir)
            elif fixture == "rounds":
                run(ROUNDS[output_dir].arguments(output_dir))
                found = read_rounds(output_dir)
            else:
                run(PAIRS[output_dir].arguments(output_dir))
                found = read_pairs(output_dir)
        results[output_dir] = found | {"asked": asked(server)}
    Path(RESULTS).write_text(json.dumps(results), encoding="utf-8")


def in_process(folder: Path, *words: str, code: int = 0) -> None:
    command = [sys.executable, str(Path(__file__).resolve()), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != code:
        raise SystemExit(f"{command} ended with {done.returncode}, not {code}:\n{done.stdout}\n{done.stderr}")


def resumed(folder: Path, fixture: str, output_dirs: list[str]) -> dict[str, Any]:
    in_process(folder, "--resume", fixture, *output_dirs)
    return json.loads((folder / RESULTS).read_text(encoding="utf-8"))


# ---- Fixtures ------------------------------------------------------------------------------------------------------------


def make(fixture: str, work: Path) -> None:
    """Writes a fixture and the results of its own code."""
    folder, unbroken = work / fixture, work / "unbroken"
    folder.mkdir()
    in_process(folder, "--prepare", fixture)
    shutil.copytree(folder, unbroken)
    outputs = list({"pairs": PAIRS, "rounds": ROUNDS}.get(fixture, ["out"]))
    for output in outputs:
        is_finished = fixture == "pairs" and PAIRS[output].dies_at is None
        in_process(folder, "--write", fixture, output, code=0 if is_finished else KILLED)
    for output in REFUSED if fixture == "pairs" else ():
        in_process(folder, "--write", fixture, output, code=1)
    for lock in folder.rglob("_lock"):  # of a process that died: it names the host
        if lock.read_text():
            lock.write_text("12345@elsewhere")
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    pack(folder, FIXTURES / f"{fixture}.tar.xz")

    results = resumed(folder, fixture, outputs)
    if fixture == "pairs":
        for name, whole in (("interrupted", "finished"), *((f"{n}-interrupted", n) for n in ("judged", "messages"))):
            assert results[name]["rows"] == results[whole]["rows"], name
    else:
        whole = resumed(unbroken, fixture, outputs[-1:])[outputs[-1]]
        weights = weights_file(str(unbroken / outputs[-1]))
        for output, result in results.items():
            assert result | {"asked": None} == whole | {"asked": None}, output
            assert weights_file(str(folder / output)).read_bytes() == weights.read_bytes(), output
        shutil.copyfile(weights, FIXTURES / f"{fixture}.safetensors")
    text = json.dumps(results, ensure_ascii=False, indent=1, sort_keys=True)
    (FIXTURES / f"{fixture}.json").write_text(f"{text}\n", encoding="utf-8")


def pack(folder: Path, path: Path) -> None:
    """Every file, without owners and times."""

    def bare(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        return info

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz", preset=9) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                content = file.read_bytes()
                for word in (
                    str(folder.parent),
                    str(Path.home()),
                    f"@{socket.gethostname()}",
                    os.getcwd(),
                    sys.prefix,
                ):
                    if word.encode() in content and word != "/":
                        raise SystemExit(f"{file} holds {word!r}")
                archive.add(file, file.relative_to(folder), filter=bare)
    path.write_bytes(buffer.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the fixtures of NAME, or all.")
    for what in ("prepare", "write", "resume"):
        parser.add_argument(f"--{what}", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", metavar="NAME")
    args = parser.parse_args()
    if args.prepare:
        prepare(*args.prepare)
    elif args.write:
        write(*args.write)
    elif args.resume:
        resume(*args.resume)
    else:
        import trl_kd

        root = Path(trl_kd.__file__).parents[1]
        commit = subprocess.check_output(["git", "-C", root, "rev-parse", "HEAD"], text=True)
        if not commit.startswith(COMMIT):
            raise SystemExit(
                f"trl_kd is that of commit {commit.strip()} in {root}, not of {COMMIT}: see the head of this file."
            )
        FIXTURES.mkdir(exist_ok=True)
        for name in args.names or ["pairs", *TRAININGS, "rounds", "rounds_lora"]:
            with tempfile.TemporaryDirectory() as work:
                make(name, Path(work))
            print(name, (FIXTURES / f"{name}.tar.xz").stat().st_size, flush=True)


if __name__ == "__main__":
    main()
