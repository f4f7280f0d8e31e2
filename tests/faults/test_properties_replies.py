"""Replies of any content from a real server: each is an answer, no answer with a reason, or one sentence; what is kept can
be read again."""

import json
from contextlib import closing

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.faults.profiles import properties
from tests.sampling.fault_server import FaultServer, Reply, chat
from trl_kd.pairs.store import AnswerStore
from trl_kd.sampling import Request
from trl_kd.sampling.client import ServerClient
from trl_kd.sampling.server import ServerSampler
from trl_kd.sampling.server_errors import ServerError


pytest.importorskip("openai", reason="needs the extra `api`")

ODD = st.one_of(
    st.sampled_from(
        [None, True, 0, -1, 1.5, 10**30, 1e300, float("nan"), float("inf"), "", "2", "\0", "\ud83d", " \n"]
    ),
    st.sampled_from(
        [[], [None], {}, {"a": 1}, [[]], ["2"], "[" * 3000, [{"type": "text", "text": None}], {"content": "2"}]
    ),
    st.text(max_size=4),
)
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
PLACES = (
    *((), ("id",), ("object",), ("model",), ("created",), ("error",), ("usage",), ("usage", "completion_tokens")),
    *(("usage", "prompt_tokens"), ("choices",), ("choices", 0), ("choices", 0, "index"), ("choices", 0, "message")),
    *(("choices", 0, "message", name) for name in ("role", "content", "refusal", "reasoning", "reasoning_content")),
    ("choices", 0, "message", "tool_calls"),
    *(("choices", 0, name) for name in ("finish_reason", "logprobs", "error")),
    *(("choices", 0, "message", "tool_calls", 0), ("choices", 0, "message", "tool_calls", 0, "function")),
    *(("choices", 0, "message", "tool_calls", 0, "function", name) for name in ("name", "arguments")),
)  # fmt: skip
STATUSES = st.sampled_from([200] * 6 + [201, 204, 299, 301, 400, 401, 404, 413, 422, 429, 500, 503, 529, 599])
HEADERS = st.one_of(
    st.just({}),
    st.sampled_from(["0", "-1", "nan", "inf", "1e400", "x", "", "Wed, 21 Oct 2015 07:28:00 GMT", "9" * 20]).map(
        lambda value: {"Retry-After": value}
    ),
    st.sampled_from(["text/html", "application/json; charset=utf-16", "", "x"]).map(lambda value: {"Content-Type": value}),
    st.sampled_from(["gzip", "x", "br"]).map(lambda value: {"Content-Encoding": value}),
    st.sampled_from(["/v1/x", "", "http://", "http://["]).map(lambda value: {"Location": value}),
)  # fmt: skip


def changed(body, place, value):
    """`body` with another value at a place in it."""
    if not place:
        return value
    copy = list(body) if isinstance(body, list) else dict(body)
    copy[place[0]] = changed(copy[place[0]], place[1:], value) if len(place) > 1 else value
    return copy


@st.composite
def replies(draw):
    body = json.loads(json.dumps(chat("2").body))
    place, value = draw(st.sampled_from(PLACES)), draw(ODD)
    if "tool_calls" in place[:-1]:
        body["choices"][0]["message"]["tool_calls"] = [CALL]
    data = json.dumps(changed(body, place, value)).encode()
    kind = draw(st.sampled_from(["whole"] * 6 + ["short", "bytes", "html"]))
    if kind == "short":
        data = data[: draw(st.integers(0, len(data)))]
    elif kind == "bytes":
        data = draw(st.binary(max_size=20))
    elif kind == "html":
        data = b"<html>Bad gateway</html>"
    status, headers = draw(STATUSES), draw(HEADERS)
    return Reply(data, status, headers, cut=draw(st.sampled_from([False, False, False, True])))


class Odd:
    """A server whose next replies are set from outside, and a store of its answers."""

    def __init__(self, folder):
        self.folder = folder
        self.reply = chat("2")
        self.key = "00"
        self.server = FaultServer(lambda body, number: self.reply)

    def ask(self, reply):
        self.reply, self.key = reply, f"{int(self.key, 16) + 1:08x}"
        sampler = ServerSampler("m", ServerClient(self.server.url, max_retries=1, timeout=5))
        return [answer for _, _, answer in sampler.sample([Request(self.key, [{"role": "user", "content": "hi"}])])]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", "sk-of-a-test")
        patch.setattr("trl_kd.sampling.client.backoff", lambda attempt: 0.0)
        patch.setattr("trl_kd.sampling.server.backoff", lambda attempt: 0.0)
        patch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *_: 0.0)
        odd = Odd(tmp_path_factory.mktemp("replies"))
        with odd.server:
            yield odd


def test_a_whole_reply_is_its_text(odd):
    (answer,) = odd.ask(chat("2"))
    assert answer.text == "2"


@properties
@given(replies())
@example(Reply(chat("2").body, headers={"Content-Type": "application/json; charset=utf-16"}))
def test_a_reply_of_any_content(odd, reply):
    try:
        (answer,) = odd.ask(reply)
    except ServerError:
        return
    assert answer.text is not None or answer.finish_reason
    with closing(AnswerStore(odd.folder)) as store:
        store.add_answer("teacher", odd.key, 0, answer)
        store.commit()
    with closing(AnswerStore(odd.folder)) as store:
        assert store.answers("teacher", [odd.key], 1)[odd.key][0].text == answer.text
