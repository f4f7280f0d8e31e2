"""`trl-kd pbkd --rounds N --dry_run`: what a round will do and what all of them take, then one answer of each source."""

import math
from pathlib import Path
from typing import Any

from trl import ModelConfig

from trl_kd.pairs.fetched import FetchedAnswers
from trl_kd.pairs.pairing import Candidate, PairingSettings, choose_pairs
from trl_kd.pairs.prompts import read_prompts
from trl_kd.scripts.dry_run import (
    Table,
    as_text,
    describe_end,
    describe_memory,
    describe_output,
    describe_teacher,
    describe_tokenizer,
    load_student_processor,
    pairs_memory,
    student_memory,
    teacher_memory,
)
from trl_kd.scripts.dry_run_training import describe_push, describe_settings, describe_weights
from trl_kd.scripts.memory import readable
from trl_kd.scripts.pairs_arguments import PairsArguments
from trl_kd.scripts.pairs_dry_run import dry_run as pairs_dry_run
from trl_kd.scripts.rounds import checked_rounds, read_pairs_config
from trl_kd.trainers.common.student_answers import LEAST_COMPARISONS
from trl_kd.trainers.rounds.folder import TRAINED


def dry_run(script_args: Any, training_args: Any, model_args: ModelConfig, processes: int = 1) -> str:
    """
    Args:
        script_args, training_args, model_args:
            The arguments of the command, checked.
        processes (`int`, *optional*, defaults to `1`):
            How many processes the run will have.

    Returns:
        A table of the rounds, made without weights, and that of `trl-kd pairs --dry_run` for the next round, for which each
        source is asked for one answer.

    Raises:
        `ValueError` or `InputError`: what the run itself would refuse.
    """
    rounds = checked_rounds(script_args, training_args, model_args, processes)
    what = "the rounds, then one answer of each source, and nothing is written"
    pairs = read_pairs_config(script_args, training_args, model_args)
    table = as_text(lambda: _describe(rounds, pairs, training_args, model_args, processes), what)
    done = _finished(rounds)
    if done == rounds.rounds or rounds.folder.ended() is not None:
        return table
    return f"{table}\n\nThe pairs of round {done + 1}. {_of_a_round(rounds, done + 1)}"


def _finished(rounds: Any) -> int:
    return sum(record["stage"] == TRAINED for record in rounds.folder.records())


def _describe(rounds: Any, pairs: PairsArguments, args: Any, model_args: ModelConfig, processes: int) -> Table:
    table, done = describe_output(args), _finished(rounds)
    after = ", after which no row teaches" if rounds.folder.ended() is not None else ""
    table.append(("rounds", f"{rounds.rounds}" + (f", of which {done} are finished{after}" if done else "")))
    prompts, each = len(rounds.prompts), rounds.prompts_per_round or len(rounds.prompts)
    table.append(("prompts", f"{each:,} a round, of {prompts:,}"))
    table += _describe_answers(rounds, each)
    sizes = _sizes(rounds, each)
    table.append(("pairs of a round", f"at most {sizes[0]:,}"))
    table.append(
        ("D in the last", f"at most {sizes[-1]:,}, {'all rounds' if rounds.accumulate else 'the newest alone'}")
    )
    tokenizer = load_student_processor(args, model_args)
    table += describe_tokenizer(tokenizer)
    table += describe_end(tokenizer, rounds.prompts[0], args, model_args)
    if args.teacher_model_name_or_path is not None:
        table += describe_teacher(getattr(tokenizer, "tokenizer", tokenizer), args, model_args)
    table += _describe_steps(sizes, args, processes)
    over = "one schedule over all rounds" if rounds.schedule == "all" else "a schedule for each round"
    table.append(("learning rate", f"{args.learning_rate:g}, {over} ({args.lr_scheduler_type.value})"))
    table.append(("optimizer", f"{rounds.optimizer} in each round"))
    table += [*describe_weights(args, model_args), *describe_settings(args)]
    where = Path(args.output_dir)
    table.append(
        ("saves", f"each round's pairs and student in {where / 'round-…'}, the last student and its card in {where}")
    )
    table += describe_push(args)
    if not args.has_preference_term:
        table.append(("preference term", "off: the teacher's answers are imitated, and no reference is loaded"))
    if args.student_wins == "gated":
        table.append(("student's wins", _describe_wins(rounds, each)))
    return table + _describe_memory(rounds, pairs, args, model_args)


