"""Every chat template that TRL ships: no word of a user's or a tool's is ever taken for the model's own."""

from pathlib import Path

import pytest
import trl

from tests.conftest import CHARACTERS, make_tokenizer
from tests.responses.templates import calls, says
from trl_kd.responses.rendering import CannotRender
from trl_kd.responses.tokens import encode


TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
USER = [says("user", "ask1")]
CONVERSATIONS = {
    "question": [says("assistant", "own1"), says("user", "other1"), says("assistant", "own2")],
    "same words": [says("assistant", "ok"), says("user", "ok"), says("assistant", "own2")],
    "call": [calls("add"), says("tool", "other1"), says("assistant", "own2")],
    "call with words": [calls("add", "own1"), says("tool", "other1"), says("assistant", "own2 as other1 says")],
    "call, then a question": [
        *(calls("add"), says("tool", "other1"), says("assistant", "own1")),
        *(says("user", "other2"), says("assistant", "own2")),
    ],
    "reasoning, then a question": [
        {**calls("add"), "reasoning_content": "why"},
        *(says("tool", "other1"), says("assistant", "own1", reasoning_content="because")),
        *(says("user", "other2"), says("assistant", "own2", reasoning_content="so")),
    ],
    "two results": [calls("add"), says("tool", "other1"), says("tool", "other2"), says("assistant", "own2")],
}


def tokenizer_of(path: Path):
    tokenizer = make_tokenizer(CHARACTERS + "<>{}[]()_\"':#|\\;&%$@`~^")
    specials = [
        "<|im_start|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<turn|>",
    ]
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tokenizer.bos_token = "<unk>"
    tokenizer.chat_template = path.read_text()
    return tokenizer


def encoded_by(tokenizer, prompt, response):
    try:
        return encode(tokenizer, prompt, response)
    except CannotRender:
        return None


def in_parts(messages):
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_no_foreign_word_is_the_models_own(path):
    tokenizer = tokenizer_of(path)
    rendered = 0
    for name, response in CONVERSATIONS.items():
        encoded = encoded_by(tokenizer, USER, response) or encoded_by(tokenizer, *map(in_parts, (USER, response)))
        if encoded is None:  # no tools in this one, say
            continue
        rendered += 1
        own = tokenizer.decode([token for token, mine in zip(encoded.ids, encoded.own, strict=True) if mine])
        foreign = [m["content"] for m in response if m["role"] != "assistant" and m["content"].startswith("other")]
        quoted = "as other1 says" if name == "call with words" else ""
        for words in foreign:
            assert words not in own.replace(quoted, ""), (name, own)
        missing = [
            word for word in ("own1", "own2") if any(word in m["content"] for m in response) and word not in own
        ]
        # What is not imitated is said
        assert not missing or encoded.altered is not None, (name, missing, own)
    assert rendered
