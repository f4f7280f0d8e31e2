"""Rows, pairs and trainers for the tests of `MMPbKDTrainer`."""

import torch
from datasets import Dataset
from torch import nn

from tests.conftest import make_model
from trl_kd import MMPbKDConfig, MMPbKDTrainer


QUESTIONS = ["1+1=", "2+3=", "40+2=", "7-5=", "12+13=", "9*9=", "6/3=", "100-1="]
ANSWERS = ["2", "5", "42", "2", "25", "81", "2", "99"]
ROWS = [{"prompt": q, "completion": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
PROMPTS = [{"prompt": q} for q in QUESTIONS]
PAIRS = [{"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a * b + 7)} for a in range(5) for b in range(4)]
"""Twenty strict pairs."""

SHORT = {"max_completion_length": 6, "q_warmup_steps": 0}


class Recording(MMPbKDTrainer):
    """Remembers every batch of completions."""

    def __init__(self, *args, **kwargs):
        self.batches: list[dict] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.batches.append({"training": self.model.training, **output})
        return output

    @property
    def completions(self) -> list[list[list[int]]]:
        """Of each batch in training, without padding."""
        return [unpadded(batch, "completion") for batch in self.batches if batch["training"]]


def unpadded(batch: dict, which: str) -> list[list[int]]:
    ids, mask = batch[f"{which}_ids"], batch[f"{which}_mask"].bool()
    return [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]


def make(model, teacher, settings: dict, rows=ROWS, pairs=None, eval_rows=None, peft=None, **more) -> Recording:
    """Keywords of the constructor that are not settings: `processing_class` and `tools`."""
    keywords = {name: more.pop(name) for name in ("processing_class", "tools") if name in more}
    datasets = [Dataset.from_list(given) if isinstance(given, list) else given for given in (rows, eval_rows, pairs)]
    return Recording(
        model=model,
        teacher_model=teacher,
        args=MMPbKDConfig(**{**settings, **SHORT, **more}),
        train_dataset=datasets[0],
        eval_dataset=datasets[1],
        preference_dataset=datasets[2],
        peft_config=peft,
        **keywords,
    )


def nats(model, batch: dict) -> torch.Tensor:
    """log-probabilities `[B, T, V]` of the completions' words."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits.double()
    return logits[:, :-1][:, -batch["completion_ids"].size(1) :].log_softmax(-1)


def logs_of(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def weights_of(module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def that_says(words: dict[int, float], vocab_size: int | None = None, seed: int = 1, **settings):
    """A model whose logits have these words' added: with a large one it says that word and no other."""
    model = make_model(seed, vocab_size, **settings)
    head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    head.weight = model.lm_head.weight
    with torch.no_grad():
        head.bias.zero_()
        for word, logit in words.items():
            head.bias[word] = logit
    model.lm_head = head
    return model
