"""`trl-kd mm-pbkd --dry_run`: vocabularies first, then prompts, states, pairs and sizes."""

from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from trl import maybe_extract_prompt

from trl_kd.scripts.data import load_preferences, load_prompts
from trl_kd.scripts.dry_run import (
    SAMPLE,
    SHOWN,
    Table,
    as_text,
    columns,
    dataset_name,
    describe_end,
    describe_memory,
    describe_output,
    describe_steps,
    describe_teacher,
    describe_tokenizer,
    first_rows,
    load_student_processor,
    student_memory,
    teacher_memory,
    tokenize_prompt,
)
from trl_kd.scripts.dry_run_training import describe_training
from trl_kd.scripts.memory import Q_BYTES, q_parameters
from trl_kd.trainers.common.held_out import LEAST_HELD_OUT
from trl_kd.trainers.common.imitation_weights import PairWeights
from trl_kd.trainers.common.pair_rows import has_images
from trl_kd.trainers.common.preference_pairs import known_pairs, read_pairs
from trl_kd.trainers.common.prompts import check_prompts
from trl_kd.trainers.common.tokenizer import check_tokenizer
from trl_kd.trainers.mm_pbkd.data import (
    PairBatches,
    check_prompt_count,
    look_at_completions,
    tokenize_completion,
    tokenize_pairs,
)


def dry_run(script_args: Any, training_args: Any, model_args: Any, mixture: Any, processes: int = 1) -> str:
    """
    Checks what can be checked before weights load.

    Args:
        script_args, training_args, model_args, mixture:
            The arguments of the command, checked.
        processes (`int`, *optional*, defaults to `1`):
            How many processes the run will have.

    Returns:
        The table.

    Raises:
        `ValueError`: what the run itself would refuse.
    """
    return as_text(lambda: _describe(script_args, training_args, model_args, mixture, processes))


def _describe(script_args: Any, training_args: Any, model_args: Any, mixture: Any, processes: int) -> Table:
    table = describe_output(training_args)
    processor = load_student_processor(training_args, model_args)
    table += describe_tokenizer(processor)
    table += describe_teacher(getattr(processor, "tokenizer", processor), training_args, model_args)
    with_eval, off_policy = training_args.eval_strategy != "no", training_args.lmbda < 1
    datasets = load_prompts(script_args, mixture, with_eval, with_completions=off_policy)
    table.append(("dataset", dataset_name(script_args, mixture)))
    for name, dataset in zip(("train", "eval"), datasets, strict=True):
        if dataset is not None:
            table += _describe_prompts(name, dataset, processor, training_args)
    train_dataset = datasets[0]
    table += describe_end(processor, next(iter(train_dataset)), training_args, model_args)
    check_prompt_count(train_dataset, training_args, processes)
    table += _describe_states(next(iter(train_dataset)), training_args)
    pairs = load_preferences(script_args)
    if pairs is None:
        without = "moment matching without preferences" if training_args.moment_coef > 0 else "plain distillation"
        table.append(("pairs", f"none: {without}"))
    else:
        table.append(("preference_dataset", script_args.preference_dataset))
        if training_args.moment_coef > 0:
            table += _describe_pairs(pairs, train_dataset, processor, training_args, processes)
    if training_args.imitation_weight > 0:
        table.append(("imitation", _describe_imitation(train_dataset, pairs, training_args)))
    epoch_steps = _epoch_steps(train_dataset, training_args, processes)
    table += describe_steps(epoch_steps, training_args, processes)
    table += describe_training(training_args, model_args, epoch_steps)
    return table + _describe_memory(training_args, model_args, with_pairs=pairs is not None)


# ---- Prompts and states ------------------------------------------------------------------------------------------------


def _describe_prompts(name: str, dataset: Any, processor: Any, args: Any) -> Table:
    check_prompts(dataset, name, args.lmbda)
    first = next(iter(dataset))
    table = [(f"{name} columns", columns({c: first[c] for c in ("prompt", "completion") if c in first}))]
    if not isinstance(dataset, Dataset):
        table.append((f"{name} prompts", "a stream: checked as it is read"))
    elif "completion" in first:
        given = sum(completion is not None for completion in dataset["completion"])
        table.append((f"{name} prompts", f"{len(dataset)}, {given} with a completion of the teacher's"))
    else:
        table.append((f"{name} prompts", f"{len(dataset)}"))
    if name != "train":
        return table
    if has_images(first):
        return [*table, ("first rows", "images: tokenized batch by batch, not here")]
    return table + _describe_first_rows(dataset, processor, args)


def _describe_first_rows(dataset: Any, processor: Any, args: Any) -> Table:
    tokenizer = getattr(processor, "tokenizer", processor)
    check_tokenizer(tokenizer, dataset, "train")
    template = args.chat_template_kwargs or {}
    table, longest, completions = [], 0, []
    rows = Dataset.from_list(first_rows(dataset), features=dataset.features)
    sample = first_rows(look_at_completions(rows, processor, args, "train"))
    for index, row in enumerate(sample):
        prompt_ids = tokenize_prompt(row["prompt"], processor, template)
        longest = max(longest, len(prompt_ids))
        told = f"{len(prompt_ids)} prompt tokens"
        if args.lmbda < 1 and row.get("completion") is not None:
            ends = [tokenizer.eos_token_id]
            prompt_ids, ids, _ = tokenize_completion(row, processor, ends, args.reasoning, **template)
            completions.append(len(ids))
            told = f"{len(prompt_ids)} prompt + {len(ids)} completion tokens"
        if index < SHOWN:
            table.append((f"row {index}", told))
    told = f"longest prompt {longest} tokens"
    limit = args.max_completion_length
    if completions:
        cut = sum(limit is not None and length > limit for length in completions)
        told += f", longest completion {max(completions)}, {cut} truncated to `max_completion_length` = {limit}"
    return [*table, (f"first {len(sample)} rows", told)]


