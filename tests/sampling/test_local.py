"""A local model's answers: from the right distribution, and the same whatever is drawn beside them."""

import logging
from itertools import count, islice

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from tests.conftest import make_model, make_tokenizer
from trl_kd.sampling import Answer, Request, SamplingSettings, decoding
from trl_kd.sampling.decoding import pick_tokens
from trl_kd.sampling.local import LocalSampler


SETTINGS = SamplingSettings(max_new_tokens=12, seed=3)
TOKENIZER = make_tokenizer()
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]


def make_requests(number: int = 12, samples=(0, 1, 2, 3)) -> list[Request]:
    return [Request(f"k{i}", "1+1=" * (1 + i * 7 % 5) + str(i), samples) for i in range(number)]


def make_brief_model():
    """Its answers end after about nine tokens, so that others join a batch that has begun."""
    model = make_model()
    model.generation_config.eos_token_id = [1, *range(5, 13)]
    return model


def answers(model, requests=None, settings=SETTINGS, **options) -> dict[tuple[str, int], Answer]:
    sampler = LocalSampler(model, settings, tokenizer=TOKENIZER, **options)
    drawn = [(request.key, sample, answer) for request, sample, answer in sampler.sample(requests or make_requests())]
    assert len({(key, sample) for key, sample, _ in drawn}) == len(drawn)
    return {(key, sample): answer for key, sample, answer in drawn}


class Watched:
    """Counts what a model's forward is given, and fails above a number of rows."""

    def __init__(self, model, most: int = 10**9, error: Exception | None = None):
        self.shapes: list[tuple[int, int]] = []
        self.padding: list[int] = []
        self.most, self.error = most, error or torch.OutOfMemoryError("CUDA out of memory.")
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        shape = tuple(kwargs["input_ids"].shape)
        self.shapes.append(shape)
        self.padding.append(int((kwargs["attention_mask"][:, -shape[1] :] == 0).sum()))
        if shape[0] > self.most:
            raise self.error


# Distribution


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7), (1.0, 0.05)])
def test_tokens_have_exactly_their_probability(temperature, top_p):
    """Evenly spaced numbers in [0, 1) hit each token as often as its probability says, to one part in their number."""
    logits = torch.tensor([0.3, -1.0, 2.0, -torch.inf, 1.1, 0.0])
    probs = (logits.double() / temperature).softmax(0)
    # The reference: the smallest set of most likely tokens with a share of at least top_p, renormalized
    kept, share = [], 0.0
    for token in sorted(range(6), key=lambda token: -probs[token]):
        if share < top_p:
            kept.append(token)
            share += float(probs[token])
    expected = torch.tensor([float(probs[token]) / share if token in kept else 0.0 for token in range(6)])

    n = 100_000
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = pick_tokens(logits.expand(n, 6), uniforms, temperature, top_p)
    torch.testing.assert_close(tokens.bincount(minlength=6) / n, expected, atol=1e-4, rtol=0)


def test_tokens_at_the_edges_have_probability():
    logits = torch.tensor([[-torch.inf, 1.0, 1.0, -torch.inf]]).expand(2, 4)
    edges = torch.tensor([0.0, 1 - 1e-16], dtype=torch.float64)
    assert pick_tokens(logits, edges, 1.0, 1.0).tolist() == [1, 2]
    assert pick_tokens(logits, edges, 1.0, 0.4).tolist() == [1, 2]  # as likely as each other: both are kept


