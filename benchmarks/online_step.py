"""What the parts of an `OnlinePbKDTrainer` step cost, and what it costs beside `RLOOTrainer`'s with the same generation.

    python benchmarks/online_step.py
    python benchmarks/online_step.py --device cuda --dtype bfloat16 --hidden 896 --layers 24 --vocab 151936

Parts, in processor time of a step (on a CPU, one thread; on a GPU, wall time with synchronisation): generation by the
student; asking (teacher's answers from a column, labels by a function that counts characters); the reward model (its step
and its rewards); the policy (everything else: old and reference log-probabilities, loss, backward, optimizer). RLOO has a
reward function that costs nothing. Steps of both trainers are interleaved; the first ones warm up; numbers are medians.
Results go to benchmarks/results/online_step_<device>.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from moment_loss import processor
from trl import RLOOConfig, RLOOTrainer
from white_box import make_model, tokenizer_of

from trl_kd import OnlinePbKDConfig, OnlinePbKDTrainer


class Clock:
    """Seconds of named parts, a part inside another counted once."""

    def __init__(self, device: str):
        self._device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        if self._device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def watch(self, owner: Any, method: str, part: str) -> None:
        inner = getattr(owner, method)

        def timed(*args, **kwargs):
            started = self.now()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[part] += self.now() - started

        setattr(owner, method, timed)


def longer(prompts, first, second, **columns):
    return [0.5 if len(a) == len(b) else float(len(a) > len(b)) for a, b in zip(first, second, strict=True)]


def nothing(completions, **kwargs):
    return [float(len(completion) % 3) for completion in completions]


def trainer_of(kind: str, options: argparse.Namespace, folder: str) -> Any:
    tokenizer = tokenizer_of(options)
    model = make_model(options, seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = [" ".join(f"w{3 + (7 * i + j) % (options.vocab - 3)}" for j in range(options.prompt)) for i in range(64)]
    rows = Dataset.from_list([{"prompt": prompt, "completion": prompt} for prompt in words])
    settings = {
        "output_dir": folder,
        "per_device_train_batch_size": options.rows,
        "num_generations": 4,
        "max_completion_length": options.length,
        "max_steps": 1000,
        "beta": 0.05,
        "use_cpu": options.device == "cpu",
        "bf16": options.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "generation_kwargs": {"min_new_tokens": options.length},
    }
    common = {"model": folder, "train_dataset": rows, "processing_class": tokenizer}
    if kind == "rloo":
        return RLOOTrainer(reward_funcs=nothing, args=RLOOConfig(**settings), **common)
    ours = {"rm_lora_r": options.lora, "rm_warmup_accuracy": 0.0}
    ours["imitation_weight"] = 0.1 if kind == "online, imitation" else 0.0
    return OnlinePbKDTrainer(args=OnlinePbKDConfig(**settings, **ours), preference_function=longer, **common)


def steps_of(trainer: Any, clock: Clock):
    """Runs a step for each `next`, and yields the seconds of its parts."""
    clock.watch(trainer, "_generate", "generation")
    if isinstance(trainer, OnlinePbKDTrainer):
        clock.watch(trainer, "_ask", "asking")
        clock.watch(trainer, "_update_reward_model", "reward model")
        clock.watch(trainer.learner, "score", "reward model")
    trainer.create_optimizer_and_scheduler(1000)
    trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped = trainer.model
    trainer.current_gradient_accumulation_steps = 1
    while True:
        for batch in trainer.get_train_dataloader():
            clock.seconds.clear()
            started = clock.now()
            trainer.model.train()
            trainer.training_step(trainer.model, batch, None)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            total = clock.now() - started
            parts = dict(clock.seconds)
            yield {"total": total, **parts, "policy": total - sum(parts.values())}


def main() -> None:
    options = _arguments()
    torch.set_num_threads(1)
    kinds = ("rloo", "online", "online, imitation")
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as scratch:
        running = {
            kind: steps_of(trainer_of(kind, options, f"{scratch}/{i}"), Clock(options.device))
            for i, kind in enumerate(kinds)
        }
        for step in range(options.rounds + 1):
            for kind in kinds if step % 2 else reversed(kinds):
                seconds = next(running[kind])
                if step:
                    found[kind].append(seconds)
    medians = {
        kind: {part: round(statistics.median(step.get(part, 0.0) for step in steps), 4) for part in steps[0]}
        for kind, steps in found.items()
    }
    rloo = medians["rloo"]
    for kind in kinds[1:]:
        ours = medians[kind]
        besides = (ours["generation"] + ours["policy"] + ours["asking"]) / (rloo["generation"] + rloo["policy"])
        ours["beside RLOO, without the reward model"] = round(besides, 3)
    print(json.dumps(medians, indent=1))
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    versions = {name: version(name) for name in ("torch", "trl", "transformers", "trl-kd")}
    output = options.output or Path(__file__).parent / "results" / f"online_step_{options.device}.json"
    report = {"settings": settings, "hardware": processor(options.device), "versions": versions}
    output.write_text(json.dumps(report | {"median seconds of a step": medians}, indent=2) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--vocab", type=int, default=8000)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--lora", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=None)
    return parser.parse_args()


if __name__ == "__main__":
    main()
