"""Replies that servers in the field have sent: each is an answer, no answer, or asked for again. None is a traceback."""

import json
import time

import pytest

from tests.sampling.fault_server import FaultServer, Reply, chat, choice, error
from trl_kd.sampling import Answer, Request, SamplingSettings
from trl_kd.sampling.budget import Usage
from trl_kd.sampling.client import ServerClient
from trl_kd.sampling.server import ServerSampler
from trl_kd.sampling.server_errors import ServerError


pytest.importorskip("openai", reason="needs the extra `api`")

MESSAGES = [{"role": "user", "content": "hi"}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
DEEP = "[" * 5000 + "]" * 5000


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-a-test")
    monkeypatch.setattr("trl_kd.sampling.client.backoff", lambda attempt: 0.01)
    monkeypatch.setattr("trl_kd.sampling.server.backoff", lambda attempt: 0.01)


def ask(server, samples=(0,), prompt="hi", settings=None, **client):
    sampler = ServerSampler("m", ServerClient(server.url, **{"max_retries": 1, **client}), settings)
    return {sample: answer for _, sample, answer in sampler.sample([Request("k", prompt, samples)])}


def ask_three(script, **client):
    """The answers to the prompts 0, 1 and 2, of which `script` may answer the second oddly."""
    with FaultServer(script) as server:
        sampler = ServerSampler("m", ServerClient(server.url, **{"max_retries": 1, **client}))
        answers = sampler.sample([Request(str(i), f"p{i}") for i in range(3)])
        return {request.key: answer for request, _, answer in answers}, server


def odd_for_p1(reply):
    def script(body, number):
        if body["messages"][-1]["content"] != "p1":
            return chat("fine")
        time.sleep(0.05)  # others are answered by then
        return reply

    return script


def message(**fields):
    return chat({"message": {"role": "assistant", **fields}, "finish_reason": fields.pop("ended_by", "stop")})


def raw(text):
    """A reply in JSON with `text` as it stands in place of the message's content."""
    return Reply(b'{"choices": [{"finish_reason": "stop", "message": {"content": ' + text.encode() + b"}}]}")


PARTS = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "2"}, "!"]


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (message(content=PARTS), Answer("2!", "stop", 10)),
        (message(content=PARTS[:1]), Answer(None, "empty", 10)),
        (message(content=[]), Answer(None, "empty", 10)),
        (message(content="", reasoning="so"), Answer(None, "empty", 10)),
        (message(content=" \n", reasoning_content="so"), Answer(None, "empty", 10)),
        (message(content="2", reasoning_content="so"), Answer("2", "stop", 10)),
        (chat(choice("", "length")), Answer(None, "length", 10)),
        (chat(choice(" \n", "MAX_TOKENS")), Answer(None, "MAX_TOKENS", 10)),
        (chat(choice("", "stop")), Answer("", "stop", 10)),
        (chat(choice("half", "a_new_word")), Answer("half", "a_new_word", 10)),
        (chat(choice("half", {"type": "stop"})), Answer("half", "unknown", 10)),
        (chat(choice("half", "Content_Filter")), Answer(None, "Content_Filter", 10)),
        (message(content="I call.", tool_calls=[CALL]), Answer(None, "tool_calls", 10)),
        (message(content="2", tool_calls=[]), Answer("2", "stop", 10)),
        (message(content="2", refusal=False), Answer("2", "stop", 10)),
        (Reply({"choices": []}), Answer(None, "empty")),
        (Reply({"choices": [choice("2")], "error": None, "usage": None}), Answer("2", "stop")),
        (raw(r'"ok \ud83d"'), Answer("ok �", "stop")),
        (raw(r'"a\u0000b"'), Answer("a\x00b", "stop")),
    ],
)
def test_one_reply(reply, expected):
    with FaultServer(lambda *_: reply) as server:
        assert ask(server) == {0: expected}
    assert server.count == 1


