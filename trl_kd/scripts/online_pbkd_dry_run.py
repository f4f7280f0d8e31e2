"""`trl-kd online-pbkd --dry_run`: prompts, teacher, preferences, the reward model and its warm-up, sizes."""

from typing import Any

from datasets import Dataset

from trl_kd.scripts.dry_run import (
    SHOWN,
    Table,
    as_text,
    columns,
    dataset_name,
    describe_end,
    describe_memory,
    describe_output,
    describe_steps,
    describe_tokenizer,
    first_rows,
    load_student_processor,
    model_memory,
    pairs_memory,
    reward_model_memory,
    student_memory,
    tokenize_prompt,
)
from trl_kd.scripts.dry_run_training import describe_training
from trl_kd.scripts.online_pbkd_build import Parts, make_parts, said, teacher_folder
from trl_kd.scripts.pairs_arguments import is_server
from trl_kd.scripts.pairs_dry_run import ask_teacher
from trl_kd.trainers.common.held_out import LEAST_HELD_OUT
from trl_kd.trainers.online_pbkd.checks import check_parts, check_student_template
from trl_kd.trainers.online_pbkd.data import OnlineParts, reward_columns
from trl_kd.trainers.online_pbkd.learner import check_held_out
from trl_kd.trainers.online_pbkd.pool import PairPool


def dry_run(script_args: Any, training_args: Any, model_args: Any, mixture: Any, processes: int = 1) -> str:
    """
    Checks what can be checked before weights load. A teacher behind a server is asked for one answer.

    Args:
        script_args, training_args, model_args, mixture:
            The arguments of the command, checked.
        processes (`int`, *optional*, defaults to `1`):
            How many processes the run will have.

    Returns:
        The table.

    Raises:
        `ValueError` or `InputError`: what the run itself would refuse.
    """
    with said():
        return as_text(lambda: _describe(script_args, training_args, model_args, mixture, processes))


def _describe(script_args: Any, args: Any, model_args: Any, mixture: Any, processes: int) -> Table:
    table = describe_output(args)
    processor = load_student_processor(args, model_args)
    table += describe_tokenizer(processor)
    parts = make_parts(script_args, args, model_args, mixture)
    online = OnlineParts(args, parts.teacher, parts.preference_function, parts.preference_dataset, parts.reward_model)
    table.append(("dataset", dataset_name(script_args, mixture)))
    check_student_template(model_args.model_name_or_path, processor, parts.train_dataset, args)
    table += describe_end(processor, next(iter(parts.train_dataset)), args, model_args)
    for name, dataset in (("train", parts.train_dataset), ("eval", parts.eval_dataset)):
        if dataset is not None:
            check_parts(online, parts.reward_funcs, dataset, name)
            table += _describe_prompts(name, dataset, processor, args)
    reward_columns(args, parts.reward_funcs, None)
    table += _describe_batch(args, processes)
    table += _describe_teacher(parts, online, args)
    if args.adversary != "off":
        table += _describe_pairs(parts, online, processor, args, processes)
    table.append(("student climbs", _climbed(args, script_args.reward_funcs or [])))
    epoch_steps = _epoch_steps(parts.train_dataset, args, processes)
    table += describe_steps(epoch_steps, args, processes)
    table += describe_training(args, model_args, epoch_steps)
    return table + _describe_memory(parts, args, model_args)


# ---- Prompts and batches -----------------------------------------------------------------------------------------------


def _describe_prompts(name: str, dataset: Any, processor: Any, args: Any) -> Table:
    first = next(iter(dataset))
    table = [(f"{name} columns", columns(first))]
    is_stream = not isinstance(dataset, Dataset)
    table.append((f"{name} prompts", "a stream: checked as it is read" if is_stream else f"{len(dataset):,}"))
    if name != "train":
        return table
    sample, template = first_rows(dataset), args.chat_template_kwargs or {}
    lengths = [len(tokenize_prompt(row["prompt"], processor, template)) for row in sample]
    table += [(f"row {index}", f"{length} prompt tokens") for index, length in enumerate(lengths[:SHOWN])]
    return [*table, (f"first {len(sample)} rows", f"longest prompt {max(lengths)} tokens")]


def _generation_rows(args: Any, processes: int) -> int:
    return args.per_device_train_batch_size * processes * args.steps_per_generation


def _describe_batch(args: Any, processes: int) -> Table:
    rows, answers = _generation_rows(args, processes), args.num_generations
    told = (
        f"{rows} rows: {rows // answers} prompts, {answers} answers of up to {args.max_completion_length} tokens each"
    )
    uses = args.num_iterations * args.steps_per_generation / args.gradient_accumulation_steps
    return [("generation batch", f"{told}, for {uses:g} optimizer steps")]


