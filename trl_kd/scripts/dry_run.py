"""`--dry_run`: everything that can be known of a training run before weights load, as a short table. Here is what the
commands have in common; the rows of each are in a module of its own."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars, enable_progress_bars
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GenerationConfig
from trl import ModelConfig, get_peft_config

from trl_kd.preferences.tokens import is_conversational
from trl_kd.responses.special_tokens import set_end_token, unlearnable_end
from trl_kd.scripts.checks import check_model_source, model_error, read_model
from trl_kd.scripts.memory import (
    ModelSize,
    empty_model,
    empty_reward_model,
    model_size,
    optimizer_bytes,
    readable,
    reward_parameters,
    trainable_parameters,
)
from trl_kd.scripts.pairs_arguments import PairsArguments, read_json
from trl_kd.scripts.training import model_init_kwargs
from trl_kd.trainers.common.dual import other_processes
from trl_kd.trainers.common.vocabulary import check_same_vocabulary, shared_rows, vocabulary_size


SAMPLE = 100
"""Rows that are tokenized, from the start of the dataset."""

SHOWN = 3

Table = list[tuple[str, str]]


def as_text(describe: Callable[[], Table], what: str = "nothing is loaded or written") -> str:
    """The table that `describe` makes, to be printed; `what` the dry run does."""
    disable_progress_bars()
    try:
        table = describe()
    finally:
        enable_progress_bars()
    width = max(len(name) for name, _ in table)
    lines = [f"  {name:<{width}}  {value}" for name, value in table]
    return "\n".join([f"Dry run: {what}.", *lines, "Ready to train."])


# ---- Output and data ---------------------------------------------------------------------------------------------------


def describe_output(args: Any) -> Table:
    """Where the student will be, and what the run goes on from."""
    output_dir = Path(args.output_dir)
    table = [("output_dir", f"{output_dir} ({'exists' if output_dir.exists() else 'will be created'})")]
    return table + ([("resumes from", args.resume_from_checkpoint)] if args.resume_from_checkpoint else [])


def dataset_name(script_args: Any, mixture: Any) -> str:
    return script_args.dataset_name or ", ".join(d.path for d in mixture.datasets)


def columns(row: dict[str, Any]) -> str:
    """The columns of a row, and whether they hold messages."""
    return f"{', '.join(row)} ({'messages' if is_conversational(row) else 'text'})"


def first_rows(dataset: Any) -> list[dict[str, Any]]:
    """At most `SAMPLE` of them."""
    return list(
        dataset.select(range(min(SAMPLE, len(dataset)))) if isinstance(dataset, Dataset) else dataset.take(SAMPLE)
    )


def total_steps(epoch_steps: int | None, args: Any) -> int:
    """
    How many optimizer steps the run has.

    Raises:
        `ValueError`: that is not known, of a stream without `max_steps`.
    """
    if args.max_steps > 0:
        return args.max_steps
    if epoch_steps is None:
        raise ValueError("`max_steps` is not set, and a stream has no length: say how many steps to train.")
    return math.ceil(args.num_train_epochs * epoch_steps)


def describe_steps(epoch_steps: int | None, args: Any, processes: int) -> Table:
    """
    Args:
        epoch_steps (`int`, *optional*):
            Optimizer steps of one epoch; `None` for a stream.
        args (`TrainingArguments`):
            Settings.
        processes (`int`):
            How many processes the run will have.
    """
    batch = args.per_device_train_batch_size * processes * args.gradient_accumulation_steps
    told = f"{batch} rows a step ({args.per_device_train_batch_size} × {processes} processes × "
    told += f"{args.gradient_accumulation_steps} accumulated)"
    epochs = "" if args.max_steps > 0 else f" in {args.num_train_epochs:g} epochs"
    resumed = args.resume_from_checkpoint
    said = other_processes(resumed, processes) if resumed else None
    table = [("steps", f"{total_steps(epoch_steps, args)}{epochs}, {told}")]
    return table if said is None else [*table, ("warning", said)]


# ---- Models ------------------------------------------------------------------------------------------------------------


def load_student_processor(args: Any, model_args: ModelConfig) -> Any:
    """The student's tokenizer or processor, with the end token that it is to have."""
    name, revision = model_args.model_name_or_path, model_args.model_revision
    given = model_init_kwargs(args, model_args)
    processor = _load(AutoProcessor, "model_name_or_path", name, revision, args, given)
    set_end_token(getattr(processor, "tokenizer", processor), args.eos_token)
    return processor


def _load(auto: Any, field: str, name: str, revision: str | None, args: Any, given: dict[str, Any]) -> Any:
    options = {"revision": revision, "trust_remote_code": args.trust_remote_code}
    return read_model(field, name, options | given, lambda: auto.from_pretrained(name, **options))


def describe_tokenizer(processor: Any) -> Table:
    tokenizer = getattr(processor, "tokenizer", processor)
    return [
        ("tokenizer", f"{type(tokenizer).__name__}, {len(tokenizer)} tokens, end {tokenizer.eos_token!r}"),
        ("chat template", "yes" if getattr(processor, "chat_template", None) else "no"),
    ]


def describe_end(processor: Any, row: dict[str, Any], args: Any, model_args: ModelConfig) -> Table:
    """Whether the student can learn to stop where its chat template ends turns."""
    if args.eos_token is not None or not is_conversational(row):
        return []
    name, options = model_args.model_name_or_path, {"revision": model_args.model_revision}
    try:
        config = GenerationConfig.from_pretrained(name, **options)
    except OSError:  # it is made of the model's config, then
        config = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code, **options)
    said = unlearnable_end(processor, config)
    return [] if said is None else [("end of turns", said)]


