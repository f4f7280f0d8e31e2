"""Cost of `moment_matching` (divergence, moment gap, both players' gradients) beside TRL's chunked divergence on the same
tensors, and beside the plain form that holds the logits of student, teacher and Q: forward and backward, interleaved.

    python benchmarks/moment_loss.py
    python benchmarks/moment_loss.py --device cuda --dtype bfloat16 --tokens 8192 --vocab 131072 --hidden 896 --compile

Times are medians of rounds in which every kind runs once, in changing order; ratios are medians of the rounds' ratios. On a
CPU one thread runs, and its processor time is given beside the clock's, which other programs change too. Peak memory is that
of a process which runs one kind alone, in all (CPU: with Python and torch; CUDA: as torch allocated it), and above what it
held before the pass. Results go to benchmarks/results/moment_loss_<device>.json. On a CPU it takes some six minutes.
"""

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from trl.trainer.distillation_trainer import _chunked_divergence_loss as chunked_divergence_loss

from trl_kd.losses.heads import Head
from trl_kd.losses.moments import moment_matching


KINDS = ("trl", "ours without Q", "moments", "plain")
CLOCKS = {"seconds": time.perf_counter, "processor seconds": time.process_time}
BOUND = 5.0


class Tensors:
    """Student, teacher and Q of one width. Q's words are the student's, detached."""

    def __init__(self, vocab: int, options: argparse.Namespace):
        torch.manual_seed(0)
        n, h, dtype, device = options.tokens, options.hidden, getattr(torch, options.dtype), options.device
        self.hidden, self.teacher_hidden, self.features = (
            torch.randn(n, h, device=device).to(dtype) for _ in range(3)
        )
        self.weight, self.teacher_weight = (
            (torch.randn(vocab, h, device=device) / h**0.5 * 2).to(dtype) for _ in range(2)
        )
        self.leaves = [self.hidden, self.weight, self.features]
        for leaf in self.leaves:
            leaf.requires_grad_()


def total(divergence, gap, q_gap) -> torch.Tensor:
    return (divergence + gap - q_gap).mean()


def run(kind: str, tensors: Tensors, options: argparse.Namespace) -> torch.Tensor:
    """Forward and backward of one kind. Returns Σ divergence, which all share."""
    for leaf in tensors.leaves:
        leaf.grad = None
    if kind == "trl":
        loss, _, _ = chunked_divergence_loss(
            tensors.hidden.unsqueeze(0),
            tensors.teacher_hidden.unsqueeze(0),
            tensors.weight,
            tensors.teacher_weight,
            torch.ones(1, options.tokens, device=options.device),
            beta=options.beta,
        )
        loss.backward()
        return loss.detach()
    student, teacher = Head(tensors.hidden, tensors.weight), Head(tensors.teacher_hidden, tensors.teacher_weight)
    if kind == "plain":
        parts = plain(tensors, options.beta)
    else:
        q = (None, None) if kind == "ours without Q" else (tensors.features, tensors.weight.detach())
        settings = {"q_bound": BOUND, "beta": options.beta, "compile_tiles": kind == "moments compiled"}
        parts = moment_matching(student, teacher, *q, **settings)[:3]
    total(*parts).backward()
    return parts[0].detach().mean()


def plain(tensors: Tensors, beta: float):
    log_pi = (tensors.hidden @ tensors.weight.T).float().log_softmax(-1)
    log_mu = (tensors.teacher_hidden @ tensors.teacher_weight.T).float().log_softmax(-1)
    q = BOUND * torch.tanh((tensors.features @ tensors.weight.detach().T).float() / BOUND)
    pi, mu = log_pi.exp(), log_mu.exp()
    if beta not in (0, 1):
        log_m = torch.log((1 - beta) * pi + beta * mu)
        parts = beta * (mu * (log_mu - log_m)).sum(-1), (1 - beta) * (pi * (log_pi - log_m)).sum(-1)
        divergence = parts[0] + parts[1]
    else:
        divergence = (pi * (log_pi - log_mu)).sum(-1) if beta == 1 else (mu * (log_mu - log_pi)).sum(-1)
    return divergence, ((mu - pi) * q.detach()).sum(-1), ((mu - pi).detach() * q).sum(-1)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def resident(name: str) -> float:
    """MiB. Not `getrusage`: what it calls the peak is inherited from the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def run_alone(options: argparse.Namespace) -> None:
    """Prints the peak of memory in all, and above what was held before."""
    tensors = Tensors(options.vocab[0], options)
    if options.device == "cpu":
        before = resident("VmRSS")
        run(options.only, tensors, options)
        peak = resident("VmHWM")
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        run(options.only, tensors, options)
        peak = torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps([peak, peak - before]))


def peak_memory(kind: str, vocab: int, options: argparse.Namespace) -> list[float]:
    shapes = {name: getattr(options, name) for name in ("tokens", "hidden", "beta", "device", "dtype")}
    arguments = [f"--{name}={value}" for name, value in shapes.items()]
    done = subprocess.run(
        [sys.executable, __file__, *arguments, f"--vocab={vocab}", f"--only={kind}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(vocab: int, kinds: list[str], options: argparse.Namespace) -> dict:
    tensors = Tensors(vocab, options)
    rng = random.Random(0)
    times: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in kinds} for name in CLOCKS}
    values = {}
    for round_ in range(options.rounds + 1):
        for kind in rng.sample(kinds, len(kinds)):
            synchronize(options.device)
            start = {name: clock() for name, clock in CLOCKS.items()}
            value = run(kind, tensors, options)
            synchronize(options.device)
            if round_ > 0:  # the first round warms up
                for name, clock in CLOCKS.items():
                    times[name][kind].append(clock() - start[name])
            values[kind] = float(value)
    memory = {kind: peak_memory(kind, vocab, options) for kind in kinds}
    return {
        "vocab": vocab,
        "mean divergence": values,
        **{
            f"median {name}": {kind: statistics.median(v) for kind, v in of_clock.items()}
            for name, of_clock in times.items()
        },
        **{
            f"ratio of {name} to trl": {
                kind: statistics.median(a / b for a, b in zip(v, of_clock["trl"], strict=True))
                for kind, v in of_clock.items()
            }
            for name, of_clock in times.items()
        },
        "peak MiB": {kind: m[0] for kind, m in memory.items()},
        "peak MiB above the start": {kind: m[1] for kind, m in memory.items()},
        "memory ratio to trl": {kind: m[0] / memory["trl"][0] for kind, m in memory.items()},
    }


def processor(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} with {capability}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 512), ("hidden", 512), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="also `compile_tiles=True`")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    if options.only:
        run_alone(options)
        return
    kinds = [*KINDS, *(["moments compiled"] if options.compile else [])]
    result = {
        "shapes": {name: getattr(options, name) for name in ("tokens", "hidden", "rounds", "beta", "dtype")},
        "hardware": processor(options.device),
        "versions": {name: version(name) for name in ("torch", "trl", "trl-kd")},
        "results": [measure(vocab, kinds, options) for vocab in options.vocab],
    }
    out = Path(__file__).parent / "results" / f"moment_loss_{options.device}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
