"""Cost of a `PbKDTrainer` step beside a `DPOTrainer` step: same model, same batch, interleaved in one run.

    python benchmarks/step_time.py                                  # CPU, a small Llama-type model
    python benchmarks/step_time.py --device cuda --hidden 896 --layers 24 --vocab 151936 --tokens 512

A step is forward, loss, backward and optimizer, without generation. Times are medians of rounds in which every kind of step
runs once, in changing order; ratios are medians of the rounds' ratios. Peak memory is that of a process which runs one kind
of step alone (CPU), or the device's peak (CUDA). Results go to benchmarks/results/step_time_<device>.json.
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
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from trl_kd import PbKDConfig, PbKDTrainer


KINDS = ("dpo", "sequence", "token")


def make_model(options: argparse.Namespace, folder: Path, seed: int) -> str:
    vocabulary = {f"w{i}": i for i in range(options.vocab)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w2").save_pretrained(
        folder
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def make_rows(options: argparse.Namespace) -> list[dict]:
    """Pairs of `tokens` tokens, a quarter of them the prompt; the last tenth of each response differs in length."""
    rng = random.Random(0)

    def text(length: int) -> str:
        return " ".join(f"w{rng.randrange(3, options.vocab)}" for _ in range(length))

    response = options.tokens - options.tokens // 4
    return [
        {
            "prompt": text(options.tokens // 4) + " ",
            "chosen": text(response - rng.randrange(response // 10)),
            "rejected": text(response - rng.randrange(response // 10)),
        }
        for _ in range(options.batch)
    ]


def make_trainer(kind: str, student: str, teacher: str, rows: list[dict], options: argparse.Namespace):
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": options.device == "cpu",
        "bf16": options.device != "cpu",
        "gradient_checkpointing": False,
        "report_to": "none",
        "per_device_train_batch_size": options.batch,
        "disable_tqdm": True,
    }
    dataset = Dataset.from_list(rows)
    if kind == "dpo":
        trainer = DPOTrainer(model=student, args=DPOConfig(**settings), train_dataset=dataset)
    else:
        settings["dual_init"] = 1.0
        if kind == "token":
            settings |= {"imitation": "token", "teacher_model_name_or_path": teacher}
        trainer = PbKDTrainer(model=student, args=PbKDConfig(**settings), train_dataset=dataset)
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    return trainer


def make_step(trainer, device: str):
    def step() -> float:
        batch = next(iter(trainer.get_train_dataloader()))
        synchronize(device)
        start = time.perf_counter()
        trainer.training_step(trainer.model, batch)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        synchronize(device)
        return time.perf_counter() - start

    return step


def make_teacher_forward(trainer, options: argparse.Namespace):
    batch = trainer.data_collator(list(trainer.train_dataset))
    ids, mask = (batch[name][: options.batch].to(options.device) for name in ("input_ids", "attention_mask"))

    def forward() -> float:
        start = time.perf_counter()
        with torch.no_grad(), trainer.accelerator.autocast():
            trainer.teacher.model(input_ids=ids, attention_mask=mask)
        synchronize(options.device)
        return time.perf_counter() - start

    return forward


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def peak_memory(kind: str, options: argparse.Namespace) -> float:
    """MiB, of a process that runs three steps of one kind."""
    arguments = [f"--{name}={value}" for name, value in vars(options).items() if name not in ("only", "rounds")]
    done = subprocess.run(
        [sys.executable, __file__, *arguments, f"--only={kind}"], capture_output=True, text=True, check=True
    )
    return float(done.stdout.strip().splitlines()[-1])


def run_alone(kind: str, trainer, options: argparse.Namespace) -> None:
    step = make_step(trainer, options.device)
    for _ in range(3):
        step()
    if options.device == "cpu":
        # Not `getrusage`: what it calls the peak is inherited from the process that started this one
        status = Path("/proc/self/status").read_text()
        print(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024)
    else:
        print(torch.cuda.max_memory_allocated() / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("batch", 4),
        ("tokens", 128),
        ("hidden", 192),
        ("layers", 4),
        ("vocab", 8000),
        ("rounds", 25),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        student = make_model(options, Path(folder, "student"), seed=0)
        teacher = make_model(options, Path(folder, "teacher"), seed=1)
        rows = make_rows(options)
        kinds = [options.only] if options.only else KINDS
        trainers = {kind: make_trainer(kind, student, teacher, rows, options) for kind in kinds}
    if options.only:
        run_alone(options.only, trainers[options.only], options)
        return

    timers = {kind: make_step(trainer, options.device) for kind, trainer in trainers.items()}
    timers["teacher_forward"] = make_teacher_forward(trainers["token"], options)
    times: dict[str, list[float]] = {name: [] for name in timers}
    rng = random.Random(0)
    for round_ in range(options.rounds + 2):
        for name in rng.sample(list(timers), len(timers)):
            seconds = timers[name]()
            if round_ >= 2:  # the first rounds warm up
                times[name].append(seconds)

    rounds = list(zip(*times.values(), strict=True))
    ratio = {
        "sequence / dpo": statistics.median(sequence / dpo for dpo, sequence, _, _ in rounds),
        "token / (dpo + teacher forward)": statistics.median(
            token / (dpo + forward) for dpo, _, token, forward in rounds
        ),
    }
    memory = {kind: peak_memory(kind, options) for kind in KINDS}
    result = {
        "shapes": {k: v for k, v in vars(options).items() if k not in ("only", "device")},
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads"
        if options.device == "cpu"
        else torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "trl-kd")},
        "median seconds": {name: statistics.median(values) for name, values in times.items()},
        "time ratio": ratio,
        "peak MiB": memory,
        "memory ratio": {
            "sequence / dpo": memory["sequence"] / memory["dpo"],
            "token / dpo": memory["token"] / memory["dpo"],
        },
    }
    out = Path(__file__).parent / "results" / f"step_time_{options.device}.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