def _describe_states(first: dict[str, Any], args: Any) -> Table:
    limit = args.max_completion_length
    ours = f"the student samples up to {limit} tokens a prompt"
    theirs = "the teacher's, sampled from it"
    if "completion" in first:
        theirs = "the teacher's: `completion`, or sampled from it where there is none"
    if args.lmbda == 1:
        unread = "; `completion` is not read" if "completion" in first else ""
        return [("states", f"all on-policy: {ours}{unread}")]
    if args.lmbda == 0:
        return [("states", f"all {theirs}")]
    return [("states", f"{args.lmbda:.4g} on-policy: {ours}; {1 - args.lmbda:.4g} {theirs}")]


def _epoch_steps(dataset: Any, args: Any, processes: int) -> int | None:
    if not isinstance(dataset, Dataset):
        return None
    return len(dataset) // (args.per_device_train_batch_size * processes * args.gradient_accumulation_steps)


# ---- Pairs -------------------------------------------------------------------------------------------------------------


def _describe_pairs(dataset: Dataset, prompts: Any, processor: Any, args: Any, processes: int) -> Table:
    table = [
        ("pairs columns", columns({c: dataset[0][c] for c in ("prompt", "chosen", "rejected") if c in dataset[0]}))
    ]
    known = known_pairs(read_pairs(dataset, prompts))
    sample = tokenize_pairs(known.select(range(min(SAMPLE, len(known)))), processor, args)
    world: Any = SimpleNamespace(process_index=0, num_processes=processes)
    batches = PairBatches(_told_apart(known), args, world, pad_token_id=0)
    strict = sum(preference != 0.5 for preference in known["preference"])
    held_out = len(known) - len(batches)
    limit = args.pair_max_length
    lengths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in sample]
    cut = sum(limit is not None and length > limit for length in lengths)
    return [
        *table,
        (
            "pairs",
            f"{len(dataset)} rows, {len(known)} known, {strict} strict; {held_out} held out ({batches.strict} strict)",
        ),
        ("pairs a step", f"{batches.size * args.q_steps} ({args.q_steps} steps of Q with {batches.size} each)"),
        (
            f"first {min(SAMPLE, len(known))} pairs",
            f"longest {max(lengths)} tokens, {cut} truncated to `pair_max_length` = {limit}, "
            f"{min(SAMPLE, len(known)) - len(sample)} left out",
        ),
        ("warm-up", _warm_up(batches.strict, args)),
    ]


def _describe_imitation(dataset: Any, pairs: Dataset | None, args: Any) -> str:
    weights = PairWeights(None if pairs is None else read_pairs(pairs, dataset), args)
    told = f"weight {args.imitation_weight:g}"
    if pairs is None or not isinstance(dataset, Dataset) or "completion" not in dataset.column_names:
        return f"{told}, of all completions alike"
    counts = weights.count(dataset)
    return f"{told}; {counts.told}"


def _told_apart(known: Dataset) -> Dataset:
    """Pairs with what tells their prompts apart in place of `prompt_ids`: all of them are not tokenized here."""
    texts = known.select_columns([c for c in ("prompt", "chosen", "rejected") if c in known.column_names])
    batches = texts.with_format(None).iter(batch_size=1000)
    rows = (dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True))
    prompts = [[hash(repr(maybe_extract_prompt(row)["prompt"]))] for row in rows]
    return known.select_columns("preference").add_column("prompt_ids", prompts)


def _warm_up(strict: int, args: Any) -> str:
    if args.q_warmup_steps == 0 or args.dual_max == 0:
        return "none"
    if strict < LEAST_HELD_OUT:
        return f"{args.q_warmup_steps} steps of Q: fewer than {LEAST_HELD_OUT} strict pairs held out could not end it sooner"
    return f"at most {args.q_warmup_steps} steps of Q, until its held-out accuracy is above chance"


# ---- Memory ------------------------------------------------------------------------------------------------------------


def _describe_memory(args: Any, model_args: Any, with_pairs: bool) -> Table:
    model, size, trained, parts = student_memory(args, model_args)
    parts["teacher"] = teacher_memory(args)
    table: Table = []
    if args.moment_coef > 0:
        sources = 2 if 0 < args.lmbda < 1 else 1
        width = model.get_output_embeddings().weight.shape[1]
        count = q_parameters(args.q_head, width, 1 + sources * with_pairs)
        parts["Q"] = Q_BYTES * count
        table = [("Q", f"{args.q_head}, {count:,} parameters")]
    without = "activations, logits, batches and the cache of generation"
    return table + describe_memory(size, trained, parts, without)
