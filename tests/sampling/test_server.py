"""The client and the sampler against a server that fails as scripted."""

import asyncio
import itertools
import json
import logging
import subprocess
import sys
import threading
import time
import traceback

import pytest

from tests.sampling.fault_server import FaultServer, Reply, chat, choice, error
from trl_kd.sampling import Answer, Request, SamplingSettings
from trl_kd.sampling.budget import BudgetExceeded, Usage
from trl_kd.sampling.client import ServerClient
from trl_kd.sampling.server import ServerSampler
from trl_kd.sampling.server_errors import ServerError


pytest.importorskip("openai", reason="needs the extra `api`")

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def echo(body, number):
    """As many choices as asked for, each with the prompt and its own number."""
    return chat(*(f"{body['messages'][-1]['content']} {i}" for i in range(body.get("n", 1))))


def ask(server, samples=(0,), prompt="hi", settings=None, columns=None, client=None, **options):
    sampler = ServerSampler("m", ServerClient(server.url, **(client or {})), settings, **options)
    request = Request("k", prompt, samples, columns or {})
    return {sample: answer for _, sample, answer in sampler.sample([request])}


def requests(count=None):
    return (Request(str(i), f"p{i}") for i in (itertools.count() if count is None else range(count)))


# What is asked


def test_settings_reach_the_server():
    settings = SamplingSettings(temperature=0.5, top_p=0.9, max_new_tokens=7, stop=("\n",), seed=3)
    with FaultServer(echo) as server:
        answers = ask(server, (4,), settings=settings, extra={"top_k": 20, "top_p": None})
    assert answers == {4: Answer("hi 0", "stop", 10)}
    assert server.bodies == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "hi"}],
            "temperature": 0.5,
            "max_tokens": 7,
            "stop": ["\n"],
            "seed": settings.answer_seed("k", 4),
            "top_k": 20,
        }
    ]
    assert server.authorizations == [f"Bearer {KEY}"]


def test_conversations_with_tools_go_as_they_are_without_nulls():
    prompt = [{"role": "user", "content": "hi", "tool_calls": None}]
    tools = [{"type": "function", "function": {"name": "f", "description": None}}]
    with FaultServer(echo) as server:
        ask(server, prompt=prompt, columns={"tools": tools}, system_prompt="Be brief.")
        ask(server, prompt=[{"role": "system", "content": "Mine."}, *prompt], system_prompt="Be brief.")
    assert server.bodies[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]
    assert server.bodies[0]["tools"] == [{"type": "function", "function": {"name": "f"}}]
    assert server.bodies[1]["messages"][0]["content"] == "Mine."
    assert "tools" not in server.bodies[1]


def test_a_text_prompt_takes_no_tools():
    """Their call would be a message, and the answer to a text must be a text."""
    with FaultServer(echo) as server:
        ask(server, prompt="hi", columns={"tools": [{"type": "function", "function": {"name": "f"}}]})
    assert "tools" not in server.bodies[0]


def test_variables_of_the_chat_template_go_with_every_request():
    columns = {"chat_template_kwargs": {"b": 3, "c": None}}
    with FaultServer(echo) as server:
        ask(server, chat_template_kwargs={"a": 1, "b": 2})
        ask(server, chat_template_kwargs={"a": 1, "b": 2}, columns=columns)
        ask(server)
    assert [body.get("chat_template_kwargs") for body in server.bodies] == [{"a": 1, "b": 2}, {"a": 1, "b": 3}, None]


def test_a_call_of_a_tool_is_a_message():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    with FaultServer(lambda *_: chat({"message": message, "finish_reason": "tool_calls"})) as server:
        answer = ask(server, prompt=[{"role": "user", "content": "hi"}])[0]
        to_text = ask(server)[0]
    assert to_text == Answer(None, "tool_calls", 10)  # the answer to a text must be a text
    assert answer.finish_reason == "tool_calls"
    assert answer.text == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
        }
    ]


