"""A learning curve of exact match, measured by generation while a trainer runs."""

from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback

from trl_kd.evaluation.metrics import Scorer, exact_match


class ExactMatchCallback(TrainerCallback):
    """
    Lets the model answer held-out questions every so many steps, and adds the share of right answers to
    `trainer.state.log_history`, from where checkpoints save and restore it.

    The global random state is left as it was: a run with this callback trains the same weights as one without.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        questions (`dict[str, list]`):
            Columns of the questions, see [`exact_match`].
        scorer (`Callable`):
            Reward function in TRL's signature, see [`exact_match`].
        max_new_tokens (`int`):
            Longest answer, in tokens.
        every (`int`):
            Optimizer steps between two measurements. There is one before the first step too.
        stop_at (`float`, *optional*):
            Share of right answers, in [0, 1], at which training stops.
        samples (`int`, *optional*, defaults to `1`):
            Answers sampled for each question; `0` for one greedy answer.
        name (`str`, *optional*, defaults to `"exact_match"`):
            Key in the log history.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        questions: dict[str, list[Any]],
        scorer: Scorer,
        max_new_tokens: int,
        every: int,
        stop_at: float | None = None,
        samples: int = 1,
        name: str = "exact_match",
    ):
        self.tokenizer = tokenizer
        self.questions = questions
        self.scorer = scorer
        self.max_new_tokens = max_new_tokens
        self.every = every
        self.stop_at = stop_at
        self.samples = samples
        self.name = name

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self._measure(state, control, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            self._measure(state, control, model)

    def _measure(self, state, control, model) -> None:
        if not state.is_world_process_zero:
            return
        accuracy, _ = exact_match(
            model, self.tokenizer, self.questions, self.scorer, self.max_new_tokens, self.samples
        )
        state.log_history.append({"step": state.global_step, self.name: accuracy.value})
        if self.stop_at is not None and accuracy.value >= self.stop_at:
            control.should_training_stop = True
