"""Everything of TRL and transformers that is private to them and used here, in one place.

TRL may move any of these names in a release, and then this file is the only one to change. `require` turns a missing
name into one sentence, and `warn_if_untested` says once when the installed TRL is outside the tested range.
"""

import warnings
from importlib import import_module
from importlib.metadata import version
from typing import Any

from packaging.version import Version


TESTED_TRL = (">=1.16.0", "<1.17")
"""The range of TRL releases that the tests have run with."""


def require(module: str, name: str) -> Any:
    """Returns `module.name`, or raises an `ImportError` that says which TRL this release was tested with."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"`{module}.{name}` is gone in trl {version('trl')} with transformers {version('transformers')}. trl-kd was "
            f"tested with trl{','.join(TESTED_TRL)}: install such a release, or a newer trl-kd."
        ) from error


def warn_if_untested(installed: str | None = None) -> None:
    """Warns when the installed TRL (or the version given) is outside the tested range."""
    installed = installed or version("trl")
    low, high = (Version(bound.lstrip("<>=")) for bound in TESTED_TRL)
    if not low <= Version(Version(installed).base_version) < high:
        warnings.warn(
            f"trl {installed} is outside the range that trl-kd was tested with (trl{','.join(TESTED_TRL)}).",
            stacklevel=2,
        )


warn_if_untested()

chunked_divergence_loss = require("trl.trainer.distillation_trainer", "_chunked_divergence_loss")
create_model_from_path = require("trl.trainer.utils", "create_model_from_path")
get_config_model_id = require("trl.trainer.utils", "get_config_model_id")
prepare_deepspeed = require("trl.models", "prepare_deepspeed")
prepare_fsdp = require("trl.models", "prepare_fsdp")
ForwardRedirection = require("trl.models.utils", "_ForwardRedirection")
