"""What the demo shows while it works: one progress bar a stage, and none of the libraries' chatter."""

import logging
import warnings

import datasets
import torch
import transformers
from tqdm.auto import tqdm
from transformers import TrainerCallback


def quiet_libraries() -> None:
    """One thread, and no notices, warnings or bars of saving and mapping; errors still show."""
    torch.set_num_threads(1)  # models this small gain nothing from a second thread, and lose much on a busy machine
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("trl", "trl_kd", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)


class BarCallback(TrainerCallback):
    """
    A progress bar with the latest share of right answers.

    Args:
        title (`str`):
            What stands before the bar.
        metric (`str`, *optional*, defaults to `"exact_match"`):
            Key of that share in the log history.
        goal (`float`, *optional*):
            Share at which training stops; shown beside it.
    """

    def __init__(self, title: str, metric: str = "exact_match", goal: float | None = None):
        self.title = title
        self.metric = metric
        self.goal = goal

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=f"  {self.title:<22}",
            mininterval=0.5,
            bar_format="{desc} {bar:24} {n_fmt:>4}/{total_fmt} {elapsed} {postfix}",
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)
        measured = [entry[self.metric] for entry in state.log_history if self.metric in entry]
        if measured:
            goal = "" if self.goal is None else f" (until {self.goal:.0%})"
            self.bar.set_postfix_str(f"{measured[-1]:.0%} right{goal}", refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
