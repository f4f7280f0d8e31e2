"""Which values of fields that users set freely are stored, compared and shown. Keys and passwords may stand in the others.

Such fields are those of a request to a server, variables of a chat template, and options of loading a model. Of a field that
is not listed here only the name is recorded, so that a key may change between two runs of one folder.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Union


NOT_STORED = "(not stored)"
"""Stands in place of a value that is not recorded."""

NOT_SHOWN = "(it is not shown, since a key may stand in it)"
"""Stands in a message in place of a value that is refused."""


class How(Enum):
    """How a value is recorded."""

    PLAIN = "as it is; an object in it as HASHED"
    HASHED = "numbers as they are, texts as hashes: compared, and not to be read"
    HIDDEN = "not at all"


@dataclass(frozen=True)
class Fields:
    """Rules of the fields of an object.

    Parameters:
        rules (`Mapping[str, How | Fields]`): By name.
        others (`How`): Of all other names.
    """

    rules: Mapping[str, Union[How, "Fields"]] = field(default_factory=dict)
    others: How = How.HIDDEN

    def of(self, name: str) -> Union[How, "Fields"]:
        return self.rules.get(name, self.others)


Rule = How | Fields


def _all(how: How, *names: str) -> dict[str, Rule]:
    return dict.fromkeys(names, how)


TEMPLATE_FIELDS = Fields(
    _all(How.PLAIN, "reasoning_effort", "thinking_mode", "date_string", "builtin_tools", "model_identity"), How.HASHED
)
"""Variables of chat templates. Of most the values are numbers or true and false."""

REQUEST_FIELDS = Fields(
    {
        **_all(How.HASHED, "temperature", "top_p", "top_k", "top_a", "min_p", "typical_p", "tfs_z"),
        **_all(How.HASHED, "seed", "sampling_seed"),
        **_all(How.HASHED, "n", "best_of", "max_tokens", "max_completion_tokens", "max_new_tokens", "min_tokens"),
        **_all(How.HASHED, "n_predict", "num_ctx", "thinking_budget", "truncate_prompt_tokens", "allowed_token_ids"),
        **_all(How.HASHED, "presence_penalty", "frequency_penalty", "repetition_penalty", "repeat_penalty"),
        **_all(How.HASHED, "repeat_last_n", "length_penalty", "no_repeat_ngram_size", "mirostat", "mirostat_tau"),
        **_all(How.HASHED, "mirostat_eta", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n"),
        **_all(How.HASHED, "xtc_probability", "xtc_threshold", "dynatemp_range", "dynatemp_exponent", "logit_bias"),
        **_all(How.HASHED, "use_beam_search", "early_stopping", "ignore_eos", "include_stop_str_in_output", "echo"),
        **_all(How.HASHED, "skip_special_tokens", "spaces_between_special_tokens", "add_special_tokens"),
        **_all(How.HASHED, "add_generation_prompt", "continue_final_message", "parallel_tool_calls", "stream"),
        **_all(How.HASHED, "stop_token_ids", "logprobs", "top_logprobs", "prompt_logprobs", "cache_prompt"),
        **_all(How.HASHED, "enable_thinking", "chat_template", "response_format", "structured_outputs", "guided_json"),
        **_all(How.HASHED, "json_schema", "documents", "mm_processor_kwargs", "suffix"),
        **_all(How.PLAIN, "stop", "bad_words", "reasoning_effort", "reasoning_format", "verbosity", "service_tier"),
        **_all(How.PLAIN, "guided_regex", "guided_choice", "guided_grammar", "guided_decoding_backend"),
        **_all(How.PLAIN, "regex", "ebnf"),
        **_all(How.PLAIN, "guided_whitespace_pattern", "grammar", "tool_choice", "modalities", "models", "route"),
        **_all(How.PLAIN, "transforms", "samplers"),
        "reasoning": Fields(_all(How.PLAIN, "effort", "max_tokens", "exclude", "enabled", "summary")),
        "thinking": Fields(_all(How.PLAIN, "type", "budget_tokens")),
        "provider": Fields(
            {
                **_all(How.PLAIN, "order", "only", "ignore", "sort", "quantizations", "data_collection", "zdr"),
                **_all(How.PLAIN, "allow_fallbacks", "require_parameters", "enforce_distillable_text"),
                **_all(How.PLAIN, "preferred_min_throughput", "preferred_max_latency"),
                "max_price": Fields(_all(How.PLAIN, "prompt", "completion", "request", "image")),
            }
        ),
        "chat_template_kwargs": TEMPLATE_FIELDS,
    }
)
"""Fields of a request to a server of the OpenAI protocol that answers depend on, of the servers that we know."""

_QUANTIZATION_FIELDS = Fields(
    {
        **_all(How.PLAIN, "quant_method", "load_in_4bit", "load_in_8bit", "bnb_4bit_compute_dtype"),
        **_all(How.PLAIN, "bnb_4bit_quant_storage", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
        **_all(How.PLAIN, "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "llm_int8_skip_modules"),
        **_all(How.PLAIN, "llm_int8_threshold"),
    },
    How.HASHED,
)

MODEL_FIELDS = Fields(
    {
        **_QUANTIZATION_FIELDS.rules,
        "quantization_config": _QUANTIZATION_FIELDS,
        **_all(How.PLAIN, "revision", "code_revision", "tokenizer_revision", "subfolder", "variant", "gguf_file"),
        **_all(How.PLAIN, "dtype", "torch_dtype", "attn_implementation", "experts_implementation", "device_map"),
        **_all(How.PLAIN, "trust_remote_code", "use_safetensors", "low_cpu_mem_usage", "use_cache", "tp_plan"),
        **_all(How.PLAIN, "tokenizer", "tokenizer_mode", "load_format", "kv_cache_dtype", "quantization", "runner"),
        **_all(How.PLAIN, "max_model_len", "max_lora_rank", "enable_lora", "enable_prefix_caching", "seed"),
        **_all(How.PLAIN, "disable_sliding_window", "enable_chunked_prefill", "attention_backend", "model_impl"),
        **_all(How.PLAIN, "max_num_batched_tokens", "block_size", "generation_config", "config_format"),
        **_all(How.HASHED, "attention_dropout", "rope_scaling", "rope_parameters", "rope_theta", "sliding_window"),
        **_all(How.HASHED, "max_position_embeddings", "num_labels", "tie_word_embeddings", "hf_overrides"),
        **_all(How.HASHED, "override_generation_config", "speculative_config", "limit_mm_per_prompt"),
    }
)
"""Options of `from_pretrained` and of vLLM's engine that a model depends on."""

