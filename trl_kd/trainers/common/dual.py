"""What a trainer with a dual variable writes: its checkpoints and its model card."""

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy
from typing import Any

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model

from trl_kd._trl.models import get_config_model_id
from trl_kd._trl.seams import temporarily
from trl_kd.losses.dual import DualVariable, theory_radius
from trl_kd.trainers.common.card import DATASET, MODEL, put_names
from trl_kd.trainers.common.checkpoints import EndsAtLastStep, remove_older
from trl_kd.trainers.common.config_checks import without_keys
from trl_kd.trainers.common.full_disk import saving


logger = get_logger(__name__)

DUAL_FILE = "pbkd_dual.json"
_PROCESSES = "num_processes"


def make_dual(args: Any, pairs: int, target: float = 0.0) -> DualVariable:
    """λ as the fields `dual_*` and `confidence_*` of a config describe it, for so many training pairs."""
    radius: Any = args.confidence_radius
    if radius == "theory":
        radius = theory_radius(pairs, args.confidence_constant, args.confidence_delta)
    return DualVariable(
        value=min(args.dual_init, args.dual_max),
        learning_rate=args.dual_learning_rate,
        maximum=args.dual_max,
        target=target,
        radius=float(radius),
    )


def other_processes(checkpoint: str, processes: int) -> str | None:
    """What is said of a run of so many processes that goes on from a checkpoint of another number; `None` of the same."""
    path = os.path.join(checkpoint, DUAL_FILE)
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        before = json.load(file).get(_PROCESSES)
    if before in (None, processes):
        return None
    return (
        f"The checkpoint was saved by a run of {before} processes, and this run has {processes}. Its steps use batches of "
        "another size, so that the student will differ from that of a run that was not stopped. To get the same student, "
        f"start {before} processes."
    )


class DualCheckpoints(EndsAtLastStep):
    """Mixin before a TRL trainer: `self.dual` is saved beside the optimizer's state, and goes on from there; TRL's model
    card gets the sections that `_add_card_sections(path, trainer)` writes."""

    dual: DualVariable
    args: Any
    model: Any
    state: Any
    is_world_process_zero: Any
    _add_card_sections: Callable[[str, Any], None]

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        model_name = model_name or os.path.basename(os.path.normpath(self.args.output_dir))
        names = {"model_name": MODEL, "dataset_name": DATASET if dataset_name else None}
        super().create_model_card(**names, tags=tags)  # type: ignore[misc]
        if self.is_world_process_zero():
            path = os.path.join(self.args.output_dir, "README.md")
            put_names(path, model_name, dataset_name or None, get_config_model_id(self.model.config))
            self._add_card_sections(path, self)

    def _save_checkpoint(self, *args, **kwargs):
        with saving(self, os.path.join(self.args.output_dir, f"checkpoint-{self.state.global_step}")):
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir=None, _internal_call=False):
        with nullcontext() if _internal_call else saving(self):  # a part of a checkpoint, or the end
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.args.should_save:
            with open(os.path.join(output_dir, DUAL_FILE), "w", encoding="utf-8") as file:
                json.dump(self.dual.state_dict() | {_PROCESSES: self.args.world_size}, file)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        if self.args.should_save and os.path.dirname(os.path.abspath(checkpoint)) == os.path.abspath(
            self.args.output_dir
        ):
            remove_older(checkpoint, self.args.save_total_limit, self.state.best_model_checkpoint)
        path = os.path.join(checkpoint, DUAL_FILE)
        if not os.path.isfile(path):
            logger.warning(f"No {DUAL_FILE} in the checkpoint: λ starts again at dual_init={self.dual.value}.")
            return
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
        state.pop(_PROCESSES, None)
        said = other_processes(checkpoint, self.args.world_size)
        if said is not None:
            logger.warning(said)
        for name, now in self.dual.settings().items():
            if state[name] != now:
                logger.warning(f"λ's {name} was {state[name]} in the checkpoint and is now {now}.")
        self.dual.load_state_dict(state)  # λ itself goes on from the checkpoint, whatever `dual_init` says

    def _save(self, output_dir=None, state_dict=None):
        # `training_args.bin` is saved, and pushed, beside the weights: without any key
        public = copy(self.args)
        vars(public).update(without_keys(vars(public)) | {"hub_token": None})
        with temporarily(self, args=public):
            super()._save(output_dir, state_dict)  # type: ignore[misc]
        if self.args.should_save and self.args.eos_token is not None and is_peft_model(self.model):
            # an adapter is saved without it
            self.model.generation_config.save_pretrained(output_dir or self.args.output_dir)