def test_sequences_have_their_probability():
    """Relative frequencies of two-token answers against the model's own probabilities, by a χ² test at 5 σ."""
    model = make_model(vocab_size=7, initializer_range=0.5)
    tokenizer = make_tokenizer("abcd")
    n = 3000
    sampler = LocalSampler(model, SamplingSettings(max_new_tokens=2), tokenizer=tokenizer)
    counts: dict[str, int] = {}
    for _, _, answer in sampler.sample([Request("k", "abc", tuple(range(n)))]):
        counts[answer.text] = counts.get(answer.text, 0) + 1

    def probs(text: str) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].double().softmax(0)

    expected: dict[str, float] = {}
    for first in range(7):
        for second in range(7):
            ids = [first] if first == 1 else [first, second]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            p = float(probs("abc")[first])
            if first != 1:
                with torch.no_grad():
                    ids = torch.tensor([[*tokenizer("abc")["input_ids"], first]])
                    p *= float(model(ids).logits[0, -1].double().softmax(0)[second])
            else:
                p /= 7  # once for each `second`
            expected[text] = expected.get(text, 0.0) + p
    assert sum(expected.values()) == pytest.approx(1)
    chi2 = sum((counts.get(text, 0) - n * p) ** 2 / (n * p) for text, p in expected.items())
    freedom = len(expected) - 1
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5


def test_greedy_equals_generate():
    model = make_model().eval()
    drawn = answers(model, settings=SamplingSettings(temperature=0, max_new_tokens=12))
    for request in make_requests():
        ids = torch.tensor([TOKENIZER(request.prompt)["input_ids"]])
        generated = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.size(1) :]
        text = TOKENIZER.decode(generated, skip_special_tokens=True)
        ended = generated[-1] == 1
        expected = Answer(text, "stop" if ended else "length", len(generated))
        assert [drawn[request.key, sample] for sample in range(4)] == [expected] * 4


# What an answer depends on


def test_answers_are_the_same_in_any_batch():
    model = make_brief_model()
    alone = answers(model, max_batch_tokens=1)
    assert len(alone) == 48
    assert len({answer.text for answer in alone.values()}) > 40
    assert len({answer.tokens for answer in alone.values()}) > 8
    assert answers(model) == alone
    assert answers(model, max_batch_tokens=200, read_ahead=3) == alone
    assert answers(model, list(reversed(make_requests()))) == alone


def test_answers_are_the_same_in_any_batch_with_top_p():
    settings = SamplingSettings(max_new_tokens=12, top_p=0.8, temperature=0.7)
    model = make_model()
    assert answers(model, settings=settings) == answers(model, settings=settings, max_batch_tokens=100)


def test_a_missing_sample_is_the_same_drawn_later():
    model = make_model()
    every = answers(model)
    missing = answers(model, make_requests(samples=(2,)))
    assert missing == {place: answer for place, answer in every.items() if place[1] == 2}


def test_seed_and_key_change_answers():
    model = make_model()
    first = answers(model)
    other = answers(model, settings=SamplingSettings(max_new_tokens=12, seed=4))
    assert sum(first[place] != other[place] for place in first) > 40
    twins = answers(model, [Request("a", "1+1=", (0, 1)), Request("b", "1+1=", (0, 1))])
    assert len({answer.text for answer in twins.values()}) == 4


def test_a_model_of_sliding_windows_runs_too():
    """Its cache forgets, so no row can join a batch that has begun."""
    torch.manual_seed(0)
    config = MistralConfig(
        **{"vocab_size": len(TOKENIZER), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 8, "initializer_range": 0.2},
        **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None},
    )
    model = MistralForCausalLM(config)
    requests = make_requests(4)
    assert answers(model, requests, max_batch_tokens=150) == answers(model, requests, max_batch_tokens=1)


def test_nothing_else_is_touched():
    model = make_model(attention_dropout=0.5)  # which would show in evaluation, were it on
    expected = answers(model.eval())
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    drawing = LocalSampler(model, SETTINGS, tokenizer=TOKENIZER).sample(make_requests())
    next(drawing)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    drawn = {(request.key, sample): answer for request, sample, answer in drawing}
    assert drawn == {place: answer for place, answer in expected.items() if place in drawn}
    assert len(drawn) == len(expected) - 1
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


# Work


def test_a_prompt_is_run_once_for_all_its_answers():
    model = make_model()
    watched = Watched(model)
    requests = [Request(str(i), "1+1=", tuple(range(8))) for i in range(3)]
    drawn = answers(model, requests)
    steps = max(answer.tokens for answer in drawn.values()) - 1
    assert watched.shapes[0] == (3, 4)
    assert watched.shapes[1][0] > 3
    assert [width for _, width in watched.shapes[1:]] == [1] * steps
    # An answer that has ended is not run on with: a token each, less the first, which comes of the prompt
    assert sum(rows for rows, _ in watched.shapes[1:]) == sum(answer.tokens - 1 for answer in drawn.values())


