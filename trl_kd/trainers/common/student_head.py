"""The student's loss is about the student's own distribution: looked at once, before the first update."""

from pathlib import Path
from typing import Any

import torch

from trl_kd._trl import models as trl_models
from trl_kd._trl.models import get_config_model_id
from trl_kd.sampling.causal import check_causality, check_named
from trl_kd.sampling.model_errors import named
from trl_kd.sampling.model_files import check_files, check_tokens, is_adapter, read_config
from trl_kd.sampling.own_logits import (
    OTHER_CAPS,
    Probe,
    difference,
    evaluating,
    is_allowed,
    log_probs,
    output_like,
    own_forward,
    probe,
    standing_still,
    tolerance,
)
from trl_kd.trainers.common.output_heads import head_logits


def check_student(model: Any, args: Any) -> int | None:
    """
    Checks a student before its weights are loaded.

    Returns:
        `int` or `None`: rows of the embeddings of one that is named, where they can be told: see
        [`~trl_kd.sampling.model_files.check_tokens`].

    Raises:
        `ValueError`: it is no causal language model.
        `BadModel`: the files of one that is named cannot be used.
    """
    given: Any = (args.model_init_kwargs if isinstance(model, str) else None) or {}
    options = {"trust_remote_code": args.trust_remote_code, **given}
    with named(f"`model` is {model!r}, which"):
        check_named(model, _who(model), **options)
        if not isinstance(model, str) or is_adapter(model):
            return None
        return check_files(model, read_config(model, options), options)


def check_student_tokens(model: Any, tokenizer: Any, rows: int | None) -> None:
    """Raises a `BadModel` for a named student of so many `rows` of embeddings, whose tokenizer has more tokens."""
    with named(f"`model` is {model!r}, which"):
        check_tokens(tokenizer, rows)


def _who(model: Any) -> str:
    return f"The student {model if isinstance(model, str) else get_config_model_id(model.config)!r}"


class CheckedStudent:
    """
    Mixin before a TRL trainer: compares the log-probabilities that its loss makes of the student's hidden states with the
    student's own, and finds out whether it reads later tokens. `_check_student` does it at the end of `__init__`. Where
    weights are placed or split by DeepSpeed or FSDP it is done at the first micro-batch, by all processes together.
    """

    args: Any
    model: Any
    model_wrapped: Any
    accelerator: Any
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    _tokenizer: Any
    _student_looked_at = False

    def _check_student(self, given: Any, reference: Any = None) -> None:
        """Looks at the student, which was `given` as a model or by name, and at a reference model that was given."""
        if isinstance(given, str) and not Path(given).is_dir():
            check_student(
                given, self.args
            )  # again: now its weights are downloaded, and TRL does not tell what they lack
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return
        self._look_at_student()
        if reference is not None:
            self._compare_head(reference, f"The reference model {get_config_model_id(reference.config)!r}")

    def training_step(self, *args, **kwargs):
        self._look_once()
        return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def _look_once(self) -> None:
        """Looks at student and teacher, if that was not possible before the first step."""
        if not self._student_looked_at:
            self._look_at_student()
        teacher = getattr(self, "teacher", None)
        if teacher is not None and not teacher.looked_at:
            teacher.look()

    def _look_at_student(self) -> None:
        self._student_looked_at = True
        wrapped = self.model_wrapped
        model = self.accelerator.unwrap_model(wrapped)
        with evaluating(wrapped):
            if wrapped is model and not self.is_fsdp_enabled:
                self._compare_head(model)
            else:
                with torch.no_grad():
                    trl_models.ForwardRedirection()(wrapped, model, self._compare_head, model)

    @torch.no_grad()
    def _compare_head(self, model: Any, who: str | None = None) -> None:
        who = who or _who(model)
        found = probe(model, self._tokenizer, who)
        check_causality(model, found, who)
        config = model.config.get_text_config()
        if found.backbone is None:
            raise ValueError(
                f"{who}, of the class {type(model).__name__}, calls no backbone, whose hidden states are trained on."
            )
        capped = [name for name in OTHER_CAPS if getattr(config, name, None)]
        gap = float("inf") if capped else self._head_gap(model, found)
        if not gap <= tolerance(found.hidden, found.logits):  # NaN neither
            seen = f"has log-probabilities that differ by {gap:.2g} nats from those that the loss makes of its hidden states"
            if capped:
                seen = f"caps its logits by `{capped[0]}`, which the loss does not apply"
            raise ValueError(
                f"{who}, of the type {model.config.model_type!r}, {seen}: it would be trained on a distribution that is not "
                "its own. Take a student of another type, such as Llama, Qwen or Gemma. As a teacher, or for likelihoods, "
                "this model works."
            )

    def _head_gap(self, model: Any, found: Probe) -> float:
        """How far the loss's log-probabilities are from the student's own on average, in nats at a temperature of 1."""
        return difference(head_logits(model, found.hidden), found.logits)


class FusedStudent(CheckedStudent):
    """For trainers whose log-probabilities come from the fused output layer that TRL gives to the student."""

    def _head_gap(self, model, found):
        temperature = getattr(self, "temperature", 1.0)
        own_TV = log_probs(found.logits[:-1].float() / temperature)
        count, words = found.ids.size(1), own_TV.size(1)
        # The text itself, what the model would say, and any words
        drawn = torch.randint(0, words, (6, count), generator=torch.Generator().manual_seed(2)).to(found.ids)
        likely = found.logits.topk(2, dim=-1).indices.T.roll(1, 1).to(found.ids)
        labels_LT = torch.cat([found.ids, likely, drawn])
        rows = len(labels_LT)
        hidden = found.output[0].expand(rows, -1, -1)
        with standing_still(trl_models.backbone(model), output_like(found.output, hidden)):
            ids = found.ids.expand(rows, -1)
            fused = own_forward(model)(
                input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels_LT, fused_lm_head=True
            )
        ours_LT = fused.log_probs[:, 1 - count :].float()
        labels_TL = labels_LT[:, 1:].T.to(own_TV.device)
        own_TL, allowed_TL = own_TV.gather(1, labels_TL), is_allowed(found.logits[:-1]).gather(1, labels_TL)
        return temperature * (ours_LT.T.to(own_TL.device) - own_TL)[allowed_TL].abs().mean().item()
