"""Which tokens are the model's own, over templates of the kinds that real checkpoints have."""

import pytest
from datasets import Dataset
from trl import DPOConfig

from tests.conftest import CHAT_TEMPLATE, make_tokenizer
from tests.responses.templates import CHATML, PHI3, QWEN3, R1, TOOLS, TRIMMED, calls, says, tokenizer_with
from trl_kd._trl.seams import prepare_preference_dataset
from trl_kd.responses.rendering import CannotRender, render
from trl_kd.responses.tokens import LEFT_OUT, OTHERS, OWN, encode, pair_ids, response_kinds, text_kinds


USER = [says("user", "1+1=")]
QWEN3_TOOLS = QWEN3.replace(
    "{{ content }}", "{{ content }}{% if m.tool_calls %}call {{ m.tool_calls[0].function.name }}{% endif %}"
)
TOOLS_WITHIN = (
    "{% for m in messages %}{% if m.role == 'tool' %}{% else %}<|im_start|>{{ m.role }}\n"
    "{% if m.tool_calls %}call {{ m.tool_calls[0].function.name }}"
    "{% if not loop.last and messages[loop.index0 + 1].role == 'tool' %}"
    "[{{ messages[loop.index0 + 1].content }}]{% endif %}{% endif %}"
    "{{ m.content }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = {"own": CHAT_TEMPLATE, "chatml": CHATML, "trimmed": TRIMMED}


def spoken(tokenizer, encoded) -> str:
    return tokenizer.decode([token for token, own in zip(encoded.ids, encoded.own, strict=True) if own])


def trl_row(tokenizer, prompt, response) -> dict:
    rows = Dataset.from_list([{"prompt": prompt, "chosen": response, "rejected": response}])
    return prepare_preference_dataset(rows, tokenizer, DPOConfig(bf16=False), "train")[0]


@pytest.mark.parametrize("name", [*PLAIN, "text"])
@pytest.mark.parametrize("said", ["2", " 2 ", "it is 2\n", "", "a\n\nb"])
def test_a_complete_answer_is_as_dpo_trainer_has_it(name, said):
    tokenizer = make_tokenizer() if name == "text" else tokenizer_with(PLAIN[name])
    prompt, response = ("1+1=", said) if name == "text" else (USER, [says("assistant", said)])
    row = trl_row(tokenizer, prompt, response)
    encoded = encode(tokenizer, prompt, response)
    assert (encoded.prompt_ids, encoded.ids) == (row["prompt_ids"], row["chosen_ids"])
    assert all(encoded.own)
    assert encoded.altered is None
    if name != "text":
        rendering = render(tokenizer, prompt, response)
        ids = pair_ids(tokenizer, prompt, rendering, rendering)
        assert ids == (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])


@pytest.mark.parametrize("name", [*PLAIN, "text"])
@pytest.mark.parametrize("said", ["First we add", "ends in space ", "42\n", ""])
def test_nothing_is_learnt_behind_an_answer_that_was_cut_off(name, said):
    tokenizer = make_tokenizer() if name == "text" else tokenizer_with(PLAIN[name])
    prompt, response = ("1+1=", said) if name == "text" else (USER, [says("assistant", said)])
    shown = said.strip() if name == "trimmed" else said
    assert spoken(tokenizer, encode(tokenizer, prompt, response, complete=False)) == shown
    row = trl_row(tokenizer, prompt, response)
    rendering = render(tokenizer, prompt, response, complete=False)
    ids, count = row["prompt_ids"] + row["chosen_ids"], len(row["chosen_ids"])
    kinds = response_kinds(tokenizer, rendering, ids, count, text_format=name == "text")
    behind = len(kinds) - len(shown)
    assert kinds == [OWN] * len(shown) + [LEFT_OUT] * behind
    assert behind >= 1


def test_a_tokenizer_that_writes_the_end_token_itself():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    assert tokenizer("2")["input_ids"][-1] == 1
    assert tokenizer.decode(encode(tokenizer, "1+1=", "2").ids) == "2<eos>"
    assert tokenizer.decode(encode(tokenizer, "1+1=", "2", complete=False).ids) == "2"
    row = trl_row(tokenizer, "1+1=", "2")
    rendering = render(tokenizer, "1+1=", "2", complete=False)
    kinds = response_kinds(tokenizer, rendering, row["prompt_ids"] + row["chosen_ids"], len(row["chosen_ids"]), True)
    assert kinds == [OWN] + [LEFT_OUT] * (len(kinds) - 1)


