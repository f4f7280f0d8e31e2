"""Replies of no use, in a build: what stops it, what is asked for again, and folders that former versions have written."""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from datasets import Dataset

from tests.sampling.fault_server import FaultServer, chat, choice, error
from trl_kd.pairs import build_pairs, merge_shards
from trl_kd.pairs.readonly_store import StoredAnswers
from trl_kd.preferences.judge import LLMJudge
from trl_kd.preferences.simple import TeacherWins
from trl_kd.sampling import SamplingSettings
from trl_kd.sampling.client import ServerClient
from trl_kd.sampling.column import ColumnSampler
from trl_kd.sampling.server import ServerSampler
from trl_kd.sampling.server_errors import ServerError


pytest.importorskip("openai", reason="needs the extra `api`")

FORMER = Path(__file__).parent / "former"
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
LONG = error(400, "This model's maximum context length is 300 tokens. However, your request has 400 input tokens.")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-a-test")
    monkeypatch.setattr("trl_kd.sampling.client.backoff", lambda attempt: 0.01)
    monkeypatch.setattr("trl_kd.sampling.server.backoff", lambda attempt: 0.01)


def build(folder, server, count=6, settings=None, preference=None, retries=1, **options):
    client = ServerClient(server.url, max_concurrency=1, max_retries=retries)
    return build_pairs(
        Dataset.from_list([{"prompt": f"p{i}", "by_student": "5"} for i in range(count)]),
        teacher=ServerSampler("m", client, settings),
        student=ColumnSampler("by_student"),
        preference=preference or TeacherWins(),
        output_dir=folder,
        show_progress=False,
        **options,
    )


def asked(server):
    return [body["messages"][-1]["content"] for body in server.bodies]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def former(name, folder):
    """A folder in which a former version has answered p0 … p5, with the default settings."""
    folder.mkdir()
    with closing(sqlite3.connect(folder / "answers.db")) as connection:
        connection.executescript((FORMER / f"{name}.sql").read_text())
    return folder


def judge(server):
    return LLMJudge("judge", ServerClient(server.url))


def fine(body, number):
    return chat("Verdict: A" if body["model"] == "judge" else "fine")


# Folders of former versions


def test_a_folder_with_the_call_of_a_tool_in_answer_to_a_text_opens_again(tmp_path):
    """It was refused for good at each start."""
    folder = former("calls", tmp_path / "pairs")
    with FaultServer(lambda body, number: fine(body, number) if body["model"] == "judge" else LONG) as server:
        pairs = build(folder, server, preference=judge(server))
        assert pairs["prompt"] == ["p0"]
        teachers = [text for body, text in zip(server.bodies, asked(server), strict=True) if body["model"] == "m"]
        assert teachers == ["p5"]  # too long, which an older version blamed on the prompt
        server.bodies.clear()
        assert build(folder, server, preference=judge(server)).to_list() == pairs.to_list()
        assert not server.bodies
    counts = summary(folder)["answers"]["teacher"]
    reasons = {"tool_calls": 1, "length": 1, "error": 1, "content_filter": 1, "prompt_too_long": 1}
    assert (counts["refused"], counts["reasons"]) == (5, reasons)


def test_a_finished_folder_keeps_its_texts_and_labels(tmp_path):
    folder = former("odd", tmp_path / "pairs")
    with FaultServer(lambda *_: LONG) as server:
        pairs = build(folder, server, preference=judge(server))
    assert asked(server) == ["p5"]
    assert pairs["chosen"] == ["fine", "also fine"]
    assert pairs["preference"] == [0.5, 0.5]


def test_prompts_that_the_settings_made_too_long_are_asked_for_again(tmp_path):
    with FaultServer(fine) as server:
        same = build(former("context", tmp_path / "same"), server)
        other = build(former("context", tmp_path / "other"), server, settings=SamplingSettings(max_new_tokens=100))
    assert len(same) == len(other) == 6
    assert len(server.bodies) == 12
    with (
        FaultServer(lambda *_: error(400, "The maximum context length is 200 tokens.")) as server,
        pytest.raises(ServerError, match="`max_new_tokens` = 256"),
    ):
        build(former("context", tmp_path / "still"), server)


