"""The student's tokenizer or processor, before the weights."""

from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from transformers import AutoProcessor

from trl_kd._trl.models import get_config_model_id
from trl_kd.preferences.tokens import is_conversational
from trl_kd.responses.special_tokens import begins_twice
from trl_kd.sampling.model_errors import named
from trl_kd.sampling.model_files import reading_tokenizer


logger = get_logger(__name__)


def load_processing_class(model: Any, args: Any, **options: Any) -> Any:
    """The tokenizer or processor that TRL's trainer would load, before the weights."""
    kwargs: Any = args.model_init_kwargs if isinstance(model, str) else None
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    with named(f"`model` is {name!r}, which"), reading_tokenizer(name):
        return AutoProcessor.from_pretrained(
            name, revision=(kwargs or {}).get("revision"), trust_remote_code=args.trust_remote_code, **options
        )


def check_tokenizer(tokenizer: Any, dataset: Dataset | IterableDataset, name: str) -> None:
    """Raises a `ValueError` when `tokenizer` cannot render the dataset: messages without a chat template, text without an
    end token. Warns of text prompts that get a second BOS token."""
    first: dict[str, Any] = next(iter(dataset))
    if is_conversational(first):
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"The {name} dataset holds messages, but the tokenizer of {tokenizer.name_or_path!r} has no chat template: "
                "set `tokenizer.chat_template` and pass it as `processing_class`, or give the dataset as text."
            )
        return
    if tokenizer.eos_token is None:
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no end-of-sequence token, with which every response must "
            "end: set `tokenizer.eos_token` and pass it as `processing_class`."
        )
    column = "prompt" if "prompt" in first else "chosen"  # which begins with the prompt, then
    texts = dataset[column] if isinstance(dataset, Dataset) else [first[column]]
    count = sum(begins_twice(tokenizer, text) for text in texts)
    if count:
        logger.warning(
            f"{count} prompts of the {name} dataset begin with {tokenizer.bos_token!r}, and the tokenizer writes another "
            "one before them: take it out of the prompts."
        )
