"""A step of `MMPbKDTrainer` beside one of TRL's `DistillationTrainer`: same student, teacher and completions; interleaved.

    python benchmarks/white_box.py
    python benchmarks/white_box.py --device cuda --dtype bfloat16 --vocab 131072 --rows 16 --length 512 --hidden 896

Kinds, each a trainer of its own and measured over a `training_step` (forward, backward, and Q's step where there is a Q):

- trl: `DistillationTrainer(beta=1)`;
- trl, fused JSD of Liger: its divergence replaced by Liger's, where that is installed (CUDA; peak memory only);
- mm: moment matching on the same states, without preferences, which is MM-PbKD without its pass over pairs;
- mm, plain: the same with the three tables of logits whole, as a check of the values and a measure of what tiles save;
- mm-pbkd: with as many pairs a step as the batch has rows, of the same length;
- ..., generating: with completions that the student samples, for trl and mm.

Student and teacher are Llama-type and random. Times are medians over rounds in which every kind runs once, in changing
order; ratios are medians of the rounds' ratios; the first round warms up. On a CPU one thread runs, and processor time
counts. Peak memory is that of a process which makes one step of one kind (CPU: in all, with Python and torch; CUDA: as torch
allocated it). Results go to benchmarks/results/white_box_<device>.json.
"""

import argparse
import json
import logging
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from moment_loss import processor, resident, synchronize
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer

from trl_kd import MMPbKDConfig, MMPbKDTrainer
from trl_kd.losses.moments import MomentOutput
from trl_kd.trainers.mm_pbkd import step as mm_pbkd_step


KINDS = ("trl", "mm", "mm, plain", "mm-pbkd")
GENERATING = ("trl, generating", "mm, generating")
LIGER = "trl, fused JSD of Liger"


def tokenizer_of(options: argparse.Namespace) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(options.vocab)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w2")


def make_model(options: argparse.Namespace, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    return model.to(options.device, getattr(torch, options.dtype))


class Given:
    """Before a trainer: completions of full length, the same for every kind."""

    def _generate(self, prompts):
        prompt_ids, _, _ = self._tokenize_prompts(prompts)
        rng = random.Random(0)
        words = range(2, len(self.processing_class))
        completions = [rng.choices(words, k=self.max_completion_length) for _ in prompts]
        return prompt_ids, completions, None, None, []


class GivenTRL(Given, DistillationTrainer):
    pass


class GivenMM(Given, MMPbKDTrainer):
    pass


def plain_moments(student, teacher, q_NE=None, q_embedding_VE=None, *, q_bound, temperature, **_) -> MomentOutput:
    """`moment_matching` at beta = 1 with whole tables of logits."""
    log_pi = (student.hidden_NH @ student.weight_VH.T).float().div(temperature).log_softmax(-1)
    log_mu = (teacher.hidden_NH @ teacher.weight_VH.T).float().div(temperature).log_softmax(-1)
    q = q_bound * torch.tanh((q_NE @ q_embedding_VE.T).float() / q_bound)
    pi, mu = log_pi.exp(), log_mu.exp()
    fixed_pi = pi.detach()
    return MomentOutput(
        divergence_N=(pi * (log_pi - log_mu)).sum(-1),
        gap_N=((mu - pi) * q.detach()).sum(-1),
        q_gap_N=((mu - fixed_pi) * q).sum(-1),
        entropy_N=-(fixed_pi * log_pi.detach()).sum(-1),
        q_abs_N=(fixed_pi * q.detach().abs()).sum(-1),
        q_saturation_N=(fixed_pi * (q.detach().abs() > 0.99 * q_bound)).sum(-1),
        logps_N=log_pi.new_zeros(len(log_pi)),
    )


def liger_divergence(hidden_s, hidden_t, weight_s, weight_t, mask, beta, **_):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    width = hidden_s.size(-1)
    rows = mask.reshape(-1) != 0
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta)(
        hidden_s.reshape(-1, width)[rows],
        weight_s,
        hidden_t.reshape(-1, hidden_t.size(-1))[rows],
        weight_t,
        torch.zeros(int(rows.sum()), dtype=torch.long, device=mask.device),
    )
    return loss, loss.detach() * 0, rows.sum()