def test_a_look_at_a_former_folder_changes_nothing(tmp_path):
    folder = former("context", tmp_path / "pairs")
    before = (folder / "answers.db").read_bytes()
    with FaultServer(fine) as server, closing(StoredAnswers(folder)) as stored:
        teacher = ServerSampler("m", server.url)
        keys = [row[0].hex() for row in stored._connection.execute("SELECT prompt FROM answers")]
        assert stored.missing("teacher", keys, 1) == {}
        stored.check_settings({"teacher": teacher.describe(), "student": {}, "preference": {}})
        assert len(stored.missing("teacher", keys, 1, teacher.causes)) == 6
    assert (folder / "answers.db").read_bytes() == before


# Answers without a text


def test_an_answer_without_a_text_is_asked_for_again_when_its_cause_changes(tmp_path):
    replies = {"p0": chat("fine"), "p1": LONG, "p2": chat(choice(None, "length")), "p3": chat(choice("half", "error"))}

    def script(body, number):
        return replies[body["messages"][-1]["content"]]

    with FaultServer(script) as server:
        assert len(build(tmp_path, server, 4)) == 1
        server.bodies.clear()
        build(tmp_path, server, 4)
        assert not server.bodies
        build(tmp_path, server, 4, retries=0)
        assert asked(server) == ["p3"]
    replies |= {"p1": chat("shorter")}
    with FaultServer(script) as server:  # another address, which may have another context
        assert build(tmp_path, server, 4, retries=0)["chosen"] == ["fine", "shorter"]
        assert sorted(asked(server)) == ["p1", "p3"]
        server.bodies.clear()
        build(tmp_path, server, 4, retries=0)
        assert not server.bodies
        # Texts of two settings are never mixed
        with pytest.raises(ValueError, match="answers of another teacher"):
            build(tmp_path, server, 4, SamplingSettings(temperature=0.5))


def test_nothing_but_answers_without_a_text_binds_to_no_settings(tmp_path):
    with FaultServer(lambda *_: chat(choice("", "length"))) as server:
        with pytest.raises(ServerError, match="6 × length"):
            build(tmp_path, server)
        server.script = fine
        assert len(build(tmp_path, server, settings=SamplingSettings(max_new_tokens=2000))) == 6
        assert len(server.bodies) == 12
        with pytest.raises(ValueError, match="answers of another teacher"):
            build(tmp_path, server)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (chat(choice("", "length", message={"content": "", "reasoning": "Hmm."})), "length"),
        (chat({"message": {"content": None, "tool_calls": [CALL]}, "finish_reason": "tool_calls"}), "tool_calls"),
        (LONG, "prompt_too_long"),
        (chat(choice("half", "error")), "error"),
    ],
)
def test_twenty_useless_replies_stop_the_run_and_are_not_stored(tmp_path, reply, reason):
    said = "300 tokens" if reply is LONG else "Hmm" if reason == "length" else reason
    with FaultServer(lambda *_: reply) as server:
        with pytest.raises(ServerError, match=rf"20 replies to the teacher in a row.*20 × {reason}.*'p0'.*{said}"):
            build(tmp_path, server, 50, retries=0)
        assert 20 <= len(server.bodies) <= 24
        server.script = fine
        assert len(build(tmp_path, server, 50, SamplingSettings(max_new_tokens=2000))) == 50


def test_fewer_than_twenty_useless_replies_are_answers_without_a_text(tmp_path):
    with FaultServer(lambda b, n: chat(choice("", "length") if n < 19 else "fine")) as server:
        assert len(build(tmp_path, server, 30)) == 11
    assert len(server.bodies) == 30


@pytest.mark.parametrize("count", [1, 3])
def test_a_run_of_nothing_but_useless_replies_stores_none(tmp_path, count):
    with FaultServer(lambda *_: chat(choice("", "length", message={"content": "", "reasoning": "Hmm."}))) as server:
        with pytest.raises(ServerError, match=rf"^{count} repl.* to the teacher .*{count} × length.*Hmm"):
            build(tmp_path, server, count)
        server.script = fine
        assert len(build(tmp_path, server, count, SamplingSettings(max_new_tokens=2000))) == count


def test_refusals_of_single_prompts_stop_nothing(tmp_path):
    with FaultServer(lambda *_: chat(choice(None, "content_filter"))) as server:
        assert len(build(tmp_path, server, 30)) == 0
    assert len(server.bodies) == 30