BROKEN = [
    chat(choice("half", "error", error={"code": 502, "message": "Upstream idle timeout"})),
    chat(choice("half", "stop", error={"code": 502, "message": "Upstream idle timeout"})),
    chat(choice("half", "abort")),
    chat({"message": "no object", "finish_reason": "stop"}),
    chat({"message": {"content": 5}, "finish_reason": "stop"}),
    chat({"message": {"content": {"text": "2"}}, "finish_reason": "stop"}),
    Reply({"choices": ["2"]}),
    Reply({"choices": [None]}),
    message(content=None, tool_calls="f()"),
    message(content=None, tool_calls=[None]),
    message(content=None, tool_calls=[{"function": None}]),
    message(content=None, tool_calls=[{"function": {"name": None, "arguments": "{}"}}]),
]


@pytest.mark.parametrize("reply", BROKEN)
def test_a_broken_answer_is_asked_for_again_with_another_seed_and_then_is_none(reply, caplog):
    with FaultServer(lambda body, number: reply if number < 2 else chat("2")) as server:
        assert ask(server, prompt=MESSAGES, max_retries=2) == {0: Answer("2", "stop", 10)}
    assert [body["seed"] for body in server.bodies] == [SamplingSettings().answer_seed("k", 0, i) for i in range(3)]
    assert len({body["seed"] for body in server.bodies}) == 3
    with FaultServer(lambda *_: reply) as server:
        answer = ask(server, prompt=MESSAGES, max_retries=2)[0]
    assert server.count == 3
    assert answer.text is None
    assert answer.finish_reason in ("error", "abort", "malformed")
    assert f"'m' gave no answer ({answer.finish_reason}) to the prompt that begins 'hi': {{" in caplog.text


def test_of_several_samples_only_the_broken_one_is_asked_for_again():
    def script(body, number):
        return chat("a", choice("b", "error"), "c") if "n" in body else chat(f"again {body['seed']}")

    with FaultServer(script) as server:
        sampler = ServerSampler("m", server.url)
        ((*reply,),) = sampler.sample_replies([Request("k", "hi", (0, 1, 2))])
    seed = SamplingSettings().answer_seed("k", 1, 1)
    assert {sample: answer.text for _, sample, answer in reply} == {0: "a", 1: f"again {seed}", 2: "c"}
    assert server.count == 2


@pytest.mark.parametrize(
    "reply",
    [
        Reply({"id": "x", "choices": None, "usage": None}),
        Reply({"error": {"message": "Provider returned error"}}),
        Reply({"error": "overloaded", "choices": []}),
        Reply({"choices": "2"}),
        Reply(b'{"choices": ' + DEEP.encode() + b"}"),
        Reply({"choices": [choice("2")], "more": json.loads("[" * 300 + "]" * 300)}),
        Reply(b"[]"),
        Reply(b'{"choices": [{"mess'),
    ],
)
def test_a_reply_that_is_none_is_asked_for_again_and_costs_that_prompt_only(reply, caplog):
    answers, server = ask_three(odd_for_p1(reply))
    assert {key: answer.text for key, answer in answers.items()} == {"0": "fine", "1": None, "2": "fine"}
    assert answers["1"].finish_reason == "malformed"
    assert server.count >= 4
    assert "no answer (malformed) to the prompt that begins 'p1'" in caplog.text
    # Where nothing else is answered, the address or the server is at fault
    with FaultServer(lambda *_: reply) as server, pytest.raises(ServerError, match="The prompt begins 'hi'"):
        ask(server)
    assert server.count == 2


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"error": {"message": "no", "code": "content_filter"}}, Answer(None, "content_filter")),
        ({"error": {"message": "no", "code": "context_length_exceeded"}}, Answer(None, "prompt_too_long")),
        ({"error": {"message": "no such model", "code": 404}}, "status 404: no such model"),
        ({"error": {"message": "slow down", "code": "429"}}, "status 429: slow down"),
    ],
)
def test_an_error_in_place_of_an_answer_counts_as_what_it_says(body, expected):
    with FaultServer(lambda *_: Reply(body)) as server:
        if isinstance(expected, str):
            with pytest.raises(ServerError, match=expected):
                ask(server)
        else:
            assert ask(server) == {0: expected}
    assert server.count == (2 if "429" in str(body) else 1)


