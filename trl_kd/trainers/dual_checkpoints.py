"""Checkpoints of a trainer that has a dual variable."""

import json
import os
from typing import Any

from accelerate.logging import get_logger

from trl_kd.losses.dual import DualVariable


logger = get_logger(__name__)

DUAL_FILE = "pbkd_dual.json"


class DualCheckpoints:
    """Mixin before a TRL trainer: `self.dual` is saved beside the optimizer's state, and goes on from there."""

    dual: DualVariable
    args: Any

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.args.should_save:
            with open(os.path.join(output_dir, DUAL_FILE), "w", encoding="utf-8") as file:
                json.dump(self.dual.state_dict(), file)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, DUAL_FILE)
        if not os.path.isfile(path):
            logger.warning(f"No {DUAL_FILE} in the checkpoint: λ starts again at dual_init={self.dual.value}.")
            return
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
        for name, now in self.dual.settings().items():
            if state[name] != now:
                logger.warning(f"λ's {name} was {state[name]} in the checkpoint and is now {now}.")
        self.dual.load_state_dict(state)  # λ itself goes on from the checkpoint, whatever `dual_init` says

    def _save(self, output_dir=None, state_dict=None):
        # `training_args.bin` is saved, and pushed, beside the weights: without the token
        token, self.args.hub_token = self.args.hub_token, None
        try:
            super()._save(output_dir, state_dict)  # type: ignore[misc]
        finally:
            self.args.hub_token = token
