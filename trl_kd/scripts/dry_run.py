"""`--dry_run`: everything that can be known of a training run before weights load, as a short table."""

import math
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars, enable_progress_bars
from transformers import AutoProcessor, AutoTokenizer
from trl import get_peft_config, is_conversational

from trl_kd.scripts.checks import check_model_source, model_error
from trl_kd.scripts.data import load_pairs
from trl_kd.scripts.memory import (
    ModelSize,
    empty_model,
    model_size,
    optimizer_bytes,
    readable,
    trainable_parameters,
)
from trl_kd.trainers.pbkd_data import RowCounts, check_tokenizer, prepare_rows, tokenize_rows
from trl_kd.trainers.vocabulary import check_same_vocabulary, shared_rows, vocabulary_size


SAMPLE = 100
"""Rows that are tokenized, from the start of the dataset."""

SHOWN = 3

Table = list[tuple[str, str]]


def dry_run(script_args: Any, training_args: Any, model_args: Any, mixture: Any, processes: int = 1) -> str:
    """
    Checks data, tokenizers and sizes in the order of the run itself.

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
    disable_progress_bars()
    try:
        table = _describe(script_args, training_args, model_args, mixture, processes)
    finally:
        enable_progress_bars()
    width = max(len(name) for name, _ in table)
    lines = [f"  {name:<{width}}  {value}" for name, value in table]
    return "\n".join(["Dry run: nothing is loaded or written.", *lines, "Ready to train."])


def _describe(script_args: Any, training_args: Any, model_args: Any, mixture: Any, processes: int) -> Table:
    output_dir = Path(training_args.output_dir)
    table: Table = [("output_dir", f"{output_dir} ({'exists' if output_dir.exists() else 'will be created'})")]
    if training_args.resume_from_checkpoint:
        table.append(("resumes from", training_args.resume_from_checkpoint))
    datasets = load_pairs(script_args, mixture, with_eval=training_args.eval_strategy != "no")
    table.append(("dataset", script_args.dataset_name or ", ".join(d.path for d in mixture.datasets)))
    rows = {}
    for name, dataset in zip(("train", "eval"), datasets, strict=True):
        if dataset is not None:
            rows[name], counts = prepare_rows(dataset, name, training_args)
            table += _describe_rows(name, rows[name], counts)
    table += _describe_tokens(rows, training_args, model_args)
    table += _describe_steps(rows["train"], training_args, processes)
    return table + _describe_memory(training_args, model_args)


def _describe_rows(name: str, dataset: Any, counts: RowCounts | None) -> Table:
    first = next(iter(dataset))
    kind = "messages" if is_conversational(first) else "text"
    table = [(f"{name} columns", f"{', '.join(first)} ({kind})")]
    if counts is None:
        return [*table, (f"{name} rows", "a stream: checked as it is read")]
    return [
        *table,
        (
            f"{name} rows",
            f"{counts.rows}, {counts.teacher} with a text of the teacher, {counts.empty} with an empty response",
        ),
        (f"{name} preferences", f"{counts.known} known ({counts.soft} soft or reversed), {counts.null} null"),
    ]


def _describe_tokens(rows: dict[str, Any], training_args: Any, model_args: Any) -> Table:
    student = model_args.model_name_or_path
    processor = _load_processor("model_name_or_path", student, model_args.model_revision, training_args, AutoProcessor)
    tokenizer = getattr(processor, "tokenizer", processor)
    table = [
        ("tokenizer", f"{type(tokenizer).__name__}, {len(tokenizer)} tokens, end {tokenizer.eos_token!r}"),
        ("chat template", "yes" if getattr(processor, "chat_template", None) else "no"),
    ]
    first = next(iter(rows["train"]))
    if "image" in first or "images" in first:
        table.append(("first rows", "images: tokenized batch by batch, not here"))
    else:
        for name, dataset in rows.items():
            check_tokenizer(tokenizer, dataset, name)
        table += _describe_first_rows(rows["train"], processor, tokenizer, training_args)
    teacher = training_args.teacher_model_name_or_path
    if teacher is not None:
        revision = training_args.teacher_model_revision
        other = _load_processor("teacher_model_name_or_path", teacher, revision, training_args, AutoTokenizer)
        check_same_vocabulary(tokenizer, other)
        ours = vocabulary_size(student, training_args, model_args.model_revision)
        theirs = vocabulary_size(teacher, training_args, revision)
        shared_rows(ours, theirs, tokens=max(tokenizer.get_vocab().values()) + 1)
        table.append(("teacher", f"{teacher}, same vocabulary"))
    return table


def _load_processor(field: str, name: str, revision: str | None, training_args: Any, auto: Any) -> Any:
    try:
        return auto.from_pretrained(name, revision=revision, trust_remote_code=training_args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise model_error(field, name, error) from error


def _describe_first_rows(dataset: Any, processor: Any, tokenizer: Any, training_args: Any) -> Table:
    sample = list(dataset.select(range(min(SAMPLE, len(dataset))))) if isinstance(dataset, Dataset) else None
    sample = sample if sample is not None else list(dataset.take(SAMPLE))
    tokens = tokenize_rows(Dataset.from_list(sample), processor, training_args, "train")
    table, longest, ended = [], 0, 0
    for index, row in enumerate(tokens):
        prompt, chosen, rejected = (len(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected"))
        longest = max(longest, prompt + max(chosen, rejected))
        # Some templates end a turn with a line break behind the end token
        ended += all(tokenizer.eos_token_id in row[f"{side}_ids"][-3:] for side in ("chosen", "rejected"))
        if index < SHOWN:
            table.append((f"row {index}", f"{prompt} prompt + {chosen} chosen, {rejected} rejected tokens"))
    limit = training_args.max_length
    long = [row for row in tokens if limit and len(row["prompt_ids"]) + _longer(row) > limit]
    table.append(
        (f"first {len(sample)} rows", f"longest {longest} tokens, {len(long)} truncated to `max_length` = {limit}, "
         f"{len(sample) - len(tokens)} left out"),
    )  # fmt: skip
    table.append(("end token", f"{tokenizer.eos_token!r} ends both responses in {ended} of {len(tokens)} rows"))
    return table


def _longer(row: dict[str, Any]) -> int:
    return max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def _describe_steps(dataset: Any, args: Any, processes: int) -> Table:
    batch = args.per_device_train_batch_size * processes * args.gradient_accumulation_steps
    told = f"{batch} rows a step ({args.per_device_train_batch_size} × {processes} processes × "
    told += f"{args.gradient_accumulation_steps} accumulated)"
    if args.max_steps > 0:
        return [("steps", f"{args.max_steps}, {told}")]
    if not isinstance(dataset, Dataset):
        raise ValueError("`max_steps` is not set, and a stream has no length: say how many steps to train.")
    batches = math.ceil(len(dataset) / (args.per_device_train_batch_size * processes))
    steps = math.ceil(args.num_train_epochs * max(math.ceil(batches / args.gradient_accumulation_steps), 1))
    return [("steps", f"{steps} in {args.num_train_epochs:g} epochs, {told}")]


def _describe_memory(args: Any, model_args: Any) -> Table:
    model = _empty("model_name_or_path", model_args.model_name_or_path, model_args.model_revision, args)
    quantization = next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(model_args, name)), None)
    dtype = (args.model_init_kwargs or {}).get("dtype", model_args.dtype)
    size = model_size(model, dtype, quantization)
    trained = trainable_parameters(model, get_peft_config(model_args))
    width = 4 if model_args.use_peft and quantization is None else size.bytes / size.parameters
    parts = {
        "weights": size.bytes,
        "gradients": trained * width,
        "optimizer": trained * optimizer_bytes(args.optim) * width / 4,
    }
    if model_args.use_peft:
        parts["weights"] += trained * width
    elif not args.precompute_ref_log_probs:
        parts["reference"] = size.bytes
    if args.teacher_model_name_or_path is not None:
        parts["teacher"] = _teacher_size(args).bytes
    told = " + ".join(f"{name} {readable(value)}" for name, value in parts.items())
    return [
        ("parameters", f"{size.parameters:,}, {trained:,} trained"),
        ("memory", f"about {readable(sum(parts.values()))} = {told}"),
        ("", "an estimate for one process: without activations, logits and batches, and before any sharding"),
    ]


def _teacher_size(args: Any) -> ModelSize:
    options = args.teacher_model_init_kwargs or {}
    model = _empty("teacher_model_name_or_path", args.teacher_model_name_or_path, args.teacher_model_revision, args)
    quantization = next((name for name in ("load_in_4bit", "load_in_8bit") if options.get(name)), None)
    return model_size(model, options.get("dtype", "float32"), quantization)


def _empty(field: str, name: str, revision: str | None, args: Any) -> Any:
    try:
        check_model_source(field, name)
        return empty_model(name, args.trust_remote_code, revision)
    except (OSError, ValueError) as error:
        raise model_error(field, name, error) from error