def test_plain_completions():
    with FaultServer(lambda *_: chat({"text": " there", "finish_reason": "length"}, tokens=2)) as server:
        assert ask(server, completions=True) == {0: Answer(" there", "length", 2)}
        with pytest.raises(ValueError, match="`completions=False`"):
            ask(server, prompt=[{"role": "user", "content": "hi"}], completions=True)
    assert server.paths == ["/v1/completions"]
    assert server.bodies[0]["prompt"] == "hi"
    for option in ({"system_prompt": "x"}, {"chat_template_kwargs": {"x": 1}}):
        with pytest.raises(ValueError, match=f"`{next(iter(option))}` needs a chat"):
            ServerSampler("m", completions=True, **option)


def test_a_newer_model_gets_the_other_name_of_the_length():
    def script(body, number):
        if "max_tokens" in body:
            return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return echo(body, number)

    with FaultServer(script) as server:
        sampler = ServerSampler("m", server.url)
        assert len(list(sampler.sample(requests(5)))) == 5
        before = server.count
        assert len(list(sampler.sample(requests(3)))) == 3
    assert server.bodies[-1]["max_completion_tokens"] == 256
    assert server.count == before + 3  # it is asked the wrong way no more


# Several samples of a prompt


def test_a_server_that_honours_n_is_asked_once():
    with FaultServer(echo) as server:
        answers = ask(server, (0, 1, 2, 3))
    assert {sample: answer.text for sample, answer in answers.items()} == {i: f"hi {i}" for i in range(4)}
    assert server.count == 1
    assert server.bodies[0]["n"] == 4


@pytest.mark.parametrize(("most", "expected"), [(1, 4), (2, 2), (3, 2)])
def test_missing_choices_are_asked_for_with_other_seeds(most, expected):
    with FaultServer(lambda body, number: chat(*[f"{body['seed']}"] * min(body.get("n", 1), most))) as server:
        answers = ask(server, (0, 1, 2, 3))
    assert set(answers) == {0, 1, 2, 3}
    assert server.count == expected
    seeds = [body["seed"] for body in server.bodies]
    assert len(set(seeds)) == expected
    assert seeds[0] == SamplingSettings().answer_seed("k", 0)
    if most == 1:
        assert {s: a.text for s, a in answers.items()} == {
            s: str(SamplingSettings().answer_seed("k", s)) for s in range(4)
        }


@pytest.mark.parametrize(("most", "expected"), [(4, [[0, 1, 2, 3]]), (3, [[0, 1, 2], [3]]), (1, [[0], [1], [2], [3]])])
def test_the_answers_of_one_reply_come_together(most, expected):
    with FaultServer(lambda body, number: chat(*"abcd"[: min(body.get("n", 1), most)])) as server:
        replies = list(ServerSampler("m", server.url).sample_replies([Request("k", "hi", (0, 1, 2, 3))]))
    assert sorted([sample for _, sample, _ in reply] for reply in replies) == expected


def test_a_server_that_ignores_n_is_soon_not_asked_for_n():
    with FaultServer(lambda body, number: chat(str(number))) as server:
        sampler = ServerSampler("m", ServerClient(server.url, max_concurrency=1))
        answers = list(sampler.sample(Request(str(i), "hi", (0, 1, 2)) for i in range(4)))
    assert len(answers) == 12
    assert server.count == 12
    assert sum("n" in body for body in server.bodies) <= 2


def test_a_server_that_refuses_n():
    with FaultServer(lambda b, n: error(400, "n must be 1") if b.get("n", 1) > 1 else chat(str(n))) as server:
        assert set(ask(server, (0, 1, 2))) == {0, 1, 2}
    assert server.count == 4


