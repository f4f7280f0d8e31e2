"""TRL's own tests of `DPOTrainer`, with `PbKDTrainer` in its place: the preference term alone, at λ = 1.

In a checkout of TRL, at the release that is installed:

    PYTHONPATH=/path/to/trl-kd/tests/compat python -m pytest -p dpo_suite tests/test_dpo_trainer.py

TRL's tests take their models and data from the Hub. Offline they read what lies in `trl-internal-testing/` of the current
directory. A test that fails with `DPOTrainer` too says nothing about `PbKDTrainer`: run them without `-p dpo_suite` first.
"""

from dataclasses import dataclass

import trl

import trl_kd


@dataclass
class DPOConfig(trl_kd.PbKDConfig):
    imitation_weight: float = 0.0
    dual_init: float = 1.0
    learning_rate: float = 1e-6  # the default of TRL's


class DPOTrainer(trl_kd.PbKDTrainer):
    """Of DPO's name, which TRL's tests look for among the tags of the model."""


trl.DPOConfig, trl.DPOTrainer = DPOConfig, DPOTrainer
