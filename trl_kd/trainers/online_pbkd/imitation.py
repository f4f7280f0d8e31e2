"""Imitation of the teacher's answers in the policy's own forward."""

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from trl_kd.losses.imitation import imitation_losses
from trl_kd.preferences.tokens import encode_answer
from trl_kd.trainers.common.config import imitation_radius
from trl_kd.trainers.common.imitation_schedule import ImitationSchedule
from trl_kd.trainers.common.imitation_weights import weigh_answer
from trl_kd.trainers.online_pbkd.asking import PromptGroup


class ImitationRows(ImitationSchedule):
    """
    Mixin before `RLOOTrainer`: adds to the loss

        w · Σ_i a_i Σ_t ℓ_q(π(y_t|s_t)) / Σ_{a_i>0} |y_i|

    over the teacher's answers y_i to the prompts of a generation batch, with w = `args.imitation_weight`. a_i is that of
    [`~trl_kd.losses.confidence.imitation_advantage`], p the mean preference for y_i over the student's answers in the batch.
    The teacher's answers are further rows of the forward that TRL's loss makes, since a wrapped student (DDP, FSDP,
    DeepSpeed) allows one; like all of its log-probabilities they are at `args.temperature`.
    """

    accelerator: Any
    chat_template_kwargs: dict[str, Any]
    max_completion_length: int | None
    learner: Any
    _metrics: dict[str, defaultdict[str, list[float]]]

    _groups: list[PromptGroup]
    """Of the generation batch under way, in training."""
    _teacher_logps: torch.Tensor

    # ---- A generation batch ------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if self.model.training and self.args.imitates:
            output |= self._teacher_rows(len(inputs))
        return output

    def _teacher_rows(self, count: int) -> dict[str, torch.Tensor]:
        """For each row of the batch the teacher's answer as tokens, and its advantage: one row in each prompt's group has
        them, the others 0. `teacher_scale`, the same in all rows, is what a micro-batch's sum over tokens is multiplied
        with."""
        first = self.accelerator.process_index * count
        advantages_B = torch.zeros(count)
        ids: list[torch.Tensor] = [torch.zeros(0, dtype=torch.long) for _ in range(count)]
        labels = list(ids)
        for group, advantage in self._weighed_groups():
            place = group.places[0] - first
            if 0 <= place < count and advantage > 0:
                advantages_B[place] = advantage
                ids[place], labels[place] = self._encode_answer(group)
        rows = {
            "teacher_ids": pad_sequence(ids, batch_first=True, padding_value=self._tokenizer.pad_token_id),
            "teacher_labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "teacher_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "teacher_advantage": advantages_B,
        }
        rows = {name: value.to(self.accelerator.device) for name, value in rows.items()}
        scale = self._scale([rows["teacher_labels"]], self.args.steps_per_generation)
        return rows | {"teacher_scale": torch.full_like(rows["teacher_advantage"], scale)}

    def _weighed_groups(self) -> list[tuple[PromptGroup, float]]:
        """Those with an answer of the teacher's, and its advantage."""
        known = None if self.learner is None else max(len(self.learner.pool.train), 1)
        radius = imitation_radius(self.args, known)
        answered = [group for group in self._groups if group.teacher.text is not None]
        weighed = [weigh_answer(group.pairs, self.args, radius) for group in answered]
        seen = [advantage for advantage, compared in weighed if compared]
        if seen:
            self._metrics["train"]["pbkd/advantage"].append(sum(seen) / len(seen))
        return [(group, advantage) for group, (advantage, _) in zip(answered, weighed, strict=True)]

    def _encode_answer(self, group: PromptGroup) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of a prompt and the teacher's answer, and the labels of those that are learnt."""
        answer = group.teacher
        assert answer.text is not None
        encoded = encode_answer(
            self._tokenizer,
            group.row.prompt,
            answer.text,
            answer.finish_reason,
            self.chat_template_kwargs,
            self.args.reasoning,
        )
        prompt = encoded.prompt_ids
        learnt = [token if own else -100 for token, own in zip(encoded.ids, encoded.own, strict=True)]
        ids = torch.tensor(prompt + encoded.ids[: self.max_completion_length])
        return ids, torch.tensor([-100] * len(prompt) + learnt[: self.max_completion_length])

    def _scale(self, labels: list[torch.Tensor], micro_batches: int) -> float:
        """One by the tokens of the global batch, as `Trainer` will average it over ranks and micro-batches. 0 if there are
        none."""
        tokens = sum((labels_BT[:, 1:] != -100).sum() for labels_BT in labels)
        total = int(self.accelerator.reduce(tokens, reduction="sum"))
        return self.accelerator.num_processes * micro_batches / total if total else 0.0

    def _read_buffer(self, buffer: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        """The micro-batches of a checkpoint. Earlier ones have one weight a row, of a sum over tokens, in place of advantage
        and scale."""
        if not buffer or "teacher_weight" not in buffer[0]:
            return buffer
        scale = self._scale([batch["teacher_labels"] for batch in buffer], len(buffer))
        for batch in buffer:
            batch["teacher_advantage"] = (batch.pop("teacher_weight") > 0).float()
            batch["teacher_scale"] = torch.full_like(batch["teacher_advantage"], scale)
        return buffer

    # ---- A micro-batch -----------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        if "teacher_advantage" not in inputs:
            return super()._compute_loss(model, inputs)  # type: ignore[misc]
        chosen = inputs["teacher_advantage"] > 0
        labels_RT = inputs["teacher_labels"][chosen][:, 1:]
        self._teacher_logps = inputs["teacher_advantage"].new_zeros(labels_RT.shape)
        forward = model if not chosen.any() else self._with_teacher(model, inputs, chosen)
        loss = super()._compute_loss(forward, inputs)  # type: ignore[misc]
        logps_RT, scale = self._teacher_logps.float(), inputs["teacher_scale"][0].item()
        losses_RT = imitation_losses(logps_RT, self._is_end(labels_RT), self.imitation_q)
        imitation = scale * (inputs["teacher_advantage"][chosen] * losses_RT.sum(1)).sum()
        if scale > 0:
            self._record_imitation(imitation, -scale * logps_RT.sum())
        return loss + self.args.imitation_weight * imitation

    def _record_imitation(self, imitation: torch.Tensor, nll: torch.Tensor) -> None:
        """What a micro-batch adds to the mean over the generation batch."""
        sums = self.accelerator.reduce(torch.stack([imitation.detach(), nll.detach()]), reduction="sum")
        metrics = self._metrics["train"]
        for name, value in zip(("imitation", "teacher_nll"), sums.tolist(), strict=True):
            metrics[f"pbkd/{name}"].append(value / self.accelerator.num_processes)
        metrics["pbkd/q"].append(self.imitation_q)

    def _with_teacher(self, model, inputs, chosen: torch.Tensor) -> Callable:
        """The student's forward, with the teacher's answers as further rows: a wrapped student allows one forward."""
        theirs = {name: inputs[f"teacher_{name}"][chosen] for name in ("ids", "labels", "mask")}

        def forward(input_ids, attention_mask, labels, **kwargs):
            length = input_ids.size(1)
            width = max(length, theirs["ids"].size(1))

            def both(ours, other, value):
                rows = (
                    torch.nn.functional.pad(part, (0, width - part.size(1)), value=value) for part in (ours, other)
                )
                return torch.cat(list(rows))

            output = model(
                input_ids=both(input_ids, theirs["ids"], self._tokenizer.pad_token_id),
                attention_mask=both(attention_mask, theirs["mask"], 0),
                labels=both(labels, theirs["labels"], -100),
                **kwargs,
            )
            # Prompt learning puts virtual tokens in front
            logps, entropy = (part[:, part.size(1) - width + 1 :] for part in (output.log_probs, output.entropy))
            self._teacher_logps = logps[len(input_ids) :, : theirs["ids"].size(1) - 1]  # zero where a label is −100
            ours = {"log_probs": logps, "entropy": entropy}
            ours = {name: part[: len(input_ids), : length - 1] for name, part in ours.items()}
            return SimpleNamespace(**ours, aux_loss=getattr(output, "aux_loss", None))

        return forward