def test_equal_answers_are_remarked_on_once(caplog):
    def run(text, temperature, count=3):
        caplog.clear()
        with FaultServer(lambda body, number: chat(*(text(number, i) for i in range(body.get("n", 1))))) as server:
            sampler = ServerSampler("m", server.url, SamplingSettings(temperature=temperature))
            list(sampler.sample(Request(str(i), "hi", (0, 1)) for i in range(count)))
        return [r.getMessage() for r in caplog.records if "equal at temperature" in r.getMessage()]

    (message,) = run(lambda number, i: "same", 0.7)
    assert "All 2 answers of 'm'" in message
    assert not run(lambda number, i: "same", 0.0)
    assert not run(lambda number, i: f"{number} {i}", 0.7)
    assert not run(lambda number, i: None, 0.7)


# Answers that the server does not give


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (chat(), Answer(None, "empty")),
        (chat(None), Answer(None, "empty", 10)),
        (chat({"finish_reason": "stop", "message": None}), Answer(None, "empty", 10)),
        (chat(choice("half of", "content_filter")), Answer(None, "content_filter", 10)),
        (chat(choice(None, "length")), Answer(None, "length", 10)),
        (chat({"message": {"content": None, "refusal": "No."}, "finish_reason": "stop"}), Answer(None, "refusal", 10)),
        (Reply({"error": {"message": "filtered", "code": "content_filter"}}, 400), Answer(None, "content_filter")),
        (
            Reply({"error": {"message": "too long", "code": "context_length_exceeded"}}, 400),
            Answer(None, "prompt_too_long"),
        ),
        (
            Reply({"error": {"message": "This model's maximum context length is 300 tokens."}}, 400),
            Answer(None, "prompt_too_long"),
        ),
        (chat(""), Answer("", "stop", 10)),
        (chat(choice("cut o", "length")), Answer("cut o", "length", 10)),
    ],
)
def test_one_answer(reply, expected):
    with FaultServer(lambda *_: reply) as server:
        assert ask(server) == {0: expected}
    assert server.count == 1


def test_no_choices_for_several():
    with FaultServer(lambda body, number: chat() if "n" in body else chat("x")) as server:
        assert {s: a.text for s, a in ask(server, (0, 1)).items()} == {0: "x", 1: "x"}


@pytest.mark.parametrize(
    "fault",
    [
        error(429, "slow down", Retry_After="0.05"),
        error(500, "oops"),
        Reply({"choices": []}, cut=True),
        Reply(b'{"choices": [{"mess'),
        Reply(b"<html>gateway</html>", headers={"Content-Type": "text/html"}),
        Reply({"choices": [{"message": "no object"}]}),
        Reply({"detail": "no choices"}),
        Reply({"choices": [choice("late")]}, delay=1.0),
    ],
    ids=["429", "500", "cut", "malformed", "html", "shape", "no choices", "slow"],
)
def test_a_fault_that_passes_is_tried_again(fault):
    with FaultServer(lambda body, number: fault if number == 0 else echo(body, number)) as server:
        assert ask(server, client={"timeout": 0.5}) == {0: Answer("hi 0", "stop", 10)}
    assert server.count == 2


def test_retry_after_is_waited_for():
    with FaultServer(lambda b, n: error(429, "x", Retry_After="1.2") if n == 0 else echo(b, n)) as server:
        started = time.monotonic()
        ask(server)
        assert time.monotonic() - started >= 1.2


