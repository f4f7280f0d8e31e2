"""What the loss of a token depends on beside its probability: the training step, and whether the token ends a text."""

from typing import Any

import torch

from trl_kd.responses.special_tokens import turn_end


class ImitationSchedule:
    """
    Mixin before a TRL trainer whose `args` are an [`~trl_kd.trainers.common.config.ImitationConfig`].
    """

    args: Any
    model: Any
    state: Any
    processing_class: Any
    _tokenizer: Any

    _end_tokens: torch.Tensor | None = None

    def _progress(self) -> float:
        """The share of the training steps that are done, in [0, 1]."""
        return self.state.global_step / max(self.state.max_steps, 1)

    @property
    def imitation_q(self) -> float:
        """q of the loss as it is now: a function of the step alone. An evaluation always has its last value, so that its
        losses can be compared."""
        share = self.args.imitation_q_warmup
        if not self.model.training or share == 0:
            return self.args.final_imitation_q
        return self.args.final_imitation_q * min(1.0, self._progress() / share)

    def _is_end(self, tokens: torch.Tensor) -> torch.Tensor:
        """Whether each token is one that ends a text or an assistant's turn."""
        if self._end_tokens is None or self._end_tokens.device != tokens.device:
            ends = {self._tokenizer.eos_token_id, turn_end(self.processing_class)} - {None}
            self._end_tokens = torch.tensor(sorted(ends), device=tokens.device, dtype=torch.long)
        return torch.isin(tokens, self._end_tokens)
