"""Arguments of `trl-kd pairs`, and what does not go together among them."""

# ruff: noqa: RUF009 (`_field` is `dataclasses.field`)

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from trl_kd.pairs.folder import check_folder
from trl_kd.pairs.report import SUMMARY
from trl_kd.sampling.client import OPENAI_URL
from trl_kd.sampling.recorded import read_object
from trl_kd.sampling.urls import hostname, missing_key
from trl_kd.scripts.checks import check_attention, check_output_dir
from trl_kd.scripts.errors import InputError, bad_input


def _field(default: Any, told: str) -> Any:
    return field(default=default, metadata={"help": told})


@dataclass
class PairsArguments:
    """
    Arguments of `trl-kd pairs`.

    A source (`teacher`, `student`) is `api:MODEL` (a server of the OpenAI protocol), `vllm:MODEL` (vLLM's engine), or
    `MODEL` (transformers), a Hub id or a folder. A column with answers that exist stands in place of either.
    """

    output_dir: str | None = _field(None, "Folder for the answers, the pairs, their card and page.")
    dataset_name: str | None = _field(None, "Prompts: a Hub id, a saved dataset, a folder of files, or a file.")
    dataset_config: str | None = _field(None, "Configuration of the dataset.")
    dataset_split: str = _field("train", "Split of the dataset.")
    dataset_streaming: bool = _field(False, "Stream the dataset.")
    prompt_column: str = _field("prompt", "Column of the prompts, text or messages.")
    as_messages: bool = _field(False, "Make each text prompt a conversation of one user message.")
    max_prompts: int | None = _field(None, "Use the first prompts only.")

    teacher: str | None = _field(None, "Teacher: api:MODEL, vllm:MODEL, or MODEL for transformers.")
    teacher_column: str | None = _field(None, "Column with the teacher's answers, in place of `teacher`.")
    teacher_base_url: list[str] | None = _field(None, "Servers that serve the teacher, used side by side.")
    teacher_api_key_env: str = _field("OPENAI_API_KEY", "Environment variable with the key of the teacher's server.")
    teacher_timeout: float = _field(600.0, "Seconds until a request to the teacher's server is given up.")
    teacher_max_retries: int = _field(5, "How often a request to the teacher's server that fails is tried again.")
    teacher_price_in: float | None = _field(None, "`price_in` of the teacher, where it is another.")
    teacher_price_out: float | None = _field(None, "`price_out` of the teacher, where it is another.")
    teacher_completions: bool = _field(False, "Continue text by the server's plain completions, without a chat.")
    teacher_extra_body: str | None = _field(
        None, "JSON: fields of each request to the teacher's server; null drops one."
    )
    teacher_system_prompt: str | None = _field(None, "System prompt for the teacher behind a server.")
    teacher_adapter: str | None = _field(None, "LoRA adapter of the teacher.")
    teacher_model_init_kwargs: str | None = _field(
        None, "JSON: options of the teacher's loading (dtype, load_in_4bit, ...) or of vLLM's engine."
    )
    teacher_temperature: float = _field(1.0, "Temperature of the teacher's answers; 0 is greedy.")
    teacher_top_p: float = _field(1.0, "Share of the probability that the teacher's tokens are drawn from.")
    teacher_max_new_tokens: int = _field(256, "Longest answer of the teacher in tokens.")
    teacher_stop: list[str] | None = _field(None, "Texts at which the teacher's answers end.")
    teacher_chat_template_kwargs: str | None = _field(None, "JSON: variables for the teacher's chat template.")
    teacher_seed: int | None = _field(None, "Seed of the teacher's answers; by default it comes from `seed`.")
    num_teacher_samples: int = _field(1, "Answers of the teacher to each prompt.")

    student: str | None = _field(None, "Student: api:MODEL, vllm:MODEL, or MODEL for transformers.")
    student_column: str | None = _field(None, "Column with the student's answers, in place of `student`.")
    student_base_url: list[str] | None = _field(None, "Servers that serve the student, used side by side.")
    student_api_key_env: str = _field("OPENAI_API_KEY", "Environment variable with the key of the student's server.")
    student_timeout: float = _field(600.0, "Seconds until a request to the student's server is given up.")
    student_max_retries: int = _field(5, "How often a request to the student's server that fails is tried again.")
    student_price_in: float | None = _field(None, "`price_in` of the student, where it is another.")
    student_price_out: float | None = _field(None, "`price_out` of the student, where it is another.")
    student_completions: bool = _field(False, "Continue text by the server's plain completions, without a chat.")
    student_extra_body: str | None = _field(
        None, "JSON: fields of each request to the student's server; null drops one."
    )
    student_system_prompt: str | None = _field(None, "System prompt for the student behind a server.")
    student_adapter: str | None = _field(None, "LoRA adapter of the student.")
    student_model_init_kwargs: str | None = _field(
        None, "JSON: options of the student's loading (dtype, load_in_4bit, ...) or of vLLM's engine."
    )
    student_temperature: float = _field(1.0, "Temperature of the student's answers; 0 is greedy.")
    student_top_p: float = _field(1.0, "Share of the probability that the student's tokens are drawn from.")
    student_max_new_tokens: int = _field(256, "Longest answer of the student in tokens.")
    student_stop: list[str] | None = _field(None, "Texts at which the student's answers end.")
    student_chat_template_kwargs: str | None = _field(None, "JSON: variables for the student's chat template.")
    student_seed: int | None = _field(None, "Seed of the student's answers; by default it comes from `seed`.")
    num_student_samples: int = _field(1, "Answers of the student to each prompt.")

    preference: str | None = _field(
        None,
        "Who is better: teacher_wins, column:NAME, verifier:FUNCTION, reward_model:MODEL, judge:MODEL (behind a "
        "server), likelihood:MODEL, or function:FUNCTION for a preference function of your own.",
    )
    preference_scale: float | None = _field(
        None, "Scale of scores for Bradley-Terry labels; by default hard labels (reward models: 1)."
    )
    preference_tokenizer: str | None = _field(
        None, "Tokenizer for the `completion_ids` of a verifier; by default that of a local student."
    )
    preference_model_init_kwargs: str | None = _field(None, "JSON: options of loading the reward model or teacher.")
    judge_base_url: list[str] | None = _field(None, "Servers that serve the judge, used side by side.")
    judge_api_key_env: str = _field("OPENAI_API_KEY", "Environment variable with the key of the judge's server.")
    judge_timeout: float = _field(600.0, "Seconds until a request to the judge's server is given up.")
    judge_max_retries: int = _field(5, "How often a request to the judge's server that fails is tried again.")
    judge_price_in: float | None = _field(None, "`price_in` of the judge, where it is another.")
    judge_price_out: float | None = _field(None, "`price_out` of the judge, where it is another.")
    judge_completions: bool = _field(False, "Continue the template by the server's plain completions, without a chat.")
    judge_extra_body: str | None = _field(None, "JSON: fields of each request to the judge's server; null drops one.")
    judge_template: str | None = _field(None, "File with what the judge is asked.")
    judge_temperature: float = _field(0.0, "Temperature of the judge's replies; 0 is greedy.")
    judge_max_new_tokens: int = _field(512, "Longest reply of the judge in tokens.")

    max_concurrency: int = _field(16, "Requests under way at each server.")
    max_requests: int | None = _field(
        None, "Most requests to each source behind a server and to the judge, in all runs into the folder."
    )
    max_tokens: int | None = _field(None, "Most prompt and completion tokens of each of them, likewise.")
    max_cost: float | None = _field(None, "Most money for each of them, likewise, at the prices given.")
    price_in: float | None = _field(None, "Price of a million prompt tokens, for each of them.")
    price_out: float | None = _field(None, "Price of a million completion tokens, likewise.")

    policy: Literal["teacher_vs_student", "best_vs_worst", "all"] = _field(
        "teacher_vs_student", "Which answers make pairs."
    )
    max_pairs_per_prompt: int | None = _field(None, "At most so many pairs a prompt.")
    truncated: Literal["keep", "drop"] = _field("keep", "What happens to answers cut off at `max_new_tokens`.")
    reasoning: Literal["keep", "strip", "error"] | None = _field(
        None,
        "What happens to <think> blocks in answers: kept (by default too), taken out before labelling, or an error.",
    )
    seed: int = _field(0, "Seed of answers and pairs.")
    pairing_seed: int | None = _field(None, "Seed of pairs; by default `seed`. It may change, where that may not.")
    relabel: bool = _field(False, "Forget the labels of another preference function; the answers are kept.")
    shard: str | None = _field(None, "i/n: only the i-th of n parts of the prompts, i from 0.")
    merge: list[str] | None = _field(None, "Folders of all shards, to be made one in `output_dir`.")
    dry_run: bool = _field(False, "Ask each source for one answer, show it, estimate time and cost, and stop.")
    push_to_hub: bool = _field(False, "Push the dataset, with its card and page.")
    hub_dataset_id: str | None = _field(None, "Name of the dataset on the Hub; by default that of `output_dir`.")
    hub_private_repo: bool | None = _field(None, "Whether the dataset is private.")