CONVERSATIONS = {
    "user within": ([says("assistant", "two"), says("user", "sure?"), says("assistant", "yes")], "two", "yes"),
    "tool within": ([calls("add"), says("tool", "secret 2"), says("assistant", "it is 2")], "call add", "it is 2"),
    "others last": ([says("assistant", "two"), says("user", "thanks")], "two", ""),
    "equal texts": ([says("assistant", "ok"), says("user", "ok"), says("assistant", "ok")], "ok", "ok"),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_turns_of_others_are_not_the_models_own(name):
    response, *own = CONVERSATIONS[name]
    tokenizer = tokenizer_with(TOOLS)
    expected = "".join(f"{said}<eos>" for said in own if said)
    assert spoken(tokenizer, encode(tokenizer, USER, response)) == expected
    row = trl_row(tokenizer, USER, response)
    ids, count = row["prompt_ids"] + row["chosen_ids"], len(row["chosen_ids"])
    kinds = response_kinds(tokenizer, render(tokenizer, USER, response), ids, count, text_format=False)
    assert set(kinds) == {OWN, OTHERS}
    learnt = [token for token, kind in zip(row["chosen_ids"], kinds, strict=True) if kind == OWN]
    assert tokenizer.decode(learnt) == expected


@pytest.mark.parametrize("template", [CHATML, TRIMMED, QWEN3, PHI3])
def test_each_turn_is_learnt_with_its_end(template):
    tokenizer = tokenizer_with(template)
    response = [says("assistant", "two"), says("user", "sure?"), says("assistant", "yes")]
    encoded = encode(tokenizer, USER, response)
    learnt = spoken(tokenizer, encoded)
    assert "sure?" not in learnt
    assert "user" not in learnt
    assert learnt.count("<|im_end|>") == 2
    assert learnt.index("two") < learnt.index("<|im_end|>") < learnt.index("yes")
    cut = spoken(tokenizer, encode(tokenizer, USER, response, complete=False))
    assert cut.count("<|im_end|>") == 1
    assert cut.endswith("yes")


def test_an_earlier_turn_whose_reasoning_the_template_drops():
    """Its end is found all the same."""
    tokenizer = tokenizer_with(QWEN3)
    response = [says("assistant", "<think>\nhm\n</think>\n\ntwo"), says("user", "sure?"), says("assistant", "yes")]
    encoded = encode(tokenizer, USER, response)
    learnt = spoken(tokenizer, encoded)
    assert learnt.startswith("two<|im_end|>\n")
    assert "hm" not in learnt
    assert encoded.altered == "the chat template leaves a part of the response out"


def test_a_call_of_a_tool_before_other_turns_is_found_where_the_template_drops_its_reasoning():
    tokenizer = tokenizer_with(QWEN3_TOOLS)
    response = [calls("add"), says("tool", "it is 2"), says("assistant", "2")]
    encoded = encode(tokenizer, USER, response)
    assert spoken(tokenizer, encoded) == "call add<|im_end|>\n<think>\n\n</think>\n\n2<|im_end|>\n"


def test_a_turn_that_holds_the_results_of_its_tools_is_not_imitated():
    """As Gemma 4's: the call, its result, and then what the model says, are one turn."""
    tokenizer = tokenizer_with(TOOLS_WITHIN)
    response = [calls("add", "let me look"), says("tool", "secret"), says("assistant", "it is 2")]
    encoded = encode(tokenizer, USER, response)
    assert "secret" in tokenizer.decode(encoded.ids)
    assert spoken(tokenizer, encoded) == "it is 2<|im_end|>"
    assert "they are not imitated" in encoded.altered


def test_a_call_that_the_template_leaves_out_is_told_of():
    assert "a call of a tool out" in render(tokenizer_with(CHATML), USER, [calls("add")]).altered
    assert render(tokenizer_with(TOOLS), USER, [calls("add")]).altered is None


def test_an_answer_that_repeats_what_the_generation_prompt_opens_is_whole():
    """As with Qwen3.5: its template renders the reasoning behind the very words that its generation prompt ends in."""
    tokenizer = tokenizer_with(R1.replace("{% set content = content.split('</think>')[-1] %}", ""))
    rendering = render(tokenizer, USER, [says("assistant", "<think>\nhm\n</think>\n\n2")])
    assert rendering.altered is None


def test_reasoning_beside_the_text_is_not_lost_by_keep():
    tokenizer = tokenizer_with(QWEN3)
    apart = [says("assistant", "2", reasoning_content="hm")]
    kept, plain = (encode(tokenizer, USER, apart, reasoning=reasoning) for reasoning in ("keep", None))
    assert kept == plain  # the template's own way


def test_many_turns_are_tokenized_a_few_times_only():
    tokenizer = tokenizer_with(CHATML)
    texts = []
    whole = tokenizer.__class__.__call__

    class Counting(tokenizer.__class__):
        def __call__(self, text, **options):
            texts.append(text)
            return whole(self, text, **options)

    tokenizer.__class__ = Counting
    response = [says("user" if i % 2 else "assistant", f"turn {i}") for i in range(21)]
    encode(tokenizer, USER, response)
    assert len(texts) <= 3


def test_templates_that_change_the_response_are_found():
    r1, qwen3 = tokenizer_with(R1), tokenizer_with(QWEN3)
    sampled = "one and one\n</think>\n\n2"
    assert "leaves a part" in render(r1, USER, [says("assistant", sampled)]).altered
    assert "does not continue the generation prompt" in render(r1, USER, [says("assistant", "2")]).altered
    assert render(qwen3, USER, [says("assistant", f"<think>\nhm\n</think>\n\n{2}")]).altered is None
    begun = [*USER, says("assistant", "it")]
    assert "begins another" in render(tokenizer_with(CHATML), begun, [says("assistant", " is")]).altered


@pytest.mark.parametrize(
    ("said", "learnt"),
    [
        ("one and one\n</think>\n\n2", "one and one\n</think>\n\n2"),
        ("<think>\none and one\n</think>\n\n2", "one and one\n</think>\n\n2"),  # a server that repeats the prompt
        ("2", "2"),
    ],
)
def test_keep_learns_what_was_sampled_behind_the_generation_prompt(said, learnt):
    tokenizer = tokenizer_with(R1)
    encoded = encode(tokenizer, USER, [says("assistant", said)], reasoning="keep")
    assert tokenizer.decode(encoded.prompt_ids) == "<|im_start|>u1+1=<|im_start|>a<think>\n"
    assert tokenizer.decode(encoded.ids) == f"{learnt}<|im_end|>"
    assert (encoded.altered is None) == ("</think>" in said)  # else the answer would be learnt as reasoning
    cut = encode(tokenizer, USER, [says("assistant", said)], complete=False, reasoning="keep")
    assert tokenizer.decode(cut.ids) == learnt


@pytest.mark.parametrize("name", PLAIN)
def test_keep_changes_nothing_where_the_template_does_not(name):
    tokenizer = tokenizer_with(PLAIN[name])
    answer = [says("assistant", "it is 2")]
    assert encode(tokenizer, USER, answer, reasoning="keep") == encode(tokenizer, USER, answer)


def test_a_message_goes_on_where_the_prompt_breaks_off():
    tokenizer = tokenizer_with(CHATML)
    begun = [*USER, says("assistant", "it")]
    encoded = encode(tokenizer, begun, [says("assistant", " is 2")], reasoning="keep")
    assert tokenizer.decode(encoded.prompt_ids).endswith("<|im_start|>assistant\nit")
    assert tokenizer.decode(encoded.ids) == " is 2<|im_end|>\n"


def test_a_template_that_fails_is_one_sentence():
    refusing = tokenizer_with("{{ raise_exception('no system\n role') }}")
    with pytest.raises(CannotRender, match="the chat template cannot render it: no system role"):
        render(refusing, USER, [says("assistant", "2")])
    broken = tokenizer_with("{{ messages[0].nothing.at_all }}")
    with pytest.raises(CannotRender, match="cannot render it"):
        render(broken, USER, [says("assistant", "2")])


def test_other_tokens_than_the_texts_are_refused():
    tokenizer = tokenizer_with(CHATML)
    with pytest.raises(CannotRender, match="not those of its rendered text"):
        response_kinds(tokenizer, render(tokenizer, USER, [says("assistant", "2")]), [5, 6, 7], 1, text_format=False)


def test_kinds_of_a_response_that_is_tokenized_by_itself():
    tokenizer = tokenizer_with(TOOLS)
    response, *_ = CONVERSATIONS["user within"]
    rendering = render(tokenizer, USER, response, complete=False)
    start = len(rendering.opening)
    ids = tokenizer(rendering.text[start:], add_special_tokens=False)["input_ids"]
    kinds = text_kinds(tokenizer, rendering, start)
    assert len(kinds) == len(ids)
    own = tokenizer.decode([token for token, kind in zip(ids, kinds, strict=True) if kind == OWN])
    assert own == "two<eos>yes"
    assert kinds[-1] == LEFT_OUT
