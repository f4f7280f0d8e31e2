"""Answers a second of `LocalSampler` beside TRL's own generation path: same model, prompts, settings; one interleaved run.

    python benchmarks/sampling_speed.py                                  # CPU, a small Llama-type model, about 4 minutes
    python benchmarks/sampling_speed.py --device cuda --hidden 1024 --layers 16 --prompts 512

TRL's path is what its online trainers do: `unwrap_model_for_generation` and `generate` on fixed batches in the order of the
dataset, each prompt repeated once an answer, at batch sizes 8, 16, 32 and 64. Prompts have 16 to 192 tokens (log-uniform).
The model is random, with a bias on its end token by which answers end after a geometrically distributed number of tokens,
or at `new-tokens`. Each round runs every path once, in changing order; a ratio is the median over rounds, against the batch
size that is TRL's fastest in the median. "one answer" asks as many answers in all, one a prompt, so that no prefill is
shared. Lengths are random: the ratio of tokens a second is beside that of answers a second. On a CPU a second is one of
processor time of a single thread, so that what else runs on the machine matters less.

transformers' continuous batching (`generate_batch`) is timed once in each part, since it takes several times as long on a
CPU; `LocalSampler` does not use it. Results go to benchmarks/results/sampling_speed_<device>.json.
"""

import argparse
import json
import logging
import math
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import pad

from trl_kd.sampling import Request, SamplingSettings
from trl_kd.sampling.local import LocalSampler


BATCH_SIZES = (8, 16, 32, 64)
EOS = 1


def make_model(options: argparse.Namespace) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random model whose answers end after `options.mean_tokens` tokens on average, were they not cut off."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(options.vocab)}, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w2")
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        pad_token_id=0,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    head = torch.nn.Linear(options.hidden, options.vocab)
    head.weight = model.lm_head.weight
    torch.nn.init.zeros_(head.bias)
    head.bias.data[EOS] = math.log(options.vocab / options.mean_tokens)
    model.lm_head = head
    return model.to(options.device), tokenizer


def make_prompts(options: argparse.Namespace, number: int) -> list[str]:
    rng = random.Random(options.seed)
    low, high = math.log(16), math.log(192)
    return [
        " ".join(f"w{rng.randrange(3, options.vocab)}" for _ in range(round(math.exp(rng.uniform(low, high)))))
        for _ in range(number)
    ]


class Paths:
    """Each path answers every prompt `answers` times and returns how many tokens the answers have."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.model, self.tokenizer = make_model(options)
        self.prompts = make_prompts(options, options.prompts)
        self.accelerator = Accelerator(cpu=options.device == "cpu")
        self.round = 0
        settings = {"max_new_tokens": options.new_tokens, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
        self.generation = {"do_sample": True, "pad_token_id": 0, "eos_token_id": [EOS], **settings}

    def trl(self, batch_size: int, answers: int) -> list[int]:
        rows = [prompt for prompt in self.prompts for _ in range(answers)]
        config = GenerationConfig(**self.generation, disable_compile=True)
        torch.manual_seed(self.round)
        lengths = []
        for start in range(0, len(rows), batch_size):
            ids = self.tokenizer(rows[start : start + batch_size])["input_ids"]
            tensors = [torch.tensor(row) for row in ids]
            input_ids = pad(tensors, padding_value=0, padding_side="left").to(self.model.device)
            mask = pad([torch.ones_like(t) for t in tensors], padding_value=0, padding_side="left").to(
                self.model.device
            )
            with (
                unwrap_model_for_generation(
                    self.model, self.accelerator, generation_kwargs=self.generation
                ) as unwrapped,
                torch.no_grad(),
            ):
                output = unwrapped.generate(input_ids=input_ids, attention_mask=mask, generation_config=config)
            completions = output[:, input_ids.size(1) :].tolist()
            completions = [row[: row.index(EOS) + 1] if EOS in row else row for row in completions]
            self.tokenizer.batch_decode(completions, skip_special_tokens=True)
            lengths += map(len, completions)
        return lengths

    def local(self, answers: int) -> list[int]:
        settings = SamplingSettings(max_new_tokens=self.options.new_tokens, seed=self.round)
        sampler = LocalSampler(self.model, settings, tokenizer=self.tokenizer)
        requests = (Request(str(i), prompt, tuple(range(answers))) for i, prompt in enumerate(self.prompts))
        return [answer.tokens or 0 for _, _, answer in sampler.sample(requests)]

    def continuous_batching(self, answers: int) -> list[int]:
        rows = [ids for ids in self.tokenizer(self.prompts)["input_ids"] for _ in range(answers)]
        torch.manual_seed(self.round)
        with torch.no_grad():
            outputs = self.model.generate_batch(rows, generation_config=GenerationConfig(**self.generation))
        completions = [output.generated_tokens for output in outputs.values()]
        self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        return [len(completion) for completion in completions]


def timed(run: Callable[[], list[int]], expected: int, options: argparse.Namespace) -> tuple[float, float]:
    """Answers and tokens a second."""
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    start = clock()
    lengths = run()
    seconds = clock() - start
    assert len(lengths) == expected
    return len(lengths) / seconds, sum(lengths) / seconds


def measure(paths: Paths, answers: int, options: argparse.Namespace) -> dict:
    paths.prompts = make_prompts(options, options.prompts * options.answers // answers)
    expected = len(paths.prompts) * answers
    runs = {f"trl {size}": partial(paths.trl, size, answers) for size in BATCH_SIZES}
    runs["local"] = partial(paths.local, answers)
    rng = random.Random(options.seed)
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for paths.round in range(options.rounds):
        for name in rng.sample(list(runs), len(runs)):
            speeds[name].append(timed(runs[name], expected, options))
            print(f"{name}: {speeds[name][-1][0]:.2f} answers/s", flush=True)
    try:
        continuous = timed(lambda: paths.continuous_batching(answers), expected, options)[0]
    except (ImportError, RuntimeError, ValueError) as error:
        continuous = f"{type(error).__name__}: {str(error)[:200]}"
    medians = {name: statistics.median(answers for answers, _ in values) for name, values in speeds.items()}
    best = max((name for name in runs if name.startswith("trl")), key=medians.__getitem__)

    def ratio(unit: int) -> dict[str, float]:
        values = [a[unit] / b[unit] for a, b in zip(speeds["local"], speeds[best], strict=True)]
        return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}

    return {
        "prompts": len(paths.prompts),
        "answers a prompt": answers,
        "answers/s, median": medians | {"continuous batching (once)": continuous},
        "TRL's fastest": best,
        "local / TRL's fastest, answers/s": ratio(0),
        "local / TRL's fastest, tokens/s": ratio(1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        *(("hidden", 128), ("layers", 4), ("vocab", 8000), ("seed", 0)),
        *(("prompts", 24), ("answers", 4), ("new-tokens", 64), ("mean-tokens", 40), ("rounds", 3)),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    if options.device == "cpu":
        torch.set_num_threads(1)

    paths = Paths(options)
    paths.local(1)  # warms up
    result = {
        "workload": {name: value for name, value in vars(options).items() if name != "device"},
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} thread, processor time"
        if options.device == "cpu"
        else torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "trl-kd")},
        "several answers": measure(paths, options.answers, options),
        "one answer": measure(paths, 1, options),
    }
    out = Path(__file__).parent / "results" / f"sampling_speed_{options.device}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