def test_prompts_of_like_length_share_a_batch_and_others_join_it():
    model = make_brief_model()
    watched = Watched(model)
    requests = [Request(str(i), "1" * (5 if i % 2 else 60), (0,)) for i in range(16)]
    drawn = answers(model, requests, max_batch_tokens=8 * 72)
    assert (watched.shapes[0], watched.padding[0]) == ((8, 60), 0)  # the long ones
    assert len(drawn) == 16
    decoded = [rows for rows, width in watched.shapes if width == 1]
    assert sum(decoded) == sum(answer.tokens - 1 for answer in drawn.values())
    prefills = [rows for rows, width in watched.shapes if width > 1]
    assert sum(prefills) == 16
    assert len(prefills) < 8
    # Some joined while others went on: the batch grew between two steps
    assert any(b > a for (a, _), (b, _) in zip(watched.shapes, watched.shapes[2:], strict=False) if a < 8)


def test_it_reads_a_bounded_window_ahead():
    read = []

    def requests():
        for i in count():
            read.append(i)
            yield Request(str(i), "1+1=")

    sampler = LocalSampler(make_model(), SETTINGS, tokenizer=TOKENIZER, read_ahead=10, max_batch_tokens=100)
    drawing = sampler.sample(requests())
    assert read == []
    assert len({request.key for request, _, _ in islice(drawing, 25)}) == 25
    assert 25 <= len(read) <= 40


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
    ],
)
def test_out_of_memory_halves_the_batch_for_good(error, caplog):
    model = make_model()
    expected = answers(model)
    watched = Watched(model, most=7, error=error)
    with caplog.at_level(logging.WARNING, "trl_kd"):
        assert answers(model) == expected
    said = [record.getMessage() for record in caplog.records if "Out of memory" in record.getMessage()]
    failed = [rows for rows, _ in watched.shapes if rows > 7]
    assert len(said) == len(failed) <= 5
    assert "going on with `max_batch_tokens` = " in said[0]
    last = max(i for i, (rows, _) in enumerate(watched.shapes) if rows > 7)
    assert len(watched.shapes) - last > 20  # most of the work is done after the last failure


def test_memory_that_ends_after_the_forward_loses_no_answer(monkeypatch):
    model = make_brief_model()
    expected = answers(model)
    for name in ("pick_tokens", "_join", "_select"):
        function = getattr(decoding, name)
        calls = []

        def fail_at_first(*args, function=function, calls=calls):
            calls.append(1)
            if len(calls) < 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return function(*args)

        with monkeypatch.context() as patched:
            patched.setattr(decoding, name, fail_at_first)
            assert answers(model, max_batch_tokens=500) == expected
            assert len(calls) > 2


def test_out_of_memory_with_a_single_answer_is_one_sentence():
    model = make_model()
    Watched(model, most=0)
    with pytest.raises(RuntimeError, match=r"with a single answer of \d+ tokens.*lower `max_new_tokens`"):
        answers(model)


