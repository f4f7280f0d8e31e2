"""What the files of a model tell before its weights are read: whether config, weights and tokenizer can be used together."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trl_kd.sampling.model_errors import BadModel, reading, reason
from trl_kd.sampling.weight_files import check_weights, find_weights, rehearse


FINDING = ("revision", "trust_remote_code", "token", "subfolder", "cache_dir", "local_files_only")
"""Options of `from_pretrained` that say where the files are: the config needs them too."""

_ELSEWHERE = ("subfolder", "variant", "gguf_file")
"""Options that say which files of a folder hold the weights."""

_OF_LOADING = (
    *(*FINDING, *_ELSEWHERE),
    *("dtype", "torch_dtype", "attn_implementation", "experts_implementation", "quantization_config"),
    *("device_map", "max_memory", "offload_folder", "offload_buffers", "offload_state_dict", "low_cpu_mem_usage"),
    *("tp_plan", "tp_size", "device_mesh", "distributed_config", "use_kernels", "kernel_config", "allow_all_kernels"),
    *("use_safetensors", "weights_only", "ignore_mismatched_sizes", "key_mapping", "disable_mmap"),
    *("adapter_kwargs", "adapter_name", "generation_config", "force_download", "proxies"),
)  # fmt: skip
"""Options that `from_pretrained` takes for itself. Others must be fields of the config."""

QUANTIZATION = ("load_in_", "bnb_", "llm_int8_")
"""How the options begin that are fields of `BitsAndBytesConfig`."""

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def read_config(name: str, options: Mapping[str, Any], **more: Any) -> Any:
    """
    A model's config.

    Raises:
        `BadModel`: there is none, or it is none.
    """
    with reading("config.json"):
        try:
            options = {key: options[key] for key in FINDING if key in options}
            config = AutoConfig.from_pretrained(name, **options, **more)
        except OSError as error:  # which tells the file itself, or that there is no way to it
            raise BadModel(reason(error)) from error
        _check_fields(config)
        return config


def _check_fields(config: Any) -> None:
    """Fields that transformers takes as they come."""
    classes = config.architectures
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise BadModel(f"config.json: `architectures` is {classes!r}: it must be a list of names")
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers < 1:
        raise BadModel(f"config.json: `num_hidden_layers` is {layers}: it must be at least 1")


def is_adapter(name: str) -> bool:
    """Whether a folder holds an adapter alone, without a config."""
    return Path(name, "adapter_config.json").is_file() and not Path(name, "config.json").is_file()


def empty_model(config: Any, trust_remote_code: bool = False) -> PreTrainedModel:
    """
    The model that a config describes, on the meta device: shapes, no weights.

    Raises:
        `BadModel`: there is no such model.
    """
    with reading("config.json"):
        architecture = _class_of(config)
        with init_empty_weights():
            if architecture is None:
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            else:
                model = architecture(config)
        model.tie_weights()  # the context has made two parameters of a shared one
    return model


def _class_of(config: Any) -> Any:
    return getattr(transformers, (config.architectures or [""])[0], None)


def check_files(name: str, config: Any, options: Mapping[str, Any], by_transformers: bool = True) -> int | None:
    """
    Checks the files of a model, of which weights are not read.

    Args:
        name (`str`):
            Name or folder.
        config (`PretrainedConfig`):
            Its config.
        options (`Mapping[str, Any]`):
            Options of its `from_pretrained`, or of another loader.
        by_transformers (`bool`, *optional*, defaults to `True`):
            Whether transformers will load it: then its class must be known, and the options be some.

    Returns:
        `int` or `None`: rows of its input embeddings, where they can be told.

    Raises:
        `BadModel`: the config describes no model, or an option is none; of weights that are here already also: some are
            damaged, missing, not safe to load, or another model's.
    """
    described = config
    if by_transformers:
        _check_class(config)
        _check_dtype(options)
        config, unknown = _with_fields(config, options)
    if not type(config).__module__.startswith("transformers.") or _class_of(config) is None:
        return None  # of remote code nothing is told
    model = empty_model(config)
    if by_transformers and unknown:
        _check_unknown(config, unknown)
    quantized = getattr(config, "quantization_config", None) is not None
    weights = None if any(options.get(option) for option in _ELSEWHERE) else find_weights(name, options)
    if weights is not None and (quantized or getattr(config, "transformers_weights", None)):
        weights.shapes()  # under names of their own, then
    elif weights is not None:
        check_weights(weights, _class_of(config), config, options, has_all_layers=_has_all_layers(config, described))
    embeddings = model.get_input_embeddings()
    weight = getattr(embeddings, "weight", None)
    return None if weight is None else weight.shape[0]


def _check_class(config: Any) -> None:
    if not config.architectures:
        raise BadModel("config.json: `architectures` is not set: name the model's class there, in a list")
    if _class_of(config) is None and not getattr(config, "auto_map", None):
        raise BadModel(
            f"config.json: `architectures` is {config.architectures!r}, and transformers {transformers.__version__} has no "
            "such class"
        )


def _check_dtype(options: Mapping[str, Any]) -> None:
    dtype = options.get("dtype")
    if dtype is not None and not isinstance(dtype, torch.dtype) and dtype not in _DTYPES:
        raise BadModel(f"`dtype` is {dtype!r}: choose from {', '.join(map(repr, _DTYPES))}")


def _with_fields(config: Any, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config as the options change it, and the options that are nothing to it."""
    fields = {
        key: value for key, value in options.items() if key not in _OF_LOADING and not key.startswith(QUANTIZATION)
    }
    if not fields:
        return config, {}
    with reading(f"config.json with {', '.join(f'`{field}`' for field in fields)} changed"):
        return type(config).from_dict(config.to_dict(), return_unused_kwargs=True, **fields)


