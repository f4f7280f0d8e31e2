"""Chat templates of the kinds that real checkpoints have, over the tests' tokens."""

from tests.conftest import CHARACTERS, make_tokenizer


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen2.5's."""

TRIMMED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
"""Llama 3's."""

R1 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "<|im_start|>a{{ content }}<|im_end|>{% else %}<|im_start|>u{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a<think>\n{% endif %}"
)
"""DeepSeek-R1's: its generation prompt opens the reasoning, which it takes out of messages."""

QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set content = m.content %}{% set thought = '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1] | trim %}"
    "{% set content = content.split('</think>')[-1] | trim %}{% endif %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ content }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Qwen3's: the last turn alone keeps its reasoning."""

PHI3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)
"""Phi-3's: the end of the conversation has another token behind that of the turn."""

TOOLS = (
    "{% for m in messages %}[{{ m['role'][0] }}]{% if m.get('tool_calls') %}call "
    "{{ m['tool_calls'][0]['function']['name'] }}{% else %}{{ m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


def tokenizer_with(template: str, eos_token: str | None = None):
    """One token a character, and `<|im_start|>`, `<|im_end|>`, `<think>`, `</think>`."""
    tokenizer = make_tokenizer(CHARACTERS + "[]<>|_")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    if eos_token is not None:
        tokenizer.eos_token = eos_token
    return tokenizer


def says(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def calls(name: str, content: str = "") -> dict:
    function = {"name": name, "arguments": {"a": 1}}
    return {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function}]}