@pytest.mark.parametrize(
    ("fault", "tries", "said"),
    [
        (
            error(429, "slow down", Retry_After="0.05"),
            2,
            r"status 429: slow down — The request failed in 2 attempts .*`max_concurrency`",
        ),
        (
            error(503, "down", Retry_After="0.05"),
            2,
            r"status 503: down — The request failed in 2 attempts .*log.* The prompt begins 'hi'",
        ),
        (Reply({}, cut=True), 2, r"cut the connection, in 2 attempts .*check `base_url`"),
        (
            Reply(b"{"),
            2,
            r"sent replies that are not completions in JSON, in 2 attempts \(`max_retries` is 1\), e.g. '\{'",
        ),
        (Reply({}, delay=1), 2, r"no answer within `timeout` = 0.5 seconds .*raise `timeout`"),
        (error(401, "who are you"), 1, r"status 401: who are you — Put a valid key .* OPENAI_API_KEY"),
        (error(404, "no model"), 1, r"status 404: no model — Check `model` and `base_url`"),
        (error(400, "top_p is bad"), 2, r"status 400: top_p is bad — Change the setting .* begins 'hi'"),
        (Reply({"detail": "pinned"}, 422), 2, r"status 422: pinned"),
    ],
)
def test_a_fault_that_stays_is_one_clear_sentence(fault, tries, said):
    with (
        FaultServer(lambda *_: fault) as server,
        pytest.raises(ServerError, match=said) as raised,
    ):
        ask(server, client={"timeout": 0.5, "max_retries": 1})
    assert server.url in str(raised.value)
    assert server.count == tries


@pytest.mark.parametrize("as_text", [True, False])
def test_a_prompt_that_is_refused_by_itself_gets_no_answer(as_text, caplog):
    def script(body, number):
        asked = body["prompt"] if as_text else body["messages"][-1]["content"]
        return error(400, "it is bad") if asked == "bad" else chat({"text": "x"} if as_text else "x")

    columns = {} if as_text else {"tools": [{"type": "function"}]}
    message = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "bad"}]
    with FaultServer(script) as server:
        sampler = ServerSampler("m", ServerClient(server.url), completions=as_text)
        prompts = {"0": "good", "1": "bad"} if as_text else {"0": [{**message[1], "content": "good"}], "1": message}
        asked = [Request(key, prompt, (0,), columns) for key, prompt in prompts.items()]
        answers = {request.key: answer for request, _, answer in sampler.sample(asked)}
    assert answers["1"] == Answer(None, "bad_request")
    assert answers["0"].text == "x"
    assert "refuses the prompt that begins 'bad'" in caplog.text
    probe = next(body for body in server.bodies if "Say yes." in str(body))
    refused = next(body for body in server.bodies if "bad" in str(body))
    if not as_text:  # the same in all but words, or a role that it never takes would be the prompt's fault
        assert probe["tools"] == refused["tools"]
        assert [m["role"] for m in probe["messages"]] == ["system", "user"]
        assert [m["content"] for m in probe["messages"]] == ["Say yes."] * 2


def test_a_refusal_of_all_conversations_of_a_kind_is_an_error():
    """A template without system messages, or tools without a parser for them."""

    def script(body, number):
        return error(400, "no system role") if body["messages"][0]["role"] == "system" else chat("x")

    with FaultServer(script) as server, pytest.raises(ServerError, match=r"no system role.* begins 'hi'"):
        ask(server, system_prompt="be brief")


def test_nobody_there():
    with FaultServer(echo) as server:
        pass
    with pytest.raises(ServerError, match="could not be reached"):
        ask(server, client={"max_retries": 0})


def test_what_is_under_way_is_yielded_before_the_failure():
    def script(body, number):
        if body["messages"][0]["content"] == "p1":
            return error(404, "bad")
        return Reply(echo(body, number).body, delay=0.4)

    with FaultServer(script) as server:
        sampler = ServerSampler("m", ServerClient(server.url, max_concurrency=4))
        answered = []
        with pytest.raises(ServerError, match="bad"):
            collect(answered, sampler.sample(requests()))
    assert set(answered) == {"0", "2", "3"}
    assert server.count == 4  # nothing new was started


def test_other_samples_of_a_prompt_are_kept_when_one_fails():
    def script(body, number):
        if number == 2:
            return error(404, "bad")
        return Reply(chat("x").body, delay=0.0 if number == 0 else 0.4)

    answered = []
    with FaultServer(script) as server, pytest.raises(ServerError, match="bad"):
        collect(answered, ServerSampler("m", server.url).sample([Request("k", "hi", (0, 1, 2, 3))]))
    assert server.count == 4
    assert len(answered) == 3


