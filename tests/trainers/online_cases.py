"""Rows, teacher, preferences and trainers for the tests of `OnlinePbKDTrainer`."""

from datasets import Dataset

from tests.trainers.mm_cases import PAIRS, PROMPTS, ROWS, equal, logs_of, weights_of
from trl_kd import OnlinePbKDConfig, OnlinePbKDTrainer
from trl_kd.sampling import Answer


__all__ = ["PAIRS", "PROMPTS", "ROWS", "Teacher", "digits", "equal", "logs_of", "make", "unchecked", "weights_of"]

SHORT = {
    "max_completion_length": 6,
    "num_generations": 2,
    "per_device_train_batch_size": 8,
    "rm_lora_r": 0,
    "rm_learning_rate": 1e-2,
    "rm_warmup_accuracy": 0.0,
    "beta": 0.05,
    "imitation_weight": 0.0,
}


class Teacher:
    """Says the sum's first operand, and counts how often it is asked."""

    is_lookup = False

    def __init__(self):
        self.asked: list[str] = []

    def describe(self):
        return {"sampler": "first operand"}

    def sample(self, requests):
        for request in requests:
            self.asked.append(request.prompt)
            for sample in request.samples:
                if isinstance(request.prompt, str):
                    yield request, sample, Answer(request.prompt[0] * 3, "stop")
                else:
                    yield request, sample, Answer([{"role": "assistant", "content": "7"}], "stop")


def digits(prompts, first, second, **columns):
    """The text with more digits is better."""
    texts = [[text if isinstance(text, str) else text[-1]["content"] for text in side] for side in (first, second)]
    counts = [[sum(c.isdigit() for c in text) for text in side] for side in texts]
    return [0.5 if a == b else float(a > b) for a, b in zip(*counts, strict=True)]


def unchecked(monkeypatch) -> None:
    """As if there were prompts enough for a warm-up, before it is known how many of their pairs are ties."""
    monkeypatch.setattr("trl_kd.trainers.online_pbkd.trainer.check_held_out", lambda *args: None)


def make(model, settings: dict, rows=ROWS, eval_rows=None, pairs=None, **more) -> OnlinePbKDTrainer:
    """Keywords of the constructor that are not settings are named below."""
    names = ["reward_funcs", "teacher", "preference_function", "reward_model", "peft_config", "processing_class"]
    names += ["reward_processing_classes", "quantization_config"]
    keywords = {name: more.pop(name) for name in names if name in more}
    datasets = [Dataset.from_list(given) if isinstance(given, list) else given for given in (rows, eval_rows, pairs)]
    trainer = more.pop("trainer", OnlinePbKDTrainer)
    return trainer(
        model=model,
        args=OnlinePbKDConfig(**{**settings, **SHORT, **more}),
        train_dataset=datasets[0],
        eval_dataset=datasets[1],
        preference_dataset=datasets[2],
        **keywords,
    )
