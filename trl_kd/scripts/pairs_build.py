"""The parts that the arguments of `trl-kd pairs` name: prompts, samplers and a preference function."""

import re
from functools import partial
from pathlib import Path
from typing import Any

from trl_kd.sampling import SamplingSettings
from trl_kd.scripts.checks import check_model_source, model_error
from trl_kd.scripts.data import load_split
from trl_kd.scripts.errors import InputError, one_line
from trl_kd.scripts.pairs_arguments import OF_ASKING, PRICES, SOURCES, PairsArguments, is_server, read_json


def load_prompts(args: PairsArguments) -> Any:
    """The prompts, with their column named `prompt`."""
    assert args.dataset_name is not None
    dataset = load_split(args.dataset_name, args.dataset_config, args.dataset_split, args.dataset_streaming)
    columns = next(iter(dataset), None)
    if columns is None:
        raise InputError(f"`dataset_name` is {args.dataset_name!r}, which is empty: it needs at least one row.")
    for name in ("prompt_column", "teacher_column", "student_column"):
        column = getattr(args, name)
        if column is not None and column not in columns:
            raise InputError(f"`{name}` is {column!r}: the dataset has {', '.join(map(repr, columns))}.")
        if name != "prompt_column" and column in ("prompt", args.prompt_column):
            raise InputError(f"`{name}` is {column!r}, the column of the prompts: name one with answers.")
    if args.prompt_column != "prompt":
        if "prompt" in columns:  # which stays, under another name
            new = "source_prompt"
            while new in columns:
                new = f"source_{new}"
            dataset = dataset.rename_column("prompt", new)
        dataset = dataset.rename_column(args.prompt_column, "prompt")
    if args.max_prompts is not None:
        if args.max_prompts < 1:
            raise InputError(f"`max_prompts` is {args.max_prompts}: it must be at least 1.")
        streamed = args.dataset_streaming
        dataset = (
            dataset.take(args.max_prompts) if streamed else dataset.select(range(min(args.max_prompts, len(dataset))))
        )
    if args.as_messages:
        if isinstance(columns[args.prompt_column], list):
            raise InputError(f"`as_messages` is true, but the column {args.prompt_column!r} holds messages: drop it.")
        dataset = dataset.map(partial(_as_messages, column=args.prompt_column), with_indices=True)
    return dataset


def _as_messages(row: dict[str, Any], index: int, column: str) -> dict[str, Any]:
    text = row["prompt"]
    if not isinstance(text, str):
        raise InputError(
            f"`as_messages` is true, but the column {column!r} holds {text!r} in row {index}, which is no text: leave such "
            "rows out."
        )
    return {"prompt": [{"role": "user", "content": text}]}


def describe_prompts(args: PairsArguments) -> dict[str, Any]:
    """Where the prompts come from, for settings and card."""
    names = ("config", "split")
    return {
        "dataset": args.dataset_name,
        **{name: getattr(args, f"dataset_{name}") for name in names},
        "column": args.prompt_column,
        "as_messages": args.as_messages,
        "max_prompts": args.max_prompts,
    }


def check_models(args: PairsArguments, samplers: dict[str, Any]) -> None:
    """[`check_sampler`] of each."""
    for source, sampler in samplers.items():
        check_sampler(source, getattr(args, source), sampler)


def check_sampler(field: str, name: str, sampler: Any) -> None:
    """Reads what is small of a local model here, so that one that is missing or cannot be loaded is said at once, and by the
    `field` that names it."""
    if not hasattr(type(sampler), "check_model"):
        return
    from trl_kd.sampling.model_errors import MODEL_ERRORS

    try:
        sampler.check_model()
    except MODEL_ERRORS as error:
        raise model_error(field, name, error, adapters=True) from error


def make_sampler(args: PairsArguments, source: str) -> Any:
    """The sampler that the arguments of a source describe; nothing is loaded yet."""
    column = getattr(args, f"{source}_column")
    if column is not None:
        from trl_kd.sampling.column import ColumnSampler

        return ColumnSampler(column)
    model = getattr(args, source)
    try:
        return _model_sampler(args, source, model)
    except ValueError as error:
        raise InputError(f"`{source}` is {model!r}: {_of(args, source, error)}") from error


def _of(args: PairsArguments, who: str, error: Exception) -> str:
    """What a part refuses of its own settings, by the names that these have among all arguments."""

    def named(match: re.Match[str]) -> str:
        name = f"{who}_{match[1]}"
        is_shared = match[1] in OF_ASKING and getattr(args, name, None) is None
        return f"`{name}`" if hasattr(args, name) and not is_shared else match[0]

    return re.sub(r"`(\w+)`", named, str(error))


