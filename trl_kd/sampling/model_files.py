"""What the files of a model tell before its weights are read: whether config, weights and tokenizer can be used together."""

import json
import math
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


FINDING = ("revision", "trust_remote_code", "token", "subfolder", "cache_dir", "local_files_only")
"""Options of `from_pretrained` that say where the files are: the config needs them too."""

_ELSEWHERE = ("subfolder", "variant", "gguf_file")
"""Options that say which files of a folder hold the weights."""

_PLAIN = (OSError, ValueError, StrictDataclassError)
MODEL_ERRORS = (
    *_PLAIN,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    RuntimeError,
    SafetensorError,
    pickle.UnpicklingError,
)
"""What transformers raises for files of a model that it cannot use: configs are not checked, but put to use."""


class BadModel(OSError):
    """A model cannot be loaded from its files; the sentence names the file."""


@contextmanager
def named(who: str) -> Iterator[None]:
    """Whatever is wrong with a model's files is said of `who`: "The model 'name'"."""
    try:
        yield
    except BadModel as error:
        raise BadModel(f"{who} cannot be loaded: {error}") from error


@contextmanager
def reading(file: str) -> Iterator[None]:
    """Takes whatever goes wrong here for a fault of the file."""
    try:
        yield
    except BadModel:
        raise
    except MODEL_ERRORS as error:
        raise BadModel(f"{file}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """An error in words; of a KeyError and its like also which it is."""
    text = " ".join(str(error).split())
    return text if isinstance(error, _PLAIN) and text else f"{type(error).__name__}: {text}"


def read_config(name: str, options: Mapping[str, Any], **more: Any) -> Any:
    """
    A model's config.

    Raises:
        `BadModel`: there is none, or it is none.
    """
    with reading("config.json"):
        try:
            return AutoConfig.from_pretrained(name, **{key: options[key] for key in FINDING if key in options}, **more)
        except OSError as error:  # which tells the file itself, or that there is no way to it
            raise BadModel(reason(error)) from error


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
    with reading("config.json"):
        return getattr(transformers, (config.architectures or [""])[0], None)


def check_files(name: str, config: Any, options: Mapping[str, Any]) -> int | None:
    """
    Checks the files of a model, of which weights are not read.

    Args:
        name (`str`):
            Name or folder.
        config (`PretrainedConfig`):
            Its config.
        options (`Mapping[str, Any]`):
            Options of its `from_pretrained`.

    Returns:
        `int` or `None`: rows of its input embeddings, where they can be told.

    Raises:
        `BadModel`: the config describes no model; of a folder also: weights are damaged, missing, not safe to load, or
            another model's.
    """
    # Of remote code, or of a class that is not named, nothing is told
    model = None if getattr(config, "auto_map", None) or _class_of(config) is None else empty_model(config)
    if not any(options.get(option) for option in _ELSEWHERE):
        quantized = getattr(config, "quantization_config", None) is not None
        shapes = {} if model is None or quantized else {key: value.shape for key, value in model.state_dict().items()}
        _check_weights(Path(name), shapes)
    embeddings = None if model is None else model.get_input_embeddings()
    weight = getattr(embeddings, "weight", None)
    return None if weight is None else weight.shape[0]


def _check_weights(folder: Path, shapes: dict[str, torch.Size]) -> None:
    index = folder / "model.safetensors.index.json"
    files = sorted(path for path in folder.glob("model*.safetensors"))
    if index.is_file():
        with reading(index.name):
            content = json.loads(index.read_text(encoding="utf-8"))
            files = [folder / shard for shard in sorted(set(content["weight_map"].values()))]
    for path in files:
        with reading(path.name), safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is no dictionary)
                _check_shape(path.name, name, weights.get_slice(name).get_shape(), shapes.get(name))
    if files:
        return
    for path in sorted(folder.glob("pytorch_model*.bin")):
        with reading(f"{path.name}, which is not safe to load or damaged (save it as safetensors)"):
            torch.load(path, map_location="meta", weights_only=True)


def _check_shape(file: str, name: str, found: list[int], wanted: torch.Size | None) -> None:
    """Matrices only: transformers may rearrange what has more dimensions while it loads, or turn one."""
    if wanted is None or len(wanted) != 2 or sorted(found) == sorted(wanted):
        return
    raise BadModel(
        f"{file} and config.json are not of one model: `{name}` is {' × '.join(map(str, found))} there, and "
        f"{' × '.join(map(str, wanted))} by the config"
    )


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


def check_model(name: str, options: Mapping[str, Any], tokenizer: Any = None) -> None:
    """Checks the files of a model, and its tokenizer with them: see `check_files` and `check_tokens`."""
    rows = check_files(name, read_config(name, options), options)
    if tokenizer is not None:
        check_tokens(tokenizer, rows)
