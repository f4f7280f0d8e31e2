"""Share of GSM8K's test questions that models answer rightly, greedily, by the final number.

python recipes/gsm8k/accuracy.py Qwen/Qwen2.5-0.5B-Instruct runs/gsm8k/0.5b-pbkd
"""

import argparse
import json
import sys
from pathlib import Path

from trl_kd.evaluation.metrics import Accuracy
from trl_kd.preferences.reward_function import load_function
from trl_kd.sampling import Request, SamplingSettings
from trl_kd.sampling.local import LocalSampler
from trl_kd.scripts.data import load_split


correct = load_function(f"{Path(__file__).with_name('reward.py')}:correct")


def accuracy(model: str, questions: list[str], solutions: list[str], max_new_tokens: int, dtype: str) -> Accuracy:
    """Share of right answers. Each question is a user's message, as in `pairs.yaml`."""
    settings = SamplingSettings(temperature=0, max_new_tokens=max_new_tokens)
    sampler = LocalSampler(model, settings, model_init_kwargs={"dtype": dtype, "device_map": "auto"})
    requests = (Request(str(i), [{"role": "user", "content": question}]) for i, question in enumerate(questions))
    answers = {int(request.key): answer.text or "" for request, _, answer in sampler.sample(requests)}
    sampler.close()
    return Accuracy.of(correct(completions=[answers[i] for i in range(len(questions))], answer=solutions))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Share of GSM8K's test questions that models answer rightly.")
    parser.add_argument("models", nargs="+", help="Hub ids or folders")
    parser.add_argument(
        "--dataset_name", default="openai/gsm8k", help="Hub id, or a file with `question` and `answer`"
    )
    parser.add_argument("--dataset_config", default="main")
    parser.add_argument("--dataset_split", default="test")
    parser.add_argument("--skip_questions", type=int, default=0, help="leave out the first questions")
    parser.add_argument("--max_new_tokens", type=int, default=400)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    args = parser.parse_args(argv)
    data = load_split(args.dataset_name, args.dataset_config, args.dataset_split, streaming=False)
    rows = data[args.skip_questions :]
    results = {}
    for model in args.models:
        found = accuracy(model, rows["question"], rows["answer"], args.max_new_tokens, args.dtype)
        results[model] = vars(found)
        print(f"{model}: {found.value:.1%} right (95 % interval {found.low:.1%} to {found.high:.1%})")
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
