import asyncio
import functools
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from transformers import TrainerState
from trl import RLOOTrainer

from tests.conftest import make_tokenizer
from trl_kd.preferences.reward_function import RewardFunctionPreference, load_function


def right(prompts, completions, answer, **kwargs):
    return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]


def length(completions, **kwargs):
    return [len(text) for text in completions]


def nothing(completions, **kwargs):
    return [None] * len(completions)


MESSAGES = [{"role": "user", "content": "1+1="}]


def test_the_higher_score_wins():
    preference = RewardFunctionPreference(right)
    labels = preference(["1+1="] * 4, ["2", "3", "2", "3"], ["3", "2", "2", "4"], answer=["2"] * 4)
    assert labels == [1.0, 0.0, 0.5, 0.5]


def test_bradley_terry():
    (label,) = RewardFunctionPreference(length, scale=2.0)(["x"], ["abcd"], ["a"])
    assert label == pytest.approx(1 / (1 + math.exp(-1.5)))


def test_everything_that_trl_gives_is_given():
    seen = {}

    def function(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns):
        seen.update(locals())
        log_extra("note", ["a"] * len(prompts))
        log_metric("accuracy", sum(len(c) for c in completions))
        return [1.0] * len(prompts)

    preference = RewardFunctionPreference(function)
    columns = {"answer": ["2"], "prompt": ["kept out"], "completion": ["kept out"], "completion_ids": [[9]]}
    preference.score(["1+1="], ["2"], **columns)
    assert (seen["prompts"], seen["completions"], seen["completion_ids"]) == (["1+1="], ["2"], [None])
    assert isinstance(seen["trainer_state"], TrainerState)
    assert seen["columns"] == {"answer": ["2"]}
    preference.score(["1+1="], ["123"], answer=["2"])
    assert preference.metrics == {"accuracy": 2.0}


def test_the_keywords_are_those_of_trls_trainers():
    given = []

    def function(**keywords):
        given.append(keywords)
        return [1.0, None]

    PartialState()  # without which TRL cannot log
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", is_main_process=False),
        args=SimpleNamespace(report_to=[]),
        reward_funcs=[function],
        reward_func_names=["function"],
        reward_processing_classes=[None],
        environments=None,
        state=TrainerState(),
        _log_completion_extra=None,
        _log_metric=None,
    )
    prompts, completions = [MESSAGES, MESSAGES], [[{"role": "assistant", "content": text}] for text in "23"]
    rows = [{"prompt": MESSAGES, "answer": "2", "completion": "?"}] * 2
    scores = RLOOTrainer._calculate_rewards(trainer, rows, prompts, completions, [[5, 1], [6, 1]])
    assert scores[0, 0] == 1
    assert scores[1, 0].isnan()
    preference = RewardFunctionPreference(function, processing_class=make_tokenizer())
    assert preference.score(prompts, ["2", "3"], answer=["2", "2"], completion=["?", "?"]) == [1.0, None]
    theirs, ours = given
    assert theirs.keys() == ours.keys()
    assert theirs["completion_ids"] == ours["completion_ids"]
    for name in ("prompts", "completions", "answer"):
        assert theirs[name] == ours[name]


@pytest.mark.parametrize("completion", ["2", [{"role": "assistant", "content": "2"}]])
def test_completions_of_messages_are_messages(completion):
    def function(prompts, completions, **kwargs):
        assert prompts == [MESSAGES]
        assert completions == [[{"role": "assistant", "content": "2"}]]
        return [1.0]

    assert RewardFunctionPreference(function).score([MESSAGES], [completion]) == [1.0]
    with pytest.raises(ValueError, match="The prompt '1\\+1=' is plain text and its response a list"):
        RewardFunctionPreference(right).score(["1+1="], [MESSAGES], answer=["2"])


def test_completion_ids():
    def function(completion_ids, **kwargs):
        seen.extend(completion_ids)
        return [0.0] * len(completion_ids)

    seen, tokenizer = [], make_tokenizer()
    RewardFunctionPreference(function, processing_class=tokenizer).score(["1+1=", MESSAGES], ["23", "4"])
    two, three, four = (tokenizer.convert_tokens_to_ids(digit) for digit in "234")
    assert seen == [[two, three, tokenizer.eos_token_id], [four, tokenizer.eos_token_id]]


def test_no_opinion():
    assert RewardFunctionPreference(nothing)(["x"], ["a"], ["b"]) == [None]
    half = RewardFunctionPreference(
        lambda completions, **kwargs: [None if c == "a" else math.nan for c in completions]
    )
    assert half.score(["x"] * 2, ["a", "b"]) == [None, None]


def test_several_functions_are_added_as_trl_adds_them():
    preference = RewardFunctionPreference([right, length, nothing], reward_weights=[10.0, 0.5, 3.0])
    assert preference.score(["x", "x"], ["2", "abc"], answer=["2", "2"]) == [10.5, 1.5]
    assert RewardFunctionPreference([nothing, nothing]).score(["x"], ["a"]) == [None]
    with pytest.raises(ValueError, match=r"`reward_weights` is \[1.0\] for 2 reward functions"):
        RewardFunctionPreference([right, length], reward_weights=[1.0])
    with pytest.raises(ValueError, match="at least one function"):
        RewardFunctionPreference([])


class AsyncJudge:
    """Keeps something that belongs to one event loop, as HTTP clients do."""

    def __init__(self):
        self.loops = set()

    async def __call__(self, completions, **kwargs):
        self.loops.add(asyncio.get_running_loop())
        await asyncio.sleep(0.01)
        return [len(text) for text in completions]


