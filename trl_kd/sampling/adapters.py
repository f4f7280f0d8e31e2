"""Adapters of models: what they adapt, whether their files can be used, and loading them."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel

from trl_kd.sampling.model_errors import BadModel, reading, reason
from trl_kd.sampling.model_files import empty_model


CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def split_adapter(model: str, adapter: str | None) -> tuple[str, str | None]:
    """
    The names of the base model and of the adapter, where `model` may itself be an adapter's folder.

    Raises:
        `ValueError`: both are adapters, or the adapter does not say what it adapts.
        `BadModel`: its config cannot be read.
    """
    if not Path(model, CONFIG).is_file():
        return model, adapter
    if adapter is not None:
        raise ValueError(
            f"`model` = {model!r} is an adapter already, and `adapter` = {adapter!r} another: give the base model."
        )
    with reading(str(Path(model, CONFIG))):
        config = json.loads(Path(model, CONFIG).read_text(encoding="utf-8"))
        base = config.get("base_model_name_or_path")
        if base is not None and not isinstance(base, str):
            raise TypeError(f"`base_model_name_or_path` is {base!r}")
    if not base:
        raise ValueError(
            f"The adapter {model!r} does not say what it adapts: give that as `model`, and this as `adapter`."
        )
    return base, model


def load_adapter(model: Any, adapter: str, **options: Any) -> PeftModel:
    """
    Args:
        model (`PreTrainedModel`):
            What it adapts.
        adapter (`str`):
            Its name or folder.
        **options:
            Options of PEFT's `from_pretrained`.

    Raises:
        `BadModel`: its config, or its weights, are missing, damaged or of another model.
    """
    config = str(Path(adapter, CONFIG))
    with reading(config):
        PeftConfig.from_pretrained(adapter)
    folder = Path(adapter)
    if folder.is_dir() and not any((folder / file).is_file() for file in _WEIGHTS):
        raise BadModel(f"{folder / _WEIGHTS[0]}: there is no such file")
    file = str(folder / next((file for file in _WEIGHTS if (folder / file).is_file()), _WEIGHTS[0]))
    with reading(file), warnings.catch_warnings():
        # PEFT would leave these as they were made
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, adapter, **options)
        except ValueError as error:
            if isinstance(error, OSError):  # as some of the Hub's are
                raise
            raise BadModel(f"{config}: {reason(error)}") from error
        except UserWarning as error:
            raise BadModel(f"{file} lacks weights that {CONFIG} describes: {' '.join(str(error).split())}") from error


def check_adapter(adapter: str, config: Any, options: Mapping[str, Any]) -> None:
    """Raises a `BadModel` if an adapter cannot be loaded onto the model that `config` describes, of which no weights are
    read; of remote code nothing is told."""
    if getattr(config, "auto_map", None):
        return
    model = empty_model(config, bool(options.get("trust_remote_code")))
    load_adapter(model, adapter, low_cpu_mem_usage=True, torch_device="cpu")