def test_other_errors_are_not_taken_for_memory():
    model = make_model()
    Watched(model, most=0, error=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        answers(model)


def test_logits_that_are_not_numbers_are_one_sentence():
    model = make_model()
    model.lm_head.weight.data[5] = torch.nan
    for temperature in (0, 1):
        with pytest.raises(ValueError, match="not numbers .*`dtype` 'bfloat16' or 'float32'"):
            answers(model, settings=SamplingSettings(temperature=temperature))


# Where answers end


def test_finish_reasons():
    drawn = answers(make_model(), make_requests(40), SamplingSettings(max_new_tokens=30))
    reasons = {reason: [a for a in drawn.values() if a.finish_reason == reason] for reason in ("stop", "length")}
    assert sum(map(len, reasons.values())) == len(drawn)
    assert reasons["stop"]
    assert reasons["length"]
    assert {answer.tokens for answer in reasons["length"]} == {30}
    assert all(answer.tokens <= 30 for answer in reasons["stop"])


def test_stop_texts_end_an_answer_and_are_cut_off():
    model = make_model()
    free = answers(model, settings=SamplingSettings(max_new_tokens=30))
    stop = ("1", "ab", "Q")
    stopped = answers(model, settings=SamplingSettings(max_new_tokens=30, stop=stop))
    cut = 0
    for place, answer in free.items():
        ends = [answer.text.find(text) for text in stop if text in answer.text]
        if ends:
            cut += 1
            assert stopped[place].text == answer.text[: min(ends)]
            assert stopped[place].finish_reason == "stop"
            assert stopped[place].tokens <= answer.tokens
        else:
            assert stopped[place] == answer
    assert 10 < cut < len(free)


def test_every_end_token_of_the_model_ends_an_answer():
    model = make_model()
    model.generation_config.eos_token_id = [5, 6, 7, 8, 9, 10]
    drawn = answers(model)
    ended = [answer for answer in drawn.values() if answer.finish_reason == "stop"]
    assert len(ended) > 10
    # Tokens 5 to 10 are the digits 2 to 7
    assert not any(character in "234567" for answer in drawn.values() for character in answer.text[:-1])


def test_prompts_that_leave_no_room():
    """The tiny model has 128 positions."""
    drawn = answers(make_model(), [Request("full", "1" * 128), Request("near", "1" * 125), Request("short", "1")])
    assert drawn["full", 0] == Answer(None, "prompt_too_long")
    assert drawn["near", 0].tokens <= 3
    assert drawn["short", 0].text is not None


def test_an_empty_prompt_and_no_prompts():
    assert answers(make_model(), [Request("empty", "")])["empty", 0].text is not None
    assert list(LocalSampler("no such model", SETTINGS).sample([])) == []  # nothing is loaded for nothing


# Prompts


def seen_prompt(request: Request, tokenizer=None, **options) -> str:
    model = make_model()
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    sampler = LocalSampler(model, SETTINGS, tokenizer=tokenizer or TOKENIZER, **options)
    list(sampler.sample([request]))
    return TOKENIZER.decode(seen[0][0])


def test_messages_go_through_the_chat_template():
    assert seen_prompt(Request("k", CHAT)) == "s?Be brief.u?1+1?a?"
    nulls = [{"role": "user", "content": "1+1?", "tool_calls": None}]
    assert seen_prompt(Request("k", nulls)) == "u?1+1?a?"
    begun = [*CHAT[1:], {"role": "assistant", "content": "It is"}]
    assert seen_prompt(Request("k", begun)) == "u?1+1?a?It is"
    assert seen_prompt(Request("k", "plain?")) == "plain?"


def test_tools_and_variables_reach_the_chat_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ tool.function.name }}{{ tool.function.description }} {% endfor %}"
        "{{ mode or '' }}{{ messages[0].content }}"
    )
    tool = {"type": "function", "function": {"name": "add", "description": None}}
    for tools in ([tool], '[{"type": "function", "function": {"name": "add"}}]'):
        request = Request("k", CHAT[1:], columns={"tools": tools})
        assert seen_prompt(request, tokenizer) == "add 1+1?"
    assert seen_prompt(Request("k", CHAT[1:], columns={"tools": []}), tokenizer) == "1+1?"
    options = {"chat_template_kwargs": {"mode": "slow "}}
    assert seen_prompt(Request("k", CHAT[1:]), tokenizer, **options) == "slow 1+1?"
    own = Request("k", CHAT[1:], columns={"chat_template_kwargs": {"mode": "fast "}})
    assert seen_prompt(own, tokenizer, **options) == "fast 1+1?"


def test_messages_without_a_chat_template_are_one_sentence():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    sampler = LocalSampler(make_model(), SETTINGS, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="The prompts are messages, but .* has no chat template"):
        list(sampler.sample([Request("k", CHAT)]))