def test_a_server_that_breaks_down_stops_the_run_later_too(tmp_path):
    with FaultServer(lambda b, n: chat("fine") if n < 5 else chat(choice("half", "abort"))) as server:
        with pytest.raises(ServerError, match="20 × abort"):
            build(tmp_path, server, 50, retries=0)
        server.script = fine
        assert len(build(tmp_path, server, 50, retries=0)) == 50


def test_what_came_before_a_failure_is_kept_but_for_what_broke_off(tmp_path):
    def script(body, number):
        return (
            chat(choice("", "length"))
            if number == 0
            else chat(choice("x", "error"))
            if number == 1
            else error(404, "no")
        )

    with FaultServer(script) as server:
        with pytest.raises(ServerError, match="status 404"):
            build(tmp_path, server, retries=0)
        server.script = fine
        server.bodies.clear()
        build(tmp_path, server, retries=0)
    assert "p0" not in asked(server)
    assert "p1" in asked(server)


def test_an_answer_that_was_cut_off_by_any_word_is_dropped(tmp_path):
    ends = ["stop", "length", "MAX_TOKENS", "a_new_word", "EOS"]
    with FaultServer(lambda b, n: chat(choice(f"says {n}", ends[n % 5]))) as server:
        kept = build(tmp_path, server, 5)
        assert kept["chosen_finish_reason"] == ends
        assert summary(tmp_path)["pairs"]["truncated"] == summary(tmp_path)["answers"]["teacher"]["truncated"] == 3
        assert (tmp_path / "pairs.html").read_text().count('"cut":true') == 3
        dropped = build(tmp_path, server, 5, truncated="drop")
    assert dropped["chosen_finish_reason"] == ["stop", "EOS"]
    assert '"cut":true' not in (tmp_path / "pairs.html").read_text()


def test_reasoning_inside_answers_is_counted(tmp_path):
    texts = ["<think>so</think>2", "<think>so", "so</think>2", "2", "2", "2"]
    with FaultServer(lambda body, number: chat(texts[number])) as server:
        build(tmp_path, server)
    assert summary(tmp_path)["answers"]["teacher"]["with_reasoning"] == 3
    assert "3 with reasoning inside" in (tmp_path / "README.md").read_text()


def test_labels_that_are_all_null_bind_to_no_judge(tmp_path):
    def script(body, number):
        return chat("I cannot say." if body["model"] == "judge" else "fine")

    with FaultServer(script) as server:
        assert set(build(tmp_path, server, preference=judge(server))["preference"]) == {None}
        server.script = fine
        other = LLMJudge("judge", ServerClient(server.url), both_orders=False)
        assert set(build(tmp_path, server, preference=other)["preference"]) == {1.0}
        with pytest.raises(ValueError, match="labels of another preference"):
            build(tmp_path, server, preference=judge(server))


@pytest.mark.parametrize("unread", [2, 3])
def test_replies_of_a_judge_that_cannot_be_read_are_shown_if_they_are_many(tmp_path, unread):
    def script(body, number):
        text = body["messages"][-1]["content"]
        if body["model"] == "m":
            return chat(f"answer to {text}.")
        is_odd = any(f"answer to p{i}." in text for i in range(unread))
        return chat("I cannot say.\nReally not." if is_odd else "Verdict: A")

    with FaultServer(script) as server:
        pieces = [tmp_path / "0", tmp_path / "1"]
        for index, piece in enumerate(pieces):
            build(piece, server, 20, preference=judge(server), shard=(index, 2))
        build(tmp_path / "one", server, 20, preference=judge(server))
        build(tmp_path / "one", server, 20, preference=judge(server))
    merge_shards(pieces, tmp_path / "whole")
    for folder in (tmp_path / "one", tmp_path / "whole"):
        told = summary(folder)
        assert (told["unparseable"], told["judged"]) == (unread, 20)
        warnings = [warning for warning in told["warnings"] if "no verdict that could be read" in warning]
        assert len(warnings) == (unread > 2)
        for warning in warnings:
            assert warning.startswith("The judge gave no verdict that could be read on 3 of 20 comparisons")
            assert '"I cannot say.\\nReally not. (stop)"' in warning
            assert "Really not" in (folder / "README.md").read_text()
    shutil.rmtree(tmp_path)