def collect(keys, results):
    """Keeps what is yielded before a failure."""
    for request, _, _ in results:
        keys.append(request.key)


# Laziness and cleaning up


def test_an_endless_source_is_read_no_further_than_needed():
    read = itertools.count()
    with FaultServer(lambda b, n: Reply(echo(b, n).body, delay=0.02)) as server:
        sampler = ServerSampler("m", ServerClient(server.url, max_concurrency=3))
        answers = sampler.sample(Request(str(i), "hi") for i in read)
        for taken in range(1, 11):
            next(answers)
            assert next_value(read) <= taken + 2 * 3
        answers.close()
    assert server.most_at_once == 3


def next_value(counter):
    """The value that an `itertools.count` would give next, which it goes on to give."""
    return counter.__reduce__()[1][0]


@pytest.mark.parametrize("how", ["close", "raise"])
def test_stopping_early_ends_the_thread(how):
    with FaultServer(lambda b, n: Reply(echo(b, n).body, delay=0.0 if n < 10 else 5.0)) as server:
        answers = ServerSampler("m", server.url).sample(requests())
        started = time.monotonic()
        if how == "close":
            list(itertools.islice(answers, 10))
            answers.close()
        else:
            with pytest.raises(KeyError):
                raise_within(answers)
            answers.close()
        assert time.monotonic() - started < 4
        assert not [t for t in threading.enumerate() if "trl-kd-server" in t.name]


def test_a_caller_inside_an_event_loop_of_its_own():
    """A notebook is one."""

    async def cell():
        with FaultServer(echo) as server:
            return ask(server)

    assert asyncio.run(cell()) == {0: Answer("hi 0", "stop", 10)}
    assert "trl-kd-server-client" not in [thread.name for thread in threading.enumerate()]