def _check_unknown(config: Any, unknown: dict[str, Any]) -> None:
    try:
        rehearse(_class_of(config), config, None, **unknown)
    except TypeError as error:
        raise BadModel(
            f"`{next(iter(unknown))}` is neither an option of `from_pretrained` nor a field of config.json: drop it"
        ) from error


def _has_all_layers(config: Any, described: Any) -> bool:
    """Whether a config has a place for each layer of its weights: no layers are left out by an option, and none predict
    further tokens, which transformers does not use."""
    text = config.get_text_config()
    return config is described and not getattr(text, "num_nextn_predict_layers", None)


def check_tokens(tokenizer: Any, rows: int | None) -> None:
    """
    Embeddings larger than the tokenizer (Qwen, Llama, Phi) are as they should be. A token beyond them is refused even if it
    was added and no row seems to use it, as `[PAD]` and the ends of turns of some converted models: a text or template that
    spells it, or a batch that is padded by it, would look up a row that is not there, in the middle of a run.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer of a model.
        rows (`int`, *optional*):
            Rows of the model's input embeddings.

    Raises:
        `BadModel`: it has tokens that the model has no embedding for.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    last = max(vocabulary, key=lambda token: vocabulary[token], default=None)
    if last is not None and vocabulary[last] >= (math.inf if rows is None else rows):
        raise BadModel(
            f"its tokenizer numbers {vocabulary[last] + 1:,} tokens, and its embeddings have {rows:,} rows (`vocab_size` in "
            f"config.json): {last!r} has none. Take the model's own tokenizer, or enlarge the embeddings by "
            f"`resize_token_embeddings({vocabulary[last] + 1})` and save both"
        )


_OF_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json", "tokenizer_config.json")


@contextmanager
def reading_tokenizer(name: str) -> Iterator[None]:
    """Takes whatever goes wrong here for a fault of the tokenizer at `name`."""
    try:
        yield
    except Exception as error:  # those of `tokenizers` have no class of their own
        raise BadModel(f"its tokenizer cannot be read: {tokenizer_reason(name, error)}") from error


def tokenizer_reason(name: str, error: BaseException) -> str:
    """Why the tokenizer at `name` cannot be read: the file of its folder at fault, which transformers does not say, or
    else the `error`."""
    folder = Path(name)
    if not folder.is_dir():
        return reason(error)
    for path in (folder / file for file in _OF_TOKENIZERS):
        if path.is_file() and (fault := _json_fault(path)) is not None:
            return f"{path.name}: {fault}"
    if not any(next(folder.glob(file), None) for file in _VOCABULARIES):
        return "there is no tokenizer.json in the folder"
    return reason(error)


def _json_fault(path: Path) -> str | None:
    try:
        if not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
            return "it is no JSON object"
        if path.name == _OF_TOKENIZERS[0]:
            Tokenizer.from_file(str(path))
    except Exception as error:  # those of `tokenizers` have no class of their own
        return reason(error)
    return None


def check_model(name: str, options: Mapping[str, Any], tokenizer: Any = None) -> None:
    """Checks the files of a model, and its tokenizer with them: see `check_files` and `check_tokens`."""
    rows = check_files(name, read_config(name, options), options)
    if tokenizer is not None:
        check_tokens(tokenizer, rows)
