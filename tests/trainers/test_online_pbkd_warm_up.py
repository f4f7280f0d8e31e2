"""The warm-up of `OnlinePbKDTrainer`: when it ends, what is seen of it, and what it leaves in the logs."""

import pytest

from tests.trainers.online_cases import digits, make
from trl_kd.trainers.online_pbkd.learner import WarmUpFailed


MANY = [{"prompt": f"{i}+{j}=", "chosen": "777", "rejected": "1"} for i in range(10) for j in range(10)]
WARM = {"rm_warmup_accuracy": 0.65, "rm_held_out": 0.3}


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch):
    monkeypatch.setattr("trl_kd.trainers.online_pbkd.learner.LEAST_HELD_OUT", 1)


def ends_after(trainer, accuracies) -> float:
    """Steps of a warm-up whose looks find such accuracies."""
    found = iter(accuracies)
    trainer.learner.held_out_accuracy = lambda: next(found)
    trainer.learner.step = lambda *args, **kwargs: None
    return trainer.learner.warm_up(None)["warmup_steps"]


def test_one_lucky_look_ends_no_warm_up(tiny_dir, settings):
    trainer = make(tiny_dir, settings, pairs=MANY, rm_warmup_steps=35, **WARM)
    assert ends_after(trainer, [0.9, 0.65]) == 10
    assert ends_after(trainer, [0.9, 0.5, 0.7, 0.7]) == 30
    assert ends_after(trainer, [0.5, 0.5, 0.5, 0.7, 0.7]) == 35
    with pytest.raises(
        WarmUpFailed, match=r"= 35 the reward model orders 50.0% and 90.0% of \d+ held-out pairs rightly"
    ):
        ends_after(trainer, [0.5, 0.9, 0.5, 0.5, 0.9])


@pytest.mark.parametrize("hidden", [False, True])
def test_a_warm_up_is_seen(tiny_dir, settings, capsys, hidden):
    trainer = make(tiny_dir, settings, pairs=MANY, max_steps=1, disable_tqdm=hidden, rm_learning_rate=0.03, **WARM)
    trainer.train()
    seen = capsys.readouterr()
    steps = trainer.state.log_history[0]["pbkd/warmup_steps"]
    assert f"The reward model is ready after {steps:.0f} steps on 100 pairs: it orders " in seen.out
    for told in ("Warm-up", "held-out accuracy "):
        assert (told in seen.err) is not hidden


def test_the_first_log_is_of_the_first_step_alone(tiny_dir, settings):
    """And not of what the student answered in the warm-up, but that it read and wrote so many tokens."""
    warm = {"rm_warmup_accuracy": 0.01, "rm_held_out": 0.5, "rm_warmup_epochs": 3}
    trainer = make(tiny_dir, settings, preference_function=digits, max_steps=1, **warm)
    batches, counts = [], []
    generate, log = trainer._generate, trainer.log

    def counted(*args, **kwargs):
        batches.append(1)
        return generate(*args, **kwargs)

    def watched(logs, *args):
        metrics = trainer._metrics["train"]
        counts.append((len(metrics["completions/mean_length"]), metrics["num_tokens"]))
        log(logs, *args)

    trainer._generate, trainer.log = counted, watched
    trainer.train()
    assert len(batches) > 2
    assert counts[0] == (1, [trainer.state.num_input_tokens_seen])
