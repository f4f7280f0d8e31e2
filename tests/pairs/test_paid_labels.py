"""What a judge is paid for is kept at once and asked once: with a real client, and a server that counts."""

import asyncio
import re

import pytest
from datasets import Dataset

from tests.sampling.fault_server import FaultServer, chat
from trl_kd.pairs import build_pairs
from trl_kd.preferences.judge import LLMJudge
from trl_kd.sampling.budget import BudgetExceeded
from trl_kd.sampling.client import ServerClient
from trl_kd.sampling.column import ColumnSampler


def prompts(count=10, repeats=1):
    texts = [f"question {i}" for i in range(count)] * repeats
    rows = [{"prompt": t, "t": f"{t}: yes", "s": f"{t}: no", "id": i} for i, t in enumerate(texts)]
    return Dataset.from_list(rows)


def prefers_yes(body, number):
    first = re.search(r"answer A ---\n(.*)\n", body["messages"][-1]["content"])[1]
    return chat(f"Verdict: {'A' if first.endswith('yes') else 'B'}")


def build(data, folder, server, **limits):
    judge = LLMJudge("judge", ServerClient(server.url, max_concurrency=2, **limits), logprobs=False)
    return build_pairs(
        data,
        teacher=ColumnSampler("t"),
        student=ColumnSampler("s"),
        preference=judge,
        output_dir=folder,
        show_progress=False,
    )


def test_labels_before_a_cap_are_kept_and_not_asked_again(tmp_path):
    with FaultServer(prefers_yes) as server:
        for cap in range(7, 70, 7):  # raised until it is enough
            try:
                pairs = build(prompts(), tmp_path, server, max_requests=cap)
                break
            except BudgetExceeded:
                assert server.count == cap
        else:
            pytest.fail("a cap below one batch never came to an end")
        # A comparison of which one order was asked when the cap was reached is asked again, two at most in each run
        assert server.count <= 20 + 2 * 4
    assert [row["preference"] for row in pairs] == [1.0] * 10


def test_equal_comparisons_are_judged_once_whatever_other_columns_say(tmp_path):
    with FaultServer(prefers_yes) as server:
        assert len(build(prompts(4, repeats=3), tmp_path, server)) == 4
        assert server.count == 8
        build(prompts(4, repeats=3).add_column("more", list(range(12))), tmp_path, server)
        assert server.count == 8


def test_a_slow_reply_keeps_nobody_waiting_and_what_is_stored_opens_no_connection(tmp_path, monkeypatch):
    asked = []
    run = ServerClient.run

    def counted(self, *args):
        asked.append(self)
        return run(self, *args)

    monkeypatch.setattr(ServerClient, "run", counted)
    with FaultServer(prefers_yes) as server:
        for _ in range(2):
            assert len(build(prompts(130), tmp_path, server)) == 130
        assert server.count == 260
    assert len(asked) == 1  # and not once for each 64, each of which ends with its slowest


def test_a_judge_inside_an_event_loop(tmp_path):
    async def cell():
        with FaultServer(prefers_yes) as server:
            return build(prompts(3), tmp_path, server)

    assert asyncio.run(cell())["preference"] == [1.0] * 3