def make_trainer(kind: str, options: argparse.Namespace) -> Any:
    tokenizer = tokenizer_of(options)
    text = " ".join(f"w{2 + i}" for i in range(options.prompt))
    answer = " ".join(f"w{2 + i}" for i in range(options.length - 1))
    rows = Dataset.from_list([{"prompt": text}] * options.rows)
    pairs = [{"prompt": text, "chosen": " " + answer, "rejected": " w3" + answer[2:]}] * 2 * options.rows
    ours = kind.startswith("mm")
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": options.rows,
        "max_completion_length": options.length,
        "use_cpu": options.device == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        # Answers of full length, so that every kind generates as much
        "generation_kwargs": {"min_new_tokens": options.length},
    }
    arguments: dict[str, Any] = {}
    if kind == "mm-pbkd":
        settings |= {"q_warmup_steps": 0, "pair_max_length": options.prompt + options.length}
        arguments["preference_dataset"] = Dataset.from_list(pairs)
    generates = kind in GENERATING
    trainer_class = (
        (MMPbKDTrainer if generates else GivenMM) if ours else DistillationTrainer if generates else GivenTRL
    )
    trainer = trainer_class(
        model=make_model(options, 0),
        teacher_model=make_model(options, 1),
        args=(MMPbKDConfig if ours else DistillationConfig)(**settings),
        train_dataset=rows,
        processing_class=tokenizer,
        **arguments,
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    if ours:
        # At zero, where it starts, Q would be spared some of its work
        with torch.no_grad():
            trainer.adversary.q.outputs.normal_(generator=torch.Generator(options.device).manual_seed(0))
        trainer.adversary.optimizer = torch.optim.SGD(trainer.adversary.q.parameters(), lr=0.0)  # and stays what it is
    return trainer


def step(kind: str, trainer: Any, options: argparse.Namespace) -> float:
    """One training step, but for the student's optimizer, which is everyone's."""
    trainer.model.zero_grad()
    rows = [trainer.train_dataset[i] for i in range(options.rows)]
    original = mm_pbkd_step.moment_matching
    if kind == "mm, plain":
        mm_pbkd_step.moment_matching = plain_moments
    try:
        loss = trainer.training_step(trainer.model, rows, None)
    finally:
        mm_pbkd_step.moment_matching = original
    return loss.item()


def patch_liger(kind: str) -> None:
    import trl.trainer.distillation_trainer as module

    if kind == LIGER:
        module._chunked_divergence_loss = liger_divergence


def run_alone(options: argparse.Namespace) -> None:
    """Prints the peak of memory of one step, MiB."""
    patch_liger(options.only)
    trainer = make_trainer(options.only, options)
    if options.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    step(options.only, trainer, options)
    peak = resident("VmHWM") if options.device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    print(json.dumps(peak))


def peak_memory(kind: str, options: argparse.Namespace) -> float:
    names = ("vocab", "hidden", "layers", "rows", "prompt", "length", "device", "dtype")
    arguments = [f"--{name}={getattr(options, name)}" for name in names]
    command = [sys.executable, __file__, *arguments, f"--only={kind}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    kinds = [*KINDS, *GENERATING]
    trainers = {kind: make_trainer(kind, options) for kind in kinds}
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    losses, rng = {}, random.Random(0)
    for round_ in range(options.rounds + 1):
        for kind in rng.sample(kinds, len(kinds)):
            synchronize(options.device)
            start = clock()
            losses[kind] = step(kind, trainers[kind], options)
            synchronize(options.device)
            if round_ > 0:
                seconds[kind].append(clock() - start)
        print(f"vocabulary {options.vocab}, round {round_} of {options.rounds}", flush=True)
    assert abs(losses["mm"] - losses["mm, plain"]) < 1e-3 * abs(losses["mm"]), losses
    del trainers
    memory = {kind: peak_memory(kind, options) for kind in KINDS}
    against = {"trl, generating": "trl, generating", "mm, generating": "trl, generating"}
    return {
        "vocab": options.vocab,
        "loss": losses,
        "median seconds": {kind: statistics.median(values) for kind, values in seconds.items()},
        "ratio of seconds to trl": {
            kind: statistics.median(a / b for a, b in zip(values, seconds[against.get(kind, "trl")], strict=True))
            for kind, values in seconds.items()
        },
        "peak MiB": memory,
        "memory ratio to trl": {kind: value / memory["trl"] for kind, value in memory.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = (("hidden", 256), ("layers", 8), ("rows", 4), ("prompt", 64), ("length", 128), ("rounds", 3))
    for name, default in shapes:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    if options.device == "cpu":
        torch.set_num_threads(1)
    vocabularies = options.vocab
    options.vocab = vocabularies[0]
    if options.only:
        run_alone(options)
        return
    results = []
    for options.vocab in vocabularies:
        results.append(measure(options))
        if options.device == "cuda" and find_spec("liger_kernel"):
            results[-1][LIGER] = {"peak MiB": peak_memory(LIGER, options)}
    found = {
        "shapes": {name: getattr(options, name) for name, _ in shapes} | {"dtype": options.dtype},
        "hardware": processor(options.device),
        "versions": {name: version(name) for name in ("torch", "trl", "transformers", "trl-kd")},
        "results": results,
    }
    out = Path(__file__).parent / "results" / f"white_box_{options.device}.json"
    out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