_OF_DESCRIPTIONS: dict[str, Fields] = {
    "extra": REQUEST_FIELDS,
    "chat_template_kwargs": TEMPLATE_FIELDS,
    "model_options": MODEL_FIELDS,
    "model_init_kwargs": MODEL_FIELDS,
}
_OURS = (
    *(("source", "server"), ("sampler", "local"), ("sampler", "vllm"), ("preference", "llm_judge")),
    *(("preference", "reward_model"), ("preference", "teacher_likelihood")),
)
"""What the descriptions of our own sources and preferences say of themselves."""

_OF_REQUESTS = ("model", "messages", "prompt", "tools")
"""Fields of each request that are made of the prompt and the settings."""

_HASH = re.compile(r"sha256:[0-9a-f]{16}")
_KEY = re.compile(r"(?=.*\d)(?=.*[A-Za-z])\S{8,}")
"""What looks like a key."""

_LONG_NUMBER = 8
"""Digits of a number that may be a secret: a shorter one is a setting far more often, and stands in many answers."""


def recorded(value: Any, rule: Rule) -> Any:
    """
    What is stored, compared and shown of a value, as JSON. What is recorded already stays as it is.

    Args:
        value (`Any`):
            A value, of JSON or one that is told by its text.
        rule (`How` or `Fields`):
            How; of an object mostly that of each of its fields.
    """
    if rule is How.HIDDEN:
        return NOT_STORED
    if isinstance(value, Mapping):
        return {str(name): recorded(item, _inside(rule).of(str(name))) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [recorded(item, rule) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    if rule is How.PLAIN or text == NOT_STORED or _HASH.fullmatch(text):
        return text
    return f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def _inside(rule: Rule) -> Fields:
    """The rules of the fields of an object."""
    if isinstance(rule, Fields):
        return rule
    return Fields(others=How.HIDDEN if rule is How.HIDDEN else How.HASHED)


def recorded_description(description: Any) -> Any:
    """What a source or a preference of ours says of itself, with what is recorded of its free fields: an earlier version
    stored all of them. Those of others stay as they are."""
    if not isinstance(description, Mapping) or not any(description.get(key) == value for key, value in _OURS):
        return description
    return {
        name: recorded(value, _OF_DESCRIPTIONS[name]) if name in _OF_DESCRIPTIONS else value
        for name, value in description.items()
    }


def recorded_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a folder, stored by any version, with what is recorded of each part."""
    return {name: recorded_description(value) for name, value in settings.items()}


def hidden_texts(body: Mapping[str, Any]) -> list[str]:
    """The texts and the long numbers in a request that are not recorded, and the texts recorded as hashes that look like
    keys: none of them may get into an answer or an error by a server's echo."""
    own = {name: value for name, value in body.items() if name not in _OF_REQUESTS}
    return list(_hidden(own, REQUEST_FIELDS))


def _hidden(value: Any, rule: Rule) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _hidden(item, _inside(rule).of(str(name)))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _hidden(item, rule)
    elif isinstance(value, str) and (rule is How.HIDDEN or (rule is not How.PLAIN and _KEY.fullmatch(value))):
        yield value
    elif isinstance(value, int) and rule is How.HIDDEN and len(str(value)) >= _LONG_NUMBER:
        yield str(value)


def not_words(texts: Iterable[str]) -> list[str]:
    """Those of some texts that an answer would not hold unless it repeats them: no word, and nothing of several words."""
    return [text for text in texts if not text.isalpha() and not re.search(r"\s", text)]


def read_object(name: str, text: str, example: str | None = None) -> dict[str, Any]:
    """
    A field whose text is a JSON object.

    Raises:
        `ValueError`: it is none. The message does not show the text, in which a key may stand.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        fault = (
            f"{error.msg}, at character {error.pos + 1}"
            if isinstance(error, json.JSONDecodeError)
            else "it is too deep"
        )
    else:
        if isinstance(value, dict):
            return value
        fault = f"it is {kind_of(value)}"
    such_as = "" if example is None else f", such as '{example}'"
    raise ValueError(f"`{name}` must be a JSON object{such_as}, and is none: {fault} {NOT_SHOWN}.")


def kind_of(value: Any) -> str:
    """What a value of JSON or YAML is, in words."""
    return _KINDS.get(type(value), "of another kind")


_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
