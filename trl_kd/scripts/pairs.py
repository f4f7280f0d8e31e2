"""`trl-kd pairs`: preference pairs from teacher versus student.

```bash
trl-kd pairs --dataset_name my/prompts \\
    --teacher api:gpt-4o-mini --teacher_base_url http://localhost:8000/v1 --student Qwen/Qwen2.5-0.5B-Instruct \\
    --num_teacher_samples 1 --num_student_samples 4 --preference verifier:my_module.reward --output_dir pairs/
```

It may be stopped at any moment and started again by the same command.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from trl_kd.pairs import build_pairs, merge_shards
from trl_kd.pairs.prompts import read_prompts
from trl_kd.pairs.statistics import content_text, format_summary
from trl_kd.sampling import Request
from trl_kd.sampling.budget import BudgetExceeded
from trl_kd.sampling.server_errors import ServerError
from trl_kd.scripts.arguments import parse
from trl_kd.scripts.errors import InputError, bad_input, one_line
from trl_kd.scripts.pairs_arguments import (
    SOURCES,
    PairsArguments,
    check,
    load_prompts,
    make_preference,
    make_sampler,
    parse_shard,
)


PROG = "trl-kd pairs"
PUSHED = ["README.md", "pairs.html", "summary.json", "data/*.parquet"]


def main(argv: list[str]) -> int:
    """Checks the arguments, builds or merges, and says what came of it."""
    parsed = parse((PairsArguments,), argv, PROG)
    if parsed.launch_args:
        raise InputError(f"unknown key `{parsed.launch_args[0]}`: `{PROG} --help` lists the keys.")
    args: PairsArguments = parsed.values[0]
    check(args)
    assert args.output_dir is not None
    if args.merge is not None:
        with bad_input():
            merge_shards(args.merge, args.output_dir)
    else:
        with bad_input():
            prompts = load_prompts(args)
            sources = {source: make_sampler(args, source) for source in SOURCES}
            preference = make_preference(args)
        if args.dry_run:
            with _said():
                print(_dry_run(args, prompts, sources, preference))
            return 0
        with _said():
            build_pairs(
                prompts,
                **sources,
                preference=preference,
                output_dir=args.output_dir,
                num_teacher_samples=args.num_teacher_samples,
                num_student_samples=args.num_student_samples,
                policy=args.policy,
                max_pairs_per_prompt=args.max_pairs_per_prompt,
                truncated=args.truncated,
                seed=args.seed if args.pairing_seed is None else args.pairing_seed,
                shard=parse_shard(args.shard),
                relabel=args.relabel,
            )
    _report(args.output_dir)
    if args.push_to_hub:
        _push(args)
    return 0


@contextmanager
def _said() -> Iterator[None]:
    """What stops a build is one line, and the answers so far are kept."""
    try:
        with bad_input():
            yield
    except (BudgetExceeded, ServerError) as error:
        raise InputError(one_line(error)) from error
    except KeyboardInterrupt:
        print("\nStopped. Answers and labels are kept: the same command goes on from here.", file=sys.stderr)
        raise


def _report(output_dir: str) -> None:
    summary = json.loads((Path(output_dir) / "summary.json").read_text(encoding="utf-8"))
    print(format_summary(summary))
    print(f"\nPairs: {output_dir}   (trl-kd pbkd --dataset_name {output_dir}, or trl_kd.pairs.load_pairs)")
    print(f"Page:  {Path(output_dir) / 'pairs.html'}")


def _push(args: PairsArguments) -> None:
    from huggingface_hub import HfApi

    assert args.output_dir is not None
    api = HfApi()
    name = args.hub_dataset_id or Path(args.output_dir).resolve().name
    repo = api.create_repo(name, repo_type="dataset", private=args.hub_private_repo, exist_ok=True)
    api.upload_folder(
        repo_id=repo.repo_id,
        repo_type="dataset",
        folder_path=args.output_dir,
        allow_patterns=PUSHED,
        delete_patterns="data/*.parquet",
        commit_message="Preference pairs by trl-kd",
    )
    print(f"Dataset pushed to the Hub: {repo}")


def _dry_run(args: PairsArguments, prompts: Any, sources: dict[str, Any], preference: Any) -> str:
    """One answer of each source to the first prompt, its label, and what all of them would take."""
    row = next(read_prompts(prompts))[0]
    count = len(prompts) if hasattr(prompts, "__len__") else None
    table = [("prompts", "a stream" if count is None else str(count)), ("first prompt", _short(row.prompt))]
    answers = {}
    for source, sampler in sources.items():
        started = time.monotonic()
        with closing(sampler.sample([Request(row.key, row.prompt, (0,), row.columns)])) as answering:
            _, _, answer = next(answering)
        seconds = time.monotonic() - started
        answers[source] = answer.text
        reason = f" ({answer.finish_reason})" if answer.finish_reason else ""
        table.append((source, f"{_short(answer.text)}{reason}"))
        if not sampler.is_lookup:
            wanted = getattr(args, f"num_{source}_samples") * (count or 1)
            table.append(("", _estimate(sampler, answer, seconds, wanted, args.max_concurrency)))
    if None not in answers.values():
        columns = {name: [value] for name, value in row.columns.items()}
        columns |= {"first_source": ["teacher"], "second_source": ["student"]}
        label = preference([row.prompt], [answers["teacher"]], [answers["student"]], **columns)[0]
        table.append(("preference", f"P(teacher ≻ student) = {'unknown' if label is None else f'{label:g}'}"))
    width = max(len(name) for name, _ in table)
    lines = [f"  {name:<{width}}  {value}" for name, value in table]
    return "\n".join(["Dry run: one answer of each source, and nothing is written.", *lines])


def _estimate(sampler: Any, answer: Any, seconds: float, wanted: int, concurrency: int) -> str:
    """What all answers of a source would take, by its first one."""
    told = [f"{wanted} answers"]
    usage = getattr(sampler, "usage", None)
    if usage is None:
        told.append(f"{seconds:.1f} s for the first one, loading included; batches are faster")
        if answer.tokens is not None:
            told.append(f"about {answer.tokens * wanted:,} tokens")
    else:
        told.append(f"about {_duration(seconds * wanted / concurrency)}")
        told.append(f"{(usage.prompt_tokens + usage.completion_tokens) * wanted:,} tokens")
        if usage.cost:
            told.append(f"cost {usage.cost * wanted:.2f} at the prices given")
    return ", ".join(told)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} minutes"
        if seconds < 7200
        else f"{seconds / 3600:.1f} hours"
    )


def _short(text: Any) -> str:
    """A text, or messages, on one line."""
    if text is None:
        return "no answer"
    if not isinstance(text, str):
        text = " / ".join(f"{message.get('role')}: {content_text(message.get('content'))}" for message in text)
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:100]} …"
