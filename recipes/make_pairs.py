"""Makes preference pairs for a recipe: teacher and student each answer every prompt of a dataset once.

```bash
python recipes/make_pairs.py --dataset openai/gsm8k --dataset_config main --prompt_column question --verifier gsm8k \
    --teacher Qwen/Qwen2.5-7B-Instruct --student Qwen/Qwen2.5-0.5B-Instruct --output runs/gsm8k/pairs.jsonl
```

Each model is loaded after the other and generates with transformers, which is slow but needs nothing else.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_kd.evaluation.generation import generate
from trl_kd.pairs import count_pairs, pair_row


def last_number(text: str) -> float | None:
    """The last number of a text, which is where GSM8K's answers and most responses to it have the result."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def verify_gsm8k(row: dict[str, Any], response: str) -> bool:
    """Whether a response ends in the result of a GSM8K question."""
    return last_number(response) == last_number(row["answer"])


VERIFIERS = {"gsm8k": verify_gsm8k}


def main(argv: list[str] | None = None) -> None:
    """Answers, compares and writes the pairs as JSON lines, with messages for prompt and responses."""
    args = _parser().parse_args(argv)
    rows = load_dataset(args.dataset, args.dataset_config, split=args.split)
    rows = list(rows.select(range(min(args.limit or len(rows), len(rows)))))
    prompts = [_as_messages(row[args.prompt_column]) for row in rows]
    teacher, student = (
        _answer(name, prompts, args, seed) for seed, name in enumerate((args.teacher, args.student), args.seed)
    )
    pairs = [
        pair_row(prompt, _turn(a), _turn(b), _preference(args.verifier, row, a, b))
        for row, prompt, a, b in zip(rows, prompts, teacher, student, strict=True)
    ]
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs), encoding="utf-8")
    print(f"{output}: {count_pairs(pairs)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Makes preference pairs of a teacher's and a student's responses.")
    parser.add_argument("--dataset", required=True, help="Hub id or builder of the prompts")
    parser.add_argument("--dataset_config", help="configuration of the dataset")
    parser.add_argument("--split", default="train")
    parser.add_argument("--prompt_column", default="prompt", help="column of the prompts, text or messages")
    parser.add_argument("--limit", type=int, help="use the first rows only")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument(
        "--verifier", choices=sorted(VERIFIERS), help="who is right; without it the teacher is preferred"
    )
    parser.add_argument("--max_new_tokens", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True)
    return parser


def _as_messages(prompt: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _turn(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _preference(verifier: str | None, row: dict[str, Any], teacher: str, student: str) -> float:
    """P(teacher's ≻ student's): ½ where both are right or both wrong."""
    if verifier is None:
        return 1.0
    return 0.5 + 0.5 * (VERIFIERS[verifier](row, teacher) - VERIFIERS[verifier](row, student))


def _answer(name: str, prompts: list[list[dict[str, str]]], args: argparse.Namespace, seed: int) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(name)
    texts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return generate(model, tokenizer, texts, args.max_new_tokens, seed=seed, batch_size=args.batch_size)


if __name__ == "__main__":
    main()
