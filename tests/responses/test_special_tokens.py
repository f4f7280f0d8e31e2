import pytest
from transformers import GenerationConfig

from tests.conftest import make_tokenizer
from tests.responses.templates import CHATML, R1, TRIMMED, tokenizer_with
from trl_kd.responses.reasoning import has_reasoning, strip_reasoning, stripped
from trl_kd.responses.special_tokens import end_tokens, set_end_token, turn_end, unlearnable_end


@pytest.mark.parametrize("template", [CHATML, TRIMMED, R1])
def test_the_token_that_ends_turns(template):
    tokenizer = tokenizer_with(template)
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_templates_without_such_a_token():
    assert turn_end(make_tokenizer()) == 1
    assert turn_end(tokenizer_with("{% for m in messages %}{{ m.content }}\n{% endfor %}")) is None
    assert turn_end(tokenizer_with("{{ raise_exception('no') }}")) is None
    bare = make_tokenizer()
    bare.chat_template = None
    assert turn_end(bare) is None


def test_ends_that_generation_stops_at():
    tokenizer = make_tokenizer()
    assert end_tokens(tokenizer, GenerationConfig(eos_token_id=None)) == [1]
    assert end_tokens(tokenizer, GenerationConfig(eos_token_id=7)) == [1, 7]
    assert end_tokens(tokenizer, GenerationConfig(eos_token_id=[7, 1])) == [1, 7]
    assert end_tokens(tokenizer, None) == [1]


def test_an_end_that_cannot_be_learnt_names_both_tokens():
    base = tokenizer_with(CHATML)
    said = unlearnable_end(base, GenerationConfig(eos_token_id=1))
    assert "'<|im_end|>'" in said
    assert "'<eos>'" in said
    assert "`eos_token='<|im_end|>'`" in said
    turn = base.convert_tokens_to_ids("<|im_end|>")
    assert unlearnable_end(base, GenerationConfig(eos_token_id=[1, turn])) is None
    set_end_token(base, "<|im_end|>")
    assert unlearnable_end(base, GenerationConfig(eos_token_id=1)) is None


def test_an_end_token_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="`eos_token` is '<end>', which is not in the vocabulary"):
        set_end_token(make_tokenizer(), "<end>")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("2", "2"),
        (" 2 ", " 2 "),
        ("<think>\nhm\n</think>\n\n2", "2"),
        ("hm\n</think>\n\n2", "2"),
        ("<think>hm", ""),
        ("so <think>hm</think>2<think>or 3</think>", "so 2"),
        ("hm</think>\n\n4", "4"),
        ("okay so\n</think>4", "4"),
        ("so</think>4", "4"),
        ("The <think> tag is new", "The <think> tag is new"),
        ("Use </think> to close. Done", "Use </think> to close. Done"),
    ],
)
def test_reasoning_is_taken_out(text, left):
    assert strip_reasoning(text) == left
    assert has_reasoning(text) == (text != left)
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    assert stripped(messages) == [messages[0], {"role": "assistant", "content": left}]
    assert stripped(None) is None


def test_reasoning_beside_the_text_and_in_parts_is_taken_out_too():
    message = {"role": "assistant", "content": "2", "reasoning_content": "hm", "thinking": "hm"}
    assert stripped([message]) == [{**message, "reasoning_content": None, "thinking": None}]
    parts = [{"type": "text", "text": "<think>hm</think>2"}, {"type": "image"}]
    assert stripped([{"role": "assistant", "content": parts}])[0]["content"] == [
        {"type": "text", "text": "2"},
        {"type": "image"},
    ]


def test_a_template_that_leaves_the_answer_out_ends_turns_with_nothing_known():
    assert turn_end(tokenizer_with("{% for m in messages %}<|im_start|>{{ m.role }}{% endfor %}")) is None
