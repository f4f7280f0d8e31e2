"""Rounds that earlier code has begun go on where they stopped, to the numbers that the earlier code came to.

What the training of round 2 learns is another thing: its imitation term has another form now.
"""

from pathlib import Path

import pytest

from tests.compat.cases import (
    OF_TRAINED_ROUNDS,
    ROUNDS,
    asked,
    expected,
    lora_rounds,
    read_rounds,
    run,
    serving,
    unpack,
)


pytest.importorskip("openai", reason="needs the extra `api`")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, for what the fixtures hold has relative names."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(fixture: str, name: str) -> None:
    """Within what another CPU, or another order of sums, may change. Later code may tell more."""
    found, wanted = read_rounds(name), expected(fixture)[name]
    assert len(found["rounds"]) == len(wanted["rounds"]) == 2
    for record, former in zip(found["rounds"], wanted["rounds"], strict=True):
        learnt = OF_TRAINED_ROUNDS if former["round"] == 2 else set()
        for key, value in former.items():
            if key not in learnt:
                assert record[key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), key
    for key in ("round", "stage", "prompts", "new_pairs"):
        assert found["final"][key] == wanted["final"][key]


@pytest.mark.parametrize("name", ROUNDS)
def test_the_command_goes_on(name, tmp_path):
    unpack("rounds", tmp_path)
    former = Path(name, "round-1", "metrics.json").read_bytes()
    with serving() as server:
        run(ROUNDS[name].arguments(name))
    assert asked(server) == expected("rounds")[name]["asked"]
    assert Path(name, "round-1", "metrics.json").read_bytes() == former  # it is not done again
    check("rounds", name)


def test_python_goes_on(tmp_path):
    """With rounds of an adapter."""
    unpack("rounds_lora", tmp_path)
    with serving() as server:
        lora_rounds("out").run()
    assert asked(server) == expected("rounds_lora")["out"]["asked"]
    check("rounds_lora", "out")