def test_a_consumer_that_fails_does_not_keep_the_interpreter_from_ending():
    with FaultServer(lambda b, n: Reply(echo(b, n).body, delay=0.0 if n < 3 else 60.0)) as server:
        code = (
            "import itertools\n"
            "from trl_kd.sampling.sampler import Request\n"
            "from trl_kd.sampling.server import ServerSampler\n"
            f"answers = ServerSampler('m', {server.url!r}).sample(Request(str(i), 'hi') for i in itertools.count())\n"
            "next(answers)\n"
            "raise KeyError('consumer')\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("KeyError: 'consumer'")


def raise_within(answers):
    for _ in answers:
        raise KeyError("consumer")


def test_a_source_that_fails_loses_nothing():
    def source():
        yield from requests(3)
        raise OSError("disk")

    answered = []
    with FaultServer(lambda b, n: Reply(echo(b, n).body, delay=0.2)) as server, pytest.raises(OSError, match="disk"):
        collect(answered, ServerSampler("m", server.url).sample(source()))
    assert sorted(answered) == ["0", "1", "2"]


def test_answers_that_are_there_do_not_wait_for_a_slow_source():
    go_on = threading.Event()
    waited = []

    def source():
        yield from requests(3)
        waited.append(go_on.wait(30))  # a long scan, say, over what is stored already
        yield Request("last", "hi")

    with FaultServer(echo) as server:
        answers = ServerSampler("m", server.url).sample(source())
        assert {next(answers)[0].key for _ in range(3)} == {"0", "1", "2"}
        assert not waited
        go_on.set()
        assert [request.key for request, _, _ in answers] == ["last"]
    assert waited == [True]


@pytest.mark.parametrize("how", ["close", "fail"])
def test_nothing_waits_for_a_slow_source_at_the_end(how):
    go_on = threading.Event()

    def source():
        yield from requests(1)
        go_on.wait(30)

    with FaultServer(lambda b, n: error(404, "bad") if how == "fail" else echo(b, n)) as server:
        answers = ServerSampler("m", server.url).sample(source())
        started = time.monotonic()
        if how == "fail":
            with pytest.raises(ServerError, match="bad"):
                next(answers)
        else:
            next(answers)
            answers.close()
        assert time.monotonic() - started < 10
        go_on.set()
        deadline = time.monotonic() + 10
        while reader_threads() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not reader_threads()


def reader_threads():
    return [thread for thread in threading.enumerate() if thread.name == "trl-kd-reader"]


# Several servers


def test_several_servers_share_the_work():
    with FaultServer(lambda b, n: Reply(echo(b, n).body, delay=0.02)) as one, FaultServer(echo) as other:
        client = ServerClient([one.url, other.url], max_concurrency=2)
        assert len(list(ServerSampler("m", client).sample(requests(40)))) == 40
        sequential = ServerClient([one.url, other.url], max_concurrency=1)
        list(ServerSampler("m", sequential).sample(requests(1)))
    assert one.count + other.count == 41
    assert one.count >= 5
    assert other.count >= 5
    assert max(one.most_at_once, other.most_at_once) <= 2


def test_where_it_is_asked_is_not_in_the_description():
    settings = SamplingSettings(temperature=0.3)
    described = ServerSampler("m", "http://user:pa55word@one/v1", settings, system_prompt="s").describe()
    assert described == ServerSampler("m", ["http://two/v1", "http://three"], settings, system_prompt="s").describe()
    assert described["temperature"] == 0.3
    assert described["system_prompt"] == "s"
    changes = (
        {"completions": True},
        {"system_prompt": "t"},
        {"extra": {"top_k": 1}},
        {"chat_template_kwargs": {"a": 1}},
    )
    for change in changes:
        assert ServerSampler("m", "http://one/v1", settings, **change).describe() != described


# Budgets


@pytest.mark.parametrize(
    ("caps", "expected"),
    [
        ({"max_requests": 5}, 5),
        ({"max_tokens": 60}, 5),  # 12 a request
        ({"max_cost": 0.0001, "price_in": 5, "price_out": 1}, 5),  # 0.00002 a request
    ],
)
def test_a_cap_ends_the_run_after_what_is_under_way(caps, expected):
    with FaultServer(echo) as server:
        client = ServerClient(server.url, max_concurrency=1, **caps)
        answered = []
        with pytest.raises(BudgetExceeded, match=f"`{next(iter(caps))}` = .* is reached: {expected} requests"):
            collect(answered, ServerSampler("m", client).sample(requests(50)))
    assert len(answered) == server.count == expected
    assert (client.usage.prompt_tokens, client.usage.completion_tokens) == (2 * expected, 10 * expected)
    assert client.usage.cost == pytest.approx(expected * 2e-5 if "max_cost" in caps else 0)


def test_a_cap_that_is_just_enough_is_no_error():
    with FaultServer(echo) as server:
        assert len(list(ServerSampler("m", ServerClient(server.url, max_requests=3)).sample(requests(3)))) == 3


def test_requests_under_way_at_the_cap_are_finished():
    with FaultServer(lambda b, n: Reply(echo(b, n).body, delay=0.2)) as server:
        client = ServerClient(server.url, max_concurrency=4, max_tokens=1)
        answered = []
        with pytest.raises(BudgetExceeded):
            collect(answered, ServerSampler("m", client).sample(requests(50)))
    assert len(answered) == server.count == 4


def test_a_cap_that_the_server_does_not_help_to_keep():
    with FaultServer(lambda *_: Reply({"choices": [choice("x")]})) as server:
        client = ServerClient(server.url, max_concurrency=1, max_tokens=100)
        answered = []
        with pytest.raises(BudgetExceeded, match="does not report"):
            collect(answered, ServerSampler("m", client).sample(requests(50)))
    assert answered == ["0"]


def test_usage_can_be_looked_at_while_running():
    with FaultServer(lambda b, n: error(500, "x", Retry_After="0.02") if n == 2 else echo(b, n)) as server:
        sampler = ServerSampler("m", ServerClient(server.url, max_concurrency=1))
        answers = sampler.sample(requests(6))
        next(answers)
        assert sampler.usage.completion_tokens >= 10
        assert len(list(answers)) == 5
    assert (sampler.usage.requests, sampler.usage.retries) == (6, 1)


def test_former_usage_counts_under_the_caps():
    former = Usage(requests=4, prompt_tokens=8, completion_tokens=40, cost=0.5)
    with FaultServer(echo) as server:
        client = ServerClient(server.url, max_concurrency=1, max_requests=6)
        for _ in range(2):  # the second time changes nothing: the same runs are not counted twice
            client.usage.resume(former)
        answered = []
        with pytest.raises(
            BudgetExceeded, match="is reached: 6 requests.*of which 4 requests by former runs.*Raise it"
        ):
            collect(answered, ServerSampler("m", client).sample(requests(50)))
        assert len(answered) == server.count == 2
        assert client.usage == Usage(6, 0, 12, 60, 0, 0.5)


@pytest.mark.parametrize(
    ("caps", "former"),
    [
        ({"max_requests": 4}, Usage(requests=4)),
        ({"max_tokens": 48}, Usage(4, 0, 8, 40)),
        ({"max_cost": 0.5, "price_in": 1, "price_out": 1}, Usage(4, cost=0.5)),
    ],
)
def test_a_cap_that_former_runs_have_reached_is_said_before_anything_is_asked(caps, former):
    with FaultServer(echo) as server:
        client = ServerClient(server.url, **caps)
        client.usage.resume(former)
        said = (
            f"`{next(iter(caps))}` = .* was reached by former runs .* nothing is asked: 4 requests.*Raise it to go on"
        )
        with pytest.raises(BudgetExceeded, match=said):
            list(ServerSampler("m", client).sample(requests(3)))
    assert server.count == 0


# Bad arguments


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_concurrency": 0}, "`max_concurrency` is 0"),
        ({"max_retries": -1}, "`max_retries` is -1"),
        ({"timeout": 0}, "`timeout` is 0"),
        ({"max_requests": -1}, "`max_requests` is -1"),
        ({"max_cost": 1.0}, "without prices: give `price_in` and `price_out`"),
        ({"api_key_env": "NO_SUCH_KEY"}, "`api_key_env` is 'NO_SUCH_KEY'.*set it"),
        ({"base_url": "localhost:8000"}, "`base_url` is 'localhost:8000'"),
        ({"base_url": "http://host:port/v1"}, "`base_url` is 'http://host:port/v1'"),
        ({"base_url": "http://host/v1?key=x"}, "without '\\?'"),
    ],
)
def test_bad_arguments(options, said):
    with pytest.raises(ValueError, match=said):
        ServerClient(**{"base_url": "http://127.0.0.1/v1", **options})


