"""What goes wrong with the files of a model, as one sentence that names the file."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError


_PLAIN = (OSError, ValueError, StrictDataclassError)
MODEL_ERRORS = (
    *_PLAIN,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    RuntimeError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
)
"""What transformers raises for files of a model that it cannot use: configs are not checked, but put to use."""


class BadModel(OSError):
    """A model cannot be loaded from its files; the sentence names the file."""


@contextmanager
def named(who: str) -> Iterator[None]:
    """Whatever is wrong with a model's files is said of `who`: "The model 'name'"."""
    try:
        yield
    except BadModel as error:
        raise type(error)(f"{who} cannot be loaded: {error}") from error


@contextmanager
def reading(file: str) -> Iterator[None]:
    """Takes whatever goes wrong here for a fault of the file."""
    try:
        yield
    except (BadModel, torch.OutOfMemoryError):
        raise
    except MODEL_ERRORS as error:
        raise BadModel(f"{file}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """An error in words; of a KeyError and its like also which it is."""
    if isinstance(error, pickle.UnpicklingError):  # torch's own text advises to run what is in the file
        return "it is damaged, or holds more than weights and is not safe to load: save the model as safetensors"
    text = " ".join(str(error).split())
    return text if isinstance(error, _PLAIN) and text else f"{type(error).__name__}: {text}"
