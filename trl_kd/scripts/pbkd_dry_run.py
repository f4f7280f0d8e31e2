"""`trl-kd pbkd --dry_run`: data, tokenizers and sizes, in the order of the run itself."""

import math
from typing import Any

from datasets import Dataset

from trl_kd.scripts.data import load_datasets
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
    describe_teacher,
    describe_tokenizer,
    first_rows,
    load_student_processor,
    student_memory,
    teacher_memory,
)
from trl_kd.scripts.dry_run_training import describe_training
from trl_kd.trainers.common.config import imitation_radius
from trl_kd.trainers.common.pair_rows import RowCounts, has_images, names_teacher
from trl_kd.trainers.common.response_rows import tokenize_rows
from trl_kd.trainers.common.tokenizer import check_tokenizer
from trl_kd.trainers.pbkd.data import prepare_rows
from trl_kd.trainers.pbkd.texts import weigh_texts
from trl_kd.trainers.pbkd.tokens import only_teachers_text


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
        `ValueError` or `InputError`: what the run itself would refuse.
    """
    return as_text(lambda: _describe(script_args, training_args, model_args, mixture, processes))


def _describe(script_args: Any, training_args: Any, model_args: Any, mixture: Any, processes: int) -> Table:
    table = describe_output(training_args)
    datasets = load_datasets(script_args, mixture, with_eval=training_args.eval_strategy != "no")
    table.append(("dataset", dataset_name(script_args, mixture)))
    rows: dict[str, Any] = {}
    known = None
    for name, dataset in zip(("train", "eval"), datasets, strict=True):
        if dataset is not None:
            is_named = names_teacher(next(iter(dataset), {}))
            rows[name], counts = prepare_rows(dataset, name, training_args)
            table += _describe_rows(name, rows[name], counts, is_named)
            known = counts.known if name == "train" and counts is not None else known
            rows[name], said = _weigh(name, rows[name], training_args, known)
            table += said
            if not is_named:
                follows = "every chosen answer is taken as the teacher's"
                if not training_args.imitation_weight:
                    follows = "nothing is imitated"
                table.append((f"{name} teacher", f"no column `teacher_side` or `teacher`: {follows}"))
    table += _describe_tokens(rows, training_args, model_args)
    epoch_steps = _epoch_steps(rows["train"], training_args, processes)
    table += describe_steps(epoch_steps, training_args, processes)
    table += describe_training(training_args, model_args, epoch_steps)
    return table + _describe_memory(training_args, model_args)


def _weigh(name: str, dataset: Any, args: Any, known: int | None) -> tuple[Any, Table]:
    """The rows that are trained on, and how many of them are imitated."""
    dataset, counts = weigh_texts(dataset, name, args, imitation_radius(args, known), training=name == "train")
    return dataset, [] if counts is None else [(f"{name} imitation", counts.told)]


def _describe_rows(name: str, dataset: Any, counts: RowCounts | None, is_named: bool) -> Table:
    table = [(f"{name} columns", columns(next(iter(dataset))))]
    if counts is None:
        return [*table, (f"{name} rows", "a stream: checked as it is read")]
    of_teacher = f", {counts.teacher} with a text of the teacher" if is_named else ""
    return [
        *table,
        (f"{name} rows", f"{counts.rows}{of_teacher}, {counts.empty} with an empty response"),
        (f"{name} preferences", f"{counts.known} known ({counts.soft} soft or reversed), {counts.null} null"),
    ]


def _describe_tokens(rows: dict[str, Any], training_args: Any, model_args: Any) -> Table:
    processor = load_student_processor(training_args, model_args)
    tokenizer = getattr(processor, "tokenizer", processor)
    table = describe_tokenizer(processor)
    table += describe_end(processor, next(iter(rows["train"])), training_args, model_args)
    if has_images(next(iter(rows["train"]))):
        table.append(("first rows", "images: tokenized batch by batch, not here"))
    else:
        for name, dataset in rows.items():
            check_tokenizer(tokenizer, dataset, name)
        table += _describe_first_rows(rows["train"], processor, tokenizer, training_args)
    if training_args.teacher_model_name_or_path is not None:
        table += describe_teacher(tokenizer, training_args, model_args)
    return table


def _describe_first_rows(dataset: Any, processor: Any, tokenizer: Any, training_args: Any) -> Table:
    sample = first_rows(dataset)
    rows = Dataset.from_list(sample, features=dataset.features)
    if not training_args.has_preference_term:
        rows = rows.map(only_teachers_text)
    tokens = tokenize_rows(rows, processor, training_args, "train")
    table, longest, ended = [], 0, 0
    for index, row in enumerate(tokens):
        prompt, chosen, rejected = (len(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected"))
        longest = max(longest, prompt + max(chosen, rejected))
        # Some templates end a turn with a line break behind the end token
        ended += all(tokenizer.eos_token_id in row[f"{side}_ids"][-3:] for side in ("chosen", "rejected"))
        if index < SHOWN:
            texts = (
                f"{chosen} chosen, {rejected} rejected" if training_args.has_preference_term else f"{chosen} imitated"
            )
            table.append((f"row {index}", f"{prompt} prompt + {texts} tokens"))
    limit = training_args.max_length
    long = [row for row in tokens if limit and len(row["prompt_ids"]) + _longer(row) > limit]
    table.append(
        (f"first {len(sample)} rows", f"longest {longest} tokens, {len(long)} truncated to `max_length` = {limit}, "
         f"{len(sample) - len(tokens)} left out"),
    )  # fmt: skip
    what = "both responses" if training_args.has_preference_term else "the teacher's response"
    table.append(("end token", f"{tokenizer.eos_token!r} ends {what} in {ended} of {len(tokens)} rows"))
    return table


def _longer(row: dict[str, Any]) -> int:
    return max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def _epoch_steps(dataset: Any, args: Any, processes: int) -> int | None:
    if not isinstance(dataset, Dataset):
        return None
    batches = math.ceil(len(dataset) / (args.per_device_train_batch_size * processes))
    return max(math.ceil(batches / args.gradient_accumulation_steps), 1)


def _describe_memory(args: Any, model_args: Any) -> Table:
    _, size, trained, parts = student_memory(args, model_args)
    if args.has_preference_term and not model_args.use_peft and not args.precompute_ref_log_probs:
        parts["reference"] = size.bytes
    if args.teacher_model_name_or_path is not None:
        parts["teacher"] = teacher_memory(args)
    return describe_memory(size, trained, parts, without="activations, logits and batches")