SOURCES = ("teacher", "student")

# What an option is for; set in vain it is refused
PRICES = ("price_in", "price_out")
_OF_SERVER = (
    *("base_url", "api_key_env", "timeout", "max_retries", "completions", "extra_body", "system_prompt"),
    *PRICES,
)
_OF_LOADING = ("adapter", "model_init_kwargs")
_OF_SAMPLING = ("temperature", "top_p", "max_new_tokens", "stop", "chat_template_kwargs", "seed")
OF_ASKING = ("max_concurrency", "max_requests", "max_tokens", "max_cost", *PRICES)
_OF_PREFERENCES = {
    "preference_scale": ("verifier", "reward_model", "likelihood"),
    "preference_tokenizer": ("verifier",),
    "preference_model_init_kwargs": ("reward_model", "likelihood"),
    **{f.name: ("judge",) for f in fields(PairsArguments) if f.name.startswith("judge_")},
}
_JSON = {
    "model_init_kwargs": '{"load_in_4bit": true}',
    "chat_template_kwargs": '{"enable_thinking": false}',
    "extra_body": '{"top_k": 20}',
}
"""Endings of the options that are JSON, and an example of each."""


def check(args: PairsArguments) -> None:
    """Raises an `InputError` for arguments that are missing or do not go together, before anything is read."""
    if args.output_dir is None:
        raise InputError("`output_dir` is not set: give a folder for answers and pairs.")
    check_output_dir(args.output_dir)
    with bad_input():
        check_folder(args.output_dir)
    if args.merge is not None:
        others = {f.name for f in fields(args)} - {"merge", "output_dir"}
        others = {name for name in others if not name.startswith(("push_to_hub", "hub_"))}
        refuse_set(args, sorted(others), "`merge` asks nobody and takes the pieces as they are: drop one of them.")
        for folder in args.merge:
            if not Path(folder).is_dir():
                raise InputError(f"`merge` names {folder!r}: no such folder.")
        return
    if args.dataset_name is None:
        raise InputError("`dataset_name` is not set: give the prompts, a Hub id, a folder or a file.")
    prompts = Path(args.dataset_name)
    if prompts.is_dir() and Path(args.output_dir).resolve().is_relative_to(prompts.resolve()):
        raise InputError(
            f"`output_dir` is {args.output_dir!r}, in the folder {args.dataset_name!r} that `dataset_name` names: what is "
            "written there would be read as prompts the next time. Give a folder outside of it, or name the file of prompts."
        )
    for source in SOURCES:
        _check_source(args, source)
    if args.preference is None:
        raise InputError(
            "`preference` is not set: say who is better, by teacher_wins, column:NAME, verifier:FUNCTION, "
            "reward_model:MODEL, judge:MODEL, likelihood:MODEL or function:FUNCTION."
        )
    kind = args.preference.partition(":")[0]
    for name, kinds in _OF_PREFERENCES.items():
        if kind not in kinds:
            refuse_set(args, [name], f"`preference` is {args.preference!r}: it is for {' or '.join(kinds)}, drop it.")
    if kind != "judge" and not any(is_server(getattr(args, source)) for source in SOURCES):
        refuse_set(args, OF_ASKING, "no server is asked: drop it.")
    for name in (f.name for f in fields(args)):
        if name.endswith(tuple(_JSON)):
            options = read_json(args, name)
            if name.endswith("model_init_kwargs"):
                check_attention(name, options.get("attn_implementation"))
    parse_shard(args.shard)
    if not (Path(args.output_dir) / SUMMARY).is_file():  # else there may be nothing left to ask
        _check_keys(args)