def test_async_functions():
    judge = AsyncJudge()
    preference = RewardFunctionPreference([judge, length, functools.partial(AsyncJudge().__call__)])
    assert preference.score(["x"] * 2, ["a", "bc"]) == [3.0, 6.0]

    async def inside():
        return preference.score(["x"], ["abc"])

    assert asyncio.run(inside()) == [9.0]
    assert len(judge.loops) == 1


def test_async_functions_run_side_by_side():
    met = asyncio.Event()

    async def waits(completions, **kwargs):
        await asyncio.wait_for(met.wait(), timeout=20)
        return [1.0]

    async def comes(completions, **kwargs):
        met.set()
        return [2.0]

    assert RewardFunctionPreference([waits, comes]).score(["x"], ["a"]) == [3.0]


def test_an_error_of_an_async_function_comes_through():
    async def fails(**kwargs):
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        RewardFunctionPreference(fails).score(["x"], ["a"])


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ([1.0], "returned 1 scores for 2 completions"),
        (3.0, r"returned 3\.0: it must return a list"),
        (None, "returned None: it must return a list"),
        ([1.0, "0.5"], r"returned '0\.5' for a completion"),
        ([1.0, [1.0, 2.0]], r"returned '\[1\.0, 2\.0\]' for a completion"),
        ([1.0, 1j], "returned '1j' for a completion: a score is a number, or None"),
    ],
)
def test_bad_results_name_the_function(result, said):
    def my_reward(**kwargs):
        return result

    with pytest.raises(ValueError, match=rf"The reward function [\w.]*test_reward_function\S*my_reward {said}"):
        RewardFunctionPreference(my_reward).score(["x"] * 2, ["a", "b"])


@pytest.mark.parametrize("result", [torch.tensor([0.5, 1.0]), (0.5, True), [torch.tensor(0.5), 1]])
def test_whatever_is_numbers_will_do(result):
    assert RewardFunctionPreference(lambda **kwargs: result).score(["x"] * 2, ["a", "b"]) == [0.5, 1.0]


def test_functions_of_trl_work_as_they_are():
    preference = RewardFunctionPreference(load_function("trl.rewards.think_format_reward"))
    assert preference([MESSAGES], ["<think>one and one</think>2"], ["2"]) == [1.0]


def test_describe():
    described = RewardFunctionPreference(functools.partial(right, answer=["secret"]), scale=2.0).describe()
    assert described["functions"][0]["name"] == f"{__name__}.right"
    assert "secret" not in json.dumps(described)
    other = RewardFunctionPreference(length, scale=2.0).describe()
    assert other["functions"][0]["name"] != described["functions"][0]["name"]

    class Described(AsyncJudge):
        def describe(self):
            return {"name": "mine", "version": 3}

    assert RewardFunctionPreference(Described()).describe()["functions"] == [{"name": "mine", "version": 3}]
    assert RewardFunctionPreference(AsyncJudge()).describe()["functions"][0]["name"].endswith("AsyncJudge")


SOURCE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Task:
    bonus: float = 1.0
    def score(self, completions, **kwargs):
        return [len(text) + self.bonus for text in completions]

task = Task()
number = 3

def reward(completions, **kwargs):
    return task.score(completions)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with functions of one's own, in which a command is run."""
    (tmp_path / "my_rewards_of_a_test.py").write_text(SOURCE)
    (tmp_path / "broken_rewards_of_a_test.py").write_text("import no_such_package\n")
    (tmp_path / "wrong_rewards_of_a_test.py").write_text("def (\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.endswith("rewards_of_a_test")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "name",
    [
        "my_rewards_of_a_test.reward",
        "my_rewards_of_a_test:reward",
        "my_rewards_of_a_test:task.score",
        "my_rewards_of_a_test.py:reward",
        "{here}/my_rewards_of_a_test.py:reward",
    ],
)
def test_functions_by_name(here, name):
    assert RewardFunctionPreference(load_function(name.format(here=here))).score(["x"], ["ab"]) == [3.0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("reward", "no function 'reward': give it as 'package.module.function'"),
        ("", "no function ''"),
        (".reward", "no function '.reward'"),
        ("my_rewards_of_a_test.py", "no function 'my_rewards_of_a_test.py'"),
        ("my_rewards_of_a_test:", "no function 'my_rewards_of_a_test:'"),
        ("no_such.module", "cannot load the function 'no_such.module': No module named 'no_such'"),
        ("my_rewards_of_a_test.other", "cannot load .*has no attribute 'other'"),
        ("other.py:reward", "cannot load .*no file other.py"),
        ("broken_rewards_of_a_test.reward", "cannot load .*No module named 'no_such_package'"),
        ("wrong_rewards_of_a_test.py:reward", "cannot load .*invalid syntax"),
        ("my_rewards_of_a_test.number", "'my_rewards_of_a_test.number' is a int, not a function"),
    ],
)
def test_no_such_function(here, name, said):
    with pytest.raises(ValueError, match=said) as error:
        load_function(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda completions: [1.0], "got an unexpected keyword argument 'answer'"),
        (lambda completions, level, **kwargs: [1.0], "missing a required argument: 'level'"),
        (lambda completions, /, **kwargs: [1.0], "positional"),
        (functools.partial(right, unknown=1), None),
        (right, None),
        (dict, None),  # which does not say what it takes
    ],
)
def test_a_function_that_cannot_be_called_is_said_without_calling_it(function, said):
    preference = RewardFunctionPreference([nothing, function])
    rows = {"answer": ["2"] * 3, "prompt": ["kept out"] * 3, "finish_reason": ["stop"] * 3}
    if said is None:
        preference.check_rows(["1+1="] * 3, **rows)
        return
    with pytest.raises(ValueError, match=f"cannot be called: .*{said}") as caught:
        preference.check_rows(["1+1="] * 3, **rows)
    assert "answer, finish_reason, prompts, completions" in str(caught.value)
    assert "`**kwargs`" in str(caught.value)
