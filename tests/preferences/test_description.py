"""A function that has changed is another one, and one that has not is the same in another process."""

import functools
import subprocess
import sys

import pytest

from tests.conftest import make_tokenizer
from trl_kd.preferences.description import describe_function
from trl_kd.preferences.reward_function import load_function
from trl_kd.preferences.simple import TeacherWins


MODULE = """
LIMIT = 3

def same(a, b):
    return a == b

def reward(completions, answer, **kwargs):
    return [float(same(c, a)) for c, a in zip(completions, answer)]
"""


def described(folder, text, name="reward"):
    path = folder / "rewards_that_change.py"
    path.write_text(text)
    sys.modules.pop("rewards_that_change", None)
    return describe_function(load_function(f"{path}:{name}"))


@pytest.mark.parametrize("change", [("a == b", "a != b"), ("LIMIT = 3", "LIMIT = 4"), ("float(same", "-float(same")])
def test_a_change_anywhere_in_its_file_is_seen(tmp_path, change):
    first = described(tmp_path, MODULE)
    assert described(tmp_path, MODULE) == first
    assert described(tmp_path, MODULE.replace(*change)) != first


def test_of_an_installed_package_it_is_the_functions_own_source():
    a, b = (load_function(f"trl.rewards.{name}") for name in ("think_format_reward", "accuracy_reward"))
    assert describe_function(a)["source"] != describe_function(b)["source"]
    assert describe_function(functools.lru_cache)["source"]


def kinds(sign=1, *, scale=1.0):
    def inner(completions, **kwargs):
        return [sign * scale for _ in completions]

    return inner


def plain(completions, sign=1, **kwargs):
    return [sign] * len(completions)


def other(completions, sign=1, **kwargs):
    return [sign] * len(completions)


other.__defaults__ = (2,)


def keyword(completions, *, sign=1):
    return [sign] * len(completions)


def test_what_is_bound_to_it_is_seen():
    distinct = [
        *(plain, functools.partial(plain, sign=1), functools.partial(plain, sign=-1)),
        functools.partial(functools.partial(plain, sign=1), ["x"]),
        functools.partial(plain, sign={"a": [plain], "b": {1, 2}}),
        *(kinds(1), kinds(-1), kinds(scale=2.0)),
    ]
    seen = [describe_function(function) for function in distinct]
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])
    assert describe_function(plain)["bound"] != describe_function(other)["bound"]
    before = describe_function(keyword)
    keyword.__kwdefaults__["sign"] = 2
    assert describe_function(keyword) != before
    assert describe_function(functools.partial(TeacherWins(), extra=1)) != describe_function(TeacherWins())


def test_a_cache_and_addresses_change_nothing():
    def counting(calls):
        def inner(completions, seen=[], **kwargs):  # noqa: B006
            seen.append(1)
            calls.append(1)
            return [0.0 for _ in completions]

        return inner

    function = counting([])
    before = describe_function(function)
    function(["x"])
    assert describe_function(function) == before == describe_function(counting([1, 2]))
    a, b = (functools.partial(plain, tokenizer=make_tokenizer()) for _ in range(2))
    assert describe_function(a) == describe_function(b)


SHELL = """
from trl_kd.preferences.description import describe_function
def reward(completions, **kwargs):
    wanted = lambda text: text in {{"a", "b", "c", "d"}}
    return [{value} if wanted(c) else 0.0 for c in completions]
print(describe_function(reward))
"""


def test_without_a_source_its_code_is_seen():
    def run(value):
        return subprocess.run(
            [sys.executable, "-c", SHELL.format(value=value)], capture_output=True, text=True, check=True
        ).stdout

    assert run("1.0") == run("1.0") != run("2.0")
