"""Folders of pairs that earlier code has written are opened, and gone on with: nothing that was paid is asked again."""

import shutil
from contextlib import closing
from pathlib import Path

import pytest

from tests.compat.cases import PAIRS, REFUSED, asked, expected, read_pairs, run, serving, unpack
from trl_kd.pairs import build_pairs, load_pairs, merge_shards
from trl_kd.pairs.dataset import TEXTS
from trl_kd.pairs.prompts import read_prompts
from trl_kd.pairs.readonly_store import StoredAnswers
from trl_kd.preferences.judge import LLMJudge
from trl_kd.preferences.reward_function import RewardFunctionPreference, load_function
from trl_kd.preferences.simple import TeacherWins
from trl_kd.responses.nulls import without_nulls
from trl_kd.sampling import SamplingSettings
from trl_kd.sampling.client import ServerClient
from trl_kd.sampling.server import ServerSampler
from trl_kd.scripts.data import load_split


pytest.importorskip("openai", reason="needs the extra `api`")

EXPECTED = expected("pairs")
FINISHED = [name for name, case in PAIRS.items() if case.dies_at is None]
INTERRUPTED = [name for name, case in PAIRS.items() if case.dies_at is not None]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    unpack("pairs", folder)
    return folder


@pytest.fixture(autouse=True)
def folder(unpacked, tmp_path, monkeypatch) -> Path:
    """A copy of the fixture, as the current folder: what it holds has relative names."""
    shutil.copytree(unpacked, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


FREE = ("A bad question", "A question that is too long", "Say yes.")
"""Prompts that the teacher's server refuses at no cost, and the one that tells the refusal of a single prompt from that of a
setting. The earlier code kept such refusals whatever was at fault, so that they are asked for again, once."""


def paid(requests: list[list]) -> list[list]:
    return [request for request in requests if request[0] != "teacher" or request[1] not in FREE]


def _messages_without_nulls(row: dict) -> dict:
    return row | {name: without_nulls(row[name]) for name in TEXTS if name in row}


def check(found: dict, wanted: dict) -> None:
    """The rows are those of the earlier code. A later one may add columns, and leave out null fields of messages."""
    assert len(found["rows"]) == len(wanted["rows"])
    for row, former in zip(found["rows"], wanted["rows"], strict=True):
        found_row = {name: row.get(name, "no such column") for name in former}
        assert _messages_without_nulls(found_row) == _messages_without_nulls(former)
    if wanted["usage"] is not None:
        for name, (requests, tokens) in wanted["usage"].items():
            assert requests <= found["usage"][name][0] <= requests + len(FREE)
            assert tokens <= found["usage"][name][1] <= tokens + 3  # of "Say yes."


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_folder_is_read(name):
    check(read_pairs(name), EXPECTED[name])


@pytest.mark.parametrize("name", PAIRS)
def test_the_command_goes_on(name):
    """A finished folder asks nobody; one that was interrupted asks for what it lacks, by the same seeds."""
    with serving() as server:
        run(PAIRS[name].arguments(name))
    assert paid(asked(server)) == paid(EXPECTED[name]["asked"])
    assert bool(paid(asked(server))) == (name in INTERRUPTED)
    check(read_pairs(name), EXPECTED[name])


def server(model: str, seed: int) -> ServerSampler:
    """Teacher or student as the YAML files of the fixture have them; the seeds come from `seed: 3`."""
    return ServerSampler(model, ServerClient(max_concurrency=1), SamplingSettings(seed=seed))


@pytest.mark.parametrize("name", ["interrupted", "judged-interrupted", "scored"])
def test_python_goes_on(name):
    with serving() as served:
        options = {"teacher": server("teacher", 6), "student": server("student", 7)}
        if name == "interrupted":
            options |= {"preference": TeacherWins(), "num_student_samples": 2}
        elif name == "judged-interrupted":
            options |= {"preference": LLMJudge("judge", ServerClient(max_concurrency=1))}
        else:
            digits = RewardFunctionPreference(load_function("rewards.py:digits"), scale=1.0)
            options |= {"preference": digits, "policy": "best_vs_worst"}
            options |= {"num_teacher_samples": 2, "num_student_samples": 3}
        prompts = load_split("questions.jsonl" if name == "interrupted" else "plain.jsonl", None, "train", False)
        build_pairs(prompts, output_dir=name, seed=3, show_progress=False, **options)
    assert paid(asked(served)) == paid(EXPECTED[name]["asked"])
    check(read_pairs(name), EXPECTED[name])


def test_null_answers_keep_their_reasons():
    rows = [row for rows in read_prompts(load_split("questions.jsonl", None, "train", False)) for row in rows]
    with closing(StoredAnswers("finished")) as stored:
        answers = stored.answers("teacher", [row.key for row in rows], 1)
    reasons = {row.prompt: answers[row.key][0].finish_reason for row in rows if answers[row.key][0].text is None}
    assert reasons == {
        "A filtered question": "content_filter",
        "A refused question": "refusal",
        "An empty question": "empty",
        "A question that is too long": "prompt_too_long",
        "A question against the policy": "content_policy_violation",
        "A bad question": "bad_request",
    }


def test_cut_answers_can_be_dropped_afterwards():
    whole = EXPECTED["truncated"]["rows"]
    sides = ("chosen_finish_reason", "rejected_finish_reason")
    kept = [row for row in whole if "length" not in [row[side] for side in sides]]
    assert 0 < len(kept) < len(whole)
    with serving() as server:
        run([*PAIRS["truncated"].arguments("truncated"), "--truncated", "drop"])
    assert not server.count
    for row in load_pairs("truncated"):
        assert [row[side] for side in sides] == ["stop", "stop"]


def test_shards_are_merged():
    run(["pairs", "--merge", "shard-0", "shard-1", "--output_dir", "merged"])
    whole = EXPECTED["finished"] | {"usage": None}
    check({"rows": list(load_pairs("merged")), "usage": None}, whole)
    check({"rows": list(merge_shards(["shard-1", "shard-0"], "again")), "usage": None}, whole)


def test_more_answers_are_asked_for():
    """Those that are there stay, and only a further one of each prompt is asked for."""
    before = {(row["prompt"], row["chosen"], row["rejected"]) for row in EXPECTED["finished"]["rows"]}
    with serving() as server:
        run([*PAIRS["finished"].arguments("finished"), "--num_student_samples", "3"])
    assert {model for model, *_ in paid(asked(server))} == {"student"}
    assert len(paid(asked(server))) == 15
    assert before <= {(row["prompt"], row["chosen"], row["rejected"]) for row in load_pairs("finished")}


def test_a_folder_that_its_own_code_refuses_opens():
    with serving() as server:
        run(REFUSED["tool-calls"].arguments("tool-calls"))
    assert not server.count
    assert [row["prompt"] for row in load_pairs("tool-calls")] == ["1+1=", "2+3="]
