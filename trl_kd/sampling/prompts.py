"""From a request to token ids and back: what the local model and vLLM share."""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from trl_kd.responses.nulls import without_nulls
from trl_kd.responses.rendering import ends_open, row_options
from trl_kd.sampling.model_files import reading_tokenizer
from trl_kd.sampling.sampler import Request


def load_tokenizer(name: str, options: dict[str, Any]) -> Any:
    """The tokenizer at `name`; of the options of a model those that a tokenizer shares are used. A `BadModel` for files that
    are none."""
    shared = ("revision", "trust_remote_code", "subfolder", "gguf_file", "token", "cache_dir", "local_files_only")
    with reading_tokenizer(name):
        return AutoTokenizer.from_pretrained(name, **{key: options[key] for key in shared if key in options})


def encode_prompt(tokenizer: Any, request: Request, template_options: dict[str, Any]) -> list[int]:
    """
    Token ids of a request's prompt, after which the model writes its answer.

    Messages go through the chat template, with the row's `tools` and `chat_template_kwargs`, and end where the assistant
    begins, or where its last message breaks off if that is the assistant's. Plain text is tokenized as it stands.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            Tokenizer.
        request (`Request`):
            Request.
        template_options (`dict`):
            Variables for every chat template.

    Raises:
        `ValueError`: messages, and a tokenizer without a chat template.
    """
    if isinstance(request.prompt, str):
        ids = tokenizer(request.prompt)["input_ids"]
    else:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"The prompts are messages, but the tokenizer of {tokenizer.name_or_path!r} has no chat "
                "template: give plain text, or pass a `tokenizer` with a `chat_template`."
            )
        open_end = ends_open(request.prompt)
        ids = tokenizer.apply_chat_template(
            without_nulls(request.prompt),
            add_generation_prompt=not open_end,
            continue_final_message=open_end,
            tokenize=True,
            return_dict=False,
            **{**template_options, **row_options(request.columns)},
        )
    if ids:
        return list(ids)
    # A model needs something to go on: an empty text begins like any other
    return [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]


def decode_answer(tokenizer: Any, request: Request, prompt_ids: list[int], ids: list[int]) -> str:
    """The text of an answer, without special tokens.

    After plain text it is what comes after the prompt's, which some tokenizers begin with a space that they drop from a text
    by itself; an assistant's message is a text by itself.
    """
    if isinstance(request.prompt, str):
        before = prompt_ids[-8:]
        head = tokenizer.decode(before, skip_special_tokens=True)
        whole = tokenizer.decode(before + ids, skip_special_tokens=True)
        if whole.startswith(head):
            return whole[len(head) :]
    return tokenizer.decode(ids, skip_special_tokens=True)


def cut_at(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the first of `stops`, and whether there is one."""
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(found)], True) if found else (text, False)


def describe_template(tokenizer: Any, template_options: dict[str, Any]) -> dict[str, Any]:
    """The chat template, as a hash, and its variables."""
    template = getattr(tokenizer, "chat_template", None)
    return {
        "chat_template": None if template is None else digest(json.dumps(template, sort_keys=True).encode()),
        "chat_template_kwargs": {key: template_options[key] for key in sorted(template_options)},
    }


def describe_files(folder: str | None) -> str | None:
    """A hash of the weights in a local folder, of which some are read; `None` for a name on the Hub.

    A student trained on and saved in the same place is another student.
    """
    if folder is None or not Path(folder).is_dir():
        return None
    read = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix not in (".safetensors", ".bin", ".gguf"):
            continue
        size = path.stat().st_size
        read.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for part in range(64):
                file.seek(size * part // 64)
                read.update(file.read(4096))
    return read.hexdigest()[:16]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
