"""What `PbKDRounds` refuses before any weight is loaded, and what it is in words: the settings that a resume compares."""

import inspect
import json
from collections import Counter
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR

from trl_kd.pairs import build_pairs
from trl_kd.pairs.checks import CHECKED_ROWS, check_asked_anew, check_parts
from trl_kd.pairs.fetched import FetchedAnswers
from trl_kd.pairs.labels import describe_preference
from trl_kd.pairs.pairing import PairingSettings
from trl_kd.pairs.prompts import Fingerprint, PromptRow, read_prompts
from trl_kd.pairs.readonly_store import resume_usage
from trl_kd.sampling import Request
from trl_kd.sampling.prompts import encode_prompt
from trl_kd.trainers.common.config_checks import check_integer, check_schedule, extend_config
from trl_kd.trainers.common.pair_rows import each_dataset
from trl_kd.trainers.common.student_head import check_student, check_student_tokens
from trl_kd.trainers.common.tokenizer import load_processing_class
from trl_kd.trainers.pbkd.data import prepare_rows
from trl_kd.trainers.rounds.folder import TRAINED, as_json, compared_settings


logger = get_logger(__name__)


_OURS = {"prompts", "teacher", "student", "preference", "output_dir", "num_teacher_samples", "num_student_samples"}
_REFUSED = {"shard", "relabel"}
PAIRS_OPTIONS = set(inspect.signature(build_pairs).parameters) - _OURS - _REFUSED
"""What `PbKDRounds` passes on to `build_pairs` as it is."""

_CHOICES = {"reference": ("start", "previous"), "optimizer": ("fresh", "carried"), "schedule": ("all", "round")}
_MUTATING = ("pissa", "olora", "corda", "loftq")
"""Initialisations of LoRA that change the base model's weights, so that start plus adapter is no longer the student."""


def check_rounds(rounds: Any) -> None:
    """
    Checks everything about a [`PbKDRounds`] that needs no weights.

    Raises:
        `ValueError`, `TypeError`: the sentence names the argument, its value and the way out.
    """
    rounds.args = _as_begun(rounds.args, rounds.folder.begun_with)
    if rounds.optimizer is None:
        rounds.optimizer = _optimizer(rounds.args, rounds.folder.begun_with)
    _check_numbers(rounds)
    if not callable(rounds.student):
        raise TypeError(
            f"`student` is {rounds.student!r}: give `SamplingSettings`, or a function of the model's name and the round's "
            "number that returns a sampler. The student itself is `model`."
        )
    unknown = sorted(set(rounds.pairs_options) - PAIRS_OPTIONS)
    if unknown:
        raise TypeError(
            f"`{unknown[0]}` is no argument of `PbKDRounds`, and none of `build_pairs` that it passes on "
            f"({', '.join(sorted(PAIRS_OPTIONS))})."
        )
    PairingSettings(**{name: rounds.pairs_options[name] for name in _PAIRING if name in rounds.pairs_options})
    _check_model(rounds)
    embeddings = check_student(rounds.model, rounds.args)
    tokenizer = load_processing_class(rounds.model, rounds.args)  # or the sentence that names the model
    check_student_tokens(rounds.model, getattr(tokenizer, "tokenizer", tokenizer), embeddings)
    check_asked_anew(rounds.preference, "preference")
    first = next(read_prompts(rounds.prompts, batch_size=CHECKED_ROWS))
    teacher = rounds.teacher.sampler if isinstance(rounds.teacher, FetchedAnswers) else rounds.teacher
    sources = {
        "teacher": (teacher, rounds.num_teacher_samples),
        "student": (rounds.student(rounds.model, 1), rounds.num_student_samples),
    }
    if getattr(sources["student"][0], "is_lookup", False):
        raise ValueError(
            "`student` looks its answers up, and each round's student answers anew: give one that samples."
        )
    check_parts(first, sources, rounds.preference)
    _check_length(first, getattr(tokenizer, "tokenizer", tokenizer), rounds.args.max_length)
    # The first trainer would refuse it when the pairs of a round are paid for
    each_dataset(rounds.eval_dataset, lambda dataset, name: prepare_rows(dataset, name, rounds.args))
    _warn_of_longer_schedule(rounds)


def _check_length(rows: list[PromptRow], tokenizer: Any, limit: int | None) -> None:
    requests = [Request(row.key, row.prompt, (0,), row.columns) for row in rows]
    shortest = min(len(encode_prompt(tokenizer, request, {})) for request in requests)
    if limit is not None and shortest >= limit:
        raise ValueError(
            f"`max_length` is {limit}, and the shortest of the first {len(rows)} prompts has {shortest} tokens, which "
            "leaves none of a response: raise it."
        )


