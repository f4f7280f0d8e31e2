"""
Whether the weights of a model are those that its config describes.

transformers fills what is missing in the files with random numbers, and says so in a report among its progress bars. Here
it loads the model in rehearsal, onto the meta device: from the names and shapes in the files, without their numbers. So its
own rules say what is missing: tied embeddings, names that it converts, experts that it fuses, weights that a class does
without.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from transformers.utils import logging

from trl_kd._trl.models import whole_models
from trl_kd.sampling.model_errors import BadModel, reading


_KINDS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""Files of weights, and what lists them where they are several, in the order in which transformers looks for them."""

_SHOWN = 3


class MissingWeights(BadModel):
    """Parameters that are in no file, so that they would be random. `names` are theirs."""

    def __init__(self, message: str, names: Iterable[str] = ()):
        super().__init__(message)
        self.names = set(names)


@dataclass(frozen=True)
class WeightFiles:
    """The `files` that weights would be loaded from; `name` stands for them in messages."""

    name: str
    files: list[Path]

    def shapes(self) -> dict[str, torch.Tensor]:
        """
        Weights without numbers, on the meta device.

        Raises:
            `BadModel`: a file is missing or damaged, or not safe to load.
        """
        found: dict[str, torch.Tensor] = {}
        for path in self.files:
            with reading(path.name):
                found |= _of_safetensors(path) if path.suffix == ".safetensors" else _of_pickle(path)
        return found


def _of_safetensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as weights:
        names = weights.keys()
        return {name: torch.empty(weights.get_slice(name).get_shape(), device="meta") for name in names}


def _of_pickle(path: Path) -> dict[str, torch.Tensor]:
    weights = torch.load(path, map_location="meta", weights_only=True)
    return {name: weight for name, weight in weights.items() if isinstance(weight, torch.Tensor)}


def find_weights(name: str, options: Mapping[str, Any]) -> WeightFiles | None:
    """
    Args:
        name (`str`):
            Name or folder of a model.
        options (`Mapping[str, Any]`):
            Options of its `from_pretrained`.

    Returns:
        `WeightFiles` or `None`: `None` where the weights are still to be downloaded, or cannot be told by their names.

    Raises:
        `BadModel`: there are parts of weights, and no index of them that can be read.
    """
    is_here = Path(name).is_dir()
    folder = Path(name) if is_here else _cached(name, options)
    if folder is None:
        return None
    for file, index in _KINDS[options.get("use_safetensors") is False :]:
        if (folder / file).is_file():
            return WeightFiles(file, [folder / file])
        if (folder / index).is_file():
            with reading(index):
                listed = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
                parts = [folder / part for part in sorted(set(listed.values()))]
            whole = is_here or all(part.is_file() for part in parts)
            return WeightFiles(f"the {len(parts)} files of {index}", parts) if whole else None
    part = next(iter(sorted(folder.glob("model-*-of-*.safetensors"))), None)
    if is_here and part is not None:
        raise BadModel(f"{_KINDS[0][1]}: there is no such file beside {part.name}, which is a part of the weights")
    return None


def _cached(name: str, options: Mapping[str, Any]) -> Path | None:
    """Where the files of a model of the Hub are that were downloaded."""
    places = {key: options[key] for key in ("cache_dir", "revision") if options.get(key) is not None}
    found = try_to_load_from_cache(name, "config.json", **places)
    return Path(found).parent if isinstance(found, str) else None


def check_weights(
    weights: WeightFiles, architecture: Any, config: Any, options: Mapping[str, Any], has_all_layers: bool
) -> None:
    """
    Args:
        weights (`WeightFiles`):
            The files.
        architecture (`type`):
            Class of the model.
        config (`PretrainedConfig`):
            Its config.
        options (`Mapping[str, Any]`):
            Options of its `from_pretrained`, of which `key_mapping` and `ignore_mismatched_sizes` matter here.
        has_all_layers (`bool`):
            Whether weights of layers that the config does not have are a mistake.

    Raises:
        `BadModel`: weights are damaged, missing, or another model's.
    """
    model, found = rehearse(architecture, config, weights, options.get("key_mapping"))
    if not options.get("ignore_mismatched_sizes"):
        for name, there, wanted in sorted(found["mismatched_keys"]):
            raise BadModel(
                f"{weights.name} and config.json are not of one model: `{name}` is {_size(there)} there, and "
                f"{_size(wanted)} by the config"
            )
    check_missing(model, found, weights.name)
    dropped = _of_other_layers(found["unexpected_keys"], model.state_dict()) if has_all_layers else []
    if dropped:
        raise BadModel(
            f"config.json describes fewer layers than {weights.name} has: nothing would read {_some(dropped)}; correct "
            "`num_hidden_layers` and its like"
        )


def rehearse(
    architecture: Any, config: Any, weights: WeightFiles | None, key_mapping: Any = None, **more: Any
) -> tuple[Any, dict[str, Any]]:
    """Loads a model onto the meta device, of the names and shapes in its files, or of none.

    Returns:
        `tuple`: the model, and what transformers tells of the loading (`output_loading_info`).
    """
    shapes = {} if weights is None else weights.shapes()
    with whole_models(), _silent():
        try:
            return architecture.from_pretrained(
                None,
                config=config,
                state_dict=shapes,
                dtype=torch.float32,
                device_map="meta",
                key_mapping=key_mapping,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **more,
            )
        except RuntimeError as error:  # its text points to a report
            name = "its weights" if weights is None else weights.name
            raise BadModel(
                f"{name} and config.json are not of one model: transformers cannot make the weights of "
                f"{architecture.__name__} of them, since some are missing or of other sizes"
            ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """No report and no bar of transformers: what they say is said by us, or will be when weights are loaded."""
    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL + 1)
    if has_bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


def check_missing(model: Any, found: Mapping[str, Any], weights: str) -> None:
    """
    Args:
        model (`PreTrainedModel`):
            A model that was loaded.
        found (`Mapping[str, Any]`):
            What transformers tells of the loading (`output_loading_info`).
        weights (`str`):
            What the files of weights are called.

    Raises:
        `MissingWeights`: parameters were in no file, so that they are random. Buffers may be missing: most are computed.
    """
    parameters = {name for name, _ in model.named_parameters()}
    missing = parameters & set(found["missing_keys"])
    if missing:
        raise MissingWeights(
            f"config.json describes {len(missing)} weights that are not in {weights}, and would be random: "
            f"{_some(missing)}; save the whole model, or correct config.json",
            missing,
        )


def _of_other_layers(unexpected: Iterable[str], expected: Iterable[str]) -> list[str]:
    """Names that a model would have if it had more layers, and of which layers it has nothing. Other names are left out
    rightly: of heads and towers that a class does not have, or that layers share."""
    names = list(expected)
    patterns = {_NUMBER.sub("*", name) for name in names}
    layers = {name[: number.end()] for name in names for number in _NUMBER.finditer(name)}
    return [
        name
        for name in unexpected
        if _NUMBER.sub("*", name) in patterns
        and any(name[: number.end()] not in layers for number in _NUMBER.finditer(name))
    ]


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def _some(names: Iterable[str]) -> str:
    shown = sorted(names)
    return ", ".join(f"`{name}`" for name in shown[:_SHOWN]) + (", …" if len(shown) > _SHOWN else "")


def _size(shape: Iterable[int]) -> str:
    return " × ".join(map(str, shape)) or "a number"