def _describe_wins(rounds: Any, each: int) -> str:
    """Whether p̄ will have as many comparisons as it needs."""
    times = math.ceil(rounds.rounds * each / len(rounds.prompts)) if rounds.accumulate else 1
    most = times * rounds.num_student_samples
    told = f"imitated where {LEAST_COMPARISONS} answers to a prompt were compared; at most {most} are"
    return told if most >= LEAST_COMPARISONS else f"{told}: never"


def _describe_answers(rounds: Any, each: int) -> Table:
    """Answers to ask, and those of the teacher in all rounds, which are asked once."""
    met = len({row.key for k in _met(rounds) for rows in read_prompts(rounds.prompts_of(k)) for row in rows})
    asked = met * rounds.num_teacher_samples
    teacher = f"{asked:,} in all, each once" if isinstance(rounds.teacher, FetchedAnswers) else "read from a column"
    student = each * rounds.num_student_samples
    return [
        ("student answers", f"{student:,} a round, {student * (rounds.rounds + 1):,} in all (at the end once more)"),
        ("teacher answers", teacher),
    ]


def _met(rounds: Any) -> range:
    """The rounds after which no prompt is new."""
    if rounds.prompts_per_round is None:
        return range(1, 2)
    return range(1, min(rounds.rounds, math.ceil(len(rounds.prompts) / rounds.prompts_per_round)) + 1)


def _sizes(rounds: Any, each: int) -> list[int]:
    """The most pairs that D may have in each round."""
    everyone = [Candidate("teacher", f"t{sample}") for sample in range(rounds.num_teacher_samples)]
    everyone += [Candidate("student", f"s{sample}") for sample in range(rounds.num_student_samples)]
    new = each * len(choose_pairs("", everyone, _pairing(rounds)))
    return [new * (number if rounds.accumulate else 1) for number in range(1, rounds.rounds + 1)]


def _pairing(rounds: Any) -> PairingSettings:
    names = ("policy", "max_pairs_per_prompt", "truncated", "seed", "reasoning")
    options = rounds.pairs_options
    return PairingSettings(**{name: options[name] for name in names if name in options})


def _describe_steps(sizes: list[int], args: Any, processes: int) -> Table:
    batch = args.per_device_train_batch_size * processes * args.gradient_accumulation_steps
    told = f"{batch} rows a step"
    if args.max_steps > 0:
        return [("steps", f"{args.max_steps} a round, {args.max_steps * len(sizes):,} in all, {told}")]
    steps = [math.ceil(args.num_train_epochs * math.ceil(size / batch)) for size in sizes]
    range_ = f"{steps[0]:,}" if steps[0] == steps[-1] else f"{steps[0]:,} in the first to {steps[-1]:,} in the last"
    return [("steps", f"at most {range_} round, {sum(steps):,} in all: {args.num_train_epochs:g} epochs each, {told}")]


def _describe_memory(rounds: Any, pairs: PairsArguments, args: Any, model_args: ModelConfig) -> Table:
    _, size, trained, parts = student_memory(args, model_args)
    if args.has_preference_term and (not model_args.use_peft or rounds.reference == "previous"):
        parts["reference"] = size.bytes
    if args.teacher_model_name_or_path is not None:
        parts["teacher"] = teacher_memory(args)
    table = describe_memory(size, trained, parts, without="activations, logits and batches")
    sampling = {"student": size.bytes, **pairs_memory(pairs, args)}
    told = ", ".join(f"{name} {readable(value)}" for name, value in sampling.items())
    return [*table, ("memory to sample", f"about {readable(max(sampling.values()))}, one model at a time: {told}")]


def _of_a_round(rounds: Any, number: int) -> str:
    prompts, teacher = rounds.prompts_of(number), rounds.teacher
    if isinstance(teacher, FetchedAnswers) and not teacher.has_all(prompts):
        teacher = teacher.sampler
    sources = {
        "teacher": (teacher, rounds.num_teacher_samples),
        "student": (rounds.student(rounds.student_of(number), number), rounds.num_student_samples),
    }
    return pairs_dry_run(prompts, sources, rounds.preference, _pairing(rounds), rounds.folder.pairs(number))