_PAIRING = ("policy", "max_pairs_per_prompt", "truncated", "seed", "reasoning")


def _check_numbers(rounds: Any) -> None:
    for name in ("rounds", "num_teacher_samples", "num_student_samples"):
        check_integer(name, getattr(rounds, name), least=1)
    if not isinstance(rounds.prompts, Dataset):
        raise ValueError(
            f"`prompts` is a {type(rounds.prompts).__name__}, and rounds read it again and again, in parts: give a "
            "`Dataset` with a column 'prompt'."
        )
    if not len(rounds.prompts):
        raise ValueError("`prompts` is empty: it needs at least one row.")
    if rounds.prompts_per_round is not None:
        check_integer("prompts_per_round", rounds.prompts_per_round, least=1)
        if rounds.prompts_per_round > len(rounds.prompts):
            raise ValueError(
                f"`prompts_per_round` is {rounds.prompts_per_round}, but there are {len(rounds.prompts)} prompts: lower it, "
                "or leave it out to take all of them in each round."
            )
    for name, choices in _CHOICES.items():
        if getattr(rounds, name) not in choices:
            raise ValueError(f"`{name}` is {getattr(rounds, name)!r}: use {' or '.join(map(repr, choices))}.")


def _check_model(rounds: Any) -> None:
    model, peft = rounds.model, rounds.peft_config
    if not isinstance(model, str):
        raise TypeError(
            f"`model` is a {type(model).__name__}: give the name of the start, a Hub id or a folder. Each round loads it "
            "again, as the reference."
        )
    if Path(model, "adapter_config.json").is_file():
        raise ValueError(
            f"`model` is {model!r}, an adapter: merge it into its base model first (`merge_and_unload` of PEFT), and save "
            "that."
        )
    args = rounds.args
    if args.eval_strategy != "no" and rounds.eval_dataset is None:
        raise ValueError(f"`eval_strategy` is {args.eval_strategy.value!r}, but `eval_dataset` is not given: give it.")
    if rounds.reference == "previous" and not args.has_preference_term:
        raise ValueError(
            "`reference` is 'previous', which only the preference term uses, and that is off, since `dual_init` and "
            "`dual_learning_rate` are 0: drop `reference`, or set `dual_init` above 0."
        )
    if not isinstance(check_schedule(args), LambdaLR) and rounds.schedule == "all":
        raise ValueError(
            f"`schedule` is 'all', but `lr_scheduler_type` is {args.lr_scheduler_type.value!r}, which is not of such a kind "
            "that rounds could share it: use 'round', or another scheduler."
        )
    if rounds.optimizer == "carried" and _is_sharded(args):
        raise ValueError(
            "`optimizer` is 'carried', but under FSDP or DeepSpeed its state is cut up among the processes: use 'fresh'."
        )
    if peft is None:
        return
    if getattr(peft, "is_prompt_learning", False):
        raise ValueError(f"`peft_config` is a {type(peft).__name__}, which learns a prompt: only LoRA can be sampled.")
    init = getattr(peft, "init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_MUTATING):
        raise ValueError(
            f"`peft_config` has `init_lora_weights` = {init!r}, which changes the start's own weights: they would no longer "
            "be the reference. Use True or 'gaussian'."
        )
    if args.deepspeed:
        raise ValueError(
            "`peft_config` is set, and `deepspeed` too: rounds of LoRA load adapters into a whole model. Use DDP."
        )
    quantized = rounds.quantization_config is not None or any(
        name.startswith(("load_in_", "quantization_config")) for name in args.model_init_kwargs or {}
    )
    if rounds.reference == "previous" and quantized:
        raise ValueError(
            "`reference` is 'previous', but the start is quantized, and an adapter cannot be merged into it without loss: "
            "use 'start', whose reference is the start without its adapter."
        )


def _is_sharded(args: Any) -> bool:
    sharded = args.distributed_state.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    return bool(sharded or args.deepspeed or args.fsdp)


def _optimizer(args: Any, settings: dict[str, Any]) -> str:
    """What becomes of the optimizer where nothing is said: as in the rounds that are there ("fresh" was the default)."""
    if settings:
        return settings.get("optimizer", "fresh")
    return "fresh" if _is_sharded(args) else "carried"


def _as_begun(args: Any, settings: dict[str, Any]) -> Any:
    """Rounds on the CPU that were begun in bfloat16, when that was the default there too, go on so."""
    if getattr(args, "bf16_is_settled", False) and args.use_cpu and settings.get("bf16"):
        logger.warning("`bf16` is True, since the rounds in `output_dir` were begun so.")
        return extend_config(args, type(args), bf16=True)
    return args


def describe_rounds(rounds: Any) -> dict[str, Any]:
    """Everything that the rounds depend on but their number, as JSON."""
    prompts = Fingerprint()
    for _ in read_prompts(rounds.prompts, fingerprint=prompts):
        pass
    eval_rows = None if rounds.eval_dataset is None else "given"
    described = {
        "model": rounds.model,
        "prompts": prompts.describe(),
        "teacher": rounds.teacher.describe(),
        "student": rounds.student(rounds.model, 1).describe(),
        "preference": describe_preference(rounds.preference),
        **{name: getattr(rounds, name) for name in ("prompts_per_round", "accumulate", *_CHOICES)},
        **{name: getattr(rounds, name) for name in ("num_teacher_samples", "num_student_samples")},
        "pairs": {name: rounds.pairs_options[name] for name in _PAIRING if name in rounds.pairs_options},
        "peft_config": None if rounds.peft_config is None else rounds.peft_config.to_dict(),
        "quantization_config": rounds.quantization_config,
        "eval_dataset": eval_rows,
        "num_processes": rounds.num_processes,
    }
    return as_json(described) | compared_settings(rounds.args)


def _warn_of_longer_schedule(rounds: Any) -> None:
    """Says that rounds were trained with the schedule of fewer of them, which has come to its end already."""
    before = [record.get("schedule_rounds") for record in rounds.folder.records() if record["stage"] == TRAINED]
    told = before[-1] if before else None
    if rounds.schedule == "all" and told is not None and told < rounds.rounds and len(before) < rounds.rounds:
        logger.warning(
            f"{len(before)} of the rounds are finished, with a learning rate that has gone through its schedule. The "
            f"next go on in one over {rounds.rounds}, where it is higher than it was at the end, and q of the imitation "
            "term may be lower. Only in a new `output_dir` do all have one schedule."
        )


def no_pairs(rounds: Any, number: int) -> ValueError:
    """What to say of a round that has nothing to train on: who did not answer, and why."""
    folder = rounds.folder.pairs(number)
    answers = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["answers"]
    told = [_answered(who, of) for who, of in answers.items()]
    samples = tuple(range(rounds.num_teacher_samples))
    rows = (row for rows in read_prompts(rounds.prompts_of(number)) for row in rows)
    requests = [Request(f"{row.key}/{row.index}", row.prompt, samples, row.columns) for row in rows]
    reasons = Counter(answer.finish_reason for _, _, answer in rounds.teacher.sample(requests) if answer.text is None)
    why = ", ".join(f"{reason} ({count})" for reason, count in reasons.items() if reason is not None)
    return ValueError(
        f"Round {number} has no pairs to train on: {', '.join(told)}. The teacher is {rounds.teacher.describe()}"
        f"{f'; where it did not answer, the finish reasons are {why}' if why else ''}. "
        f"{_way_out(rounds, answers)}, and another `output_dir`: `{folder}` keeps what was said."
    )


def _answered(who: str, answers: dict[str, Any]) -> str:
    told = f"the {who} answered {answers['answers'] - answers['refused']} of {answers['answers']} times"
    return f"{told}, {answers['truncated']} of them cut off" if answers["truncated"] else told


def _way_out(rounds: Any, answers: dict[str, Any]) -> str:
    if rounds.pairs_options.get("truncated") == "drop" and any(of["truncated"] for of in answers.values()):
        return "Answers that are cut off are dropped (`truncated` = 'drop'): give more `max_new_tokens`, or 'keep'"
    return "Give one that answers, or other prompts"


def resume_rounds_usage(rounds: Any) -> None:
    """Lets teacher and judge go on from what all rounds have used, so that their caps hold for all rounds together."""
    folder, numbers = rounds.folder, range(1, rounds.rounds + 1)
    places = [*map(folder.pairs, numbers), *(folder.after(number) / "pairs" for number in numbers)]
    teacher = getattr(rounds.teacher, "sampler", None)
    resume_usage([(teacher, "teacher", [folder.teacher]), (rounds.preference, "judge", places)])