# Secrets


def everything_said(error):
    """What a user, a log or a debugger that walks the chain of an error could print."""
    chain = [error, error.__cause__, error.__context__]
    formatted = "".join(traceback.format_exception(error))
    return formatted + "".join(f"{e!r} {e} {vars(e)} {getattr(e, '__notes__', '')}" for e in chain if e is not None)


def echoing(headers_of):
    return lambda body, number: error(400, f"bad request with Authorization: {headers_of()} and {KEY}")


@pytest.mark.parametrize("status", [400, 401, 429, 500, 200])
@pytest.mark.parametrize("credentials", ["", "user:pa55word-very-secret@"])
def test_no_secret_is_said_anywhere(status, credentials, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    secrets = [KEY, "pa55word-very-secret", "dXNlcjpwYTU1d29yZC12ZXJ5LXNlY3JldA=="]

    def script(body, number):
        said = f"bad header 'Authorization: {server.authorizations[-1]}' at http://{credentials}host, {secrets}"
        if status == 200:
            return chat(said)
        return Reply({"error": {"message": said, "code": said}}, status, {"Retry-After": "0.02"})

    with FaultServer(script) as server:
        url = server.url.replace("://", f"://{credentials}")
        sampler = ServerSampler("m", ServerClient(url, max_retries=1, timeout=5))
        if status == 200:
            ((_, _, answer),) = sampler.sample(requests(1))
            said = repr(answer)
        else:
            with pytest.raises(ServerError, match=r"bad header.*\*\*\*") as raised:
                list(sampler.sample(requests(1)))
            said = everything_said(raised.value)
        if credentials:
            assert server.authorizations[0] == f"Basic {secrets[2]}"
        else:
            assert server.authorizations[0] == f"Bearer {KEY}"
            secrets = secrets[:1]
    said += f"{sampler.client!r} {sampler!r} {sampler.describe()} {vars(sampler)} {caplog.text} {capfd.readouterr()}"
    said += " ".join(str(vars(record)) for record in caplog.records)
    assert not [secret for secret in secrets if secret in said]


@pytest.mark.parametrize("key", ["sk-12345", 'a"quoted/key\\'])
def test_a_key_that_a_server_echoes_is_in_no_answer(key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with FaultServer(lambda *_: chat(f"your key is {key}.")) as server:
        assert ask(server)[0].text == "your key is ***."


def test_keys_among_the_fields_of_a_request_are_sent_and_not_said(caplog):
    """Also where a server echoes what it was sent, in an answer or in an error."""
    caplog.set_level(logging.DEBUG)
    key = "AIza-planted-0123456789"
    extra = {"headers": {"x-goog-key": key}, "provider": {"order": ["a"], "own": [[{"token": key}]]}, "stop": ["\n"]}
    described = {"headers": "(not stored)", "provider": {"order": ["a"], "own": "(not stored)"}, "stop": ["\n"]}
    with FaultServer(lambda body, number: chat(f"You sent {json.dumps(body)}")) as server:
        sampler = ServerSampler("m", server.url, extra=extra)
        assert sampler.describe()["extra"] == described
        ((_, _, answer),) = sampler.sample(requests(1))
        assert {name: server.bodies[0][name] for name in extra} == extra
        assert '"x-goog-key": "***"' in answer.text
        said = repr(answer)
    for status in (400, 500):
        with FaultServer(lambda body, number, status=status: error(status, json.dumps(body))) as server:
            client = ServerClient(server.url, max_retries=0)
            with pytest.raises(ServerError) as raised:
                list(ServerSampler("m", client, extra=extra).sample(requests(1)))
            said += everything_said(raised.value)
    assert key not in said + caplog.text


def test_older_versions_of_openai_log_no_bodies(caplog):
    import openai  # noqa: F401

    import trl_kd.sampling.http_client  # noqa: F401

    caplog.set_level(logging.DEBUG)
    options = {"method": "post", "url": "/x", "json_data": {"token": "planted"}, "extra_json": {"token": "planted"}}
    logging.getLogger("openai._base_client").debug("Request options: %s", options)
    assert "post" in caplog.text
    assert "planted" not in caplog.text


def test_a_password_that_breaks_the_url_is_not_shown():
    for url in ("http://user:pa/55word@host/v1", "http://user:pa?55word@host/v1", "ftp://user:pa55word@host"):
        with pytest.raises(ValueError, match="`base_url`") as raised:
            ServerClient(url)
        assert "55word" not in str(raised.value)


def test_a_key_that_no_header_can_carry_is_not_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very\nsecret")
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds characters") as raised:
        ServerClient("http://127.0.0.1/v1")
    assert "very" not in str(raised.value)


def test_the_key_comes_from_the_variable_that_is_named(monkeypatch):
    monkeypatch.setenv("MY_KEY", " other-key\n")
    with FaultServer(echo) as server:
        ask(server, client={"api_key_env": "MY_KEY"})
        monkeypatch.delenv("OPENAI_API_KEY")
        ask(server)
    assert server.authorizations == ["Bearer other-key", "Bearer none"]