def describe_teacher(tokenizer: Any, args: Any, model_args: ModelConfig) -> Table:
    """Raises a `ValueError` for a white-box teacher that has another vocabulary than the student."""
    teacher, revision = args.teacher_model_name_or_path, args.teacher_model_revision
    other = _load(
        AutoTokenizer, "teacher_model_name_or_path", teacher, revision, args, args.teacher_model_init_kwargs or {}
    )
    check_same_vocabulary(tokenizer, other)
    ours = vocabulary_size(model_args.model_name_or_path, args, model_args.model_revision)
    theirs = vocabulary_size(teacher, args, revision)
    tokens = max(tokenizer.get_vocab().values()) + 1
    shared = shared_rows(ours, theirs, tokens)
    said = f"{ours:,} rows both, for {tokens:,} tokens"
    if shared is not None:
        said = f"student {ours:,} rows, teacher {theirs:,}; the {shared:,} tokens that they share enter the softmaxes"
    return [("teacher", f"{teacher}, same vocabulary"), ("embeddings", said)]


def tokenize_prompt(prompt: Any, processor: Any, template: dict[str, Any]) -> list[int]:
    """As trainers that generate do."""
    if not is_conversational({"prompt": prompt}):
        return processor(text=[prompt])["input_ids"][0]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, **template}
    return processor.apply_chat_template([prompt], **options)["input_ids"][0]


# ---- Memory ------------------------------------------------------------------------------------------------------------


def student_memory(args: Any, model_args: ModelConfig) -> tuple[Any, ModelSize, int, dict[str, float]]:
    """The student without weights, its size, how many parameters are trained, and the bytes of weights, gradients and
    optimizer."""
    model = _empty("model_name_or_path", model_args.model_name_or_path, model_args.model_revision, args)
    quantization = next((name for name in ("load_in_4bit", "load_in_8bit") if getattr(model_args, name)), None)
    dtype = (args.model_init_kwargs or {}).get("dtype", model_args.dtype)
    size = model_size(model, dtype, quantization)
    trained = trainable_parameters(model, get_peft_config(model_args))
    width = 4 if model_args.use_peft and quantization is None else size.bytes / size.parameters
    parts = {
        "weights": size.bytes + (trained * width if model_args.use_peft else 0),
        "gradients": trained * width,
        "optimizer": trained * optimizer_bytes(args.optim) * width / 4,
    }
    return model, size, trained, parts


def model_memory(field: str, name: str, options: dict[str, Any], args: Any) -> float:
    """Bytes of the weights of another model that `field` names, which is not trained."""
    quantization = next((kind for kind in ("load_in_4bit", "load_in_8bit") if options.get(kind)), None)
    return model_size(_empty(field, name, None, args, causal=False), options.get("dtype"), quantization).bytes


def pairs_memory(pairs: PairsArguments, args: Any) -> dict[str, float]:
    """Bytes of the weights of a local teacher, and of a model that compares."""
    found: dict[str, float] = {}
    teacher, (kind, _, name) = pairs.teacher, (pairs.preference or "").partition(":")
    if teacher is not None and not teacher.startswith(("api:", "vllm:")):
        found["teacher"] = model_memory("teacher", teacher, read_json(pairs, "teacher_model_init_kwargs"), args)
    if kind in ("reward_model", "likelihood"):
        options = read_json(pairs, "preference_model_init_kwargs")
        found["preference"] = model_memory("preference", name, options, args)
    return found


def reward_model_memory(args: Any, model_args: ModelConfig, source: str | None) -> tuple[int, int, float]:
    """The reward model's parameters, how many are trained, and the bytes of weights, gradients and optimizer. `source` is
    the checkpoint that it starts from; `None`: the student."""
    field = "model_name_or_path" if source is None else "reward_model_name_or_path"
    name = source or model_args.model_name_or_path
    assert name is not None
    quantization = next((kind for kind in ("load_in_4bit", "load_in_8bit") if getattr(model_args, kind)), None)
    try:
        model = empty_reward_model(name, args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise model_error(field, name, error) from error
    whole = source is None and not model_args.use_peft  # the student's own weights, in float32
    size = model_size(model, "float32" if whole else "auto", quantization if source is None else None)
    parameters, trained = reward_parameters(model, args.reward_bound, args.rm_lora_r)
    width = 4 if args.rm_lora_r else size.bytes / size.parameters
    return parameters, trained, size.bytes + (parameters - size.parameters) * 4 + trained * width * 3


def teacher_memory(args: Any) -> float:
    options = args.teacher_model_init_kwargs or {}
    model = _empty("teacher_model_name_or_path", args.teacher_model_name_or_path, args.teacher_model_revision, args)
    quantization = next((name for name in ("load_in_4bit", "load_in_8bit") if options.get(name)), None)
    return model_size(model, options.get("dtype", "float32"), quantization).bytes


def _empty(field: str, name: str, revision: str | None, args: Any, causal: bool = True) -> Any:
    try:
        check_model_source(field, name)
        return empty_model(name, args.trust_remote_code, revision, causal)
    except (OSError, ValueError) as error:
        raise model_error(field, name, error) from error


def describe_memory(size: ModelSize, trained: int, parts: dict[str, float], without: str) -> Table:
    """
    Args:
        size ([`ModelSize`]), trained (`int`):
            Of the student.
        parts (`dict[str, float]`):
            What needs memory, in bytes.
        without (`str`):
            What is not counted.
    """
    told = " + ".join(f"{name} {readable(value)}" for name, value in parts.items())
    return [
        ("parameters", f"{size.parameters:,}, {trained:,} trained"),
        ("memory", f"about {readable(sum(parts.values()))} = {told}"),
        ("", f"an estimate for one process: without {without}, and before any sharding"),
    ]
