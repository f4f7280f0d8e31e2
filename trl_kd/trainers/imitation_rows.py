"""Imitation of the teacher's answers in the policy's own forward."""

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from trl_kd.preferences.tokens import encode_answer
from trl_kd.trainers.online_pbkd_data import PromptGroup


class ImitationRows:
    """
    Mixin before `RLOOTrainer`: adds `args.imitation_weight` · −log π(y_T|x), summed over tokens and averaged over the
    prompts of a generation batch, to the loss. The teacher's answers are further rows of the forward that TRL's loss makes,
    since a wrapped student (DDP, FSDP, DeepSpeed) allows one; like all of its log-probabilities they are at
    `args.temperature`.
    """

    args: Any
    accelerator: Any
    model: Any
    chat_template_kwargs: dict[str, Any]
    max_completion_length: int | None
    _tokenizer: Any
    _metrics: dict[str, defaultdict[str, list[float]]]

    _groups: list[PromptGroup]
    """Of the generation batch under way, in training."""
    _teacher_logps: torch.Tensor

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if self.model.training and self.args.imitates:
            output |= self._teacher_rows(len(inputs))
        return output

    def _teacher_rows(self, count: int) -> dict[str, torch.Tensor]:
        """For each row of the batch the teacher's answer as tokens, and its weight in the loss: that of one row in each
        prompt's group is such that the whole is a mean over prompts."""
        first = self.accelerator.process_index * count
        answered = [group for group in self._groups if group.teacher.text is not None]
        micro_batches = self.accelerator.num_processes * self.args.steps_per_generation
        weight_B = torch.zeros(count)
        ids: list[torch.Tensor] = [torch.zeros(0, dtype=torch.long) for _ in range(count)]
        labels = list(ids)
        for group in answered:
            place = group.places[0] - first
            if 0 <= place < count:
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
                ids[place] = torch.tensor(prompt + encoded.ids[: self.max_completion_length])
                labels[place] = torch.tensor([-100] * len(prompt) + learnt[: self.max_completion_length])
                weight_B[place] = micro_batches / len(answered)
        rows = {
            "teacher_ids": pad_sequence(ids, batch_first=True, padding_value=self._tokenizer.pad_token_id),
            "teacher_labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "teacher_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "teacher_weight": weight_B,
        }
        return {name: value.to(self.accelerator.device) for name, value in rows.items()}

    def _compute_loss(self, model, inputs):
        if "teacher_weight" not in inputs:
            return super()._compute_loss(model, inputs)  # type: ignore[misc]
        chosen = inputs["teacher_weight"] > 0
        self._teacher_logps = inputs["teacher_weight"].new_zeros(0)
        forward = model if not chosen.any() else self._with_teacher(model, inputs, chosen)
        loss = super()._compute_loss(forward, inputs)  # type: ignore[misc]
        nll = -(self._teacher_logps * inputs["teacher_weight"][chosen]).sum()
        total = self.accelerator.reduce(nll.detach(), reduction="sum") / self.accelerator.num_processes
        self._metrics["train"]["pbkd/imitation_nll"].append(total.item())
        return loss + self.args.imitation_weight * nll

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
            self._teacher_logps = logps[len(input_ids) :].sum(1)
            ours = {"log_probs": logps, "entropy": entropy}
            ours = {name: part[: len(input_ids), : length - 1] for name, part in ours.items()}
            return SimpleNamespace(**ours, aux_loss=getattr(output, "aux_loss", None))

        return forward