def _check_source(args: PairsArguments, source: str) -> None:
    model, column = getattr(args, source), getattr(args, f"{source}_column")
    if (model is None) == (column is None):
        both = "both set" if model else "neither set"
        raise InputError(
            f"`{source}` and `{source}_column` are {both}: say who answers, or the column with the answers."
        )
    for name, most in ((f"num_{source}_samples", 2**16), (f"{source}_max_new_tokens", 2**31)):
        value = getattr(args, name)
        if not 1 <= value <= most:
            raise InputError(f"`{name}` is {value}: it must be at least 1, and at most {most:,}.")
    if model in ("api:", "vllm:"):
        raise InputError(f"`{source}` is {model!r}: give the model's name behind the colon.")
    for names, is_idle, why in (
        (_OF_LOADING, model is None or is_server(model), "no model of that source is loaded here: drop it."),
        (_OF_SERVER, not is_server(model), f"`{source}` is {model!r}: a server is `api:MODEL`."),
        (_OF_SAMPLING, model is None, f"the answers are those in the column {column!r}: drop it."),
    ):
        if is_idle:
            refuse_set(args, [f"{source}_{name}" for name in names], why)


def _check_keys(args: PairsArguments) -> None:
    """Raises where a server would be asked without the key that it needs: OpenAI's own, or one whose variable is named."""
    assert args.preference is not None
    kind, _, judge = args.preference.partition(":")
    asked = {source: getattr(args, source) for source in SOURCES if is_server(getattr(args, source))}
    asked |= {"judge": f"judge:{judge}"} if kind == "judge" else {}
    for who, model in asked.items():
        variable = getattr(args, f"{who}_api_key_env")
        if os.environ.get(variable, "").strip():
            continue
        urls = getattr(args, f"{who}_base_url") or [os.environ.get("OPENAI_BASE_URL") or OPENAI_URL]
        if variable != "OPENAI_API_KEY":
            raise InputError(missing_key(f"{who}_api_key_env", variable))
        if any(hostname(url) == hostname(OPENAI_URL) for url in urls):
            field = "preference" if who == "judge" else who
            raise InputError(
                f"`{field}` is {model!r}, at OpenAI's server, but the environment has no variable {variable}, its key: "
                f"set it, or give the server's address as `{who}_base_url`."
            )


def refuse_set(args: PairsArguments, names: Iterable[str], why: str) -> None:
    """Raises an `InputError` if one of these has another value than by default."""
    defaults = {f.name: f.default for f in fields(args)}
    for name in names:
        if getattr(args, name) != defaults[name]:
            raise InputError(f"`{name}` is set, but {why}")


def is_server(model: str | None) -> bool:
    return model is not None and model.startswith("api:")


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """`"i/n"` as `(i, n)`, 0 ≤ i < n."""
    if text is None:
        return None
    index, slash, count = text.partition("/")
    if not slash or not (index.isdecimal() and count.isdecimal()) or not int(index) < int(count):
        raise InputError(f"`shard` is {text!r}: it is i/n with 0 <= i < n, such as 0/4, 1/4, 2/4 and 3/4.")
    return int(index), int(count)


def read_json(args: PairsArguments, name: str) -> dict[str, Any]:
    """An option that is a JSON object."""
    value = getattr(args, name)
    if value is None or isinstance(value, dict):
        return value or {}
    example = next(example for ending, example in _JSON.items() if name.endswith(ending))
    with bad_input():
        return read_object(name, value, example)
