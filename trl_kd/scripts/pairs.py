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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trl_kd.pairs import build_pairs, merge_shards
from trl_kd.pairs.pairing import PairingSettings
from trl_kd.pairs.statistics import format_summary
from trl_kd.sampling.budget import BudgetExceeded
from trl_kd.sampling.server_errors import ServerError
from trl_kd.scripts.arguments import parse
from trl_kd.scripts.checks import check_hub
from trl_kd.scripts.errors import InputError, bad_input, one_line
from trl_kd.scripts.pairs_arguments import SOURCES, PairsArguments, check, parse_shard
from trl_kd.scripts.pairs_build import check_models, describe_prompts, load_prompts, make_preference, make_sampler
from trl_kd.scripts.pairs_dry_run import dry_run
from trl_kd.scripts.paths import option, shell


PROG = "trl-kd pairs"
PUSHED = ["README.md", "pairs.html", "summary.json", "data/*.parquet"]


def main(argv: list[str]) -> int:
    """Checks the arguments, builds or merges, and says what came of it."""
    args: PairsArguments = parse((PairsArguments,), argv, PROG, is_launched=False).values[0]
    check(args)
    assert args.output_dir is not None
    if args.push_to_hub:
        _check_hub(args)
    if args.merge is not None:
        with bad_input():
            merge_shards(args.merge, args.output_dir)
    else:
        with bad_input():
            prompts = load_prompts(args)
            sources = {source: make_sampler(args, source) for source in SOURCES}
            check_models(args, sources)
            preference = make_preference(args, sources["student"])
            seed = args.seed if args.pairing_seed is None else args.pairing_seed
            pairing = PairingSettings(args.policy, args.max_pairs_per_prompt, args.truncated, seed, args.reasoning)
        with _said():
            if args.dry_run:
                print(_dry_run(args, prompts, sources, preference, pairing))
                return 0
            build_pairs(
                prompts,
                **sources,
                preference=preference,
                output_dir=args.output_dir,
                num_teacher_samples=args.num_teacher_samples,
                num_student_samples=args.num_student_samples,
                **pairing.describe(),
                shard=parse_shard(args.shard),
                relabel=args.relabel,
                prompts_from=describe_prompts(args),
            )
    _report(args.output_dir)
    if args.push_to_hub:
        _push(args)
    return 0


def _dry_run(args: PairsArguments, prompts: Any, sources: dict[str, Any], preference: Any, pairing: Any) -> str:
    assert args.output_dir is not None
    numbers = {source: getattr(args, f"num_{source}_samples") for source in SOURCES}
    return dry_run(
        prompts,
        {source: (sampler, numbers[source]) for source, sampler in sources.items()},
        preference,
        pairing,
        args.output_dir,
        parse_shard(args.shard),
        args.relabel,
    )


@contextmanager
def _said() -> Iterator[None]:
    """What stops a build is one line, and the answers so far are kept."""
    try:
        with bad_input():
            yield
    except InputError as error:  # said in Python's words by those whom Python calls too
        raise InputError(str(error).replace("`relabel=True`", "`--relabel`")) from error
    except (BudgetExceeded, ServerError) as error:
        raise InputError(one_line(error)) from error
    except KeyboardInterrupt:
        print("\nStopped. Answers and labels are kept: the same command goes on from here.", file=sys.stderr)
        raise


def _report(output_dir: str) -> None:
    summary = json.loads((Path(output_dir) / "summary.json").read_text(encoding="utf-8"))
    print(format_summary(summary))
    if not summary["pairs"]["total"]:
        print(
            f"\nWarning: there is not a single pair in {output_dir}, and nothing to train on. Each needs an answer of both: "
            "look at the answers above that are without a text, truncated (and dropped), or null in their column.",
            file=sys.stderr,
        )
        return
    train = shell("trl-kd", "pbkd", *option("dataset_name", output_dir))
    print(f"\nPairs: {output_dir}   ({train}, or trl_kd.pairs.load_pairs)")
    print(f"Page:  {Path(output_dir) / 'pairs.html'}")


def _hub_name(args: PairsArguments) -> str:
    assert args.output_dir is not None
    return args.hub_dataset_id or Path(args.output_dir).resolve().name


def _check_hub(args: PairsArguments) -> None:
    field = "hub_dataset_id" if args.hub_dataset_id else "output_dir"
    check_hub(_hub_name(args), field, getattr(args, field), "hub_dataset_id")


def _push(args: PairsArguments) -> None:
    from huggingface_hub import HfApi

    assert args.output_dir is not None
    api = HfApi()
    repo = api.create_repo(_hub_name(args), repo_type="dataset", private=args.hub_private_repo, exist_ok=True)
    api.upload_folder(
        repo_id=repo.repo_id,
        repo_type="dataset",
        folder_path=args.output_dir,
        allow_patterns=PUSHED,
        delete_patterns="data/*.parquet",
        commit_message="Preference pairs by trl-kd",
    )
    print(f"Dataset pushed to the Hub: {repo}")
