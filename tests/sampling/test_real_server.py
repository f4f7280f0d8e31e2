"""A real server, `transformers serve` with a tiny model, asked through the real client."""

import pytest

from tests.conftest import save_tiny
from tests.sampling.real_server import serving
from trl_kd.preferences.judge import LLMJudge
from trl_kd.sampling import Request, SamplingSettings
from trl_kd.sampling.client import ServerClient
from trl_kd.sampling.server import ServerSampler
from trl_kd.sampling.server_errors import ServerError


for package in ("openai", "fastapi", "uvicorn"):
    pytest.importorskip(package, reason="needs the extras `api` and `transformers[serving]`")

LONGEST = 6


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The base URL and the model's name."""
    folder = tmp_path_factory.mktemp("served")
    model = save_tiny(folder / "model")
    with serving(model, folder) as url:
        yield url, model


def sampler(served, settings=None, **options):
    url, model = served
    return ServerSampler(model, ServerClient(url, max_concurrency=4, max_retries=1, timeout=60), settings, **options)


def test_n_samples_though_the_server_ignores_n(served):
    source = sampler(served, SamplingSettings(max_new_tokens=LONGEST, temperature=1.0))
    requests = [Request(str(i), f"{i}+1=", (0, 1, 2)) for i in range(3)]
    answers = {(request.key, sample): answer for request, sample, answer in source.sample(iter(requests))}
    assert set(answers) == {(str(i), sample) for i in range(3) for sample in range(3)}
    assert source.usage.requests == 9
    assert source.usage.completion_tokens == sum(answer.tokens for answer in answers.values()) > 0
    assert all(isinstance(answer.text, str) for answer in answers.values())
    assert len({answer.text for answer in answers.values()}) > 4
    for answer in answers.values():
        assert answer.finish_reason == ("length" if answer.tokens == LONGEST else "stop")
    assert "length" in {answer.finish_reason for answer in answers.values()}


def test_greedy_answers_repeat(served):
    def ask():
        source = sampler(served, SamplingSettings(max_new_tokens=LONGEST, temperature=0))
        return [answer.text for _, _, answer in source.sample([Request("k", [{"role": "user", "content": "1+1="}])])]

    assert ask() == ask()


def test_plain_completions_and_stop(served):
    source = sampler(served, SamplingSettings(max_new_tokens=LONGEST, temperature=0), completions=True)
    ((_, _, whole),) = source.sample([Request("k", "1+1=")])
    assert whole.finish_reason == "length"
    source = sampler(
        served, SamplingSettings(max_new_tokens=LONGEST, temperature=0, stop=whole.text[2]), completions=True
    )
    ((_, _, short),) = source.sample([Request("k", "1+1=")])
    assert whole.text.startswith(short.text)
    assert len(short.text) < len(whole.text)


def test_what_the_server_refuses_is_said(served):
    url, _ = served
    with pytest.raises(ServerError, match="status 400: .*no-such-model"):
        list(ServerSampler("no-such-model", url).sample([Request("k", "hi")]))


def test_a_model_that_gives_no_verdict(served):
    url, model = served
    judge = LLMJudge(model, url, template="{prompt} {first} {second}", max_new_tokens=4)
    assert judge(["1+1="] * 2, ["2", "2"], ["3", "2"]) == [None, 0.5]
    assert (judge.asked, judge.unparseable, judge.order_agreement) == (1, 1, None)
