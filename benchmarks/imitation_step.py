"""Cost of a `PbKDTrainer` step without the preference term beside an `SFTTrainer` step on the same texts, and beside a
`PbKDTrainer` step with the preference term on pairs of the same number of tokens: interleaved in one run.

    python benchmarks/imitation_step.py                             # CPU, a small Llama-type model
    python benchmarks/imitation_step.py --device cuda --hidden 896 --layers 24 --vocab 151936 --tokens 512

A step is batch, forward, loss, backward and optimizer. Times are medians of rounds in which every kind of step runs once, in
changing order, of processor time on a CPU; ratios are medians of the rounds' ratios. Peak memory is that of a process which
runs one kind of step alone (CPU), or the device's peak (CUDA). Results go to
benchmarks/results/imitation_step_<device>.json.
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from step_time import make_model, make_rows, synchronize
from trl import SFTConfig, SFTTrainer

from trl_kd import PbKDConfig, PbKDTrainer


KINDS = ("sft", "imitation", "preference term")


def make_trainer(kind: str, student: str, rows: list[dict], options: argparse.Namespace):
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": options.device == "cpu",
        "bf16": options.device != "cpu",
        "gradient_checkpointing": False,
        "report_to": "none",
        "per_device_train_batch_size": options.batch,
        "disable_tqdm": True,
        "learning_rate": 2e-5,
    }
    if kind == "sft":
        texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        trainer = SFTTrainer(model=student, args=SFTConfig(**settings), train_dataset=Dataset.from_list(texts))
    else:
        settings["dual_init"] = 1.0 if kind == "preference term" else 0.0
        trainer = PbKDTrainer(model=student, args=PbKDConfig(**settings), train_dataset=Dataset.from_list(rows))
    trainer.state.max_steps = 4  # q is at its full value from the third step on
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    return trainer


def make_step(trainer, device: str):
    clock = time.process_time if device == "cpu" else time.perf_counter

    def step() -> float:
        loader = iter(trainer.get_train_dataloader())
        synchronize(device)
        start = clock()
        (batch,), items = trainer.get_batch_samples(loader, 1, trainer.args.device)
        trainer.training_step(trainer.model, batch, items)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.state.global_step += 1
        synchronize(device)
        return clock() - start

    return step


def peak_memory(kind: str, options: argparse.Namespace) -> float:
    """MiB, of a process that runs three steps of one kind."""
    arguments = [f"--{name}={value}" for name, value in vars(options).items() if name not in ("only", "rounds")]
    done = subprocess.run(
        [sys.executable, __file__, *arguments, f"--only={kind}"], capture_output=True, text=True, check=True
    )
    return float(done.stdout.strip().splitlines()[-1])


def run_alone(trainer, options: argparse.Namespace) -> None:
    step = make_step(trainer, options.device)
    for _ in range(4):
        step()
    if options.device == "cpu":
        # Not `getrusage`: what it calls the peak is inherited from the process that started this one
        status = Path("/proc/self/status").read_text()
        print(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024)
    else:
        print(torch.cuda.max_memory_allocated() / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"batch": 4, "tokens": 128, "hidden": 192, "layers": 4, "vocab": 8000, "rounds": 25}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        student = make_model(options, Path(folder, "student"), seed=0)
        rows = make_rows(options)
        kinds = [options.only] if options.only else KINDS
        trainers = {kind: make_trainer(kind, student, rows, options) for kind in kinds}
    if options.only:
        run_alone(trainers[options.only], options)
        return

    steps = {kind: make_step(trainer, options.device) for kind, trainer in trainers.items()}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    rng = random.Random(0)
    for round_ in range(options.rounds + 2):
        for kind in rng.sample(KINDS, len(KINDS)):
            seconds = steps[kind]()
            if round_ >= 2:  # the first rounds warm up
                times[kind].append(seconds)
    memory = {kind: peak_memory(kind, options) for kind in KINDS}

    def ratios(other: str) -> dict[str, float]:
        pairs = zip(times["imitation"], times[other], strict=True)
        return {
            "time": statistics.median(ours / theirs for ours, theirs in pairs),
            "peak memory": memory["imitation"] / memory[other],
        }

    result = {
        "shapes": {k: v for k, v in vars(options).items() if k not in ("only", "device")},
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads"
        if options.device == "cpu"
        else torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "trl-kd")},
        "median seconds": {name: statistics.median(values) for name, values in times.items()},
        "peak MiB": memory,
        "imitation / sft": ratios("sft"),
        "imitation / preference term": ratios("preference term"),
    }
    out = Path(__file__).parent / "results" / f"imitation_step_{options.device}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