def _model_sampler(args: PairsArguments, source: str, model: str) -> Any:
    given = {name: getattr(args, f"{source}_{name}") for name in ("temperature", "top_p", "max_new_tokens", "stop")}
    seed = getattr(args, f"{source}_seed")
    if seed is None:
        seed = 2 * args.seed + SOURCES.index(source)  # the two draw apart, also where they are one model
    settings = SamplingSettings(**given | {"stop": tuple(given["stop"] or ())}, seed=seed)
    template = read_json(args, f"{source}_chat_template_kwargs") or None
    if is_server(model):
        from trl_kd.sampling.server import ServerSampler

        return ServerSampler(
            model.removeprefix("api:"),
            _client(args, source),
            settings,
            system_prompt=getattr(args, f"{source}_system_prompt"),
            completions=getattr(args, f"{source}_completions"),
            chat_template_kwargs=template,
            extra=read_json(args, f"{source}_extra_body"),
        )
    kwargs = read_json(args, f"{source}_model_init_kwargs")
    adapter = getattr(args, f"{source}_adapter")
    if model.startswith("vllm:"):
        from trl_kd.sampling.vllm import VLLMSampler

        name = model.removeprefix("vllm:")
        return VLLMSampler(name, settings, adapter=adapter, chat_template_kwargs=template, **kwargs)
    from trl_kd.sampling.local import LocalSampler

    check_model_source(source, model, adapters=True)
    options = {"model_init_kwargs": kwargs, "adapter": adapter, "chat_template_kwargs": template}
    try:
        return LocalSampler(model, settings, **options)
    except OSError as error:  # of an adapter's config
        raise model_error(source, model, error, adapters=True) from error


def make_preference(args: PairsArguments, student: Any = None) -> Any:
    """The preference function that the arguments describe; configs and tokenizers are read, weights are not. A verifier gets
    the tokens of completions by the tokenizer of the `student`, if it has one, unless the arguments name another."""
    from trl_kd.preferences.reward_function import RewardFunctionPreference, load_function
    from trl_kd.preferences.simple import LabelColumn, TeacherWins

    assert args.preference is not None
    kind, _, name = args.preference.partition(":")
    if kind == "teacher_wins":
        return TeacherWins()
    makers = {
        "column": lambda: LabelColumn(name),
        "verifier": lambda: RewardFunctionPreference(
            load_function(name), scale=args.preference_scale, processing_class=_verifier_tokenizer(args, student)
        ),
        "function": lambda: load_function(name),
        "reward_model": lambda: _reward_model(args, name),
        "likelihood": lambda: _likelihood(args, name),
        "judge": lambda: _judge(args, name),
    }
    if kind not in makers or not name:
        raise InputError(
            f"`preference` is {args.preference!r}: it is teacher_wins, or one of {', '.join(makers)} with "
            "a name after a colon."
        )
    try:
        return makers[kind]()
    except (ValueError, OSError) as error:
        if kind in ("reward_model", "likelihood") and isinstance(error, OSError):
            raise model_error("preference", name, error) from error
        said = _of(args, "judge", error) if kind == "judge" else str(error)
        raise InputError(f"`preference` is {args.preference!r}: {said}") from error


def _verifier_tokenizer(args: PairsArguments, student: Any) -> Any:
    if args.preference_tokenizer is None:
        return getattr(student, "tokenizer", None)
    from trl_kd.sampling.prompts import load_tokenizer

    try:
        return load_tokenizer(args.preference_tokenizer, {})
    except (OSError, ValueError) as error:
        raise InputError(
            f"`preference_tokenizer` is {args.preference_tokenizer!r}, which cannot be loaded: {one_line(error)}"
        ) from error


def _reward_model(args: PairsArguments, name: str) -> Any:
    from trl_kd.preferences.reward_model import RewardModelPreference

    check_model_source("preference", name)
    scale = 1.0 if args.preference_scale is None else args.preference_scale
    return RewardModelPreference(name, scale, model_init_kwargs=read_json(args, "preference_model_init_kwargs"))


def _likelihood(args: PairsArguments, name: str) -> Any:
    from trl_kd.preferences.likelihood import TeacherLikelihood

    check_model_source("preference", name)
    kwargs = read_json(args, "preference_model_init_kwargs")
    return TeacherLikelihood(name, args.preference_scale, model_init_kwargs=kwargs, reasoning=args.reasoning)


def _judge(args: PairsArguments, name: str) -> Any:
    from trl_kd.preferences.judge import DEFAULT_TEMPLATE, LLMJudge

    template = DEFAULT_TEMPLATE
    if args.judge_template is not None:
        if not Path(args.judge_template).is_file():
            raise InputError(f"`judge_template` is {args.judge_template!r}: no such file.")
        template = Path(args.judge_template).read_text(encoding="utf-8")
    return LLMJudge(
        name,
        _client(args, "judge"),
        template=template,
        max_new_tokens=args.judge_max_new_tokens,
        temperature=args.judge_temperature,
        completions=args.judge_completions,
        extra=read_json(args, "judge_extra_body"),
    )


def _client(args: PairsArguments, who: str) -> Any:
    from trl_kd.sampling.client import ServerClient

    own = {name: getattr(args, f"{who}_{name}") for name in ("base_url", "api_key_env", "timeout", "max_retries")}
    prices = {name: getattr(args, f"{who}_{name}") for name in PRICES}
    shared = {name: getattr(args, name) for name in OF_ASKING if prices.get(name) is None}
    return ServerClient(**{**prices, **shared, **own})