def _epoch_steps(dataset: Any, args: Any, processes: int) -> int | None:
    if not isinstance(dataset, Dataset):
        return None
    batches = len(dataset) // (_generation_rows(args, processes) // args.num_generations)
    micro_steps = batches * args.num_iterations * args.steps_per_generation
    return -(-micro_steps // args.gradient_accumulation_steps)


# ---- Teacher and preferences -------------------------------------------------------------------------------------------


def _describe_teacher(parts: Parts, online: OnlineParts, args: Any) -> Table:
    if not online.needs_teacher:
        return [("teacher", "none is needed")]
    table: Table
    if parts.teacher is None:
        table = [("teacher", f"the column {args.teacher_column!r}{_given(parts.train_dataset, args.teacher_column)}")]
        table += _asked(parts.train_dataset, online.sampler(), args)
    else:
        assert parts.pairs is not None
        table = [("teacher", f"{parts.pairs.teacher}, asked once for each prompt")]
        if is_server(parts.pairs.teacher):
            table += _asked(parts.train_dataset, parts.teacher, args)
        else:
            table.append(("", "its weights are not loaded here, so that it is not asked"))
    told = "none: D is what is given" if parts.preference_function is None else None
    if parts.pairs is not None:
        told = parts.pairs.preference
    return [*table, ("preference", told or "")]


def _asked(dataset: Any, teacher: Any, args: Any) -> Table:
    asked = ask_teacher(dataset, teacher, teacher_folder(args))
    return [("its answer" if name == "teacher" else name, value) for name, value in asked]


def _given(dataset: Any, column: str) -> str:
    if not isinstance(dataset, Dataset):
        return ""
    return f", given for {sum(answer is not None for answer in dataset[column]):,}"


def _describe_pairs(parts: Parts, online: OnlineParts, processor: Any, args: Any, processes: int) -> Table:
    if not args.uses_preferences:
        return [("D", "not used"), ("reward model", _steps(args, ""))]
    pool = PairPool(args.rm_held_out, args.seed)
    pool.add(online.given_pairs(processor, parts.train_dataset))
    grows = parts.preference_function is not None
    told = "empty at the start" if not len(pool) else f"{len(pool):,} known pairs at the start"
    told += f", {len(pool.held_out)} held out ({len(pool.strict)} strict)" if len(pool) else ""
    told += f"; at most {_generation_rows(args, processes):,} more a generation batch" if grows else "; it stays"
    size = args.rm_batch_size or _generation_rows(args, processes)
    fresh = f", {args.rm_fresh_share:.0%} of them from the newest batch" if grows else ""
    return [
        ("D", told),
        ("reward model", _steps(args, f" with {size} pairs each{fresh}")),
        ("warm-up", _warm_up(parts, pool, args)),
    ]


def _steps(args: Any, told: str) -> str:
    return f"{args.rm_steps} step{'s' * (args.rm_steps > 1)} a generation batch{told}"


def _warm_up(parts: Parts, pool: PairPool, args: Any) -> str:
    if args.rm_warmup_accuracy == 0:
        return "none"
    most = check_held_out(pool, None if parts.preference_function is None else parts.train_dataset, args)
    told = f"at most {args.rm_warmup_steps} steps, until {args.rm_warmup_accuracy:.0%} of {LEAST_HELD_OUT} or more strict "
    told += "held-out pairs are ordered rightly, before the student moves"
    return told if most is None else f"{told}; of these there will be at most {most}"


def _climbed(args: Any, reward_funcs: list[str]) -> str:
    heads = {
        "pbkd": "the adversarial head, held by λ and ζ",
        "mle": "the maximum-likelihood head",
        "discriminator": "a discriminator between teacher and student",
    }
    named = list(reward_funcs)
    if args.adversary != "off":
        named.append(heads["mle" if args.follows_mle else args.adversary])
    told = " + ".join(named)
    if args.reward_weights is not None:
        told += f", weighted {', '.join(f'{weight:g}' for weight in args.reward_weights)}"
    return told + (f"; imitation {args.imitation_weight:g}" if args.imitates else "")


# ---- Memory ------------------------------------------------------------------------------------------------------------


def _describe_memory(parts: Parts, args: Any, model_args: Any) -> Table:
    _, size, trained, memory = student_memory(args, model_args)
    if args.beta > 0 and not model_args.use_peft:
        memory["reference"] = size.bytes
    table: Table = []
    if args.adversary != "off":
        count, learnt, memory["reward model"] = reward_model_memory(args, model_args, parts.reward_model)
        kind = f"LoRA of rank {args.rm_lora_r}" if args.rm_lora_r else "whole"
        start = parts.reward_model or "the student at its start"
        table = [("reward model from", f"{start}, {kind}: {count:,} parameters, {learnt:,} trained")]
    memory |= _others(parts, args)
    return table + describe_memory(
        size, trained, memory, without="activations, logits, batches and the cache of generation"
    )


def _others(parts: Parts, args: Any) -> dict[str, float]:
    """The models beside student and reward model that live in the process."""
    found = {} if parts.pairs is None else pairs_memory(parts.pairs, args)
    for reward in parts.reward_funcs:
        if isinstance(reward, str):
            found[reward] = model_memory("reward_funcs", reward, {}, args)
    return found
