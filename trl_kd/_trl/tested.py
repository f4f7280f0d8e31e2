"""The range of TRL releases that the tests have run with. A name that is gone from a release is one sentence."""

import warnings
from importlib import import_module
from importlib.metadata import version
from typing import Any

from packaging.version import Version


TESTED_TRL = (">=1.16.0", "<1.17")


def _gone(name: str) -> str:
    return (
        f"`{name}` is gone in trl {version('trl')} with transformers {version('transformers')}. trl-kd was tested with "
        f"trl{','.join(TESTED_TRL)}: install such a release, or a newer trl-kd."
    )


def require(module: str, name: str) -> Any:
    """Returns `module.name`, or raises an `ImportError` that says which TRL this release was tested with."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(_gone(f"{module}.{name}")) from error


def require_methods(owner: type, names: Any) -> None:
    """Raises an `ImportError` unless `owner` still has every method in `names`, which a trainer of ours calls or overrides:
    TRL would silently ignore an override of a method that it does not call any more."""
    for name in names:
        if not hasattr(owner, name):
            raise ImportError(_gone(f"{owner.__name__}.{name}"))


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