@pytest.mark.parametrize(
    "usage",
    [
        *("many", [], 5, True),
        *({"completion_tokens": wrong} for wrong in ("12", -5, 10**18, 1e300, 1.5, True, {"total": 3}, [4])),
        {"prompt_tokens": -(10**9), "completion_tokens": 3},
    ],
)
def test_a_wrong_usage_leaves_the_budget_as_it_is(usage):
    with FaultServer(lambda *_: Reply({"choices": [choice("2")], "usage": usage})) as server:
        sampler = ServerSampler("m", ServerClient(server.url, price_in=1.0, price_out=1.0))
        ((_, _, answer),) = sampler.sample([Request("k", "hi")])
    assert answer == Answer("2", "stop")
    assert sampler.usage == Usage(requests=1, unreported=1)


@pytest.mark.parametrize("arguments", ['{"x": 1}', {"x": 1}, None, "no JSON", DEEP, "[" * 200 + "]" * 200])
def test_arguments_of_a_call(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    with FaultServer(lambda *_: message(content=None, tool_calls=[call])) as server:
        ((called,),) = [answer.text for answer in ask(server, prompt=MESSAGES).values()]
    read = called["tool_calls"][0]
    expected = {"x": 1} if "x" in str(arguments) else {} if arguments is None else arguments
    assert read == {"type": "function", "function": {"name": "f", "arguments": expected}}


# The context


VLLM = (
    "'max_tokens' or 'max_completion_tokens' is too large: {longest}. This model's maximum context length is {context} "
    "tokens and your request has {count} input tokens ({longest} > {context} - {count})."
)


def with_context(context, wording):
    """A server that refuses what is too long."""

    def script(body, number):
        count = len(body["messages"][-1]["content"].split())
        longest = body.get("max_tokens", body.get("max_completion_tokens"))
        if count + longest <= context:
            return chat("2")
        return error(400, wording.format(context=context, longest=longest, count=count))

    return script


WORDINGS = [
    VLLM,
    "This model's maximum context length is {context} tokens. However, you requested {count} tokens.",
    "Requested token count exceeds the model's maximum context length of {context} tokens. You requested {count}.",
    "The decoder prompt (length {count}) is longer than the maximum model length of {context}.",
    "You passed {count} input tokens. However, the model's context length is only {context} tokens.",
    "The input ({count} tokens) is longer than the model's context length ({context} tokens).",
    "the request exceeds the available context size ({context} tokens), try increasing it",
    "Prompt contains {count} tokens, too large for model with {context} maximum context length",
]


@pytest.mark.parametrize("wording", WORDINGS)
def test_a_context_that_the_settings_break_stops_the_run(wording):
    settings = SamplingSettings(max_new_tokens=1000)
    said = r"status 400: .*1000.* \(`max_new_tokens` = 1000\) reaches the context of 1000 tokens: lower it"
    with FaultServer(with_context(1000, wording)) as server, pytest.raises(ServerError, match=said):
        ask(server, settings=settings)
    assert server.count == 1
    # With room for the prompts it is a prompt's fault
    with FaultServer(with_context(1010, wording)) as server:
        assert ask(server, settings=settings, prompt="one") == {0: Answer("2", "stop", 10)}
        assert ask(server, (0, 1), "word " * 20, settings) == dict.fromkeys((0, 1), Answer(None, "prompt_too_long"))


def test_the_name_of_a_field_in_an_error_switches_nothing():
    """vLLM names `max_completion_tokens` where a prompt is too long. Other servers ignore this field."""
    with FaultServer(with_context(300, VLLM)) as server:
        sampler = ServerSampler("m", ServerClient(server.url, max_concurrency=1))
        requests = [Request("0", "word " * 100), Request("1", "hi")]
        answers = {request.key: answer.finish_reason for request, _, answer in sampler.sample(requests)}
    assert answers == {"0": "prompt_too_long", "1": "stop"}
    assert ["max_tokens" in body for body in server.bodies] == [True, True]


def test_another_name_of_the_length_is_kept_only_if_it_is_answered():
    def script(body, number):
        if body["messages"][-1]["content"] == "bad":
            return error(400, "'max_tokens' is not supported, use 'max_completion_tokens' instead")
        return chat("2") if "max_tokens" in body else error(500, "not known")

    with FaultServer(script) as server:
        sampler = ServerSampler("m", server.url)
        for prompt, reason in (("bad", "bad_request"), ("good", "stop")):
            ((_, _, answer),) = sampler.sample([Request("k", prompt)])
            assert answer.finish_reason == reason
    assert ["max_tokens" in body for body in server.bodies] == [True, False, True, True]


def test_one_refused_prompt_does_not_end_the_asking_for_several():
    def script(body, number):
        if body["messages"][-1]["content"] == "bad":
            return error(400, "it is bad")
        silent = body["messages"][-1]["content"] == "silent"
        return chat(*(f"{number} {i}" for i in range(0 if silent else body.get("n", 1))))

    with FaultServer(script) as server:
        sampler = ServerSampler("m", ServerClient(server.url, max_concurrency=1))
        requests = [Request(str(i), text, (0, 1, 2)) for i, text in enumerate(("bad", "good", "silent"))]
        answers = [(request.key, answer.finish_reason) for request, _, answer in sampler.sample(requests)]
        assert sorted(answers) == [("0", "bad_request")] * 3 + [("1", "stop")] * 3 + [("2", "empty")] * 3
        server.bodies.clear()
        assert len(list(sampler.sample([Request("3", "better", (0, 1, 2))]))) == 3
        assert server.count == 1


@pytest.mark.parametrize("is_refused", [True, False])
def test_a_refused_system_role_is_named_with_its_fix(is_refused):
    said = "System role not supported" if is_refused else "no"
    prompt = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    with FaultServer(lambda *_: error(400, said)) as server, pytest.raises(ServerError) as raised:
        ask(server, prompt=prompt)
    assert ("leave out `system_prompt`" in str(raised.value)) == is_refused


# Time and place


def test_the_timeout_limits_a_whole_attempt():
    with FaultServer(lambda *_: Reply(chat("2").body, drip=0.1)) as server:
        started = time.monotonic()
        with pytest.raises(ServerError, match=r"within `timeout` = 0.5 seconds in 2 attempts"):
            ask(server, timeout=0.5)
        # Two attempts, and between them the wait of the `openai` package, of 0.375 seconds at least
        assert 1.3 < time.monotonic() - started < 6
    assert server.count == 2


def test_a_redirect_elsewhere_is_not_followed():
    def to(url):
        return lambda *_: Reply({}, 307, {"Location": f"{url}/chat/completions?key=sk-of-a-test"})

    with (
        FaultServer(lambda *_: chat("2")) as other,
        FaultServer(to(other.url)) as server,
        pytest.raises(ServerError, match=f"redirects to '{other.url}/chat/completions', which is another") as raised,
    ):
        ask(server)
    assert "sk-of" not in str(raised.value)
    assert (server.count, other.count) == (1, 0)


def test_a_redirect_on_the_same_server_is_followed():
    def script(body, number):
        return Reply({}, 308, {"Location": "/v1/elsewhere"}) if number == 0 else chat("2")

    with FaultServer(script) as server:
        assert ask(server) == {0: Answer("2", "stop", 10)}
    assert server.paths == ["/v1/chat/completions", "/v1/elsewhere"]


def test_redirects_without_end_are_an_error():
    script = lambda *_: Reply({}, 307, {"Location": "/v1/again"})  # noqa: E731
    with FaultServer(script) as server, pytest.raises(ServerError, match="redirects to '/v1/again'"):
        ask(server)
