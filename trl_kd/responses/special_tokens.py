"""Tokens that begin a text and end a turn: whether the tokenizer writes one too many, and whether generation stops."""

from typing import Any

from trl_kd.responses.rendering import CannotRender, closing


def turn_end(processing_class: Any) -> int | None:
    """
    The token with which the chat template ends the assistant's turns.

    Args:
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            Tokenizer or processor.

    Returns:
        `int`, *optional*: the first special or added token that the template writes behind an answer. `None` if it writes
        none, or if there is no template.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if getattr(processing_class, "chat_template", None) is None:
        return None
    try:
        written = closing(processing_class, [{"role": "user", "content": "?"}])
    except CannotRender:
        return None
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    return next((token for token in ids if token in special), None)


def end_tokens(tokenizer: Any, generation_config: Any) -> list[int]:
    """Tokens at which generation with this tokenizer and generation config stops, the tokenizer's own first."""
    found = getattr(generation_config, "eos_token_id", None)
    listed = [] if found is None else [found] if isinstance(found, int) else list(found)
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*own, *listed]))


def unlearnable_end(processing_class: Any, generation_config: Any) -> str | None:
    """A sentence for a model that ends its turns with a token at which its generation does not stop; `None` if it stops."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    token, known = turn_end(processing_class), end_tokens(tokenizer, generation_config)
    if token is None or token in known:
        return None
    written = tokenizer.convert_ids_to_tokens(token)
    stops = " and ".join(repr(tokenizer.convert_ids_to_tokens(end)) for end in known) or "no token"
    return (
        f"The chat template ends turns with {written!r}, but generation stops at {stops}: the trained student will write "
        f"{written!r} and go on. Set `eos_token={written!r}`, which is then saved in its tokenizer and generation config."
    )


def set_end_token(tokenizer: Any, eos_token: str | None) -> None:
    """
    Makes `eos_token` the tokenizer's end token.

    Raises:
        `ValueError`: it is no token of the vocabulary.
    """
    if eos_token is None:
        return
    if eos_token not in tokenizer.get_vocab():
        raise ValueError(
            f"`eos_token` is {eos_token!r}, which is not in the vocabulary of {tokenizer.name_or_path!r}: give one of its "
            "tokens, such as the one that the chat template ends turns with."
        )
    tokenizer.eos_token = eos_token


def stop_at_end_token(model: Any, tokenizer: Any) -> None:
    """Writes the tokenizer's end token into the config and generation config of a model, before those that are there."""
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = end_tokens(tokenizer, model.generation_config)


def begins_twice(tokenizer: Any, prompt: Any) -> bool:
    """Whether a text prompt begins with the BOS token, and the tokenizer writes another one before it."""
    bos = tokenizer.bos_token
    if not isinstance(prompt, str) or not bos or not prompt.startswith(bos):
        return False
    return tokenizer(bos)["input_ids"][:2] == [tokenizer.bos_token_id] * 2
