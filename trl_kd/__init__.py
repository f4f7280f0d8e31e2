"""Preference-based knowledge distillation for Hugging Face TRL.

The public names are resolved on first use, so that `import trl_kd` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0.dev0"

_PUBLIC = {
    "MMPbKDConfig": "trl_kd.trainers.mm_pbkd.config",
    "MMPbKDTrainer": "trl_kd.trainers.mm_pbkd.trainer",
    "OnlinePbKDConfig": "trl_kd.trainers.online_pbkd.config",
    "OnlinePbKDTrainer": "trl_kd.trainers.online_pbkd.trainer",
    "PbKDConfig": "trl_kd.trainers.pbkd.config",
    "PbKDRounds": "trl_kd.trainers.rounds.rounds",
    "PbKDTrainer": "trl_kd.trainers.pbkd.trainer",
}

__all__ = [
    "MMPbKDConfig",
    "MMPbKDTrainer",
    "OnlinePbKDConfig",
    "OnlinePbKDTrainer",
    "PbKDConfig",
    "PbKDRounds",
    "PbKDTrainer",
    "__version__",
]

if TYPE_CHECKING:
    from trl_kd.trainers.mm_pbkd.config import MMPbKDConfig
    from trl_kd.trainers.mm_pbkd.trainer import MMPbKDTrainer
    from trl_kd.trainers.online_pbkd.config import OnlinePbKDConfig
    from trl_kd.trainers.online_pbkd.trainer import OnlinePbKDTrainer
    from trl_kd.trainers.pbkd.config import PbKDConfig
    from trl_kd.trainers.pbkd.trainer import PbKDTrainer
    from trl_kd.trainers.rounds.rounds import PbKDRounds


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'trl_kd' has no attribute {name!r}; the public names are {', '.join(__all__)}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
