import pytest
import torch
from transformers import TrainerControl, TrainerState

from tests.conftest import make_model, make_tokenizer
from trl_kd.evaluation.callback import ExactMatchCallback
from trl_kd.evaluation.generation import generate
from trl_kd.evaluation.metrics import Accuracy, exact_match
from trl_kd.pairs.counting import wilson_interval


PROMPTS = ["1+1=", "12+30=", "a", "what is it?"]


@pytest.fixture(scope="module")
def model():
    return make_model(initializer_range=1.0)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


class TestGenerate:
    def test_batching_changes_no_greedy_answer(self, model, tokenizer):
        together = generate(model, tokenizer, PROMPTS, 6, sample=False)
        alone = [generate(model, tokenizer, [prompt], 6, sample=False)[0] for prompt in PROMPTS]
        assert together == alone
        assert together == generate(model, tokenizer, PROMPTS, 6, sample=False, batch_size=3)

    def test_samples_from_the_models_own_distribution(self, model, tokenizer):
        answers = generate(model, tokenizer, ["7*"] * 4000, 1, seed=1)
        with torch.no_grad():
            logits = model(**tokenizer("7*", return_tensors="pt")).logits[0, -1]
        probability, token = logits.softmax(-1)[3:].max(-1)
        share = sum(answer == tokenizer.decode(token + 3) for answer in answers) / 4000
        assert share == pytest.approx(probability.item(), abs=0.03)

    def test_seed_and_global_state(self, model, tokenizer):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        model.train()
        first = generate(model, tokenizer, PROMPTS * 4, 6, seed=1)
        assert torch.get_rng_state().equal(before)
        assert model.training
        assert first == generate(model, tokenizer, PROMPTS * 4, 6, seed=1)
        assert first != generate(model, tokenizer, PROMPTS * 4, 6, seed=2)


class TestAccuracy:
    # Values of statsmodels.stats.proportion.proportion_confint(method="wilson")
    @pytest.mark.parametrize(
        ("right", "count", "low", "high"),
        [(0, 10, 0.0, 0.277533), (5, 10, 0.236593, 0.763407), (810, 1000, 0.784550, 0.833102)],
    )
    def test_wilson(self, right, count, low, high):
        assert wilson_interval(right / count, count) == pytest.approx((low, high), abs=1e-4)

    def test_of(self):
        accuracy = Accuracy.of([1, 0, 0.5, 0.5])
        assert accuracy.value == 0.5
        assert accuracy.questions == 4
        with pytest.raises(ValueError, match="nothing to average"):
            Accuracy.of([])


def length_scorer(prompts, completions, wanted):
    return [float(len(completion) == want) for completion, want in zip(completions, wanted, strict=True)]


def test_exact_match_averages_over_the_samples_of_a_question(model, tokenizer):
    questions = {"prompt": PROMPTS, "wanted": [4, 9, 4, 9]}
    seen = []

    def scorer(prompts, completions, wanted):
        seen.extend(zip(prompts, wanted, strict=True))
        return [1.0, 0.0, 1.0] * 4

    accuracy, answers = exact_match(model, tokenizer, questions, scorer, 4, samples=3)
    assert seen == [(prompt, want) for prompt, want in zip(PROMPTS, [4, 9, 4, 9], strict=True) for _ in range(3)]
    assert accuracy.value == pytest.approx(2 / 3)
    assert accuracy.questions == len(answers) == 4
    greedy, texts = exact_match(model, tokenizer, questions, length_scorer, 4, samples=0)
    assert texts == generate(model, tokenizer, PROMPTS, 4, sample=False)
    assert greedy.value == sum(len(text) == want for text, want in zip(texts, [4, 9, 4, 9], strict=True)) / 4


def test_callback_records_and_stops(model, tokenizer):
    values = iter([0.0, 0.25, 0.75])

    def scorer(prompts, completions):
        value = next(values)
        return [value] * len(prompts)

    callback = ExactMatchCallback(tokenizer, {"prompt": PROMPTS}, scorer, 4, every=2, stop_at=0.5)
    state, control = TrainerState(), TrainerControl()
    callback.on_train_begin(None, state, control, model=model)
    stopped = []
    for step in range(1, 5):
        state.global_step = step
        callback.on_step_end(None, state, control, model=model)
        stopped.append(control.should_training_stop)
    assert state.log_history == [
        {"step": 0, "exact_match": 0.0},
        {"step": 2, "exact_match": 0.25},
        {"step": 4, "exact_match": 0.75},
    ]
    assert stopped == [False, False, False, True]
